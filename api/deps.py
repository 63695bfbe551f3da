"""What every request may use: made once by `app.py`, reached through FastAPI's dependencies."""

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from temporalio.client import Client

from api.limits import ContainerLimits, RateLimit
from kiln.catalog.session import Catalog
from kiln.errors import UnavailableError
from kiln.ports import Contexts, LogReading, PublicRegistries, Registry, SoftwareShelf, TemplateShelf
from kiln.ports.pods import PodLedger, Remotes
from kiln.registry_tokens import BuildCredentials, PodCredentials, RegistryTokens
from kiln.sealing import Sealer
from kiln.settings import Settings


@dataclass(frozen=True)
class Containers:
    """What container images need. `off` is the reason why this server builds none, in one sentence; "" if it does."""

    registry: Registry
    public: PublicRegistries
    tokens: RegistryTokens
    credentials: BuildCredentials
    pod_credentials: PodCredentials
    off: str = ""

    def require(self) -> None:
        """Raises UnavailableError with the reason where container builds are off."""
        if self.off:
            raise UnavailableError(f"container builds are off: {self.off}")


@dataclass(frozen=True)
class Parts:
    """The API's parts. `closing` is set when the server stops: live streams end then.

    `signers` is held while a request's signature is checked: each such check writes a row, and those that wait for the
    one writer of SQLite must not take the threads of requests that only read.
    """

    settings: Settings
    catalog: Catalog
    logs: LogReading
    contexts: Contexts
    containers: Containers
    temporal: Client
    templates: TemplateShelf
    software: SoftwareShelf
    sealer: Sealer
    pods: PodLedger
    remotes: Remotes
    build_limit: RateLimit
    container_limits: ContainerLimits
    pod_limit: RateLimit
    signers: asyncio.Semaphore
    closing: asyncio.Event = field(default_factory=asyncio.Event)


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


P = Annotated[Parts, Depends(_parts)]
