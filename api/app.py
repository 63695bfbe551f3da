"""The API's parts, and the application over them with every contract mounted."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from api import builds, health, machine_images
from api.deps import Parts
from api.errors import install_error_handlers
from api.limits import rate_limit
from api.openapi import describe_bodies
from kiln import __version__
from kiln.adapters.log_book import LogReader
from kiln.adapters.objects import DirectoryStore
from kiln.adapters.templates import Templates
from kiln.catalog.session import Catalog
from kiln.naming import DEFAULT_TEMPLATE
from kiln.sealing import Sealer
from kiln.settings import PROJECT_ROOT, Settings
from kiln.temporal import lazy_client

DESCRIPTION = "Durable machine-image builds: Packer driven by Temporal."
TAGS = [
    {"name": "machine-images", "description": "AMIs built with Packer."},
    {"name": "kiln", "description": "Builds of every kind through one lens."},
    {"name": "operations", "description": "Probes and metrics, without a key."},
]


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
    for module in (machine_images, builds, health):
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
        await asyncio.to_thread(parts.catalog.close)


async def _make_parts(settings: Settings) -> Parts:
    # What only the settings can spoil comes before anything is written.
    sealer = Sealer(settings.secret_key)
    build_limit = rate_limit(settings.machine_build_rate)
    catalog = Catalog(settings.catalog_dsn)
    await asyncio.to_thread(catalog.migrate)
    templates = Templates(PROJECT_ROOT / "packer", settings.template_dir)
    await asyncio.to_thread(templates.find, DEFAULT_TEMPLATE)  # parsed now rather than at the first request
    return Parts(
        settings=settings,
        catalog=catalog,
        logs=await asyncio.to_thread(LogReader, settings.logs_dsn),
        objects=DirectoryStore(settings.home_dir / "objects"),
        temporal=await lazy_client(settings),
        templates=templates,
        sealer=sealer,
        build_limit=build_limit,
    )
