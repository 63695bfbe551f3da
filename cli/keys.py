"""`kiln keys`: API keys, plain ones and those that sign, in the catalog itself; no server needs to run."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from cli.home import open_catalog, secret_key
from cli.places import secret_key_file
from kiln.catalog import keys
from kiln.catalog.keys import SCOPES
from kiln.catalog.session import Transaction
from kiln.catalog.tables import ApiKey, Organization
from kiln.errors import KilnError
from kiln.sealing import Sealer
from kiln.settings import Settings

DEFAULT_SCOPES = ("builds:read", "builds:write")
HMAC_SCOPES = ("organization:read", "organization:write")
DURATION = re.compile(r"(\d{1,6})([smhdw])")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class KeyCommandError(KilnError):
    """An option that keys, organizations and the catalog are found by is wrong, or there is no such key."""


def create_key(
    settings: Settings, name: str, organization: str, scopes: Sequence[str], lifetime: str
) -> dict[str, Any]:
    """Makes a key and returns it with `key`, which nobody can read again. Raises KilnError.

    The organization is made if it is not there. `lifetime` is a number and s, m, h, d or w; empty means for ever.
    """
    expires_at = _checked(organization, scopes, lifetime)
    with owner(settings, organization) as (tx, found):
        row, plain = keys.create(tx, found, name, set(scopes) or DEFAULT_SCOPES, expires_at)
        return {**_view(row, organization), "key": plain}


def create_hmac_key(
    settings: Settings, name: str, organization: str, scopes: Sequence[str], lifetime: str
) -> dict[str, Any]:
    """The same for a key that signs: `key` is its id, `secret` what nobody can read again.

    The secret is sealed with KILN_SECRET_KEY or the home's own key, which is made if there is none yet.
    """
    expires_at = _checked(organization, scopes, lifetime)
    check_secret_key(settings, "the key's secret")
    with owner(settings, organization) as (tx, found):
        seal = Sealer(secret_key(settings)).seal_text
        row, key, secret = keys.create_hmac(tx, found, name, set(scopes) or HMAC_SCOPES, expires_at, seal)
        return {**_view(row, organization), "key": key, "secret": secret}


def list_keys(settings: Settings) -> list[dict[str, Any]]:
    """Every key, oldest first, without the keys themselves. Raises KilnError."""
    check_catalog(settings)
    with open_catalog(settings) as catalog, catalog.read() as session:
        return [_view(row, slug) for row, slug in keys.listing(session)]


def disable_key(settings: Settings, key_id: str) -> dict[str, Any]:
    """Shuts a key for good. Raises KilnError, also if there is no such key."""
    check_catalog(settings)
    with open_catalog(settings) as catalog, catalog.transaction() as tx:
        if not keys.disable(tx, key_id):
            raise KeyCommandError(f"no API key has the id {key_id}: kiln keys list shows them")
        return next(_view(row, slug) for row, slug in keys.listing(tx) if row.id == key_id)


@contextmanager
def owner(settings: Settings, organization: str) -> Iterator[tuple[Transaction, Organization]]:
    """A transaction in the catalog, and the organization, which is made if it is not there. Raises KilnError."""
    with open_catalog(settings) as catalog, catalog.transaction() as tx:
        yield tx, keys.ensure_organization(tx, organization)


def _checked(organization: str, scopes: Sequence[str], lifetime: str) -> datetime | None:
    """When the key expires. Raises KeyCommandError for an option that is wrong, before anything is made."""
    _check_scopes(scopes)
    expires_at = datetime.now(UTC) + _duration(lifetime) if lifetime else None
    check_organization(organization)
    return expires_at


def check_organization(slug: str) -> None:
    """Raises KeyCommandError for a slug that none can have."""
    if not SLUG.fullmatch(slug):
        raise KeyCommandError(f"--org {slug}: must be lower-case letters, digits and hyphens, at most 63")


def check_secret_key(settings: Settings, what: str) -> None:
    """A catalog that is not the home's own belongs to servers whose key a new home does not know. Raises KilnError."""
    if settings.secret_key:
        Sealer(settings.secret_key)
    elif settings.catalog_url and not secret_key_file(settings).exists():
        raise KeyCommandError(f"KILN_SECRET_KEY: must be set to the servers' own: {what} is sealed with it")


def _view(row: ApiKey, organization: str) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "kind": row.kind,
        "organization": organization,
        "hint": row.hint,
        "scopes": row.scopes,
        "state": _state(row),
        "created_at": time_text(row.created_at),
        "expires_at": time_text(row.expires_at),
        "disabled_at": time_text(row.disabled_at),
    }


def _state(row: ApiKey) -> str:
    if row.disabled_at is not None:
        return "disabled"
    return "expired" if row.expires_at is not None and row.expires_at <= datetime.now(UTC) else "usable"


def time_text(moment: datetime | None) -> str | None:
    """A time as the command line's JSON and tables say it: whole seconds in UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if moment else None


def _check_scopes(scopes: Sequence[str]) -> None:
    for scope in scopes:
        if scope not in SCOPES:
            raise KeyCommandError(f"--scope {scope}: no such scope; there are {', '.join(SCOPES)}")


def _duration(text: str) -> timedelta:
    match = DURATION.fullmatch(text)
    if not match or not int(match[1]):
        raise KeyCommandError(f"--expires-in {text}: must be a number and s, m, h, d or w, such as 30d")
    return timedelta(**{UNITS[match[2]]: int(match[1])})


def check_catalog(settings: Settings) -> None:
    """Reading makes no home: a mistyped KILN_HOME would look like an empty catalog. Raises KeyCommandError."""
    if not settings.catalog_url and not (settings.home_dir / "catalog.db").exists():
        raise KeyCommandError(f"KILN_HOME: there is no catalog in {settings.home_dir}")
