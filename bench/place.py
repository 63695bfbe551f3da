"""Where the bench runs: a Kiln of its own, on free ports and in a temporary home."""

import os
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cli.local_stack import BUILD_PARTS, LocalStack
from cli.parts import ALL_ROLES
from kiln.settings import Settings

SETTINGS_PREFIXES = ("KILN_", "TEMPORAL_", "AWS_")
# Which tools are installed is the machine's matter; all else is Kiln's defaults.
KEPT_SETTINGS = frozenset({"KILN_PACKER", "KILN_BUILDX", "KILN_SKOPEO"})
PORTS = ("api_port", "temporal_port", "temporal_ui_port", "ec2_port", "registry_port")


def forget_settings() -> None:
    """Keeps the user's own catalog, Temporal and AWS out of the bench."""
    for name in list(os.environ):
        if name.startswith(SETTINGS_PREFIXES) and name not in KEPT_SETTINGS:
            del os.environ[name]


@contextmanager
def running_stack(
    parts: Iterable[str] = BUILD_PARTS, workers: Sequence[Sequence[str]] = (ALL_ROLES,), **settings: Any
) -> Iterator[LocalStack]:
    """A stack with these parts and settings, and nothing left of it after the block. Raises KilnError."""
    with tempfile.TemporaryDirectory(prefix="kiln-bench-") as home:
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        place = Settings(home=Path(home), **{**ports, **settings})
        with LocalStack(place, parts=parts, workers=workers, auto_restart=False, embedded=True) as stack:
            yield stack


def free_ports(count: int) -> list[int]:
    """Ports that were free just now; held together, so that none comes twice."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
