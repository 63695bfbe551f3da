"""The adapters that a worker's activities work with: opened at its start, closed at its end."""

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from kiln.adapters.contexts import StoredContexts, open_contexts
from kiln.adapters.ec2 import Ec2Cloud
from kiln.adapters.log_book import StoreLogBook
from kiln.adapters.registry import KilnRegistry
from kiln.adapters.registry_public import AnonymousRegistries
from kiln.adapters.software import SoftwareCatalogue
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.machine_ledger import CatalogMachineLedger
from kiln.catalog.pod_ledger import CatalogPodLedger
from kiln.catalog.session import Catalog
from kiln.models import Claim
from kiln.registry_tokens import BuildCredentials, RegistryTokens
from kiln.sealing import Sealer
from kiln.settings import PROJECT_ROOT, Settings


@dataclass(frozen=True)
class Adapters:
    """What the activities of this process work with. `name` is this worker's, as leases and operators know it."""

    settings: Settings
    name: str
    catalog: Catalog
    ledger: CatalogLedger
    machines: CatalogMachineLedger
    pods: CatalogPodLedger
    shelf: SoftwareCatalogue
    cloud: Ec2Cloud
    logs: StoreLogBook
    registry: KilnRegistry
    contexts: StoredContexts
    credentials: BuildCredentials
    public: AnonymousRegistries


@contextlib.contextmanager
def open_adapters(settings: Settings) -> Iterator[Adapters]:
    """The adapters, closed at the end of the block. Raises KilnError with one line that names what is wrong."""
    sealer = Sealer(settings.secret_key)
    shelf = SoftwareCatalogue.load(PROJECT_ROOT / "packer" / "software.yaml")
    catalog = Catalog(settings.catalog_dsn)
    catalog.migrate()
    terms = Claim(
        mine=False, heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds, max_attempts=settings.max_attempts
    )
    cloud = Ec2Cloud(simulated=settings.simulated, endpoint_url=settings.ec2_url)
    logs = StoreLogBook(settings.logs_dsn)
    registry = KilnRegistry(settings.registry_host, RegistryTokens(settings.registry_key_file))
    public = AnonymousRegistries(settings.transfer_registries)
    name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    try:
        yield Adapters(
            settings=settings,
            name=name,
            catalog=catalog,
            ledger=CatalogLedger(catalog, sealer, terms),
            machines=CatalogMachineLedger(catalog),
            pods=CatalogPodLedger(catalog, sealer, lease=timedelta(seconds=settings.pod_lease_seconds)),
            shelf=shelf,
            cloud=cloud,
            logs=logs,
            registry=registry,
            contexts=open_contexts(settings),
            credentials=BuildCredentials(sealer),
            public=public,
        )
    finally:
        public.close()
        registry.close()
        logs.close()
        cloud.close()
        catalog.close()
