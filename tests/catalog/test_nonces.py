"""Nonces of signed requests: each is let in once."""

from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from kiln.catalog import nonces
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Nonce
from support.parallel import in_parallel
from support.rows import dump

CROWD = 8
TEN_MINUTES = timedelta(minutes=10)
SECOND = timedelta(seconds=1)


def remember(catalog: Catalog, nonce: bytes = b"n-1", key: str = "a-key") -> bool:
    with catalog.transaction() as tx:
        return nonces.remember(tx, key, nonce)


def age(catalog: Catalog, passed: timedelta) -> None:
    """Makes every nonce so much older."""
    with catalog.transaction() as tx:
        for row in tx.scalars(select(Nonce)):
            tx.execute(update(Nonce).where(Nonce.digest == row.digest).values(until=row.until - passed))


def count(catalog: Catalog) -> int:
    with catalog.read() as session:
        return session.scalar(select(func.count()).select_from(Nonce)) or 0


def test_a_nonce_is_new_once(catalog: Catalog) -> None:
    """The second time it was seen before, and the third."""
    assert [remember(catalog) for _ in range(3)] == [True, False, False]


def test_a_nonce_is_its_keys(catalog: Catalog) -> None:
    """Two keys may use the same nonce, and one key two."""
    assert remember(catalog, b"n-1", "a-key")
    assert remember(catalog, b"n-1", "another-key")
    assert remember(catalog, b"n-2", "a-key")


@pytest.mark.parametrize("nonce", [b"x" * 10_000, "n \u00e9 \u2713".encode(), b"\xff\xfe\x00", b"' OR 1=1 --", b"N-1"])
def test_any_bytes_are_a_nonce(catalog: Catalog, nonce: bytes) -> None:
    """However long, and whatever they are."""
    assert remember(catalog, b"n-1")
    assert [remember(catalog, nonce), remember(catalog, nonce)] == [True, False]


def test_of_many_at_once_one_is_let_in(catalog: Catalog) -> None:
    """The same nonce in several transactions at the same moment."""
    found = in_parallel([lambda: remember(catalog)] * CROWD)
    assert sorted(found, key=str) == [False] * (CROWD - 1) + [True]


def test_a_transaction_that_fails_remembers_nothing(catalog: Catalog) -> None:
    """A nonce whose transaction was rolled back was never let in."""
    with pytest.raises(RuntimeError), catalog.transaction() as tx:
        nonces.remember(tx, "a-key", b"n-1")
        raise RuntimeError
    assert remember(catalog)


def test_a_nonce_is_known_for_ten_minutes(catalog: Catalog) -> None:
    """A timestamp passes from five minutes before its time to five after it."""
    remember(catalog)
    age(catalog, TEN_MINUTES)
    assert not remember(catalog)


def test_a_forgotten_nonce_is_new_again(catalog: Catalog) -> None:
    """And then it is known for its whole time once more, whether its row was dropped or not."""
    remember(catalog)
    age(catalog, nonces.LIFETIME + SECOND)
    assert remember(catalog)
    age(catalog, TEN_MINUTES)
    assert not remember(catalog)


def test_the_house_keeping_drops_what_is_forgotten(catalog: Catalog, ledger: CatalogLedger) -> None:
    """The table holds what may still come again, and no more."""
    remember(catalog, b"old")
    age(catalog, nonces.LIFETIME + SECOND)
    remember(catalog, b"new")
    ledger.tidy()
    assert count(catalog) == 1
    assert not remember(catalog, b"new")


def test_the_nonce_itself_is_not_kept(catalog: Catalog) -> None:
    """A row holds a digest of it, and a time."""
    remember(catalog, b"a-telling-nonce")
    with catalog.read() as session:
        assert count(catalog) == 1
        assert "a-telling-nonce" not in dump(session)
