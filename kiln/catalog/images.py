"""Queries about finished images: insert at publication, list, delete, and what EC2 says of them."""

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from kiln.catalog.tables import Build, Image
from kiln.models import Api, BuildKind, BuiltImage, ImageView
from kiln.ports import Ami, ImageFacts

AVAILABLE = "available"
DELETING = "deleting"
DELETED = "deleted"
GONE = "gone"
AMI = "ami"
CONTAINER = "container"
GIB = 1024**3


@dataclass(frozen=True)
class ImageFilter:
    """What a listing of images is narrowed to; None means any."""

    organization_id: str
    api: Api
    region: str | None = None
    provider: str | None = None

    def takes(self, build: Build) -> bool:
        """Whether the AMI of a build that is still open would be listed."""
        return self.region in (None, build.spec["region"]) and self.provider in (None, build.spec["provider"])


def insert_ami(tx: Session, build: Build, ami: Ami, built: BuiltImage, *, simulated: bool) -> Image:
    """The image of a build that has just been written `succeeded`, in the same transaction."""
    row = Image(
        id=str(uuid.uuid4()),
        organization_id=build.organization_id,
        build_id=build.id,
        kind=AMI,
        api=build.api,
        reference=ami.image_id,
        account=built.account,
        region=built.region,
        platform=build.platform,
        provider=build.spec.get("provider", ""),
        size_bytes=ami.size_gib * GIB,
        snapshot_ids=list(ami.snapshot_ids),
        kept_snapshot_ids=[],
        simulated=simulated,
        status=AVAILABLE,
        created_at=datetime.now(UTC),
    )
    tx.add(row)
    tx.flush()
    return row


def insert_container(tx: Session, build: Build, facts: ImageFacts, built: BuiltImage, host: str) -> Image:
    """The image of a build whose publication has begun, in the same transaction. `host` is the registry's.

    A registered image keeps the reference under which it was registered.
    """
    registered = build.kind == BuildKind.REGISTRATION.value
    row = Image(
        id=str(uuid.uuid4()),
        organization_id=build.organization_id,
        build_id=build.id,
        kind=CONTAINER,
        api=build.api,
        reference=build.spec["reference"] if registered else f"{host}/{build.repository}@{built.image_id}",
        account=host,
        region="",
        platform=_platform(build, facts),
        provider="",
        size_bytes=facts.size_bytes,
        snapshot_ids=[],
        kept_snapshot_ids=[],
        simulated=False,
        status=AVAILABLE,
        created_at=datetime.now(UTC),
        repository=build.repository,
        digest=built.image_id,
        platforms=list(facts.platforms),
    )
    tx.add(row)
    tx.flush()
    return row


def _platform(build: Build, facts: ImageFacts) -> str:
    """Of an image of several platforms, the one that the build asked for."""
    return build.platform if build.platform in facts.platforms else next(iter(facts.platforms), build.platform)


def of_build(session: Session, build_id: str) -> Image | None:
    """The image that a build published."""
    return session.scalars(select(Image).where(Image.build_id == build_id)).first()


def built(session: Session, digests: Collection[str]) -> dict[str, set[str]]:
    """The repositories for which builds of Dockerfiles made each of the digests; deleted images count."""
    query = (
        select(Image.digest, Image.repository)
        .join(Build, Build.id == Image.build_id)
        .where(Image.digest.in_(digests), Build.kind == BuildKind.CONTAINER.value)
    )
    found: dict[str, set[str]] = {}
    for digest, repository in session.execute(query):
        found.setdefault(str(digest), set()).add(str(repository))
    return found


def get(session: Session, image_id: str) -> Image | None:
    """An image by the catalog's own id."""
    return session.get(Image, image_id)


def find(session: Session, organization_id: str, api: Api, reference: str) -> Image | None:
    """An organization's AMI that still exists or is being deleted, by its AMI id."""
    query = select(Image).where(
        Image.organization_id == organization_id,
        Image.kind == AMI,
        Image.api == api.value,
        Image.reference == reference,
        Image.status.in_((AVAILABLE, DELETING)),
    )
    return session.scalars(query).first()


def listing(session: Session, wanted: ImageFilter, deleting_since: datetime) -> Sequence[Image]:
    """AMIs that exist, newest first; one that is being deleted only if that began after `deleting_since`."""
    query = select(Image).where(
        Image.organization_id == wanted.organization_id,
        Image.kind == AMI,
        Image.api == wanted.api.value,
        (Image.status == AVAILABLE) | ((Image.status == DELETING) & (Image.deleting_at > deleting_since)),
    )
    if wanted.region is not None:
        query = query.where(Image.region == wanted.region)
    if wanted.provider is not None:
        query = query.where(Image.provider == wanted.provider)
    return session.scalars(query.order_by(Image.created_at.desc(), Image.id.desc())).all()


def begin_deletion(tx: Session, image_id: str, *, gone_too: bool = False) -> bool:
    """Marks an available image as being deleted; with `gone_too` also one whose AMI EC2 has no more, for its snapshots
    outlive it. False if somebody else did, or nothing is left of it: the caller must not delete."""
    deletable = (AVAILABLE, GONE) if gone_too else (AVAILABLE,)
    changed = tx.execute(
        update(Image)
        .where(Image.id == image_id, Image.status.in_(deletable))
        .values(status=DELETING, deleting_at=datetime.now(UTC))
        .returning(Image.id)
    )
    return changed.first() is not None


def finish_deletion(tx: Session, image_id: str, kept_snapshot_ids: Collection[str]) -> None:
    """Records that the AMI and its snapshots are gone, less those that another AMI uses. Repeating it is harmless."""
    tx.execute(
        update(Image)
        .where(Image.id == image_id, Image.status == DELETING)
        .values(status=DELETED, gone_at=datetime.now(UTC), kept_snapshot_ids=sorted(kept_snapshot_ids))
    )


def mark_gone(tx: Session, image_ids: Collection[str], reason: str) -> None:
    """Records that EC2 proved the absence of these images, with the reason as users read it."""
    tx.execute(
        update(Image)
        .where(Image.id.in_(image_ids), Image.status == AVAILABLE)
        .values(status=GONE, gone_at=datetime.now(UTC), gone_reason=reason)
    )


def living(session: Session) -> Sequence[Image]:
    """Every AMI that the catalog believes to be there."""
    return session.scalars(select(Image).where(Image.kind == AMI, Image.status == AVAILABLE)).all()


def stuck_deletions(session: Session, older_than: timedelta) -> Sequence[Image]:
    """AMIs whose deletion began a while ago and is not recorded as done."""
    began_before = datetime.now(UTC) - older_than
    stuck = (Image.kind == AMI, Image.status == DELETING, Image.deleting_at <= began_before)
    return session.scalars(select(Image).where(*stuck)).all()


def view(row: Image) -> ImageView:
    """The image as `kiln.md` shows it."""
    return ImageView(
        kind="container" if row.kind == CONTAINER else "ami",
        reference=row.reference,
        digest=row.digest,
        region=row.region or None,
        platform=row.platform,
        size_bytes=row.size_bytes,
        simulated=row.simulated,
    )
