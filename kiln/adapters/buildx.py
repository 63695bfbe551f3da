"""Turns an order into a run of `docker buildx build`: command line, environment, and a Docker configuration of its own.

Docker's own variables: https://docs.docker.com/reference/cli/docker/#environment-variables
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kiln.adapters.pushing_runs import PushingRuns
from kiln.adapters.runs import base_environment, inherited, write_private
from kiln.ports import Engine, Order, ToolJob

METADATA_FILE = "metadata.json"
DIGEST_KEY = "containerimage.digest"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# Arguments that steer BuildKit itself; a request may not set them.
BUILDKIT_ARGUMENT = "BUILDKIT_"
CACHE_NAMESPACE = "BUILDKIT_CACHE_MOUNT_NS"
# What docker, buildx, Go's run time and the dynamic linker read: a build argument of such a name must not reach them.
TOOL_VARIABLE = re.compile(
    r"PATH|HOME|TMPDIR|LANG|LC_.*|TERM|TZ|USER|HOSTALIASES|LOCALDOMAIN|RES_OPTIONS|GLIBC_TUNABLES|SOURCE_DATE_EPOCH"
    r"|(?:DOCKER|BUILDX|LD|OTEL|JAEGER|XDG|SSL_CERT|MALLOC)_.*|KUBECONFIG|GO(?:DEBUG|GC|MAXPROCS|MEMLIMIT|TRACEBACK)"
    r"|(?i:.*_proxy)"
)
# Where Docker looks for plugins, besides its configuration's own places.
PLUGIN_DIRS = tuple(
    Path(place, "docker", "cli-plugins")
    for place in ("/usr/local/lib", "/usr/local/libexec", "/usr/lib", "/usr/libexec")
)
TLS_ENVIRONMENT = ("DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH")


def operator_config() -> Path:
    """The Docker configuration of whoever runs this worker: it has their CLI plugins and builders."""
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")


def buildx_program(setting: str) -> tuple[str, ...]:
    """The program of KILN_BUILDX. The plugin itself stands for `docker buildx` where it is found: the `docker` command
    looks through all plugins at each start, which takes longer than the rest of it."""
    program = tuple(setting.split())
    if program == ("docker", "buildx"):
        folders = [operator_config() / "cli-plugins", *map(Path, _extra_plugin_dirs(operator_config())), *PLUGIN_DIRS]
        found = next((each for each in folders if os.access(each / "docker-buildx", os.X_OK)), None)
        if found is not None:
            return (str(found / "docker-buildx"),)
    return program


def engine_tls(engine: Engine, docker_config: Path) -> dict[str, str]:
    """The operator's TLS settings for an engine across the network; their certificates stay where they are."""
    given = inherited(*TLS_ENVIRONMENT) if engine.host.startswith("tcp://") else {}
    return {"DOCKER_CERT_PATH": str(docker_config), **given} if given else {}


@dataclass(frozen=True)
class BuildxPlace:
    """Where and how buildx runs here: settings, fixed at the worker's start. `builder` names one that
    `docker buildx create` made; without it the engine's own BuildKit builds."""

    program: tuple[str, ...]
    work_dir: Path
    registry_host: str
    builder: str = ""
    registry_cache: bool = True
    docker_config: Path = field(default_factory=operator_config)


class BuildxRuns(PushingRuns):
    """`kiln.ports.ContainerKit`. `credential` makes the password with which a build's tools log in to the registry."""

    def __init__(self, place: BuildxPlace, credential: Callable[[Order], str]) -> None:
        super().__init__(place, credential)
        self._place = place

    def prepare(self, order: Order, folder: Path, context: Path, engine: Engine) -> ToolJob:
        """Writes the run's Docker configuration; values of build arguments go by the environment where they can."""
        self._write_docker_config(folder / "docker", order)
        self._copy_builder(folder / "buildx")
        arguments = _build_arguments(order)
        in_environment = {name: value for name, value in arguments.items() if not TOOL_VARIABLE.fullmatch(name)}
        named = [name if name in in_environment else f"{name}={value}" for name, value in arguments.items()]
        named.append(f"{CACHE_NAMESPACE}={order.organization_id}")
        return ToolJob(
            argv=self._argv(order, folder, named),
            env={**in_environment, **self._environment(folder, engine)},
            cwd=folder,
            stdin=context,
        )

    def digest(self, job: ToolJob) -> str | None:
        try:
            metadata = json.loads((job.cwd / METADATA_FILE).read_bytes())
            digest = str(metadata.get(DIGEST_KEY))
        except (OSError, ValueError, AttributeError):
            return None
        return digest if DIGEST.fullmatch(digest) else None

    def _argv(self, order: Order, folder: Path, arguments: list[str]) -> tuple[str, ...]:
        return (
            *self._place.program,
            "build",
            "--progress=rawjson",
            f"--metadata-file={folder / METADATA_FILE}",
            # A name that looked like a URL would be fetched, from here, and `-` would be the context itself.
            f"--file=./{order.container.dockerfile}",
            f"--platform={order.platform}",
            # An engine that has an image by this name would use it without asking whether this build may.
            "--pull",
            # An index with attestations would have another digest than the image, which Kiln publishes.
            "--provenance=false",
            "--sbom=false",
            f"--tag={self.staging_reference(order)}",
            "--push",
            *([f"--builder={self._place.builder}"] if self._place.builder else []),
            *self._cache(order),
            *(f"--build-arg={argument}" for argument in arguments),
            "-",
        )

    def _cache(self, order: Order) -> list[str]:
        """Layers of the target's last image, which tells another engine how it was built.

        Inline, because a cache manifest beside the image would need the right to push to the target. A cache that does
        not exist, or does not answer, slows a build down and does not fail it.
        """
        if not self._place.registry_cache:
            return []
        target = order.container.target
        reference = f"{self._place.registry_host}/{target.repository}:{target.tag}"
        return ["--cache-to=type=inline", f"--cache-from=type=registry,ref={reference}"]

    def _environment(self, folder: Path, engine: Engine) -> Mapping[str, str]:
        return {
            **base_environment(folder),
            "DOCKER_HOST": engine.host,
            "DOCKER_CONFIG": str(folder / "docker"),
            "BUILDX_CONFIG": str(folder / "buildx"),
            "BUILDX_GIT_INFO": "false",
            **engine_tls(engine, self._place.docker_config),
        }

    def _write_docker_config(self, folder: Path, order: Order) -> None:
        folder.mkdir(mode=0o700)
        plugins = [str(self._place.docker_config / "cli-plugins"), *_extra_plugin_dirs(self._place.docker_config)]
        write_private(folder / "config.json", self.login(order, cliPluginsExtraDirs=plugins))

    def _copy_builder(self, folder: Path) -> None:
        """Buildx finds a named builder by a file in its own directory, which this run does not share."""
        home = Path(os.environ.get("BUILDX_CONFIG") or self._place.docker_config / "buildx")
        instances = folder / "instances"
        instances.mkdir(mode=0o700, parents=True)
        if self._place.builder:
            with suppress(FileNotFoundError):  # buildx says so itself, and better
                shutil.copy(home / "instances" / self._place.builder, instances)


def _build_arguments(order: Order) -> dict[str, str]:
    given = {**order.container.build_args, **order.secrets}
    return {name: given[name] for name in sorted(given) if not name.startswith(BUILDKIT_ARGUMENT)}


def _extra_plugin_dirs(docker_config: Path) -> list[str]:
    try:
        config = json.loads((docker_config / "config.json").read_bytes())
        return [str(path) for path in config.get("cliPluginsExtraDirs", [])]
    except (OSError, ValueError, AttributeError):
        return []
