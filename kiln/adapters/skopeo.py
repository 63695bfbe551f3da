"""Turns an order into a run of `skopeo copy`: command line, environment, and a login file that nobody else can read."""

import ipaddress
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kiln.adapters.runs import (
    NETWORK_ENVIRONMENT,
    base_environment,
    inherited,
    new_run_dir,
    registry_login,
    write_private,
)
from kiln.naming import staging_repository, staging_tag
from kiln.ports import Order, ToolJob
from kiln.registry_tokens import BUILD_USER

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


class SkopeoRuns:
    """`kiln.ports.TransferKit`. `credential` makes the password with which a build's tools log in to the registry."""

    def __init__(self, place: SkopeoPlace, credential: Callable[[Order], str]) -> None:
        self._place = place
        self._credential = credential

    def folder(self, order: Order) -> Path:  # noqa: ARG002  the port's
        return new_run_dir(self._place.work_dir, "transfer")

    def discard(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def staging_reference(self, order: Order) -> str:
        """`{registry}/{staging repository}:{attempt's tag}`."""
        repository, tag = staging_repository(order.build_id), staging_tag(order.attempt)
        return f"{self._place.registry_host}/{repository}:{tag}"

    def prepare(self, order: Order, folder: Path) -> ToolJob:
        login = registry_login(self._place.registry_host, BUILD_USER, self._credential(order))
        write_private(folder / LOGIN_FILE, login)
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
