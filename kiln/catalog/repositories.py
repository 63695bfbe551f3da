"""Git repositories that an organization's pods may work on. A credential is sealed before it comes here."""

from datetime import UTC, datetime
from urllib.parse import urlsplit

from sqlalchemy import select
from sqlalchemy.orm import Session

from kiln.catalog.names import is_id
from kiln.catalog.pod_tables import Pod, Repository
from kiln.catalog.runners import OPEN_PODS
from kiln.catalog.tables import Organization
from kiln.errors import InvalidRequestError, NotFoundError, RefusedError

NAME_LENGTH = 255


def add(  # noqa: PLR0913, PLR0917  what a repository is made of
    tx: Session,
    organization: Organization,
    name: str,
    url: str,
    default_branch: str,
    sealed_credential: bytes | None = None,
) -> Repository:
    """A new repository. Raises InvalidRequestError for a name that is taken, or a URL that holds a credential."""
    _check_name(tx, organization.id, name)
    _check_url(url)
    if not default_branch or default_branch.startswith("-") or len(default_branch) > NAME_LENGTH:
        raise InvalidRequestError("default_branch", "must be the name of a branch")
    row = Repository(
        organization_id=organization.id,
        name=name,
        url=url,
        default_branch=default_branch,
        sealed_credential=sealed_credential,
        created_at=datetime.now(UTC),
    )
    tx.add(row)
    tx.flush()
    return row


def _check_name(tx: Session, organization_id: str, name: str) -> None:
    if not name.strip() or len(name) > NAME_LENGTH:
        raise InvalidRequestError("name", f"must have 1 to {NAME_LENGTH} characters, and not only spaces")
    same = select(Repository.id).where(Repository.organization_id == organization_id, Repository.name == name)
    if tx.scalar(same) is not None:
        raise InvalidRequestError("name", f"this organization has a repository {name} already")


def _check_url(url: str) -> None:
    # git would take it for an option, wherever it stands.
    if not url.strip() or url.startswith("-"):
        raise InvalidRequestError("url", "must be the URL of a git repository")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InvalidRequestError("url", "must be the URL of a git repository") from None
    # A user alone is no secret to SSH, but it may be a token over HTTP.
    if parts.password is not None or (parts.scheme in ("http", "https") and "@" in parts.netloc):
        raise InvalidRequestError("url", "must hold no user or password: give them as the credential")


def find(session: Session, organization_id: str, repository_id: int, *, lock: bool = False) -> Repository | None:
    """An organization's repository. With `lock`, it stays until the transaction's end: so a pod that is to work on it
    can be written."""
    if not is_id(repository_id):
        return None
    query = select(Repository).where(Repository.id == repository_id, Repository.organization_id == organization_id)
    return session.scalars(query.with_for_update(read=True) if lock else query).first()


def listing(session: Session) -> list[tuple[Repository, str]]:
    """Every repository with its organization's slug, by id."""
    query = select(Repository, Organization.slug).join(Organization, Organization.id == Repository.organization_id)
    return [(row, slug) for row, slug in session.execute(query.order_by(Repository.id))]


def remove(tx: Session, repository_id: int) -> None:
    """Forgets a repository, with its credential. Raises NotFoundError; RefusedError while an open pod works on it."""
    row = tx.get(Repository, repository_id, with_for_update=True) if is_id(repository_id) else None
    if row is None:
        raise NotFoundError(f"there is no repository {repository_id}")
    own = (Pod.organization_id == row.organization_id, Pod.status.in_(OPEN_PODS))
    working = Pod.spec["repository_id"].as_integer() == row.id
    key = tx.scalar(select(Pod.key).where(*own, working).limit(1))
    if key is not None:
        raise RefusedError(f"repository {row.id} is worked on by {key}: terminate it first")
    tx.delete(row)
    tx.flush()
