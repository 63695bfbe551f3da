"""Organizations and API keys. A key is `amk_` and 80 hex digits; the catalog keeps its hash only."""

import hashlib
import re
import secrets
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from kiln.catalog import tags
from kiln.catalog.tables import ApiKey, Organization
from kiln.errors import InvalidRequestError

KEY_PREFIX = "amk_"
KEY_HEX_DIGITS = 80
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
    """A key that exists, usable or not."""

    identity: Identity
    usable: bool


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
    row = ApiKey(
        id=str(uuid.uuid4()),
        organization_id=organization.id,
        name=name,
        hash=_hash(plain),
        hint=plain[:HINT_LENGTH],
        scopes=sorted(scopes),
        created_at=datetime.now(UTC),
        expires_at=expires_at,
    )
    tx.add(row)
    tx.flush()
    return row, plain


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
    """Whose key this is; None if it is nobody's."""
    query = select(ApiKey, Organization.slug).join(Organization).where(ApiKey.hash == _hash(plain))
    found = session.execute(query).first()
    if found is None:
        return None
    row, slug = found
    identity = Identity(row.id, row.organization_id, slug, frozenset(row.scopes))
    expired = row.expires_at is not None and row.expires_at <= datetime.now(UTC)
    return KnownKey(identity, usable=row.disabled_at is None and not expired)


def _hash(plain: str) -> str:
    return hashlib.sha256(plain.encode()).hexdigest()
