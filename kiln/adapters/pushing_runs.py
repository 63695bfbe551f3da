"""What the runs of tools that push to the registry have in common: BuildKit, skopeo, Packer in an engine."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol

from kiln.adapters.runs import new_run_dir, registry_login
from kiln.naming import staging_repository, staging_tag
from kiln.ports import Order
from kiln.registry_tokens import BUILD_USER


class PushingPlace(Protocol):
    """Where such a tool runs here."""

    @property
    def work_dir(self) -> Path: ...

    @property
    def registry_host(self) -> str: ...


class PushingRuns:
    """Runs of such a tool. `credential` makes the password with which a build's tools log in to the registry."""

    # Of RUN_KINDS.
    kind: ClassVar[str] = "container"

    def __init__(self, place: PushingPlace, credential: Callable[[Order], str]) -> None:
        self._pushing = place
        self._credential = credential

    def folder(self, order: Order) -> Path:  # noqa: ARG002  the ports'
        return new_run_dir(self._pushing.work_dir, self.kind)

    def discard(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def staging_reference(self, order: Order) -> str:
        """`{registry}/{staging repository}:{attempt's tag}`."""
        repository, tag = staging_repository(order.build_id), staging_tag(order.attempt)
        return f"{self._pushing.registry_host}/{repository}:{tag}"

    def login(self, order: Order, **more: object) -> str:
        """A Docker `config.json` that opens the registry to this build's tools."""
        return registry_login(self._pushing.registry_host, BUILD_USER, self._credential(order), **more)
