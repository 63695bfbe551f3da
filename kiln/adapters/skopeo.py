"""Turns an order into a run of `skopeo copy`: command line, environment, and a login file that nobody else can read."""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kiln.adapters.pushing_runs import PushingRuns
from kiln.adapters.runs import (
    NETWORK_ENVIRONMENT,
    base_environment,
    inherited,
    write_private,
)
from kiln.ports import Order, ToolJob

DIGEST_FILE = "digest"
LOGIN_FILE = "login.json"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
RETRIES = 3


@dataclass(frozen=True)
class SkopeoPlace:
    """Where and how skopeo runs here: settings, fixed at the worker's start."""

    program: str
    work_dir: Path
    registry_host: str


class SkopeoRuns(PushingRuns):
    """`kiln.ports.TransferKit`. `credential` makes the password with which a build's tools log in to the registry."""

    kind = "transfer"

    def __init__(self, place: SkopeoPlace, credential: Callable[[Order], str]) -> None:
        super().__init__(place, credential)
        self._place = place

    def prepare(self, order: Order, folder: Path) -> ToolJob:
        write_private(folder / LOGIN_FILE, self.login(order))
        return ToolJob(argv=self._argv(order, folder), env=_environment(folder), cwd=folder)

    def digest(self, job: ToolJob) -> str | None:
        try:
            digest = (job.cwd / DIGEST_FILE).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
        return digest if DIGEST.fullmatch(digest) else None

    def _argv(self, order: Order, folder: Path) -> tuple[str, ...]:
        source = order.transfer.reference
        return (
            self._place.program,
            "--override-os=linux",
            "copy",
            "--all",
            f"--retry-times={RETRIES}",
            f"--digestfile={folder / DIGEST_FILE}",
            "--src-no-creds",
            *(["--src-tls-verify=false"] if _is_loopback(source.partition("/")[0]) else []),
            f"--dest-authfile={folder / LOGIN_FILE}",
            *(["--dest-tls-verify=false"] if _is_loopback(self._place.registry_host) else []),
            f"docker://{source}",
            f"docker://{self.staging_reference(order)}",
        )


def _environment(folder: Path) -> Mapping[str, str]:
    # Without a directory of its own, skopeo takes the logins of whoever runs this worker.
    return {**base_environment(folder), "XDG_RUNTIME_DIR": str(folder), **inherited(*NETWORK_ENVIRONMENT)}


def _is_loopback(host: str) -> bool:
    """Whether `host[:port]` is this machine, where registries speak plain HTTP."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
