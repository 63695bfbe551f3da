"""The role `runner`: keeps the agents of this host, and serves the runner's own queue.

It opens no catalog, no log store and no cloud: all that it knows, it hears from Kiln's API and from Temporal.
"""

import asyncio
import fcntl
import logging
import os
import platform
import pwd
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from temporalio.client import Client
from temporalio.worker import Worker

from activities.interceptor import ErrorInterceptor
from activities.pod_keeper import PodKeeper
from activities.pod_run import Gate, Lease, PodParts
from activities.pod_tasks import beside, race
from activities.pods import PodActivities
from kiln import __version__
from kiln.adapters.agent_commands import available_agents
from kiln.adapters.pod_places import HostPlaces
from kiln.adapters.runner_api import HttpRunnerApi
from kiln.adapters.sandbox_container import ContainerSandboxes
from kiln.adapters.sandbox_files import make_passable
from kiln.adapters.sandboxes import HostSandboxes, SandboxTerms
from kiln.adapters.shims import HostShims
from kiln.errors import UnavailableError
from kiln.models import CONTAINER_LIMIT
from kiln.naming import runner_queue
from kiln.ports.pods import HostReport, KnownToKiln
from kiln.settings import Settings, SettingsError
from kiln.temporal import connected_client
from worker_roles import GRACEFUL_SHUTDOWN, HEARTBEAT_THROTTLE

RUNNER = "runner"
PAUSE = timedelta(seconds=1)
# A process that was killed may have had a child that is about to become something else.
LOCK_PATIENCE = timedelta(seconds=2)
MEGABYTE = 1024 * 1024

log = logging.getLogger("kiln.runner")
T = TypeVar("T")


@dataclass(frozen=True)
class Host:
    """What this host has of pods."""

    shims: HostShims
    sandboxes: HostSandboxes
    containers: ContainerSandboxes
    places: HostPlaces


async def run_runner(settings: Settings, name: str | None, stopping: asyncio.Event) -> None:
    """Serves as the runner of KILN_RUNNER_TOKEN until `stopping` is set; its agents live on. Raises KilnError."""
    if not settings.runner_token:
        raise SettingsError("KILN_RUNNER_TOKEN: the role runner needs a runner's token (kiln runners create NAME)")
    # It would tell of each call, of which there are many a second.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with _own_directory(settings.pods_dir):
        host = _host(settings)
        report = await asyncio.to_thread(_report, settings, host, name)
        async with _api(settings, report.incarnation) as api:
            known = await until_it_answers(lambda: api.register(report), stopping)
            if known is None:
                return
            await _sweep(host)
            keeper = _keeper(settings, host, api, known)
            async with beside(keeper.serve()):
                log.info("keeping pods in %s as the runner %s", settings.pods_dir, known.name)
                await _serve_queue(settings, keeper, known, stopping)


async def until_it_answers(call: Callable[[], Awaitable[T]], stopping: asyncio.Event) -> T | None:
    """What the call returns, once it does; None if this process is stopped before. That it does not is said once."""

    async def ask() -> T:
        return await call()

    said = False
    while not stopping.is_set():
        try:
            return await race(ask(), stopping)
        except UnavailableError as error:
            if not said:
                log.warning("%s; trying again until it does", error)
            said = True
        with suppress(TimeoutError):
            async with asyncio.timeout(PAUSE.total_seconds()):
                await stopping.wait()
    return None


async def _serve_queue(settings: Settings, keeper: PodKeeper, known: KnownToKiln, stopping: asyncio.Event) -> None:
    identity = f"runner-{known.name}-{socket.gethostname()}-{os.getpid()}"
    client = await until_it_answers(lambda: connected_client(settings, identity), stopping)
    if client is not None:
        async with _worker(client, known, keeper, settings.runner_places):
            log.info("serving %s", runner_queue(known.runner_id))
            await stopping.wait()
            log.info("stopping; agents are left alive")


def _worker(client: Client, known: KnownToKiln, keeper: PodKeeper, places: int) -> Worker:
    return Worker(
        client,
        task_queue=runner_queue(known.runner_id),
        activities=[PodActivities(keeper).run],
        max_concurrent_activities=places,
        # What a dead process still asked for is kept from the next one until a heartbeat is missed.
        max_concurrent_activity_task_polls=1,
        interceptors=[ErrorInterceptor()],
        graceful_shutdown_timeout=GRACEFUL_SHUTDOWN,
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
    )


def _keeper(settings: Settings, host: Host, api: HttpRunnerApi, known: KnownToKiln) -> PodKeeper:
    parts = PodParts(
        api=api,
        shims=host.shims,
        sandboxes=host.sandboxes,
        places=host.places,
        gate=Gate(settings.runner_places),
        lease=Lease(known.lease_seconds),
    )
    return PodKeeper(parts, known.beat_seconds)


@asynccontextmanager
async def _api(settings: Settings, incarnation: str) -> AsyncIterator[HttpRunnerApi]:
    api = HttpRunnerApi(settings.api_url or settings.base_url, settings.runner_token, incarnation)
    try:
        yield api
    finally:
        await api.aclose()


@contextmanager
def _own_directory(directory: Path) -> Iterator[None]:
    """Makes the directory, and keeps other processes off it. Raises SettingsError."""
    try:
        make_passable(directory)
        make_passable(directory / "pods")
        file = (directory / "lock").open("a")
    except OSError as error:
        raise SettingsError(f"KILN_RUNNER_DIR: {directory} cannot be used: {error.strerror}") from error
    with file:
        _lock(file.fileno(), directory)
        yield


def _lock(descriptor: int, directory: Path) -> None:
    until = time.monotonic() + LOCK_PATIENCE.total_seconds()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise SettingsError(f"another runner's process has its pods in {directory} (KILN_RUNNER_DIR)") from None
            time.sleep(0.05)
        else:
            return


def _host(settings: Settings) -> Host:
    terms = SandboxTerms(
        root=settings.pods_dir,
        uids=_user_ids(settings.agent_uids),
        memory_mb=settings.pod_memory_mb,
        processes=settings.pod_processes,
        cpus=settings.pod_cpus,
        grace_seconds=settings.pod_grace_seconds,
        lease_seconds=settings.pod_lease_seconds,
        engine=settings.runner_engine,
        path=settings.agent_path,
    )
    root = settings.pods_dir / "pods"
    shims, containers = HostShims(root), ContainerSandboxes(terms)
    return Host(shims, HostSandboxes(terms, containers), containers, HostPlaces(root, shims))


def _user_ids(setting: str) -> range:
    first, last = setting.split("-")
    return range(int(first), int(last) + 1)


async def _sweep(host: Host) -> None:
    """Ends containers of pods that have nobody to look after them: whose shim died, or whose directory is gone."""
    living = {key for key in host.places.keys() if (shim := host.shims.find(key)) and shim.is_alive()}  # noqa: SIM118
    try:
        await host.containers.sweep(frozenset(living))
    except OSError as error:
        log.info("no containers: %s", error)


def _report(settings: Settings, host: Host, runner_name: str | None) -> HostReport:
    engine_limits = (f"{CONTAINER_LIMIT}{name}" for name in host.containers.limits())
    return HostReport(
        name=socket.gethostname(),
        incarnation=str(uuid.uuid4()),
        max_concurrent_pods=settings.runner_places,
        allows_custom_commands=settings.runner_custom_commands,
        available_agents=available_agents(settings.agent_path),
        limits=sorted({*host.shims.limits(), *host.sandboxes.limits(), *engine_limits}),
        host_info=_host_info(),
        runner_name=runner_name,
    )


def _host_info() -> dict[str, str]:
    return {
        "os": _os_name(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "memory_mb": str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEGABYTE),
        "kiln": __version__,
        "user": _user_name(),
        "pid": str(os.getpid()),
    }


def _os_name() -> str:
    with suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    return platform.system()


def _user_name() -> str:
    with suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return str(os.geteuid())
