"""The workflows of container images with a real registry, real build contexts, and tools that play scripts."""

import os
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from temporalio.client import Client
from temporalio.worker import Worker

from activities.agent_attempt import AgentParts
from activities.attempt import AttemptTerms
from activities.container_attempt import ContainerParts, TransferParts
from activities.containers import ContainerActivities, TransferActivities
from activities.context import ContextActivities
from activities.house import HouseActivities
from activities.interceptor import ErrorInterceptor
from activities.publication import PublicationActivities
from activities.record import RecordActivities
from kiln.adapters.agent_images import AgentImagePlace, AgentImageRuns
from kiln.adapters.buildx import BuildxPlace, BuildxRuns
from kiln.adapters.contexts import StoredContexts
from kiln.adapters.objects import DirectoryStore
from kiln.adapters.registry import KilnRegistry
from kiln.adapters.registry_public import AnonymousRegistries
from kiln.adapters.skopeo import SkopeoPlace, SkopeoRuns
from kiln.catalog import builds, contexts, tags
from kiln.catalog.builds import NewBuild
from kiln.catalog.session import Catalog
from kiln.models import (
    AgentInstall,
    Api,
    BuildRef,
    ContainerBuildSpec,
    HouseTerms,
    Provider,
    Target,
    TransferSpec,
)
from kiln.naming import (
    STAGING_OWNER,
    TRANSFER_QUEUE,
    build_of_context,
    container_queue,
    context_key,
    staging_repository,
)
from kiln.ports import ContextFacts, Order
from kiln.registry_tokens import RegistryTokens
from kiln.settings import PROJECT_ROOT
from support.archives import LIMITS, context_archive
from support.container_rows import add_container, known_tag, target
from support.container_tools import ContainerToolbox, FakeEngines
from support.harness import GRACEFUL, HEARTBEAT_TIMEOUT, SECRET_NAME, THROTTLE, Harness
from support.oci_images import Pusher
from support.rows import REGION, make_older
from support.troubled_registry import RegistrySite, TroubledRegistry
from workflows.start import start_house_keeping

PLATFORM = "linux/amd64"
# The operator lets transfers come from here; no name is looked up for it.
PUBLIC_HOST = "public.test"
# Long enough ago for the house-keeping to ask where a build is, and what an old context is of.
LONG_AGO = timedelta(hours=3)
EVERY_ROUND = HouseTerms(pause_seconds=0.2, rounds_a_sweep=1)


class ContainerHarness(Harness):
    """What a test of container images works with. `target` is this test's own tag."""

    def __init__(self, client: Client, catalog: Catalog, folder: Path, site: RegistrySite, *, skips_time: bool) -> None:
        super().__init__(client, catalog, folder, skips_time=skips_time)
        self._site = site
        tokens = RegistryTokens(site.key_file)
        self.there = KilnRegistry(site.host, tokens)
        self.registry = TroubledRegistry(self.there)
        self.pusher = Pusher(site.host, tokens)
        self.tools = ContainerToolbox(self.pusher)
        self.engines = FakeEngines()
        self.public = AnonymousRegistries([PUBLIC_HOST])
        self.objects = folder / "objects"
        self.store = DirectoryStore(self.objects)
        self.contexts = StoredContexts(self.store, LIMITS)
        self.runs_dir = folder / "runs"
        self.target: Target = target(f"app-{uuid.uuid4().hex[:12]}")

    def close(self) -> None:
        self.public.close()
        self.registry.close()
        self.pusher.close()
        super().close()

    # Builds

    def order(self, *, secret: str = "", to: Target | None = None, **more: Any) -> str:
        """The row of a Dockerfile build whose context came with it."""
        build_id = str(uuid.uuid4())
        more = {"context": self.receive(build_id), "secrets": self._sealed(secret), **more}
        return add_container(self.catalog, self.organization, to or self.target, id=build_id, **more)

    def order_transfer(self, host: str = PUBLIC_HOST) -> str:
        spec = TransferSpec(target=self.target, reference=f"{host}/library/tool:v1")
        with self.catalog.transaction() as tx:
            build = builds.insert(tx, NewBuild(self.organization, Api.CONTAINER_IMAGES, spec, created_by="a-key"))
            tags.claim(tx, build, self.target)
            return build.id

    async def submit_agent(self, base_image: str = "") -> str:
        """A build of the newest codex, started, on a public image unless on another."""
        reference = base_image or f"{PUBLIC_HOST}/library/debian:v1"
        agent = AgentInstall(provider=Provider.CODEX, base_image=reference)
        spec = ContainerBuildSpec(target=self.target, agent=agent)
        with self.catalog.transaction() as tx:
            build = builds.insert(tx, NewBuild(self.organization, Api.CONTAINER_IMAGES, spec, created_by="a-key"))
            tags.claim(tx, build, self.target)
        await self.start(build.id)
        return build.id

    async def awaits_context(self, patience: timedelta = timedelta(hours=1), *, secret: str = "") -> str:
        """A build whose workflow waits for its context."""
        until = datetime.now(UTC) + patience
        build = add_container(
            self.catalog, self.organization, self.target, upload_until=until, secrets=self._sealed(secret)
        )
        await self.start(build)
        return build

    def _sealed(self, secret: str) -> bytes | None:
        return self.sealer.seal({SECRET_NAME: secret}) if secret else None

    def ref(self, build_id: str) -> BuildRef:
        brief = self.ledger.build_of(build_id)
        assert brief is not None
        return brief.ref

    # Contexts

    def receive(self, build_id: str, content: bytes | None = None) -> ContextFacts:
        """An upload through Kiln, which checks it; the catalog does not know of it yet."""
        upload = self.contexts.receive(context_key(build_id), "Dockerfile")
        upload.write(content or context_archive())
        return upload.commit()

    def put(self, build_id: str, content: bytes) -> None:
        """An object that comes past Kiln, as to a bucket."""
        writer = self.store.begin(context_key(build_id))
        writer.write(content)
        writer.commit()

    def age(self, build_id: str) -> None:
        """Makes a context an old one, be it whole or still coming in."""
        then = (datetime.now(UTC) - LONG_AGO).timestamp()
        for path in (self.objects / context_key(build_id)).parent.glob(f"{build_id}*"):
            os.utime(path, (then, then))

    def start_in_the_catalog(self, build_id: str) -> bool:
        """What the API's `start` writes."""
        with self.catalog.transaction() as tx:
            return contexts.start(tx, build_id, None)

    async def announce(self, build_id: str) -> None:
        await self.handle(build_id).signal("context_uploaded")

    @property
    def kept_contexts(self) -> set[str]:
        """The builds whose context is in the object store."""
        return {build_of_context(key) for key in self.store.stale(timedelta(0))}

    # What is where

    def staged(self, build_id: str) -> list[str]:
        return self.there.tags(staging_repository(build_id))

    def leftovers(self, build_id: str) -> list[str]:
        """What there still is of a build that is over, besides its image."""
        left = self._site.manifests(staging_repository(build_id))
        runs = [path.name for path in self.runs_dir.iterdir()] if self.runs_dir.exists() else []
        return [*self.staged(build_id), *left, *runs, *(self.kept_contexts & {build_id})]

    def kept_aside(self) -> list[str]:
        """Manifests of which errands keep a copy."""
        return self._site.manifests(f"{STAGING_OWNER}/errand-*")

    def pulled(self, to: Target | None = None) -> str | None:
        """The digest that the registry gives for a tag."""
        to = to or self.target
        found = self.there.manifest(to.repository, to.tag)
        return found.digest if found else None

    def tagged(self, to: Target | None = None) -> str | None:
        """The digest that the catalog has for a tag."""
        return known_tag(self.catalog, to or self.target).tag.digest

    # House-keeping

    async def lose(self, build_id: str) -> None:
        """Somebody terminates the build's workflow, and it is time to ask where the build is."""
        make_older(self.catalog, build_id, LONG_AGO)
        await self.handle(build_id).terminate()

    async def keep_house(self, rounds: int = 2) -> None:
        """Lets so many whole rounds pass, each with a sweep."""
        await start_house_keeping(self.client, EVERY_ROUND)
        wanted = self.finished["sweep"] + rounds

        async def have_passed() -> bool:
            return self.finished["sweep"] >= wanted

        await self.until(have_passed)

    # Workers

    def _light_activities(self) -> list[Callable[..., Any]]:
        record = RecordActivities(self.ledger, self.logs)
        publication = PublicationActivities(self.ledger, self.registry, self.contexts, self.logs, timedelta(0))
        house = HouseActivities(
            ledger=self.ledger,
            cloud=self.cloud,
            client=self.client,
            regions=(REGION,),
            contexts=self.contexts,
            sweep_grace=timedelta(0),
        )
        return [
            *(record.claim, record.note_cancel, record.record_end, publication.publish, publication.clean_up),
            ContextActivities(self.ledger, self.contexts).accept,
            *(house.find_lost_builds, house.observe_images, house.sweep),
            *self._machine_house(),
        ]

    def builder_of(self, client: Client, name: str) -> Worker:
        place = BuildxPlace(("docker", "buildx"), self.runs_dir, self.registry.host, docker_config=self.runs_dir.parent)
        kit = BuildxRuns(place, credential)
        parts = ContainerParts(kit=kit, engines=self.engines, contexts=self.contexts, **self._parts(client, name))
        agent_place = AgentImagePlace("packer", PROJECT_ROOT / "packer", self.runs_dir, self.registry.host)
        agent_kit = AgentImageRuns(agent_place, credential)
        agents = AgentParts(kit=agent_kit, engines=self.engines, public=self.public, **self._parts(client, name))
        return self._worker(client, container_queue(PLATFORM), ContainerActivities(parts, agents).build)

    @asynccontextmanager
    async def transferrer(self) -> AsyncIterator[None]:
        """A worker that runs skopeo."""
        kit = SkopeoRuns(SkopeoPlace("skopeo", self.runs_dir, self.registry.host), credential)
        parts = TransferParts(kit=kit, public=self.public, **self._parts(self.client, "worker-1"))
        async with self._worker(self.client, TRANSFER_QUEUE, TransferActivities(parts).transfer):
            yield

    def _parts(self, client: Client, name: str) -> dict[str, Any]:
        terms = AttemptTerms(limit=self.limit, lease=HEARTBEAT_TIMEOUT * 0.8, grace=timedelta(seconds=5))
        return {
            "ledger": self.ledger,
            "logs": self.logs,
            "tools": self.tools,
            "terms": terms,
            "holder": name,
            "client": client,
            "registry": self.registry,
        }

    def _worker(self, client: Client, queue: str, activity: Callable[..., Any]) -> Worker:
        return Worker(
            client,
            task_queue=queue,
            activities=[activity],
            interceptors=[ErrorInterceptor()],
            graceful_shutdown_timeout=GRACEFUL,
            max_heartbeat_throttle_interval=THROTTLE,
        )


def credential(order: Order) -> str:
    """The password of a build's tools, which log in nowhere."""
    return f"of {order.build_id}"
