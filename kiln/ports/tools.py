"""Child processes, and Packer's in particular."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Protocol, Self

from kiln.ports.cloud import SecurityGroupRequest
from kiln.ports.ledger import Order
from kiln.redact import Redactor


class ToolLine(Protocol):
    """One line that a tool printed, secrets masked already."""

    @property
    def stream(self) -> str: ...
    @property
    def text(self) -> str: ...


class ToolExit(Protocol):
    """How a tool ended: its exit code, or the signal that ended it."""

    @property
    def code(self) -> int | None: ...
    @property
    def signal(self) -> int | None: ...
    @property
    def reason(self) -> str: ...


class Tool(Protocol):
    """A running tool and all its descendants. Leaving the context ends them."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...
    async def renew(self, seconds: float) -> None:
        """Lets the tool live for so many seconds more; without renewal its guard kills it."""
        ...

    async def stop(self, grace: timedelta) -> ToolExit:
        """Interrupts the tool's process group, and kills the whole tree if it is not gone after `grace`."""
        ...

    async def wait(self) -> ToolExit: ...
    def lines(self) -> AsyncIterator[ToolLine]: ...


class Toolbox(Protocol):
    """Starts tools."""

    async def start(  # noqa: PLR0913  what a process needs
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        redactor: Redactor,
        lease: timedelta,
        *,
        stdin: Path | None = None,
    ) -> Tool:
        """Starts a tool that reads `stdin`, or nothing. Raises ToolMissingError if there is no such program."""
        ...


@dataclass(frozen=True)
class PackerJob:
    """A Packer run, ready to start: what to call, and the directory that holds its variable file."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    cwd: Path


class PackerKit(Protocol):
    """Makes Packer runs out of orders."""

    def prepare(self, order: Order, security_group_id: str) -> PackerJob:
        """Writes the variable file (mode 0600, in a directory of its own) and returns the run."""
        ...

    def discard(self, job: PackerJob) -> None:
        """Removes the run's directory."""
        ...

    def security_group(self, order: Order) -> SecurityGroupRequest:
        """The temporary security group that the run needs."""
        ...


class TemplateView(Protocol):
    """A Packer template that a request may name."""

    @property
    def source(self) -> str: ...
    @property
    def public_names(self) -> Sequence[str]:
        """The variables that a request may set, sorted."""
        ...

    def is_secret(self, name: str) -> bool:
        """Whether that variable's value is a secret."""
        ...


class TemplateShelf(Protocol):
    """The templates of this server."""

    def find(self, source: str) -> TemplateView:
        """Raises InvalidRequestError that names `template_source`."""
        ...
