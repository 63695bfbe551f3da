"""An organization that uses container-images, and the images that a test brings into its catalog and its registry."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx

from kiln.catalog import agents, attempts, builds, errands, images, tags
from kiln.catalog.builds import NewBuild
from kiln.catalog.tables import Organization, RegistryErrand
from kiln.models import Api, BuiltImage, ContainerBuildSpec, OwnerType, Target
from kiln.ports import ImageFacts, Manifest
from kiln.registry_tokens import RegistryTokens, make_key_file
from support.api_server import RunningApi, plain_client
from support.archives import context_archive
from support.oci_images import Made, Pusher, image
from support.registry import running_registry
from support.rows import LEASE
from support.tenants import TIME_LIMIT, Tenant

BUILD = "/api/v1/images/build"
IMAGES = "/api/v1/images"
UNKNOWN_ID = "550e8400-e29b-41d4-a716-446655440000"
ARCHIVE = context_archive({"main.py": b"print('ready')\n"})


class Owner(Tenant):
    """An organization with an admin's key, and `slug`, its personal namespace; `writer` sends a key that is no admin's."""

    def __init__(self, api: RunningApi) -> None:
        super().__init__(api)
        with api.catalog.read() as session:
            self.slug = session.get_one(Organization, self.organization_id).slug
        self.writer = plain_client(api.url, Authorization=f"Bearer {self.new_key('builds:write')}")

    def post(self, client: httpx.Client | None = None, **body: Any) -> httpx.Response:
        return (client or self.http).post(BUILD, json=body)

    def ordered(self, name: str = "app", tag: str = "v1", **body: Any) -> dict[str, Any]:
        """The answer to a build that waits for its context."""
        answer = self.post(image_name=name, image_tag=tag, **body)
        assert answer.status_code == 201, answer.text
        ordered: dict[str, Any] = answer.json()
        return ordered

    def put(self, url: str, archive: bytes | Iterator[bytes] = ARCHIVE) -> httpx.Response:
        """An upload as clients send it: without a key."""
        return self.api.http.put(url, content=archive, headers={"Content-Type": "application/octet-stream"})

    def start(self, build_id: str, body: Any = None) -> httpx.Response:
        return self.http.post(f"{BUILD}/{build_id}/start", json={"context_uploaded": True} if body is None else body)

    def status(self, build_id: str) -> dict[str, Any]:
        answer = self.http.get(f"{BUILD}/{build_id}")
        assert answer.status_code == 200, answer.text
        status: dict[str, Any] = answer.json()
        return status

    def page(self, client: httpx.Client | None = None, **query: Any) -> dict[str, Any]:
        answer = (client or self.http).get(IMAGES, params={"limit": 50, **query})
        assert answer.status_code == 200, answer.text
        page: dict[str, Any] = answer.json()
        return page

    def refs(self, **query: Any) -> list[str]:
        """The list's `displayRef`s without their owner."""
        return [row["displayRef"].partition("/")[2] for row in self.page(**query)["data"]]

    def patch(self, *updates: tuple[Any, Any], client: httpx.Client | None = None, **body: Any) -> httpx.Response:
        """PATCH of sources and what to set; a source that is a text is a reference."""
        said = [
            {"source": {"reference": source} if isinstance(source, str) else source, "set": changes}
            for source, changes in updates
        ]
        return (client or self.http).patch(IMAGES, json={"mode": "explicit", "updates": said, **body})

    def results(self, *updates: tuple[Any, Any], **body: Any) -> list[dict[str, Any]]:
        answer = self.patch(*updates, **body)
        assert answer.status_code == 200, answer.text
        results: list[dict[str, Any]] = answer.json()["results"]
        return results

    def target(self, name: str = "app", tag: str = "v1", **changes: Any) -> Target:
        """A tag of the personal namespace."""
        return Target(**{"owner_type": OwnerType.PERSONAL, "owner": self.slug, "name": name, "tag": tag, **changes})

    def waiting(self, to: Target | None = None, api: Api = Api.CONTAINER_IMAGES) -> str:
        """The id of a build in the queue, whose tag is claimed."""
        to = to or self.target()
        with self.catalog.transaction() as tx:
            agent = agents.ensure(tx, self.organization_id, "scout") if api is Api.CLOUD_BUILDS else None
            spec = ContainerBuildSpec(target=to)
            new = NewBuild(self.organization_id, api, spec, created_by="a-key", agent=agent)
            build = builds.insert(tx, new)
            tags.claim(tx, build, to)
            return build.id

    def running(self, to: Target | None = None, api: Api = Api.CONTAINER_IMAGES) -> str:
        """The id of a build whose tool runs."""
        build_id = self.waiting(to, api)
        with self.catalog.transaction() as tx:
            attempts.claim(tx, build_id, run_id=build_id)
            attempts.begin(tx, build_id, "a worker", LEASE)
            attempts.tool_started(tx, build_id, 1, TIME_LIMIT)
        return build_id

    def published(self, to: Target | None = None, made: Made | None = None, api: Api = Api.CONTAINER_IMAGES) -> str:
        """The id of a build that succeeded with this image; the registry is not told."""
        to, made = to or self.target(), made or image("an image")
        build_id = self.running(to, api)
        host = self.api.settings.registry_host
        facts = ImageFacts(made.digest, made.media_type, ("linux/amd64",), made.size_bytes)
        with self.catalog.transaction() as tx:
            build = attempts.begin_publication(tx, build_id, 1)
            built = BuiltImage(image_id=made.digest, region="", account=host, attempt=1)
            tags.publish(tx, build, images.insert_container(tx, build, facts, built, host), to)
            attempts.finish_publication(tx, build_id)
        return build_id

    def close(self) -> None:
        self.writer.close()
        super().close()


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and message of an error in container-images' shape, and in no other."""
    assert list(answer.json()) == ["detail"], answer.text
    return answer.status_code, answer.json()["detail"]


def waiting_errands(api: RunningApi, owner: str) -> list[RegistryErrand]:
    """What the registry has still to do for images below this owner."""
    with api.catalog.read() as session:
        found = errands.waiting(session, timedelta(0), 1000)
    return [row for row in found if row.repository.startswith(f"{owner}/")]


class KilnsRegistry:
    """A registry that takes Kiln's tokens, as an API's settings name it."""

    def __init__(self, host: str, key_file: Path) -> None:
        self.host = host
        self.key_file = key_file
        self.pusher = Pusher(host, RegistryTokens(key_file))

    def push(self, repository: str, tag: str, text: str = "an image") -> Made:
        """An image of its own, under this tag."""
        return self.pusher.push(repository, image(f"{repository} {text}"), tag)


class Keeper(Owner):
    """An organization whose published images are in the registry."""

    def __init__(self, api: RunningApi, registry: KilnsRegistry) -> None:
        super().__init__(api)
        self.registry = registry

    def image(self, name: str = "app", tag: str = "v1", text: str = "an image", **changes: Any) -> Made:
        """A published image."""
        to = self.target(name, tag, **changes)
        made = self.registry.push(to.repository, tag, text)
        self.published(to, made)
        return made

    def in_registry(self, repository: str, reference: str) -> Manifest | None:
        return self.api.parts.containers.registry.manifest(repository, reference)

    def digest(self, repository: str, tag: str) -> str | None:
        found = self.in_registry(repository, tag)
        return found.digest if found else None

    def listed(self, to: Target) -> bool:
        with self.catalog.read() as session:
            return tags.find(session, to.owner, to.name, to.tag) is not None


@contextmanager
def kilns_registry(folder: Path) -> Iterator[KilnsRegistry]:
    """Docker's registry with Kiln's key, until the block's end."""
    key_file = folder / "registry-token.pem"
    make_key_file(key_file)
    data = folder / "registry"
    data.mkdir()
    with running_registry(data, key_file, "http://127.0.0.1:1/registry/token") as host:
        registry = KilnsRegistry(host, key_file)
        try:
            yield registry
        finally:
            registry.pusher.close()
