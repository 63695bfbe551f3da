"""A real agent in a container of an image that Kiln built: from npm's package to the pod's log."""

import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.engine_slot import Slot
from cli.local_stack import API, ENGINE, REGISTRY, RUNNER, TEMPORAL, WORKER, LocalStack
from kiln.settings import Settings
from support.container_rig import Caller, skip_without_engine
from support.pod_rig import PORTS, PodRig, runner_folder
from support.ports import free_ports
from support.processes import eventually
from support.stack import print_logs

pytestmark = [pytest.mark.docker, pytest.mark.long]

PACKAGE = "@anthropic-ai/claude-code"
PARTS = (TEMPORAL, REGISTRY, ENGINE, WORKER, API, RUNNER)
NPM_SECONDS = 240
BUILD_SECONDS = 240
DOCKERFILE = 'FROM scratch\nCOPY root /\nCMD ["claude"]\n'


@pytest.fixture(scope="module")
def claude(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent's program, from npm."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    prefix = tmp_path_factory.mktemp("npm")
    options = ["--no-audit", "--no-fund", "--no-update-notifier", f"--cache={prefix}/cache", f"--prefix={prefix}"]
    done = subprocess.run(
        ["npm", "install", *options, PACKAGE], capture_output=True, text=True, timeout=NPM_SECONDS, check=False
    )
    if done.returncode:
        pytest.skip(f"npm has no {PACKAGE} for us: {done.stderr.strip().splitlines()[-1]}")
    found = list(prefix.glob("node_modules/@anthropic-ai/claude-code-linux-*/claude"))
    assert len(found) == 1, found
    return found[0]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodRig]:
    skip_without_engine()
    with _running_rig(tmp_path_factory.mktemp("kiln") / "home") as rig:
        yield rig
        rig.end_all()


@contextmanager
def _running_rig(home: Path) -> Iterator[PodRig]:
    """A stack with builders and a runner, all of them processes."""
    ports: dict[str, Any] = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    with runner_folder() as folder:
        settings = Settings(home=home, runner_dir=folder, pod_grace_seconds=2.0, container_slots=1, **ports)
        stack = LocalStack(settings, parts=PARTS, workers=(("control", "container"),), embedded=True)
        try:
            with (
                stack,
                httpx.Client(
                    base_url=stack.api_url, headers={"X-API-Key": stack.api_key}, timeout=120, trust_env=False
                ) as http,
            ):
                yield PodRig(stack, http, folder)
        except BaseException:
            print_logs(home)
            raise


@pytest.fixture(scope="module")
def build_id(rig: PodRig, claude: Path) -> str:
    """A build of an image with the agent in it, by cloud-builds' API."""
    caller = Caller("", "default", rig.stack.api_key, rig.http)
    made = caller.submit(_context(claude), name="claude", tag="v1", agent_name="claude")
    caller.wait(made, "succeeded", seconds=BUILD_SECONDS)
    return made


def _context(claude: Path) -> bytes:
    """A Dockerfile, and below `root` the agent with its libraries, and busybox for a shell."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        dockerfile = tarfile.TarInfo("Dockerfile")
        dockerfile.size = len(DOCKERFILE)
        tar.addfile(dockerfile, io.BytesIO(DOCKERFILE.encode()))
        files = {"/usr/bin/claude": claude, "/bin/busybox": Path("/bin/busybox"), "/bin/sh": Path("/bin/busybox")}
        for place, file in {**files, "/bin/stty": Path("/bin/busybox"), **_libraries(claude)}.items():
            tar.add(file.resolve(), f"root{place}")
    return packed.getvalue()


def _libraries(program: Path) -> dict[str, Path]:
    """The shared libraries of a program, and its loader, by where they are looked for."""
    listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    return {path: Path(path) for path in re.findall(r"(/\S+) \(0x", listed)}


def _version(claude: Path) -> str:
    env = {"PATH": os.environ["PATH"], "HOME": str(claude.parent)}
    return subprocess.run(
        [str(claude), "--version"], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


def _containers(rig: PodRig) -> list[str]:
    host = Slot(rig.stack.settings.home_dir, 1).host
    listing = ["docker", "--host", host, "ps", "--all", "--quiet"]
    return subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()


def _undeployed(rig: PodRig) -> list[str]:
    answer = rig.http.get("/v5/builds/undeployed", headers={"x-selected-account-id": "default"})
    assert answer.status_code == 200, answer.text
    return [found["agent_name"] for found in answer.json()]


def test_agent_says_its_version(rig: PodRig, claude: Path, build_id: str) -> None:
    """The image that Kiln built runs as a pod, its output is the pod's log, and its agent counts as deployed."""
    assert _undeployed(rig) == ["claude"]
    key = rig.create(
        sandbox_type="container", image=build_id, custom_agent_command="claude", custom_agent_args=["--version"]
    )
    pod = rig.wait(key, seconds=120)
    assert (pod["status"], pod["exit_code"], pod["error"]) == ("completed", 0, None), rig.log(key)
    assert rig.log(key).splitlines()[-1] == _version(claude)
    assert _undeployed(rig) == []
    assert eventually(lambda: _containers(rig) == [])


def test_agent_at_its_terminal(rig: PodRig, claude: Path, build_id: str) -> None:
    """The agent by its own command comes up at its terminal, and ends, its container too, when it is told to."""
    key = rig.create(sandbox_type="container", image=build_id, environment_variables={"ANTHROPIC_API_KEY": "sk-none"})
    version = _version(claude).split()[0]
    assert eventually(lambda: version in rig.log(key), 60), rig.log(key)
    rig.terminate(key)
    assert eventually(lambda: _containers(rig) == [], 20)
    assert rig.pod(key)["status"] == "terminated"
