"""A worker: builds the adapters, injects them, runs the workers of the roles that it is given, and stops cleanly.

python worker.py --role control --role packer
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from temporalio.client import Client

from kiln.adapters.ec2 import Ec2Cloud
from kiln.adapters.runs import sweep_work_dir
from kiln.catalog import workers
from kiln.catalog.session import Catalog
from kiln.catalog.workers import PRESENCE_INTERVAL, Presence
from kiln.errors import KilnError, UnavailableError
from kiln.models import HouseTerms
from kiln.settings import Settings, SettingsError, load_settings
from kiln.temporal import connected_client, register_search_attributes
from worker_adapters import Adapters, open_adapters
from worker_roles import CONTROL_SLOTS, MACHINE_SLOTS, ROLES, queues_of, slots_of, usual_roles, workers_of
from worker_runner import RUNNER, run_runner, until_it_answers
from workflows.dispatch import Dispatcher
from workflows.start import SEARCH_ATTRIBUTES

# Beside what waits for EC2: leases, claims and logs, which must not queue behind it.
SPARE_THREADS = 64
# A pod's agent passes through the directories in which the runner writes of other pods.
RUNNER_UMASK = 0o077

log = logging.getLogger("kiln.worker")


async def run_worker(settings: Settings, roles: Sequence[str], stopping: asyncio.Event) -> None:
    """Serves the roles' queues until `stopping` is set. Raises KilnError."""
    with open_adapters(settings) as adapters, ThreadPoolExecutor(CONTROL_SLOTS, "activity") as pool:
        client = await until_it_answers(lambda: connected_client(settings, adapters.name), stopping)
        if client is None:
            return
        await register_search_attributes(client, SEARCH_ATTRIBUTES)
        sweep_work_dir(settings.runs_dir)
        temporal_workers = [worker for role in roles for worker in workers_of(role, adapters, client, pool)]
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
    terms = HouseTerms(pause_seconds=settings.house_seconds, rounds_a_sweep=rounds)
    return Dispatcher(adapters.ledger, client, terms, adapters.registry, machines=adapters.machines, pods=adapters.pods)


def _presence(adapters: Adapters, roles: Sequence[str], settings: Settings) -> Presence:
    queues = tuple(queue for role in roles for queue in queues_of(role, settings))
    slots = sum(slots_of(role, settings) for role in roles)
    return Presence(adapters.name, "+".join(roles), queues, slots)


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


def make_room(loop: asyncio.AbstractEventLoop) -> None:
    """Has the loop begin every blocking call at once: of its own, it has a few more threads than there are processors,
    and an EC2 that does not answer would soon hold them all. Threads come as they are needed."""
    loop.set_default_executor(ThreadPoolExecutor(MACHINE_SLOTS + SPARE_THREADS, "blocking"))


async def _main(settings: Settings, roles: Sequence[str], runner_name: str | None) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    make_room(loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    if RUNNER in roles:
        os.umask(RUNNER_UMASK)
        await run_runner(settings, runner_name, stopping)
    else:
        await run_worker(settings, roles, stopping)


def main() -> int:
    """The command line. Exit 1 with one line on standard error when something that the worker needs is missing."""
    told = _arguments()
    try:
        settings = load_settings()
        roles = _roles(told, settings)
        # A line a request would drown what the worker itself has to say.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        asyncio.run(_main(settings, roles, told.runner_name))
    except KilnError as error:
        print(f"kiln worker: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs a Kiln worker.")
    parser.add_argument(
        "--role",
        action="append",
        choices=(*ROLES, RUNNER),
        help="may be repeated, but for runner; by default all that this host can serve, but for runner",
    )
    parser.add_argument("--runner-name", metavar="NAME", help="the runner that KILN_RUNNER_TOKEN must be of")
    return parser.parse_args()


def _roles(told: argparse.Namespace, settings: Settings) -> list[str]:
    """Raises SettingsError."""
    roles = sorted(set(told.role or usual_roles(settings)))
    if RUNNER in roles and roles != [RUNNER]:
        raise SettingsError("--role runner stands alone: a runner sees neither catalog nor cloud")
    if told.runner_name is not None and RUNNER not in roles:
        raise SettingsError("--runner-name is for --role runner")
    return roles


if __name__ == "__main__":
    sys.exit(main())
