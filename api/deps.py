"""What every request may use: made once by `app.py`, reached through FastAPI's dependencies."""

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from fastapi import Depends, Request
from temporalio.client import Client

from api.limits import RateLimit
from kiln.catalog.session import Catalog
from kiln.ports import LogReading, TemplateShelf
from kiln.sealing import Sealer
from kiln.settings import Settings


class Pinged(Protocol):
    """A part that can say whether it answers. Raises UnavailableError."""

    def ping(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """The API's parts. `closing` is set when the server stops: live streams end then."""

    settings: Settings
    catalog: Catalog
    logs: LogReading
    objects: Pinged
    temporal: Client
    templates: TemplateShelf
    sealer: Sealer
    build_limit: RateLimit
    closing: asyncio.Event = field(default_factory=asyncio.Event)


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


P = Annotated[Parts, Depends(_parts)]
