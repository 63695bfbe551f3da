"""Where the bench runs: a Kiln of its own, on free ports and in a temporary home."""

import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cli.local_stack import ALL_PARTS, LocalStack
from kiln.settings import Settings

SETTINGS_PREFIXES = ("KILN_", "TEMPORAL_", "AWS_")
# Which Packer is installed is the machine's matter; all else is Kiln's defaults.
KEPT_SETTINGS = frozenset({"KILN_PACKER"})


def forget_settings() -> None:
    """Keeps the user's own catalog, Temporal and AWS out of the bench."""
    for name in list(os.environ):
        if name.startswith(SETTINGS_PREFIXES) and name not in KEPT_SETTINGS:
            del os.environ[name]


@contextmanager
def running_stack(parts: Iterable[str] = ALL_PARTS) -> Iterator[LocalStack]:
    """A stack with these parts, and nothing left of it after the block. Raises KilnError."""
    with tempfile.TemporaryDirectory(prefix="kiln-bench-") as home:
        api, temporal, ui, ec2 = _free_ports(4)
        settings = Settings(home=Path(home), api_port=api, temporal_port=temporal, temporal_ui_port=ui, ec2_port=ec2)
        with LocalStack(settings, parts=parts, auto_restart=False, embedded=True) as stack:
            yield stack


def _free_ports(count: int) -> list[int]:
    """Ports that were free just now; held together, so that none comes twice."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
