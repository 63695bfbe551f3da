"""Turns an order into a run of Packer's agents' template in a Docker engine: command line, variables, and a login."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kiln.adapters.buildx import engine_tls, operator_config
from kiln.adapters.packer import VARIABLE_FILE, packer_environment
from kiln.adapters.pushing_runs import PushingRuns
from kiln.adapters.runs import write_private
from kiln.naming import resource_suffix
from kiln.ports import Engine, Order, ToolJob, Traces

TEMPLATE_FILE = "agent.pkr.hcl"
TEMPLATE_SOURCE = "docker.published"
# In the run's own directory, so that neither command line nor log says where Kiln is installed.
TEMPLATE_LINK = "packer"
CA_BUNDLE = "ca-bundle.pem"
DOCKER_CONFIG = "docker"
# Packer mounts a directory of this host into the container.
SHARED = "shared"
CONTAINER_PREFIX = "kiln-agent-"


@dataclass(frozen=True)
class AgentImagePlace:
    """Where and how Packer runs here: settings, fixed at the worker's start."""

    program: str
    template_dir: Path
    work_dir: Path
    registry_host: str
    ca_bundle: str = ""
    docker_config: Path = field(default_factory=operator_config)


class AgentImageRuns(PushingRuns):
    """`kiln.ports.AgentKit`. `credential` makes the password with which a build's tools log in to the registry."""

    def __init__(self, place: AgentImagePlace, credential: Callable[[Order], str]) -> None:
        super().__init__(place, credential)
        self._place = place

    def traces(self, order: Order) -> Traces:
        return Traces(_container(order), (self.staging_reference(order), order.agent.base_image))

    def prepare(self, order: Order, folder: Path, engine: Engine) -> ToolJob:
        """Writes the variable file and a Docker configuration, with which the engine pulls and pushes."""
        (folder / TEMPLATE_LINK).symlink_to(self._place.template_dir)
        write_private(folder / VARIABLE_FILE, json.dumps(self._variables(order, folder)))
        if self._place.ca_bundle:
            shutil.copyfile(self._place.ca_bundle, folder / CA_BUNDLE)
        (folder / SHARED).mkdir(mode=0o700)
        (folder / DOCKER_CONFIG).mkdir(mode=0o700)
        write_private(folder / DOCKER_CONFIG / "config.json", self.login(order))
        return ToolJob(argv=self._argv(folder), env=self._environment(order, folder, engine), cwd=folder)

    def _argv(self, folder: Path) -> tuple[str, ...]:
        return (
            self._place.program,
            "build",
            "-machine-readable",
            f"-only={TEMPLATE_SOURCE}",
            f"-var-file={folder / VARIABLE_FILE}",
            str(folder / TEMPLATE_LINK / TEMPLATE_FILE),
        )

    def _variables(self, order: Order, folder: Path) -> dict[str, str]:
        agent = order.agent
        return {
            "provider": agent.provider,
            "agent_version": agent.version,
            "extra_packages": agent.extra_packages,
            "npm_registry": agent.npm_registry,
            "kiln_base_image": agent.base_image,
            "kiln_container_name": _container(order),
            "kiln_container_reference": self.staging_reference(order),
            "kiln_ca_bundle": str(folder / CA_BUNDLE) if self._place.ca_bundle else "",
        }

    def _environment(self, order: Order, folder: Path, engine: Engine) -> Mapping[str, str]:
        return {
            **packer_environment(folder),
            "PACKER_TMP_DIR": str(folder / SHARED),
            "DOCKER_HOST": engine.host,
            "DOCKER_CONFIG": str(folder / DOCKER_CONFIG),
            "DOCKER_DEFAULT_PLATFORM": order.platform,
            **engine_tls(engine, self._place.docker_config),
        }


def _container(order: Order) -> str:
    return f"{CONTAINER_PREFIX}{resource_suffix(order.build_id, order.attempt)}"
