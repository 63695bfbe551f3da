"""Container images that pods run from: which one a name means, and which must stay while an open pod needs them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from kiln.catalog import tags
from kiln.catalog.images import AVAILABLE, CONTAINER
from kiln.catalog.pod_tables import Pod
from kiln.catalog.runners import OPEN_PODS
from kiln.catalog.tables import Build, Image
from kiln.models import BuildStatus
from kiln.references import DEFAULT_TAG

BUILD_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


@dataclass(frozen=True)
class Runs:
    """Who is to run an image: an organization, by its id and slug; `host` is Kiln's own registry."""

    organization_id: str
    slug: str
    host: str


def find(tx: Session, who: Runs, text: str) -> Image | None:
    """The image that a build's id, a digest, or `[host/][owner/]name[:tag][@digest]` means to the organization.

    Its own ones, the platform's, and others' that are PUBLIC; by id and by digest alone its own only. The image stays
    available until the transaction's end: so a pod that is to run from it can be written.
    """
    for wanted in _meanings(tx, who, text):
        query = (
            select(Image)
            .join(Build, Build.id == Image.build_id)
            .where(
                wanted, Image.kind == CONTAINER, Image.status == AVAILABLE, Build.status == BuildStatus.SUCCEEDED.value
            )
            .order_by(Image.created_at.desc(), Image.id)
            .limit(1)
        )
        image = tx.scalars(query.with_for_update(read=True, of=Image)).first()
        if image is not None and _may_run(tx, who, image):
            return image
    return None


def in_use(session: Session, digest: str) -> bool:
    """Whether an open pod runs from an image of this digest, whatever became of its name since."""
    query = select(Pod.id).join(Image, Image.id == Pod.image_id)
    return session.scalar(query.where(Image.digest == digest, Pod.status.in_(OPEN_PODS)).limit(1)) is not None


def _meanings(session: Session, who: Runs, text: str) -> Iterator[ColumnElement[bool]]:
    """What the text may mean, the likeliest first."""
    own = Image.organization_id == who.organization_id
    if BUILD_ID.fullmatch(text):
        yield own & (Image.build_id == text.lower())
    if DIGEST.fullmatch(text):
        places = (Image.repository.startswith(f"{owner}/", autoescape=True) for owner in _owners(who))
        yield own & or_(*places) & (Image.digest == text)
    path, _, digest = text.removeprefix(f"{who.host}/").partition("@")
    name, tag = _split(path)
    for owner, short in _places(who, name, full=text.startswith(f"{who.host}/")):
        if digest:
            yield (Image.repository == f"{owner}/{short}") & (Image.digest == digest)
        elif (row := tags.find(session, owner, short, tag)) is not None and row.image is not None:
            yield Image.id == row.image.id


def _owners(who: Runs) -> dict[str, object]:
    return {**tags.owners_of(who.organization_id, who.slug)}


def _places(who: Runs, name: str, *, full: bool) -> Iterator[tuple[str, str]]:
    """Owner and name: below the organization's own namespaces, unless the name is full, then as it stands."""
    if not full:
        yield from ((owner, name) for owner in _owners(who))
    owner, slash, short = name.partition("/")
    if slash:
        yield owner, short


def _split(path: str) -> tuple[str, str]:
    """A colon is a tag's only in the last segment."""
    start = path.rfind("/") + 1
    last, _, tag = path[start:].partition(":")
    return path[:start] + last, tag or DEFAULT_TAG


def _may_run(session: Session, who: Runs, image: Image) -> bool:
    """Also by where it is kept: a registered image may be elsewhere in the registry, and that has its own readers."""
    needed = {str(image.repository)}
    if image.reference.startswith(f"{who.host}/"):
        needed.add(image.reference.removeprefix(f"{who.host}/").partition("@")[0])
    return tags.readable(session, who.organization_id, who.slug, needed) == needed
