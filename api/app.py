"""The API's parts, and the application over them with every contract mounted."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from fastapi import FastAPI

from api import (
    builds,
    cloud_builds,
    container_images,
    health,
    machine_images,
    organization_images,
    organization_machines,
    pods,
    registry_token,
    runner_calls,
    runners,
)
from api.deps import Containers, Parts
from api.errors import install_error_handlers
from api.limits import container_limits, pod_limit, rate_limit
from api.openapi import describe_bodies
from kiln import __version__
from kiln.adapters.contexts import open_contexts
from kiln.adapters.git_remote import GitRemotes
from kiln.adapters.log_book import LogReader
from kiln.adapters.registry import KilnRegistry
from kiln.adapters.registry_public import AnonymousRegistries
from kiln.adapters.software import SoftwareCatalogue
from kiln.adapters.templates import Templates
from kiln.catalog.pod_ledger import CatalogPodLedger
from kiln.catalog.session import Catalog
from kiln.naming import DEFAULT_TEMPLATE
from kiln.registry_tokens import BuildCredentials, PodCredentials, RegistryTokens
from kiln.sealing import Sealer
from kiln.settings import PROJECT_ROOT, Settings
from kiln.temporal import lazy_client

DESCRIPTION = "Durable builds of machine and container images: Packer and BuildKit driven by Temporal."
TAGS = [
    {"name": "machine-images", "description": "AMIs built with Packer."},
    {"name": "container-images", "description": "Container images, built from Dockerfiles or copied."},
    {"name": "cloud-builds", "description": "Container images, built from uploaded archives."},
    {"name": "organization-images", "description": "Images of an organization's machines, and the machines."},
    {"name": "pods", "description": "Agents at work on runners."},
    {"name": "runners", "description": "Kiln's own: what runners of agent pods ask and report."},
    {"name": "registry", "description": "The tokens that open the image registry."},
    {"name": "kiln", "description": "Builds of every kind through one lens."},
    {"name": "operations", "description": "Probes and metrics, without a key."},
]
# Requests whose signature is checked at the same time, where the catalog takes several writers.
SIGNERS = 4


def create_app(parts: Parts) -> FastAPI:
    """The ASGI application over these parts, which outlive it."""
    app = FastAPI(
        title="Kiln",
        version=__version__,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.parts = parts
    install_error_handlers(app)
    # container_images stands before machine_images: its paths are longer, and would else be taken for an AMI's id.
    images = (container_images, machine_images, cloud_builds, organization_images, organization_machines)
    for module in (*images, pods, runners, builds, runner_calls, registry_token, health):
        app.include_router(module.router)
    describe_bodies(app, parts)
    return app


@asynccontextmanager
async def open_parts(settings: Settings) -> AsyncIterator[Parts]:
    """Everything that requests use, closed at the block's end. Raises KilnError with one line that says what is missing."""
    parts = await _make_parts(settings)
    try:
        yield parts
    finally:
        parts.closing.set()
        await parts.logs.aclose()
        await asyncio.to_thread(parts.containers.registry.close)
        await asyncio.to_thread(parts.catalog.close)


async def _make_parts(settings: Settings) -> Parts:
    # What only the settings can spoil comes before anything is written.
    sealer = Sealer(settings.secret_key)
    build_limit = rate_limit(settings.machine_build_rate)
    limits = container_limits(settings)
    new_pods = pod_limit(settings)
    containers = _containers(settings, sealer)
    catalog = Catalog(settings.catalog_dsn)
    await asyncio.to_thread(catalog.migrate)
    software = await asyncio.to_thread(SoftwareCatalogue.load, PROJECT_ROOT / "packer" / "software.yaml")
    templates = Templates(PROJECT_ROOT / "packer", settings.template_dir)
    await asyncio.to_thread(templates.find, DEFAULT_TEMPLATE)  # parsed now rather than at the first request
    return Parts(
        settings=settings,
        catalog=catalog,
        logs=await asyncio.to_thread(LogReader, settings.logs_dsn),
        contexts=open_contexts(settings),
        containers=containers,
        temporal=await lazy_client(settings),
        templates=templates,
        software=software,
        sealer=sealer,
        pods=_pods(settings, catalog, sealer),
        remotes=GitRemotes(),
        build_limit=build_limit,
        container_limits=limits,
        pod_limit=new_pods,
        signers=asyncio.Semaphore(1 if catalog.writes_one_by_one else SIGNERS),
    )


def _pods(settings: Settings, catalog: Catalog, sealer: Sealer) -> CatalogPodLedger:
    lease, retention = timedelta(seconds=settings.pod_lease_seconds), timedelta(days=settings.sandbox_days)
    return CatalogPodLedger(catalog, sealer, lease, retention=retention)


def _containers(settings: Settings, sealer: Sealer) -> Containers:
    tokens = RegistryTokens(settings.registry_key_file)
    return Containers(
        registry=KilnRegistry(settings.registry_host, tokens),
        public=AnonymousRegistries(settings.transfer_registries),
        tokens=tokens,
        credentials=BuildCredentials(sealer),
        pod_credentials=PodCredentials(sealer),
        off=settings.containers_off if settings.containers else "KILN_CONTAINERS says so",
    )
