"""Organizations and API keys. A plain key is `amk_` and 80 hex digits, and the catalog keeps its hash only.

An HMAC key is an id that is sent, `hk_` and 32 hex digits, and a secret of 64 that never is: requests are signed with it
(`api/signed.py`), so the catalog keeps it, sealed. Neither kind opens what the other does.
"""

import hashlib
import re
import secrets
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Row, bindparam, select, update
from sqlalchemy.orm import Session

from kiln.catalog import tags
from kiln.catalog.tables import ApiKey, Organization
from kiln.errors import InvalidRequestError

KEY_PREFIX = "amk_"
KEY_HEX_DIGITS = 80
HMAC_PREFIX = "hk_"
HMAC_ID_HEX_DIGITS = 32
HMAC_SECRET_HEX_DIGITS = 64
HINT_LENGTH = 12
DEFAULT_ORGANIZATION = "default"
# A path component of the OCI distribution specification; at most a DNS label's length.
SLUG = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*")
SLUG_LENGTH = 63
SCOPES = (
    "builds:read",
    "builds:write",
    "organization:read",
    "organization:write",
    "pods:read",
    "pods:write",
    "runners:read",
    "admin",
)


class KeyKind(StrEnum):
    """How a key is shown: sent as it is, or by a signature made with its secret."""

    PLAIN = "plain"
    HMAC = "hmac"


@dataclass(frozen=True)
class Identity:
    """Who calls: one key of one organization. `scopes` as the key carries them."""

    key_id: str
    organization_id: str
    organization_slug: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        """Whether the key carries a scope: `X:write` implies `X:read`, and `admin` implies all."""
        noun, _, verb = scope.partition(":")
        return "admin" in self.scopes or scope in self.scopes or (verb == "read" and f"{noun}:write" in self.scopes)


@dataclass(frozen=True)
class KnownKey:
    """A key that exists, and why it may not be usable."""

    identity: Identity
    disabled: bool
    expired: bool

    @property
    def usable(self) -> bool:
        return not (self.disabled or self.expired)


@dataclass(frozen=True)
class KnownHmacKey(KnownKey):
    """An HMAC key that exists, with its secret as `create_hmac` was given it sealed."""

    sealed_secret: bytes


def ensure_organization(tx: Session, slug: str) -> Organization:
    """The organization of this slug, made if it is not there.

    Raises InvalidRequestError for a slug that a new one cannot have: its images stand below it in the registry.
    """
    row = tx.scalars(select(Organization).where(Organization.slug == slug)).first()
    if row is None:
        _check_slug(slug)
        row = Organization(id=str(uuid.uuid4()), slug=slug, created_at=datetime.now(UTC))
        tx.add(row)
        tx.flush()
    return row


def has_organization(session: Session, slug: str) -> bool:
    """Whether there is an organization of this slug."""
    same = select(Organization.id).where(Organization.slug == slug)
    return SLUG.fullmatch(slug) is not None and session.scalar(same) is not None


def _check_slug(slug: str) -> None:
    if not SLUG.fullmatch(slug) or len(slug) > SLUG_LENGTH:
        raise InvalidRequestError(
            "organization", "must be lower-case letters and digits, with hyphens, dots or underscores between them"
        )
    if tags.is_reserved(slug):
        raise InvalidRequestError("organization", f"{slug} is the name of a namespace that no organization owns")


def create(
    tx: Session, organization: Organization, name: str, scopes: Collection[str], expires_at: datetime | None = None
) -> tuple[ApiKey, str]:
    """A new key's row and the key itself, which nobody can read again."""
    plain = KEY_PREFIX + secrets.token_hex(KEY_HEX_DIGITS // 2)
    row = _new_row(organization, name, plain, scopes, expires_at)
    tx.add(row)
    tx.flush()
    return row, plain


def create_hmac(  # noqa: PLR0913, PLR0917  what a key is made of
    tx: Session,
    organization: Organization,
    name: str,
    scopes: Collection[str],
    expires_at: datetime | None,
    seal: Callable[[str], bytes],
) -> tuple[ApiKey, str, str]:
    """A new HMAC key's row, its id and its secret, which only `seal` makes fit to be kept."""
    key = HMAC_PREFIX + secrets.token_hex(HMAC_ID_HEX_DIGITS // 2)
    secret = secrets.token_hex(HMAC_SECRET_HEX_DIGITS // 2)
    row = _new_row(organization, name, key, scopes, expires_at)
    row.kind, row.sealed_secret = KeyKind.HMAC.value, seal(secret)
    tx.add(row)
    tx.flush()
    return row, key, secret


def _new_row(
    organization: Organization, name: str, sent: str, scopes: Collection[str], expires_at: datetime | None
) -> ApiKey:
    return ApiKey(
        id=str(uuid.uuid4()),
        organization_id=organization.id,
        name=name,
        kind=KeyKind.PLAIN.value,
        hash=_hash(sent),
        hint=sent[:HINT_LENGTH],
        scopes=sorted(scopes),
        created_at=datetime.now(UTC),
        expires_at=expires_at,
    )


def listing(session: Session) -> Sequence[tuple[ApiKey, str]]:
    """Every key with its organization's slug, oldest first."""
    query = select(ApiKey, Organization.slug).join(Organization).order_by(ApiKey.created_at, ApiKey.id)
    return [(key, slug) for key, slug in session.execute(query)]


def disable(tx: Session, key_id: str) -> bool:
    """Shuts a key for good; False if there is no such key. Disabling twice keeps the first time."""
    row = tx.get(ApiKey, key_id)
    if row is None:
        return False
    tx.execute(
        update(ApiKey).where(ApiKey.id == key_id, ApiKey.disabled_at.is_(None)).values(disabled_at=datetime.now(UTC))
    )
    return True


def identify(session: Session, plain: str) -> KnownKey | None:
    """Whose plain key this is; None if it is nobody's, or an HMAC key's id."""
    found = _sent(session, plain, KeyKind.PLAIN)
    return None if found is None else KnownKey(_identity(found), *_shut(found))


def find_hmac(session: Session, key: str) -> KnownHmacKey | None:
    """Whose HMAC key has this id; None if it is nobody's, or a plain key."""
    found = _sent(session, key, KeyKind.HMAC)
    return None if found is None else KnownHmacKey(_identity(found), *_shut(found), found.sealed_secret)


# Columns rather than mapped rows, and built once: every request asks this.
_SENT = (
    select(
        ApiKey.id,
        ApiKey.organization_id,
        ApiKey.scopes,
        ApiKey.expires_at,
        ApiKey.disabled_at,
        ApiKey.sealed_secret,
        Organization.slug,
    )
    .join(Organization)
    .where(ApiKey.hash == bindparam("sent_hash"), ApiKey.kind == bindparam("sent_kind"))
)


def _sent(session: Session, text: str, kind: KeyKind) -> Row[*tuple[object, ...]] | None:
    return session.execute(_SENT, {"sent_hash": _hash(text), "sent_kind": kind.value}).first()


def _identity(found: Row[*tuple[object, ...]]) -> Identity:
    return Identity(found.id, found.organization_id, found.slug, frozenset(found.scopes))


def _shut(found: Row[*tuple[object, ...]]) -> tuple[bool, bool]:
    """Whether the key was disabled, and whether it has expired."""
    expired = found.expires_at is not None and found.expires_at <= datetime.now(UTC)
    return found.disabled_at is not None, expired


def _hash(plain: str) -> str:
    return hashlib.sha256(plain.encode()).hexdigest()
