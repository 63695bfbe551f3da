"""Answers that are given again under the same `Idempotency-Key`."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest

from kiln.catalog import idempotency
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import AlreadyThereError, Catalog
from kiln.catalog.tables import IdempotencyKey
from support.parallel import Pending
from support.rows import add_organization

DAY = timedelta(hours=24)
MINUTE = timedelta(minutes=1)


def answer(organization: str, key: str = "a-key", age: timedelta = timedelta(0)) -> IdempotencyKey:
    return IdempotencyKey(
        organization_id=organization,
        key=key,
        body_digest="0" * 64,
        build_id=str(uuid.uuid4()),
        status_code=202,
        response={"status": "queued"},
        created_at=datetime.now(UTC) - age,
    )


def remember(catalog: Catalog, given: IdempotencyKey) -> str:
    with catalog.transaction() as tx:
        idempotency.remember(tx, given)
    return given.build_id


def found(catalog: Catalog, organization: str, key: str = "a-key") -> str | None:
    """The build that was answered with under this key."""
    with catalog.transaction() as tx:
        row = idempotency.find(tx, organization, key)
        return row.build_id if row else None


def test_an_answer_is_found_again(catalog: Catalog, organization: str) -> None:
    """The answer that was given under a key is there for the next call."""
    assert remember(catalog, answer(organization)) == found(catalog, organization)


def test_a_key_is_its_organizations(catalog: Catalog, organization: str) -> None:
    """Two organizations may use the same key."""
    remember(catalog, answer(organization))
    another = add_organization(catalog)
    assert found(catalog, another) is None
    assert remember(catalog, answer(another)) == found(catalog, another)


def test_an_answer_holds_for_a_day(catalog: Catalog, organization: str) -> None:
    """Shortly before its 24 hours are over, an answer still holds."""
    assert remember(catalog, answer(organization, age=DAY - MINUTE)) == found(catalog, organization)


def test_a_key_is_free_after_a_day(catalog: Catalog, organization: str) -> None:
    """After 24 hours the key can be used anew."""
    remember(catalog, answer(organization, age=DAY + MINUTE))
    assert found(catalog, organization) is None
    assert remember(catalog, answer(organization)) == found(catalog, organization)


def test_a_key_cannot_be_answered_twice(catalog: Catalog, organization: str) -> None:
    """A second answer under the same key is refused, with its whole transaction."""
    first = remember(catalog, answer(organization))
    with pytest.raises(AlreadyThereError):
        remember(catalog, answer(organization))
    assert found(catalog, organization) == first


def test_a_second_call_waits_for_the_first(catalog: Catalog, organization: str) -> None:
    """While one call's answer is on its way, another under the same key waits, and then fails."""
    with catalog.transaction() as tx:
        idempotency.remember(tx, answer(organization))
        second = Pending(lambda: remember(catalog, answer(organization)))
        assert second.is_waiting()
    with pytest.raises(AlreadyThereError):
        second.result()


def test_old_answers_are_dropped(ledger: CatalogLedger, catalog: Catalog, organization: str) -> None:
    """Tidying drops what is past its day, and nothing else."""
    remember(catalog, answer(organization, "old", age=DAY + MINUTE))
    remember(catalog, answer(organization, "new"))
    ledger.tidy()
    with catalog.read() as session:
        assert [row.key for row in session.query(IdempotencyKey)] == ["new"]
