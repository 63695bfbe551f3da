"""The builds' logs: writing, and reading."""

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol, Self


class LogLine(NamedTuple):
    """A line of a build's log, numbered from 1 without a gap. `stream` is `stdout`, `stderr` or `kiln`."""

    number: int
    time: datetime
    stream: str
    text: str


class Gap(NamedTuple):
    """Lines that could not be kept or read, and why: they are never silently missing."""

    first: int
    last: int
    reason: str


class End(NamedTuple):
    """A log's end: the build's status in the words of `kiln.md`. Nothing follows."""

    status: str


class LogWriting(Protocol):
    """Where one attempt's lines go. Leaving the context writes all of them."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...
    async def write(self, stream: str, text: str) -> None:
        """Raises AttemptLostError once a later attempt writes to this log."""
        ...


class LogBook(Protocol):
    """The builds' logs."""

    def writing(self, build_id: str, attempt: int) -> LogWriting:
        """Opens the log for this attempt; every earlier attempt's writes are refused from then on."""
        ...

    def note(self, build_id: str, attempt: int, text: str) -> None:
        """Adds one line of Kiln's own. A log that has ended stays as it is."""
        ...

    def end(self, build_id: str, status: str) -> None:
        """Closes the log; the first end stands."""
        ...


class LogReading(Protocol):
    """The builds' logs as the API reads them."""

    def follow(self, build_id: str, after: int) -> AsyncIterator[LogLine | Gap | End]:
        """Every line after `after`: those that are there, then live, until the log's end."""
        ...

    def read(self, build_id: str, after: int, limit: int) -> Sequence[LogLine | Gap]:
        """At most `limit` lines that are there now."""
        ...

    def end(self, build_id: str, status: str) -> None:
        """Closes the log of a build that no worker ever saw; the first end stands."""
        ...

    def keep(self, pod_id: str, first: int, lines: Sequence[tuple[datetime, str, str]]) -> int:
        """Adds a pod's lines (time, stream, text), numbered from `first` on by who sends them, less those that are there
        already: repeating it, also by two at once, is harmless. Lines between the last one and `first` show as a gap.

        Returns the number up to which the sender need send nothing any more: all of it, for a log that has ended.
        """
        ...

    def ping(self) -> None:
        """Raises UnavailableError unless the log store answers."""
        ...

    async def aclose(self) -> None:
        """Ends every `follow`, and closes the store."""
        ...
