"""A Kiln with one runner named `local`, as processes of their own, and scripts as its agents."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cli.local_stack import API, EC2, RUNNER, TEMPORAL, WORKER, LocalStack
from kiln.catalog.keys import DEFAULT_ORGANIZATION
from kiln.models import AGENT_PATH
from kiln.settings import Settings
from support.ports import free_ports
from support.processes import eventually, marked

PARTS = (TEMPORAL, EC2, WORKER, API, RUNNER)
PORTS = ("api_port", "temporal_port", "temporal_ui_port", "ec2_port", "registry_port")
FAST = {
    "house_seconds": 1.0,
    "containers": False,
    "pod_grace_seconds": 2.0,
    "runner_custom_commands": True,
    "runner_places": 4,
}
TEMPORAL_CLI = str(Path(sys.executable).with_name("temporal"))
PODS = f"/api/v1/ext/orgs/{DEFAULT_ORGANIZATION}/pods"
RUNNERS = f"/api/v1/ext/orgs/{DEFAULT_ORGANIZATION}/runners"
# Agent types that the rig's runner has, and their programs.
INSTALLED = {"claude-code": "claude", "codex": "codex"}
STAND_IN = """#!/bin/sh
basename "$0"
printf '<%s>\\n' "$@"
echo "turns: $KILN_MAX_TURNS"
[ -z "$KILN_MCP_CONFIG" ] || cat "$KILN_MCP_CONFIG"
echo
case "$*" in *--print*) exit 0;; esac
while read -r line; do echo "got: $line"; done
"""
POD_MARK = "POD_TEST_MARK"
ENDED = frozenset({"completed", "failed", "terminated"})


@dataclass
class PodRig:
    """A stack, a client of its API, and the runner's folder."""

    stack: LocalStack
    http: httpx.Client
    folder: Path

    def create(self, script: str = "", **body: Any) -> str:
        """The key of a new pod whose agent is a shell script."""
        command = {"custom_agent_command": "sh", "custom_agent_args": ["-c", script]} if script else {}
        answer = self.http.post(PODS, json={"runner_id": "local", **command, **body})
        assert answer.status_code == 201, answer.text
        key: str = answer.json()["pod"]["key"]
        return key

    def pod(self, key: str) -> dict[str, Any]:
        answer = self.http.get(f"{PODS}/{key}")
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()["pod"]
        return body

    def runner(self) -> dict[str, Any]:
        answer = self.http.get(f"{RUNNERS}/local")
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()["runner"]
        return body

    def wait(self, key: str, *statuses: str, seconds: float = 30) -> dict[str, Any]:
        """The pod once it has one of the statuses (any end, without). Fails after so many seconds."""
        wanted = frozenset(statuses) or ENDED
        end = time.monotonic() + seconds
        while (body := self.pod(key))["status"] not in wanted:
            assert time.monotonic() < end, f"still {body['status']}: {json.dumps(body, indent=1)}\n{self.log(key)}"
            time.sleep(0.05)
        return body

    def log(self, key: str) -> str:
        return self.http.get(f"{PODS}/{key}/logs", headers={"Accept": "text/plain"}).text

    def events(self, key: str) -> list[tuple[str, dict[str, Any]]]:
        """The whole log as it is streamed, to its end."""
        found, name = list[tuple[str, dict[str, Any]]](), ""
        with self.http.stream("GET", f"{PODS}/{key}/logs") as answer:
            for line in answer.iter_lines():
                if line.startswith("event:"):
                    name = line[6:].strip()
                if line.startswith("data:"):
                    found.append((name, json.loads(line[5:])))
        return found

    def printed(self, key: str, text: str, seconds: float = 20) -> None:
        """Returns once the pod's log has a line of this text."""
        assert eventually(lambda: text in self.log(key).splitlines(), seconds), self.log(key)

    def prompt(self, key: str, text: str) -> None:
        answer = self.http.post(f"{PODS}/{key}/prompt", json={"prompt": text})
        assert answer.status_code == 200, answer.text

    def terminate(self, key: str) -> None:
        answer = self.http.post(f"{PODS}/{key}/terminate")
        assert answer.status_code == 200, answer.text

    def temporal_cli(self, *arguments: str) -> str:
        """Runs Temporal's own command line."""
        address = f"127.0.0.1:{self.stack.settings.temporal_port}"
        command = [TEMPORAL_CLI, *arguments, "--address", address, "--color", "never"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def workflow(self, key: str) -> tuple[str, str]:
        """The id and the status of the pod's last run, as Temporal's API names them."""
        shown = json.loads(self.temporal_cli("workflow", "describe", "-w", key, "--output", "json"))
        info = shown["workflowExecutionInfo"]
        return info["execution"]["runId"], info["status"]

    def sandbox(self, key: str) -> Path:
        return self.folder / "pods" / key

    def kill_runner(self) -> None:
        self.stack.kill("runner")
        self.stack.wait_for_exit("runner")

    def end_all(self) -> None:
        """Terminates what is open, so that each test begins with all places free."""
        answer = self.http.get(PODS, params={"status": "creating,running,orphaned", "limit": 100})
        keys = [pod["key"] for pod in answer.json()["pods"]]
        for key in keys:
            self.http.post(f"{PODS}/{key}/terminate")
        assert eventually(lambda: not any(self.sandbox(key).exists() for key in keys), 30)


def agent_processes(mark: str) -> set[int]:
    """The live processes of agents that were given this mark by `environment_variables`."""
    return marked(mark, POD_MARK)


def mark_of(mark: str) -> dict[str, str]:
    """The environment variables that mark a pod's processes."""
    return {POD_MARK: mark}


@contextmanager
def runner_folder() -> Iterator[Path]:
    """A folder for a runner's pods that the users of its agents can get to."""
    folder = Path(tempfile.mkdtemp(prefix="kiln-test-", dir="/var/tmp"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _install_agents(folder: Path) -> str:
    """Stand-ins for some of the agents, which say how they were called and then repeat what they are told; the path that
    has them."""
    programs = folder / "bin"
    programs.mkdir(mode=0o755)
    for name in INSTALLED.values():
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    return f"{programs}:{AGENT_PATH}"


@contextmanager
def running_pod_rig(home: Path, **settings: Any) -> Iterator[PodRig]:
    """A stack whose control worker, API and runner are processes; what its parts printed is printed if the block fails."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    with runner_folder() as folder:
        place = Settings(
            home=home, **{**FAST, "runner_dir": folder, "agent_path": _install_agents(folder), **ports, **settings}
        )
        stack = LocalStack(place, parts=PARTS, workers=(("control",),), auto_restart=False, embedded=True)
        try:
            with stack, _client(stack) as http:
                yield PodRig(stack, http, folder)
        except BaseException:
            for name in ("worker", "api", "runner"):
                print(f"--- {name}\n{stack.log_file(name).read_text(errors='replace')[-4000:]}")  # noqa: T201  the report
            raise


def _client(stack: LocalStack) -> httpx.Client:
    return httpx.Client(base_url=stack.api_url, headers={"X-API-Key": stack.api_key}, timeout=60, trust_env=False)
