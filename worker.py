"""A worker: builds the adapters, injects them, runs the workers of the roles that it is given, and stops cleanly.

python worker.py --role control --role packer
"""

import argparse
import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from temporalio.client import Client
from temporalio.worker import Worker

from activities.cleanup import CleanupActivities
from activities.deletion import DeletionActivities
from activities.house import HouseActivities
from activities.interceptor import ErrorInterceptor
from activities.packer import PackerActivities
from activities.packer_attempt import PackerParts, PackerTerms
from activities.record import RecordActivities
from activities.verify import VerifyActivities
from kiln.adapters.ec2 import Ec2Cloud
from kiln.adapters.log_book import StoreLogBook
from kiln.adapters.packer import PackerPlace, PackerRuns, sweep_work_dir
from kiln.adapters.templates import Templates
from kiln.adapters.toolbox import GuardedToolbox
from kiln.catalog import workers
from kiln.catalog.ledger import CatalogLedger
from kiln.catalog.session import Catalog
from kiln.catalog.workers import PRESENCE_INTERVAL, Presence
from kiln.errors import KilnError, ToolMissingError, UnavailableError
from kiln.models import Claim, HouseTerms
from kiln.naming import CONTROL_QUEUE, PACKER_QUEUE
from kiln.sealing import Sealer
from kiln.settings import PROJECT_ROOT, Settings, load_settings
from kiln.temporal import connected_client, register_search_attributes
from workflows.dispatch import Dispatcher
from workflows.runner import WORKFLOWS, workflow_runner
from workflows.start import SEARCH_ATTRIBUTES

ROLES = ("control", "packer")
CONTROL_SLOTS = 20
CONNECT_PAUSE = timedelta(seconds=1)
# A cancel reaches an activity with the answer to a heartbeat: the SDK may hold those back for so long, no longer.
HEARTBEAT_THROTTLE = timedelta(seconds=1)
# Builds outlast any shutdown: they are interrupted soon, and taken up by another worker.
GRACEFUL_SHUTDOWN = timedelta(seconds=1)

log = logging.getLogger("kiln.worker")


@dataclass(frozen=True)
class Adapters:
    """What the activities of this process work with. `name` is this worker's, as leases and operators know it."""

    settings: Settings
    name: str
    catalog: Catalog
    ledger: CatalogLedger
    cloud: Ec2Cloud
    logs: StoreLogBook


@contextlib.contextmanager
def open_adapters(settings: Settings) -> Iterator[Adapters]:
    """The adapters, closed at the end of the block. Raises KilnError with one line that names what is wrong."""
    catalog = Catalog(settings.catalog_dsn)
    catalog.migrate()
    terms = Claim(
        mine=False, heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds, max_attempts=settings.max_attempts
    )
    cloud = Ec2Cloud(simulated=settings.simulated, endpoint_url=settings.ec2_url)
    logs = StoreLogBook(settings.logs_dsn)
    name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    try:
        ledger = CatalogLedger(catalog, Sealer(settings.secret_key), terms)
        yield Adapters(settings, name, catalog, ledger, cloud, logs)
    finally:
        logs.close()
        cloud.close()
        catalog.close()


def control_worker(adapters: Adapters, client: Client, pool: ThreadPoolExecutor) -> Worker:
    """Workflows, and the light activities: catalog and EC2."""
    ledger, cloud, logs = adapters.ledger, adapters.cloud, adapters.logs
    record, verify = RecordActivities(ledger, logs), VerifyActivities(ledger, cloud)
    cleanup = CleanupActivities(ledger, cloud, logs, adapters.settings.settle)
    deletion = DeletionActivities(ledger, cloud)
    house = HouseActivities(
        ledger=ledger,
        cloud=cloud,
        client=client,
        regions=adapters.settings.regions,
        sweep_grace=timedelta(seconds=adapters.settings.sweep_grace_seconds),
    )
    activities: list[Callable[..., Any]] = [
        record.claim,
        record.note_cancel,
        record.record_end,
        verify.publish,
        cleanup.clean_up,
        deletion.delete,
        house.find_lost_builds,
        house.observe_images,
        house.sweep,
    ]
    return Worker(
        client,
        task_queue=CONTROL_QUEUE,
        workflows=WORKFLOWS,
        activities=activities,
        activity_executor=pool,
        max_concurrent_activities=CONTROL_SLOTS,
        workflow_runner=workflow_runner(),
        interceptors=[ErrorInterceptor()],
        graceful_shutdown_timeout=GRACEFUL_SHUTDOWN,
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
    )


def packer_worker(adapters: Adapters, client: Client) -> Worker:
    """Packer builds, as many at once as there are slots."""
    settings = adapters.settings
    if shutil.which(settings.packer) is None:
        raise ToolMissingError(f"{settings.packer} is not installed: apt-get install packer, or set KILN_PACKER")
    parts = PackerParts(
        ledger=adapters.ledger,
        cloud=adapters.cloud,
        logs=adapters.logs,
        tools=GuardedToolbox(),
        kit=PackerRuns(_packer_place(adapters), Templates(PROJECT_ROOT / "packer", settings.template_dir)),
        terms=PackerTerms(
            limit=settings.packer_timeout,
            lease=settings.lease,
            grace=timedelta(seconds=settings.cancel_grace_seconds),
            capacity_delay=timedelta(seconds=settings.capacity_delay_seconds),
        ),
        holder=adapters.name,
        client=client,
    )
    return Worker(
        client,
        task_queue=PACKER_QUEUE,
        activities=[PackerActivities(parts).build],
        max_concurrent_activities=settings.packer_slots,
        # A worker that freezes keeps its open polls, and each of them swallows an attempt until its heartbeat is missed.
        max_concurrent_activity_task_polls=1,
        interceptors=[ErrorInterceptor()],
        graceful_shutdown_timeout=GRACEFUL_SHUTDOWN,
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
    )


def _packer_place(adapters: Adapters) -> PackerPlace:
    settings = adapters.settings
    work_dir = settings.runs_dir
    sweep_work_dir(work_dir)
    return PackerPlace(
        program=settings.packer,
        work_dir=work_dir,
        installation=adapters.ledger.installation,
        ec2_url=settings.ec2_url,
        name_prefix=settings.ami_name_prefix,
        subnet_id=settings.subnet_id,
        iam_instance_profile=settings.iam_instance_profile,
        communicator=settings.communicator,
        ssh_cidr=settings.ssh_cidr,
        ca_bundle=settings.ca_bundle,
    )


async def run_worker(settings: Settings, roles: Sequence[str], stopping: asyncio.Event) -> None:
    """Serves the roles' queues until `stopping` is set. Raises KilnError."""
    with open_adapters(settings) as adapters, ThreadPoolExecutor(CONTROL_SLOTS, "activity") as pool:
        client = await _connect(settings, adapters.name, stopping)
        if client is None:
            return
        await register_search_attributes(client, SEARCH_ATTRIBUTES)
        temporal_workers = _workers_of(roles, adapters, client, pool)
        await asyncio.to_thread(_warm_up, adapters.cloud, settings)
        presence = _presence(adapters, roles, settings)
        async with asyncio.TaskGroup() as group:
            extras = [group.create_task(_note_presence(adapters.catalog, presence))]
            if "control" in roles:
                extras.append(group.create_task(_dispatcher(adapters, client).run()))
            for worker in temporal_workers:
                group.create_task(worker.run())
            log.info("serving %s as %s", ", ".join(presence.queues), adapters.name)
            await stopping.wait()
            log.info("stopping")
            for extra in extras:
                extra.cancel()
            await asyncio.gather(*(worker.shutdown() for worker in temporal_workers))
        await asyncio.to_thread(_leave, adapters.catalog, adapters.name)


def _workers_of(roles: Sequence[str], adapters: Adapters, client: Client, pool: ThreadPoolExecutor) -> list[Worker]:
    made = []
    if "control" in roles:
        made.append(control_worker(adapters, client, pool))
    if "packer" in roles:
        made.append(packer_worker(adapters, client))
    return made


async def _connect(settings: Settings, name: str, stopping: asyncio.Event) -> Client | None:
    """A connected client; None if the worker is stopped before Temporal answers."""
    said = False
    while not stopping.is_set():
        try:
            return await connected_client(settings, name)
        except UnavailableError as error:
            if not said:
                log.warning("%s; trying again until it does", error)
            said = True
            await asyncio.sleep(CONNECT_PAUSE.total_seconds())
    return None


def _warm_up(cloud: Ec2Cloud, settings: Settings) -> None:
    """boto3 takes its time over EC2's model; better now than in the first build."""
    for region in settings.regions:
        try:
            cloud.warm_up(region)
        except KilnError as error:
            log.warning("EC2 in %s: %s", region, error)


def _dispatcher(adapters: Adapters, client: Client) -> Dispatcher:
    settings = adapters.settings
    rounds = max(1, round(settings.sweep_seconds / settings.house_seconds))
    return Dispatcher(adapters.ledger, client, HouseTerms(pause_seconds=settings.house_seconds, rounds_a_sweep=rounds))


def _presence(adapters: Adapters, roles: Sequence[str], settings: Settings) -> Presence:
    queues = {"control": CONTROL_QUEUE, "packer": PACKER_QUEUE}
    slots = settings.packer_slots if "packer" in roles else 0
    return Presence(adapters.name, "+".join(roles), tuple(queues[role] for role in roles), slots)


async def _note_presence(catalog: Catalog, presence: Presence) -> None:
    while True:
        try:
            await asyncio.to_thread(_note, catalog, presence)
        except UnavailableError as error:
            log.warning("%s", error)
        await asyncio.sleep(PRESENCE_INTERVAL.total_seconds())


def _note(catalog: Catalog, presence: Presence) -> None:
    with catalog.transaction() as tx:
        workers.note(tx, presence)


def _leave(catalog: Catalog, name: str) -> None:
    with contextlib.suppress(UnavailableError), catalog.transaction() as tx:
        workers.leave(tx, name)


async def _main(settings: Settings, roles: Sequence[str]) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await run_worker(settings, roles, stopping)


def main() -> int:
    """The command line. Exit 1 with one line on standard error when something that the worker needs is missing."""
    parser = argparse.ArgumentParser(description="Runs a Kiln worker.")
    parser.add_argument("--role", action="append", choices=ROLES, help="may be repeated; all roles by default")
    roles = parser.parse_args().role or list(ROLES)
    try:
        settings = load_settings()
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        asyncio.run(_main(settings, sorted(set(roles))))
    except KilnError as error:
        print(f"kiln worker: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
