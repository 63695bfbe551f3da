"""A whole Kiln before a faulty EC2: real Temporal, Packer, workers and API as processes of their own."""

import json
import signal
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from temporalio.client import Client

from cli.local_stack import BUILD_PARTS, LocalStack
from kiln.settings import Settings
from support.ec2_proxy import Ec2Proxy
from support.moto import Account, MotoServer, running_moto
from support.ports import free_ports
from support.processes import read_proc

# Two builders beside one worker for workflows: when a builder is lost, another is there.
WORKERS = (("control",), ("packer",), ("packer",))
BUILDERS = ("worker-2", "worker-3")
FAST = {
    "heartbeat_timeout_seconds": 3.0,
    "house_seconds": 1.0,
    "cancel_grace_seconds": 10.0,
    "capacity_delay_seconds": 0.2,
    "packer_slots": 2,
    "containers": False,
}
FREEZES = 20
# Longer than a living process writes.
WRITE_SECONDS = 1.0
ENDED = frozenset({"succeeded", "failed", "cancelled", "timed_out"})


@dataclass
class Rig:
    """What a fault test works with. Statuses are asked of `/api/v1/builds`, the truth about AWS of EC2 itself."""

    stack: LocalStack
    proxy: Ec2Proxy
    account: Account
    http: httpx.Client

    def submit(self, **body: object) -> str:
        answer = self.http.post("/api/v1/images/build", json={"provider": "claude-code", **body})
        assert answer.status_code == 202, answer.text
        build_id: str = answer.json()["build_id"]
        return build_id

    def build(self, build_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/api/v1/builds/{build_id}")
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def wait(self, build_id: str, *statuses: str, seconds: float = 60) -> dict[str, Any]:
        """The build once it has one of the statuses (any end, without). Fails after so many seconds."""
        wanted = frozenset(statuses) or ENDED
        end = time.monotonic() + seconds
        while (body := self.build(build_id))["status"] not in wanted:
            assert time.monotonic() < end, f"still {body['status']}: {json.dumps(body, indent=1)}\n{self.log(build_id)}"
            time.sleep(0.05)
        return body

    def cancel(self, build_id: str) -> None:
        assert self.http.post(f"/api/v1/builds/{build_id}/cancel").status_code == 202

    def log(self, build_id: str) -> str:
        return self.http.get(f"/api/v1/builds/{build_id}/logs", headers={"Accept": "text/plain"}).text

    def freeze(self, name: str) -> None:
        """Stops a part's process, but not in the midst of a write: frozen there, it keeps SQLite from all others for as long
        as it is (docs/adr/0007-sqlite-needs-healthy-processes.md)."""
        for _ in range(FREEZES):
            self.stack.kill(name, signal.SIGSTOP)
            if _can_be_written(self.stack.settings.home_dir):
                return
            self.stack.kill(name, signal.SIGCONT)
        raise AssertionError(f"{name} was found writing {FREEZES} times")

    def builder_of(self, build_id: str) -> str:
        """The name of the worker process whose Packer builds this, by Packer's own command line."""
        parents = {pid: name for name, pid in self.stack.parts.items()}
        for packer in self.packers(build_id):
            pid = packer
            while pid > 1:
                if pid in parents:
                    return parents[pid]
                pid = int(read_proc(pid, "stat").rpartition(b")")[2].split()[1])
        raise AssertionError(f"no Packer runs for {build_id}")

    def packers(self, build_id: str | None = None) -> set[int]:
        """The live processes below this stack's directory of runs (of one build, by its variable file)."""
        runs = str(self.stack.settings.runs_dir).encode()
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and runs in read_proc(int(entry.name), "cmdline"):
                command = read_proc(int(entry.name), "cmdline")
                if build_id is None or self._is_of(command, build_id):
                    found.add(int(entry.name))
        return found

    @staticmethod
    def _is_of(command: bytes, build_id: str) -> bool:
        for part in command.split(b"\0"):
            if part.startswith(b"-var-file="):
                try:
                    return build_id in Path(part.removeprefix(b"-var-file=").decode()).read_text()
                except OSError:
                    return False
        return False

    async def temporal(self) -> Client:
        return await Client.connect(f"127.0.0.1:{self.stack.settings.temporal_port}")

    def heal(self) -> None:
        """Everything runs, and nothing is wrong with EC2: for the next test."""
        self.proxy.clear()
        self.proxy.release()
        self.proxy.late_available(0)
        self.proxy.hide_fresh(0)
        self.proxy.second_snapshot(enabled=False)
        missing = [name for name in self.names if name not in self.stack.parts]
        if missing:
            self.stack.start_parts(*missing)

    @property
    def seen(self) -> Account:
        """The account as EC2 shows it: through the proxy, with its lag and its second snapshots."""
        return Account(self.proxy.url)

    @property
    def names(self) -> tuple[str, ...]:
        return ("temporal", "api", "worker", *BUILDERS)


@contextmanager
def running_rig(home: Path, **settings: object) -> Iterator[Rig]:
    """A rig of its own, with settings over `FAST`. Its parts are not restarted by themselves."""
    with running_moto() as moto, Ec2Proxy(moto.url) as proxy, _stack(home, proxy, settings) as stack:
        headers = {"X-API-Key": stack.api_key}
        with httpx.Client(base_url=stack.api_url, headers=headers, timeout=40, trust_env=False) as http:
            yield Rig(stack, proxy, _account(moto), http)


def _account(moto: MotoServer) -> Account:
    return moto.account()


def _stack(home: Path, proxy: Ec2Proxy, settings: Mapping[str, object]) -> LocalStack:
    api, temporal, ui = free_ports(3)
    chosen = Settings(
        home=home,
        api_port=api,
        temporal_port=temporal,
        temporal_ui_port=ui,
        ec2_endpoint=proxy.url,
        **{**FAST, **settings},  # type: ignore[arg-type]
    )
    return LocalStack(chosen, parts=BUILD_PARTS, workers=WORKERS, auto_restart=False, embedded=True)


def _can_be_written(home: Path) -> bool:
    for name in ("catalog.db", "logs.db"):
        with closing(sqlite3.connect(home / name, timeout=WRITE_SECONDS, isolation_level=None)) as database:
            try:
                database.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
    return True
