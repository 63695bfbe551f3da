"""API keys: who may do what, and what the catalog knows of them."""

import re
from datetime import UTC, datetime, timedelta

import pytest

from kiln.catalog import keys
from kiln.catalog.keys import SCOPES, Identity, KnownHmacKey, KnownKey
from kiln.catalog.session import Catalog
from kiln.catalog.tables import ApiKey
from kiln.errors import InvalidRequestError
from kiln.sealing import Sealer
from support.rows import add_build, dump

HOUR = timedelta(hours=1)


def create(
    catalog: Catalog, scopes: tuple[str, ...] = ("builds:read",), expires_at: datetime | None = None
) -> tuple[ApiKey, str]:
    with catalog.transaction() as tx:
        return keys.create(tx, keys.ensure_organization(tx, "acme"), "a key", scopes, expires_at)


def create_hmac(
    catalog: Catalog,
    sealer: Sealer,
    scopes: tuple[str, ...] = ("organization:read",),
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str, str]:
    with catalog.transaction() as tx:
        owner = keys.ensure_organization(tx, "acme")
        return keys.create_hmac(tx, owner, "a key", scopes, expires_at, sealer.seal_text)


def find_hmac(catalog: Catalog, key: str) -> KnownHmacKey | None:
    with catalog.read() as session:
        return keys.find_hmac(session, key)


def identify(catalog: Catalog, plain: str) -> KnownKey | None:
    with catalog.read() as session:
        return keys.identify(session, plain)


def disable(catalog: Catalog, key_id: str) -> bool:
    with catalog.transaction() as tx:
        return keys.disable(tx, key_id)


def is_usable(catalog: Catalog, plain: str) -> bool:
    known = identify(catalog, plain)
    assert known is not None
    return known.usable


def test_a_key_is_a_prefix_and_80_hex_digits(catalog: Catalog) -> None:
    """Every key has the form that all contracts accept."""
    _, plain = create(catalog)
    assert plain[:4] == "amk_"
    assert (len(plain), int(plain[4:], 16) > 0) == (84, True)


def test_no_two_keys_are_equal(catalog: Catalog) -> None:
    """Each key is made anew."""
    assert create(catalog)[1] != create(catalog)[1]


def test_the_plain_key_is_nowhere_in_the_catalog(catalog: Catalog) -> None:
    """A dump of all tables holds a hint of the key, and nothing that opens the API."""
    row, plain = create(catalog)
    with catalog.read() as session:
        everything = dump(session)
    assert row.hint in everything
    assert plain not in everything
    assert plain[4:] not in everything


def test_an_hmac_key_is_an_id_and_a_secret(catalog: Catalog, sealer: Sealer) -> None:
    """`hk_` and 32 hex digits are sent; 64 hex digits never are."""
    row, key, secret = create_hmac(catalog, sealer)
    assert re.fullmatch("hk_[0-9a-f]{32}", key)
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert (row.kind, row.hint) == ("hmac", key[:12])


def test_no_two_hmac_keys_share_anything(catalog: Catalog, sealer: Sealer) -> None:
    """Neither an id nor a secret is given twice."""
    made = [create_hmac(catalog, sealer)[1:] for _ in range(2)]
    assert len({text for pair in made for text in pair}) == 4


def test_an_hmac_keys_secret_is_kept_sealed(catalog: Catalog, sealer: Sealer) -> None:
    """A dump of all tables holds neither the id nor the secret; the installation's key opens the secret again."""
    row, key, secret = create_hmac(catalog, sealer)
    with catalog.read() as session:
        everything = dump(session)
    assert row.id in everything
    assert key not in everything
    assert secret not in everything
    known = find_hmac(catalog, key)
    assert known is not None
    assert sealer.open_text(known.sealed_secret) == secret


def test_an_hmac_key_says_whose_it_is(catalog: Catalog, sealer: Sealer) -> None:
    """As a plain key does."""
    row, key, _ = create_hmac(catalog, sealer, ("organization:write",))
    known = find_hmac(catalog, key)
    assert known is not None
    assert known.identity == Identity(row.id, row.organization_id, "acme", frozenset({"organization:write"}))
    assert known.usable


def test_an_hmac_key_that_was_shut_is_known(catalog: Catalog, sealer: Sealer) -> None:
    """By its expiry, or by being disabled."""
    now = datetime.now(UTC)
    expired, disabled = create_hmac(catalog, sealer, expires_at=now - HOUR), create_hmac(catalog, sealer)
    disable(catalog, disabled[0].id)
    for _, key, _ in (expired, disabled):
        known = find_hmac(catalog, key)
        assert known is not None
        assert not known.usable


def test_neither_kind_of_key_passes_for_the_other(catalog: Catalog, sealer: Sealer) -> None:
    """An HMAC key's id and its secret are no plain keys, and a plain key has no secret to sign with."""
    _, plain = create(catalog)
    _, key, secret = create_hmac(catalog, sealer)
    assert identify(catalog, key) is None
    assert identify(catalog, secret) is None
    assert find_hmac(catalog, plain) is None


def test_a_secret_is_nowhere_in_the_catalog(catalog: Catalog, organization: str, sealer: Sealer) -> None:
    """A dump of all tables holds a build's secrets only under the installation's key."""
    build = add_build(catalog, organization, secrets=sealer.seal({"token": "s3cr3t-value"}))
    with catalog.read() as session:
        everything = dump(session)
    assert build in everything
    assert "s3cr3t-value" not in everything


def test_a_key_says_whose_it_is(catalog: Catalog) -> None:
    """A known key names its organization and its scopes."""
    row, plain = create(catalog, ("builds:read", "builds:write"))
    known = identify(catalog, plain)
    assert known is not None
    assert known.identity == Identity(row.id, row.organization_id, "acme", frozenset({"builds:read", "builds:write"}))


def test_nobodys_key_is_unknown(catalog: Catalog) -> None:
    """A key that was never made is nobody's."""
    create(catalog)
    assert identify(catalog, "amk_" + "0" * 80) is None


def test_a_key_works_until_it_expires(catalog: Catalog) -> None:
    """An expiry in the future does not matter yet; one in the past shuts the key."""
    now = datetime.now(UTC)
    assert is_usable(catalog, create(catalog, expires_at=now + HOUR)[1])
    assert not is_usable(catalog, create(catalog, expires_at=now - HOUR)[1])


def test_a_disabled_key_is_known_and_shut(catalog: Catalog) -> None:
    """A key that was disabled is told apart from one that never was."""
    row, plain = create(catalog)
    assert disable(catalog, row.id)
    assert not is_usable(catalog, plain)


def test_disabling_twice_keeps_the_first_time(catalog: Catalog) -> None:
    """The catalog remembers when a key was shut."""
    row, _ = create(catalog)
    disable(catalog, row.id)
    with catalog.read() as session:
        first = keys.listing(session)[0][0].disabled_at
    assert disable(catalog, row.id)
    with catalog.read() as session:
        assert keys.listing(session)[0][0].disabled_at == first


def test_an_unknown_key_cannot_be_disabled(catalog: Catalog) -> None:
    """Whoever mistypes an id is told so."""
    assert not disable(catalog, "5e1f4c4e-0000-4000-8000-000000000000")


def test_keys_are_listed_with_their_organization(catalog: Catalog) -> None:
    """The oldest key comes first."""
    made = [create(catalog)[0].id for _ in range(3)]
    with catalog.read() as session:
        assert [(key.id, slug) for key, slug in keys.listing(session)] == [(key_id, "acme") for key_id in made]


def test_an_organization_is_made_once(catalog: Catalog) -> None:
    """The same slug is the same organization."""
    with catalog.transaction() as tx:
        first = keys.ensure_organization(tx, "acme").id
    with catalog.transaction() as tx:
        assert keys.ensure_organization(tx, "acme").id == first


@pytest.mark.parametrize("slug", ["default", "acme", "a", "tenant-1f2e", "a--b", "a.b_c__d", "x" * 63])
def test_a_slug_is_a_segment_of_an_images_path(catalog: Catalog, slug: str) -> None:
    """What the registry takes as a repository's first segment is taken as a slug."""
    with catalog.transaction() as tx:
        assert keys.ensure_organization(tx, slug).slug == slug


@pytest.mark.parametrize(
    "slug",
    ["platform", "kiln-staging", "team-acme", "team-", "", "Acme", "a/b", "a-", "-a", "a..b", "a___b", "x" * 64, "a\n"],
)
def test_other_slugs_are_refused(catalog: Catalog, slug: str) -> None:
    """A slug that is another namespace's name, or that the registry does not take, makes no organization."""
    with pytest.raises(InvalidRequestError, match="organization: "), catalog.transaction() as tx:
        keys.ensure_organization(tx, slug)


@pytest.mark.parametrize(
    ("carried", "asked"),
    [({"builds:read"}, "builds:read"), ({"builds:write"}, "builds:read"), ({"admin"}, "admin")],
)
def test_a_scope_allows_what_it_implies(carried: set[str], asked: str) -> None:
    """`X:write` implies `X:read`."""
    assert Identity("key", "organization", "acme", frozenset(carried)).may(asked)


@pytest.mark.parametrize(
    ("carried", "asked"),
    [
        ({"builds:read"}, "builds:write"),
        ({"builds:write"}, "pods:read"),
        ({"pods:write"}, "builds:read"),
        (set(), "builds:read"),
        ({"builds:write", "organization:write"}, "admin"),
    ],
)
def test_a_scope_allows_nothing_else(carried: set[str], asked: str) -> None:
    """A scope of one noun is none of another, and reading is not writing."""
    assert not Identity("key", "organization", "acme", frozenset(carried)).may(asked)


@pytest.mark.parametrize("scope", SCOPES)
def test_admin_implies_every_scope(scope: str) -> None:
    """An admin key opens everything."""
    assert Identity("key", "organization", "acme", frozenset({"admin"})).may(scope)
