"""Rows of container images to test with: builds, the tags that they claim, and what they publish."""

import hashlib
import itertools
from datetime import timedelta
from typing import Any

from kiln.catalog import agents, attempts, builds, images, tags
from kiln.catalog.builds import NewBuild
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Agent, Image
from kiln.catalog.tags import TagRow
from kiln.models import (
    Api,
    BuiltImage,
    ContainerBuildSpec,
    OwnerType,
    RegistrationSpec,
    SourceNotes,
    Target,
    Visibility,
)
from kiln.ports import ContextFacts, ImageFacts
from support.rows import LEASE

HOST = "registry.test:5000"
HOUR = timedelta(hours=1)

_numbers = itertools.count(1)


def target(name: str = "app", tag: str = "v1", *, owner: str = "acme", **changes: Any) -> Target:
    """A tag in an organization's personal namespace."""
    return Target.model_validate({"owner_type": OwnerType.PERSONAL, "owner": owner, "name": name, "tag": tag} | changes)


def new_digest() -> str:
    return f"sha256:{hashlib.sha256(str(next(_numbers)).encode()).hexdigest()}"


def image_facts(digest: str = "", *platforms: str) -> ImageFacts:
    media_type = "application/vnd.oci.image.manifest.v1+json"
    return ImageFacts(digest or new_digest(), media_type, platforms or ("linux/amd64",), 4096)


def context_facts(sha256: str = "a" * 64) -> ContextFacts:
    return ContextFacts(size_bytes=512, sha256=sha256, members=2, unpacked_bytes=2048)


def add_agent(catalog: Catalog, organization_id: str, name: str = "scout") -> Agent:
    with catalog.transaction() as tx:
        return agents.ensure(tx, organization_id, name)


def new_container(
    organization_id: str, to: Target, api: Api = Api.CONTAINER_IMAGES, source: SourceNotes | None = None, **more: Any
) -> NewBuild:
    """A Dockerfile build; `more` are fields of NewBuild."""
    spec = ContainerBuildSpec(target=to, source=source or SourceNotes())
    return NewBuild(organization_id, api, spec, created_by="a-key", **more)


def add_container(catalog: Catalog, organization_id: str, to: Target | None = None, **more: Any) -> str:
    """The id of a new container build, `queued` unless it has an `upload_until`, whose tag is claimed."""
    to = to or target()
    with catalog.transaction() as tx:
        build = builds.insert(tx, new_container(organization_id, to, **more))
        tags.claim(tx, build, to)
        return build.id


def add_cloud_build(catalog: Catalog, organization_id: str, agent: str = "scout", **more: Any) -> str:
    """The id of a new build through cloud-builds, with its context."""
    with catalog.transaction() as tx:
        row = agents.ensure(tx, organization_id, agent)
        more = {"context": context_facts(), **more}
        new = new_container(organization_id, more.pop("to", target()), Api.CLOUD_BUILDS, agent=row, **more)
        return builds.insert(tx, new).id


def register(catalog: Catalog, organization_id: str, to: Target, facts: ImageFacts, at: str = "") -> str:
    """The id of a registration of an image that is at the tag's own place, or at `at` (host and repository)."""
    spec = RegistrationSpec(target=to, reference=f"{at or f'{HOST}/{to.repository}'}@{facts.digest}")
    with catalog.transaction() as tx:
        new = NewBuild(organization_id, Api.CLOUD_BUILDS, spec, created_by="a-key")
        return builds.insert_finished(tx, new, facts, HOST).build.id


def begin(catalog: Catalog, build_id: str) -> None:
    """Brings a build to where its first attempt's tool runs."""
    with catalog.transaction() as tx:
        attempts.claim(tx, build_id, "run-1")
        attempts.begin(tx, build_id, "worker", LEASE)
        attempts.tool_started(tx, build_id, 1, HOUR)


def begin_publication(catalog: Catalog, build_id: str, to: Target, facts: ImageFacts) -> Image:
    """Commits a build's image and its tag, as the publication's first half does."""
    with catalog.transaction() as tx:
        build = attempts.begin_publication(tx, build_id, 1)
        built = BuiltImage(image_id=facts.digest, region="", account=HOST, attempt=1)
        image = images.insert_container(tx, build, facts, built, HOST)
        tags.publish(tx, build, image, to)
        return image


def finish_publication(catalog: Catalog, build_id: str) -> None:
    with catalog.transaction() as tx:
        attempts.finish_publication(tx, build_id)


def publish(catalog: Catalog, build_id: str, to: Target, digest: str = "") -> Image:
    """Builds and publishes a queued build."""
    begin(catalog, build_id)
    image = begin_publication(catalog, build_id, to, image_facts(digest))
    finish_publication(catalog, build_id)
    return image


def published(catalog: Catalog, organization_id: str, to: Target, digest: str = "") -> Image:
    """The image of a new build that succeeded."""
    return publish(catalog, add_container(catalog, organization_id, to), to, digest)


def tag_row(catalog: Catalog, to: Target) -> TagRow | None:
    with catalog.read() as session:
        return tags.find(session, to.owner, to.name, to.tag)


def known_tag(catalog: Catalog, to: Target) -> TagRow:
    row = tag_row(catalog, to)
    assert row is not None
    return row


def public(name: str = "app", tag: str = "v1", **changes: Any) -> Target:
    """A tag that is asked to be PUBLIC."""
    return target(name, tag, visibility=Visibility.PUBLIC, **changes)
