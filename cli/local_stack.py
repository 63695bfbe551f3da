"""The embedded stack: Temporal, a simulated EC2, registry and engines, workers, a runner and the API as child processes."""

import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from cli.agents import end_agents, living_agents
from cli.checks import check_answers, check_objects, check_packer, check_ports
from cli.engines import ContainerPlan, plan_containers
from cli.home import (
    FirstKey,
    LocalRunner,
    check_home_is_free,
    first_key,
    leave_no_folder,
    local_runner,
    locked_home,
    open_catalog,
    prepare_home,
    secret_key,
)
from cli.parts import ALL_ROLES, PartFactory, TemporalPlace, configured_temporal, outside_ec2
from cli.places import api_url, log_file
from cli.registry_part import prepare_registry
from cli.supervisor import InterruptedStartError, Part, PartFailedError, Supervisor
from kiln.sealing import Sealer
from kiln.settings import Settings

START_LIMIT = timedelta(seconds=60)
TEMPORAL, EC2, REGISTRY, ENGINE, WORKER, API = "temporal", "ec2", "registry", "engine", "worker", "api"
RUNNER = "runner"
BUILD_PARTS = (TEMPORAL, EC2, REGISTRY, ENGINE, WORKER, API)
ALL_PARTS = (*BUILD_PARTS, RUNNER)
# Side by side: builders need all of these. Without the container parts, the stack serves everything else.
BASE_PARTS, CONTAINER_PARTS = (TEMPORAL, EC2), (REGISTRY, ENGINE)
# They need none of each other.
SERVING_PARTS = (WORKER, API, RUNNER)
SERVER_WAVES = ((API,), (WORKER,))
# Agents may run in the engines.
LAST_WAVE = (ENGINE, REGISTRY, EC2, TEMPORAL)
# Beside their own grace, agents need a moment to be found gone; with the runner's patience, no more than the servers take.
AGENTS_MARGIN, AGENTS_LIMIT = timedelta(seconds=3), timedelta(seconds=20)
STOPPING = {
    API: "Stopping the API",
    WORKER: "Stopping the worker",
    RUNNER: "Stopping the runner",
    ENGINE: "Stopping the Docker engines",
    REGISTRY: "Stopping the registry",
    EC2: "Stopping the simulated EC2",
    TEMPORAL: "Stopping Temporal",
}


class LocalStack:
    """A stack on `settings.home`, as a context manager or by `start` and `stop`. From any thread.

    `parts`         which to start, of `ALL_PARTS`; a part that the settings place elsewhere is not started. Without
                    more, those that builds take: there is no runner then
    `workers`       each worker's roles; they are named worker, worker-2, …
    `auto_restart`  whether a part that dies is started again
    `extra_env`     additions to a part's environment, by its name
    `embedded`      ignore TEMPORAL_ADDRESS and its like: Temporal is the stack's own
    `say`           takes one line about whatever happens
    """

    def __init__(  # noqa: PLR0913  all but the first have defaults
        self,
        settings: Settings,
        *,
        parts: Iterable[str] = BUILD_PARTS,
        workers: Sequence[Sequence[str]] = (ALL_ROLES,),
        auto_restart: bool = True,
        extra_env: Mapping[str, Mapping[str, str]] | None = None,
        embedded: bool = False,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.settings = settings
        self.temporal_place = TemporalPlace() if embedded else configured_temporal()
        self._wanted = frozenset(parts) - self._elsewhere()
        self._plan: ContainerPlan | None = None
        self._workers = [tuple(roles) for roles in workers]
        self._auto_restart = auto_restart
        self._extra_env = extra_env or {}
        self._embedded = embedded
        self._say = say
        self._resources = ExitStack()
        self._supervisor: Supervisor | None = None
        self._known: dict[str, Part] = {}
        self._key: FirstKey | None = None
        self._runner: LocalRunner | None = None
        self._secret = ""
        self._interrupted = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def api_url(self) -> str:
        return api_url(self.settings)

    @property
    def key(self) -> FirstKey:
        """The home's admin key. Raises PartFailedError before `start`."""
        if self._key is None:
            raise PartFailedError("the stack has not been started")
        return self._key

    @property
    def api_key(self) -> str:
        return self.key.plain

    @property
    def runner(self) -> LocalRunner | None:
        """The runner of this host's pods; None in a stack that has none."""
        return self._runner

    @property
    def containers(self) -> ContainerPlan:
        """Which engines build containers, or why none does; decided once."""
        if self._plan is None:
            missing = self._wanted.isdisjoint(CONTAINER_PARTS)
            off = ContainerPlan(off="this stack was started without them")
            self._plan = off if missing else plan_containers(self.settings)
        return self._plan

    @property
    def parts(self) -> dict[str, int]:
        """The processes that run: name to pid."""
        return self._supervisor.pids() if self._supervisor else {}

    def log_file(self, name: str) -> Path:
        """Where a part's output goes."""
        return log_file(self.settings, name)

    def start(self) -> None:
        """Returns when every part is ready. Raises KilnError, with nothing left running."""
        self.check()
        try:
            self._prepare()
            if self._interrupted:
                raise InterruptedStartError("interrupted")
            self._say(f"Starting {', '.join(part.title for part in self._known.values())} in {self.settings.home_dir}")
            self._start_foundations()
            self.start_parts(*self._names(SERVING_PARTS))
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Raises KilnError for what would keep the stack from starting; starts and writes nothing."""
        if self.settings.secret_key:
            Sealer(self.settings.secret_key)
        check_home_is_free(self.settings)
        check_objects(self.settings)
        if WORKER in self._wanted and any("packer" in roles for roles in self._workers):
            check_packer(self.settings)
        check_ports(self._ports())
        self._check_what_is_elsewhere()

    def stop(self) -> None:
        """Ends the API and the workers, the runner and its agents, and then all else, within 30 s. Repeating it does
        nothing."""
        with self._resources:
            if self._supervisor is not None:
                self._stop_parts(self._supervisor)
                self._supervisor = None

    def hurry(self) -> None:
        """Makes a `stop`, also one that waits, kill what does not end at once. Signal handlers may call it."""
        if self._supervisor is not None:
            self._supervisor.hurry()

    def interrupt(self) -> None:
        """Makes a `start` that waits give up with InterruptedStartError. Signal handlers may call it."""
        self._interrupted = True
        if self._supervisor is not None:
            self._supervisor.interrupt()

    def start_parts(self, *names: str) -> None:
        """Starts parts (again), and returns when they are ready. Raises PartFailedError."""
        self._running().start([self._known[name] for name in names], START_LIMIT)

    def stop_part(self, name: str) -> None:
        """Ends a part as `stop` does; it stays ended until `start_parts`."""
        self._running().stop([name])

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a part's process a signal. Raises PartFailedError if it does not run."""
        self._running().send(name, number)

    def wait_for_exit(self, name: str, limit: timedelta = timedelta(seconds=30)) -> int:
        """A part's exit code, negative for a signal. Raises PartFailedError if it still runs after `limit`."""
        return self._running().wait(name, limit)

    def _prepare(self) -> None:
        """The home, its lock and keys, and the catalog with its tables."""
        prepare_home(self.settings)
        self._resources.enter_context(locked_home(self.settings))
        self._resources.callback(leave_no_folder, self.settings)
        secret = secret_key(self.settings)
        with open_catalog(self.settings) as catalog:
            self._key = first_key(self.settings, catalog)
            if RUNNER in self._wanted:
                self._runner = local_runner(self.settings, catalog)
        if REGISTRY in self._kinds:
            prepare_registry(self.settings)
        self._secret = secret
        self._known = {part.name: part for part in self._made(ALL_PARTS)}
        self._supervisor = Supervisor(self._say, auto_restart=self._auto_restart)

    def _start_foundations(self) -> None:
        """What workers and API build on. Container builds are off if their parts cannot be had."""
        with ThreadPoolExecutor(1, "kiln-containers") as aside:
            containers = aside.submit(self._start_container_parts)
            try:
                self.start_parts(*self._names(BASE_PARTS))
            except BaseException:
                self._running().interrupt()
                raise
            containers.result()

    def _start_container_parts(self) -> None:
        names = self._names(CONTAINER_PARTS)
        try:
            self.start_parts(*names)
        except PartFailedError as error:
            self._running().stop(names)
            self._plan = ContainerPlan(off=str(error))
            self._say(f"Container builds are off: {error}")
            self._known = {name: part for name, part in self._known.items() if name not in names}
            self._known |= {part.name: part for part in self._made(SERVING_PARTS)}

    def _made(self, kinds: Iterable[str]) -> list[Part]:
        place = None if self._embedded else self.temporal_place
        plan = self.containers
        told = self.settings.model_copy(update={"containers_off": plan.off, "engine_hosts": plan.hosts})
        factory = PartFactory(told, self._secret, place, self._extra_env)
        makers: dict[str, Callable[[], list[Part]]] = {
            TEMPORAL: lambda: [factory.temporal()],
            EC2: lambda: [factory.ec2()],
            REGISTRY: lambda: [factory.registry()],
            ENGINE: lambda: [factory.engine(number) for number in range(1, plan.private_slots + 1)],
            WORKER: lambda: [factory.worker(number, roles) for number, roles in enumerate(self._roles(), 1)],
            API: lambda: [factory.api()],
            RUNNER: lambda: [factory.runner(self._runner)] if self._runner else [],
        }
        return [part for kind in kinds if kind in self._kinds for part in makers[kind]()]

    def _roles(self) -> list[tuple[str, ...]]:
        """Each worker's roles, less those that this host has nothing for; a worker without any is not started."""
        served = [tuple(role for role in roles if self.containers.serves(role)) for roles in self._workers]
        return [roles for roles in served if roles]

    @property
    def _kinds(self) -> frozenset[str]:
        """The kinds of parts that this stack has."""
        plan = self.containers
        missing = {ENGINE: not plan.private_slots, REGISTRY: not plan.own_registry}
        return self._wanted - {kind for kind, is_missing in missing.items() if is_missing}

    def _names(self, kinds: Iterable[str]) -> list[str]:
        return [name for name in self._known if _kind(name) in kinds]

    def _stop_wave(self, supervisor: Supervisor, kinds: Sequence[str]) -> None:
        names = self._names(kinds)
        running = {_kind(name) for name in supervisor.pids().keys() & set(names)}
        for kind in kinds:
            if kind in running:
                self._say(STOPPING[kind])
        supervisor.stop(names)

    def _stop_parts(self, supervisor: Supervisor) -> None:
        with ThreadPoolExecutor(1, "kiln-agents") as aside:
            runner = aside.submit(self._stop_runner, supervisor)
            for wave in SERVER_WAVES:
                self._stop_wave(supervisor, wave)
        self._stop_wave(supervisor, LAST_WAVE)
        supervisor.close()
        runner.result()

    def _stop_runner(self, supervisor: Supervisor) -> None:
        """The runner leaves its agents alive; they end here. The next start's runner reports how."""
        self._stop_wave(supervisor, (RUNNER,))
        agents = living_agents(self.settings.pods_dir / "pods") if self._runner else []
        if agents:
            self._say(f"Ending {len(agents)} agents of pods")
            grace = timedelta(seconds=self.settings.pod_grace_seconds)
            end_agents(agents, min(grace + AGENTS_MARGIN, AGENTS_LIMIT), lambda: supervisor.hurried)

    def _running(self) -> Supervisor:
        if self._supervisor is None:
            raise PartFailedError("the stack does not run")
        return self._supervisor

    def _check_what_is_elsewhere(self) -> None:
        """Raises UnavailableError if something that the settings place elsewhere does not answer there."""
        if self.temporal_place.address:
            check_answers(self.temporal_place.address, "Temporal does not answer at {address} (TEMPORAL_ADDRESS)")
        endpoint = outside_ec2(self.settings)
        if endpoint:
            check_answers(urlsplit(endpoint).netloc, "EC2 does not answer at {address} (KILN_EC2_ENDPOINT)")

    def _elsewhere(self) -> frozenset[str]:
        """The parts that run outside of this stack, or not at all."""
        temporal = {TEMPORAL} if self.temporal_place.address else set()
        ec2 = {EC2} if outside_ec2(self.settings) or not self.settings.simulated else set()
        return frozenset(temporal | ec2)

    def _ports(self) -> dict[str, tuple[str, int]]:
        settings, local = self.settings, "127.0.0.1"
        ports = {
            API: {"KILN_API_PORT": (settings.api_host, settings.api_port)},
            TEMPORAL: {
                "KILN_TEMPORAL_PORT": (local, settings.temporal_port),
                "KILN_TEMPORAL_UI_PORT": (local, settings.temporal_ui_port),
            },
            EC2: {"KILN_EC2_PORT": (local, settings.ec2_port)},
            REGISTRY: {"KILN_REGISTRY_PORT": (local, settings.registry_port)},
        }
        return {name: place for kind, places in ports.items() if kind in self._kinds for name, place in places.items()}


def _kind(name: str) -> str:
    """`worker-2` is a worker."""
    return name.partition("-")[0]
