"""What the embedded stack is made of: each part's command line, environment and sign of readiness."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from temporalio.envconfig import ClientConfig

from cli.engine_slot import Slot
from cli.engines import search_path
from cli.home import LocalRunner
from cli.places import api_url, log_file, registry_config, registry_folder
from cli.supervisor import Part
from kiln.adapters.packer import SIMULATED_ENVIRONMENT
from kiln.adapters.runs import NETWORK_ENVIRONMENT, inherited
from kiln.catalog import runners, workers
from kiln.catalog.session import Catalog
from kiln.errors import KilnError, UnavailableError
from kiln.models import RunnerStatus
from kiln.settings import PROJECT_ROOT, Settings
from workflows.start import SEARCH_ATTRIBUTES

ALL_ROLES = ("control", "packer", "container", "transfer")
ANSWER_SECONDS = 1.0
# Together with what `LocalStack.stop` does besides, below the 30 s that a host gives a process to stop.
API_PATIENCE = timedelta(seconds=3)
WORKER_PATIENCE = timedelta(seconds=22)
RUNNER_PATIENCE = timedelta(seconds=4)
EC2_PATIENCE = timedelta(seconds=1)
TEMPORAL_PATIENCE = timedelta(seconds=3)
ENGINE_PATIENCE = timedelta(seconds=3)
REGISTRY_PATIENCE = timedelta(seconds=1)
# The names of all settings: some hold secrets, and they concern nobody but Kiln's own parts.
OURS = {f"KILN_{name.upper()}" for name in Settings.model_fields} | {"KILN_API_KEY"}
# All that a runner sees: its agents, where it isn't root, are the same user and can read its environment.
RUNNER_SEES = (
    "HOME",
    "USER",
    "LOGNAME",
    "TMPDIR",
    "TZ",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    *NETWORK_ENVIRONMENT,
)
RUNNER_SETTINGS = (
    "KILN_RUNNER_",
    "KILN_POD_",
    "KILN_AGENT_UIDS",
    "KILN_AGENT_PATH",
    "KILN_SANDBOX_DAYS",
    "KILN_API_URL",
    "KILN_LOG_LEVEL",
)
# A fair order of starts among organizations needs Temporal's newer matcher. It orders each of a queue's partitions for
# itself, of which there are four unless told otherwise; one serves a single host as fast.
DYNAMIC_CONFIG = (
    "matching.useNewMatcher=true",
    "matching.enableFairness=true",
    "matching.numTaskqueueReadPartitions=1",
    "matching.numTaskqueueWritePartitions=1",
)


@dataclass(frozen=True)
class TemporalPlace:
    """Which Temporal the stack works with: the embedded server if `address` is None."""

    address: str | None = None
    namespace: str = "default"


def configured_temporal() -> TemporalPlace:
    """What TEMPORAL_ADDRESS and TEMPORAL_NAMESPACE, or Temporal's own file, say."""
    config = ClientConfig.load_client_connect_config()
    return TemporalPlace(config.get("target_host"), config.get("namespace", "default"))


class PartFactory:
    """Makes the parts of one home. `extra_env` adds to a part's environment, by its name.

    Without a `temporal`, the embedded server serves, whatever the environment says.
    """

    def __init__(
        self,
        settings: Settings,
        secret_key: str,
        temporal: TemporalPlace | None,
        extra_env: Mapping[str, Mapping[str, str]],
    ) -> None:
        self._settings = settings
        self._secret_key = secret_key
        self._temporal = temporal
        self._extra_env = extra_env

    def temporal(self) -> Part:
        """Temporal's dev server with its web UI, on a SQLite file."""
        settings = self._settings
        namespace = self._temporal.namespace if self._temporal else "default"
        options = {
            "ip": "127.0.0.1",
            "port": settings.temporal_port,
            "ui-ip": "127.0.0.1",
            "ui-port": settings.temporal_ui_port,
            "db-filename": settings.home_dir / "temporal.db",
            "log-level": "warn",
            "namespace": namespace,
        }
        attributes = [f"--search-attribute={key.name}=Keyword" for key in SEARCH_ATTRIBUTES]
        values = [f"--dynamic-config-value={value}" for value in DYNAMIC_CONFIG]
        # The UI asks the server itself, so this answers once both serve and the namespace is there.
        url = f"http://127.0.0.1:{settings.temporal_ui_port}/api/v1/namespaces/{namespace}"
        return self._part(
            "temporal",
            "Temporal",
            (_beside_python("temporal"), "server", "start-dev", *_flags(options), *attributes, *values),
            ready=lambda _pid: answers(url),
            patience=TEMPORAL_PATIENCE,
            death_signal=signal.SIGKILL,
        )

    def ec2(self) -> Part:
        """The simulated EC2, whose state is in memory."""
        port = str(self._settings.ec2_port)
        return self._part(
            "ec2",
            "simulated EC2",
            (_beside_python("moto_server"), "-H", "127.0.0.1", "-p", port),
            ready=lambda _pid: answers(f"http://127.0.0.1:{port}/moto-api/"),
            patience=EC2_PATIENCE,
            death_signal=signal.SIGKILL,
        )

    def engine(self, number: int) -> Part:
        """The private Docker engine of a builder slot; the second is `engine-2`."""
        settings = self._settings
        slot = Slot(settings.home_dir, number)
        options = {
            "home": slot.home,
            "slot": slot.number,
            "memory-bytes": settings.slot_memory_bytes,
            "cpus": settings.slot_cpus,
            "processes": settings.slot_processes,
            "keep-bytes": settings.slot_cache_bytes,
        }
        reach = [f"--reach={_host_and_port(url)}" for url in (f"https://{settings.registry_host}", settings.base_url)]
        name = numbered("engine", number)
        return self._part(
            name,
            f"Docker engine {number}",
            (sys.executable, "-P", "-m", "cli.engine_main", *_flags(options), *reach),
            ready=lambda _pid: engine_answers(slot.host),
            patience=ENGINE_PATIENCE,
            death_signal=signal.SIGTERM,
        )

    def registry(self) -> Part:
        """The embedded OCI registry; `prepare_registry` has written its files."""
        settings = self._settings
        files = (str(registry_config(settings)), str(registry_folder(settings)))
        return self._part(
            "registry",
            "registry",
            (sys.executable, "-P", "-m", "cli.registry_main", *files),
            ready=lambda _pid: answers(f"http://{settings.registry_host}/v2/", httpx.codes.UNAUTHORIZED),
            patience=REGISTRY_PATIENCE,
            death_signal=signal.SIGTERM,
        )

    def worker(self, number: int, roles: Sequence[str]) -> Part:
        """A worker; the second is `worker-2`."""
        name = numbered("worker", number)
        return self._part(
            name,
            name.replace("-", " "),
            (sys.executable, "-P", "-m", "worker", *(f"--role={role}" for role in roles)),
            ready=_is_present(self._settings.catalog_dsn),
            patience=WORKER_PATIENCE,
            death_signal=signal.SIGTERM,
        )

    def runner(self, runner: LocalRunner) -> Part:
        """The runner of this host's pods."""
        name = "runner"
        return self._part(
            name,
            name,
            (sys.executable, "-P", "-m", "worker", "--role", "runner", "--runner-name", runner.name),
            ready=_is_registered(self._settings.catalog_dsn, runner),
            patience=RUNNER_PATIENCE,
            death_signal=signal.SIGTERM,
            env=self._runner_environment(runner.token),
        )

    def api(self) -> Part:
        url = f"{api_url(self._settings)}/healthz"
        return self._part(
            "api",
            "API",
            (sys.executable, "-P", "-m", "api"),
            ready=lambda _pid: answers(url),
            patience=API_PATIENCE,
            death_signal=signal.SIGTERM,
        )

    def _part(  # noqa: PLR0913  a part has that many properties
        self,
        name: str,
        title: str,
        argv: tuple[str, ...],
        *,
        ready: Callable[[int], bool],
        patience: timedelta,
        death_signal: signal.Signals,
        env: Mapping[str, str] | None = None,
    ) -> Part:
        return Part(
            name=name,
            title=title,
            argv=argv,
            env={**(self._environment(name) if env is None else env), **self._extra_env.get(name, {})},
            log_file=log_file(self._settings, name),
            ready=ready,
            patience=patience,
            death_signal=death_signal,
        )

    def _environment(self, name: str) -> dict[str, str]:
        """What a part gets to see: the secret key where secrets are handled, AWS's credentials where AWS is called."""
        ours = name == "api" or name.startswith("worker")
        of_kiln = ours or name == "registry" or name.startswith("engine")
        calls_aws = name.startswith("worker") and not self._settings.simulated
        env = {key: value for key, value in os.environ.items() if calls_aws or not key.startswith("AWS_")}
        if self._settings.simulated:
            env |= SIMULATED_ENVIRONMENT
        if ours:
            env |= environment_of(self._settings) | {"KILN_SECRET_KEY": self._secret_key}
        else:
            env = {key: value for key, value in env.items() if key not in OURS}
        if of_kiln:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_ROOT), env.get("PYTHONPATH")]))
            env["PATH"] = search_path()
        if not ours or self._temporal is None:
            env = _without(env, "TEMPORAL_") | {"TEMPORAL_CONFIG_FILE": os.devnull}
        return env

    def _runner_environment(self, token: str) -> dict[str, str]:
        """What the runner gets to see: its own settings and how it reaches API and Temporal; no key, no catalog, no AWS."""
        settings = self._settings
        own = {
            "api_url": api_url(settings),
            "runner_token": token,
            "runner_dir": settings.pods_dir,
            "runner_engine": settings.runner_engine or next(iter(settings.engine_hosts), ""),
            "runner_custom_commands": settings.runner_custom_commands
            or "runner_custom_commands" not in settings.model_fields_set,
        }
        given = environment_of(settings.model_copy(update=own))
        env = {name: value for name, value in given.items() if name.startswith(RUNNER_SETTINGS)}
        env |= inherited(*RUNNER_SEES) | {"PATH": search_path(), "PYTHONPATH": str(PROJECT_ROOT)}
        if self._temporal is None:
            place = {"TEMPORAL_CONFIG_FILE": os.devnull}
        else:
            place = {name: value for name, value in os.environ.items() if name.startswith("TEMPORAL_")}
        return env | place | {"KILN_TEMPORAL_PORT": str(settings.temporal_port)}


def environment_of(settings: Settings) -> dict[str, str]:
    """The settings as the environment that `load_settings` reads them from; the home as an absolute path."""
    values = settings.model_dump(mode="json", exclude_none=True) | {"home": str(settings.home_dir)}
    return {f"KILN_{name.upper()}": _written(value) for name, value in values.items()}


def outside_ec2(settings: Settings) -> str | None:
    """The simulated EC2 that KILN_EC2_ENDPOINT names; None if the embedded one serves, or AWS."""
    embedded = f"http://127.0.0.1:{settings.ec2_port}"
    endpoint = settings.ec2_endpoint.rstrip("/")
    return endpoint if settings.simulated and endpoint and endpoint != embedded else None


def numbered(kind: str, number: int) -> str:
    """A part's name: `worker`, then `worker-2`."""
    return kind if number == 1 else f"{kind}-{number}"


def answers(url: str, code: int = httpx.codes.OK) -> bool:
    """Whether there is such an answer within a second. A proxy that the environment names is not on the way."""
    try:
        return httpx.get(url, timeout=ANSWER_SECONDS, trust_env=False).status_code == code
    except httpx.HTTPError:
        return False


def engine_answers(host: str) -> bool:
    """Whether the Docker engine at a Unix socket serves."""
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=host.removeprefix("unix://"))) as client:
            return client.get("http://engine/_ping", timeout=ANSWER_SECONDS).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _is_present(dsn: str) -> Callable[[int], bool]:
    """Whether the worker of a pid has noted its presence: its name is host, pid and a random end."""

    def present(pid: int) -> bool:
        catalog = Catalog(dsn, pool_size=1)
        try:
            with catalog.read() as session:
                return any(row.id.startswith(f"{socket.gethostname()}-{pid}-") for row in workers.living(session))
        except UnavailableError:
            return False
        finally:
            catalog.close()

    return present


def _is_registered(dsn: str, runner: LocalRunner) -> Callable[[int], bool]:
    """Whether the process of a pid is the one that registered last, and is there."""

    def registered(pid: int) -> bool:
        catalog = Catalog(dsn, pool_size=1)
        try:
            with catalog.read() as session:
                known = runners.find(session, runner.organization_id, runner.runner_id)
                return (
                    known is not None
                    and known.status is not RunnerStatus.OFFLINE
                    and known.runner.host_info.get("pid") == str(pid)
                )
        except UnavailableError:
            return False
        finally:
            catalog.close()

    return registered


def _beside_python(program: str) -> str:
    """The path of a program that came with Kiln's packages. Raises KilnError if it did not."""
    path = Path(sys.executable).with_name(program)
    if not path.exists():
        raise KilnError(f"{program} is not installed beside {sys.executable}: make setup")
    return str(path)


def _host_and_port(url: str) -> str:
    place = urlsplit(url)
    return f"{place.hostname}:{place.port or (443 if place.scheme == 'https' else 80)}"


def _flags(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def _without(env: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {key: value for key, value in env.items() if not key.startswith(prefix)}


def _written(value: object) -> str:
    return ",".join(str(part) for part in value) if isinstance(value, list) else str(value)
