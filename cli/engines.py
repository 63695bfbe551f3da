"""Whether this stack builds containers, on which Docker engines, and if not, why."""

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass, replace
from datetime import timedelta

from cli.engine_slot import Slot
from kiln.settings import Settings

# Where Debian keeps what only root uses; not everybody's PATH has it.
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
ANSWER_TIMEOUT = timedelta(seconds=10)
PRIVATE_ENGINE_PROGRAMS = {"docker": "docker.io", "dockerd": "docker.io", "ip": "iproute2", "unshare": "util-linux"}


@dataclass(frozen=True)
class ContainerPlan:
    """`off` is one line that says why no containers are built, or nothing; `no_transfers` the same for copies.

    `hosts` are the engines' DOCKER_HOSTs; `private_slots` how many of them the stack starts itself; `own_registry`
    whether it starts the registry.
    """

    off: str = ""
    no_transfers: str = ""
    hosts: tuple[str, ...] = ()
    private_slots: int = 0
    own_registry: bool = False

    def __post_init__(self) -> None:
        if self.off and (self.hosts or self.own_registry):
            raise ValueError("a stack without container builds has neither engine nor registry")

    def serves(self, role: str) -> bool:
        """Whether a worker of this role has what it needs."""
        if role == "transfer":
            return not (self.off or self.no_transfers)
        return role != "container" or not self.off


def plan_containers(settings: Settings) -> ContainerPlan:
    """What can be had with these settings on this host. Starts nothing."""
    off = _switched_off(settings) or _no_registry(settings) or _no_buildx(settings)
    if off:
        return ContainerPlan(off=off)
    place = "KILN_ENGINE_HOSTS" if settings.engine_hosts else "DOCKER_HOST"
    hosts = settings.engine_hosts or tuple(filter(None, [os.environ.get("DOCKER_HOST")]))
    plan = _outside(hosts, place) if hosts else _private(settings)
    return plan if plan.off else replace(plan, own_registry=not settings.registry, no_transfers=_no_skopeo(settings))


def search_path() -> str:
    """PATH, and the folders of what only root uses."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), SYSTEM_PATH])


def is_installed(program: str) -> bool:
    return shutil.which(program, path=search_path()) is not None


def _switched_off(settings: Settings) -> str:
    return settings.containers_off if settings.containers else "KILN_CONTAINERS says so"


def _no_registry(settings: Settings) -> str:
    if settings.registry or is_installed("docker-registry"):
        return ""
    return "docker-registry is not installed: apt-get install docker-registry, or set KILN_REGISTRY"


def _no_skopeo(settings: Settings) -> str:
    return "" if is_installed(settings.skopeo) else f"{settings.skopeo} is not installed: apt-get install skopeo"


def _no_buildx(settings: Settings) -> str:
    command = [*shlex.split(settings.buildx), "version"]
    return "" if _succeeds(command) else f"`{shlex.join(command)}` fails: make setup installs it, or set KILN_BUILDX"


def _outside(hosts: tuple[str, ...], place: str) -> ContainerPlan:
    for host in hosts:
        if not _succeeds(["docker", "--host", host, "version"]):
            return ContainerPlan(off=f"no Docker engine answers at {host} ({place})")
    return ContainerPlan(hosts=hosts)


def _private(settings: Settings) -> ContainerPlan:
    for program, package in PRIVATE_ENGINE_PROGRAMS.items():
        if not is_installed(program):
            return ContainerPlan(off=f"{program} is not installed: apt-get install {package}, or set DOCKER_HOST")
    if os.geteuid() != 0:
        return ContainerPlan(off="only root can start a Docker engine: set DOCKER_HOST to one that runs")
    slots = settings.container_slots
    hosts = tuple(Slot(settings.home_dir, number).host for number in range(1, slots + 1))
    return ContainerPlan(hosts=hosts, private_slots=slots)


def _succeeds(command: list[str]) -> bool:
    try:
        finished = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=ANSWER_TIMEOUT.total_seconds(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return finished.returncode == 0
