"""`kiln keys`: API keys, in the catalog itself; no server needs to run."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cli.home import open_catalog
from kiln.catalog import keys
from kiln.catalog.keys import SCOPES
from kiln.catalog.tables import ApiKey
from kiln.errors import KilnError
from kiln.settings import Settings

DEFAULT_SCOPES = ("builds:read", "builds:write")
DURATION = re.compile(r"(\d{1,6})([smhdw])")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class KeyCommandError(KilnError):
    """An option of `kiln keys` is wrong, or there is no such key."""


def create_key(
    settings: Settings, name: str, organization: str, scopes: Sequence[str], lifetime: str
) -> dict[str, Any]:
    """Makes a key and returns it with `key`, which nobody can read again. Raises KilnError.

    The organization is made if it is not there. `lifetime` is a number and s, m, h, d or w; empty means for ever.
    """
    _check_scopes(scopes)
    expires_at = datetime.now(UTC) + _duration(lifetime) if lifetime else None
    if not SLUG.fullmatch(organization):
        raise KeyCommandError(f"--org {organization}: must be lower-case letters, digits and hyphens, at most 63")
    with open_catalog(settings) as catalog, catalog.transaction() as tx:
        owner = keys.ensure_organization(tx, organization)
        row, plain = keys.create(tx, owner, name, set(scopes) or DEFAULT_SCOPES, expires_at)
    return {**_view(row, organization), "key": plain}


def list_keys(settings: Settings) -> list[dict[str, Any]]:
    """Every key, oldest first, without the keys themselves. Raises KilnError."""
    _check_catalog(settings)
    with open_catalog(settings) as catalog, catalog.read() as session:
        return [_view(row, slug) for row, slug in keys.listing(session)]


def disable_key(settings: Settings, key_id: str) -> dict[str, Any]:
    """Shuts a key for good. Raises KilnError, also if there is no such key."""
    _check_catalog(settings)
    with open_catalog(settings) as catalog, catalog.transaction() as tx:
        if not keys.disable(tx, key_id):
            raise KeyCommandError(f"no API key has the id {key_id}: kiln keys list shows them")
        return next(_view(row, slug) for row, slug in keys.listing(tx) if row.id == key_id)


def _view(row: ApiKey, organization: str) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "organization": organization,
        "hint": row.hint,
        "scopes": row.scopes,
        "state": _state(row),
        "created_at": _time(row.created_at),
        "expires_at": _time(row.expires_at),
        "disabled_at": _time(row.disabled_at),
    }


def _state(row: ApiKey) -> str:
    if row.disabled_at is not None:
        return "disabled"
    return "expired" if row.expires_at is not None and row.expires_at <= datetime.now(UTC) else "usable"


def _time(moment: datetime | None) -> str | None:
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


def _check_catalog(settings: Settings) -> None:
    """Reading makes no home: a mistyped KILN_HOME would look like an empty catalog."""
    if not settings.catalog_url and not (settings.home_dir / "catalog.db").exists():
        raise KeyCommandError(f"KILN_HOME: there is no catalog in {settings.home_dir}")
