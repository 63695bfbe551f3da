"""`kiln up` as a user runs it: one real process, with Temporal, a simulated EC2, a worker and the API below it."""

import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.processes import eventually, read_proc
from support.stack import KilnUp, run_kiln

SECRETS_OF_OTHERS = {"AWS_ACCESS_KEY_ID": "AKIAOTHERS", "AWS_SECRET_ACCESS_KEY": "not-for-the-stack"}
NO_ENGINE = {"DOCKER_HOST": "unix:///nonexistent/docker.sock"}


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path: Packer's sockets, some folders below it, have 107 characters at most (unix(7))."""
    return tmp_path_factory.mktemp("up") / "h"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilnUp]:
    """A stack for this file's tests. AWS's credentials lie around in its environment, and no Docker engine is there."""
    with KilnUp(tmp_path_factory.mktemp("up") / "home", containers=True, **SECRETS_OF_OTHERS, **NO_ENGINE) as up:
        yield up


def get(up: KilnUp, path: str) -> httpx.Response:
    return httpx.get(up.api_url + path, headers={"X-API-Key": up.api_key}, trust_env=False, timeout=10)


def runner_pid(up: KilnUp) -> int:
    """The process of the runner `local`."""
    (pid,) = [pid for pid in up.processes() if b"--runner-name" in read_proc(pid, "cmdline").split(b"\0")]
    return pid


def _module(pid: int) -> bytes:
    """What a process runs as `python -P -m MODULE`."""
    return b"".join(read_proc(pid, "cmdline").split(b"\0")[3:4])


def test_up_prints_where_everything_is(up: KilnUp) -> None:
    """API, its documentation, Temporal's UI, EC2 marked as simulated, and all of them answer."""
    assert up.api_url in up.line("^  API ")
    assert f"{up.api_url}/docs" in up.line("^  API docs")
    ui = f"http://127.0.0.1:{up.ports['KILN_TEMPORAL_UI_PORT']}"
    assert ui in up.line("^  Temporal UI")
    ec2 = f"http://127.0.0.1:{up.ports['KILN_EC2_PORT']}"
    assert f"{ec2} (simulated" in up.line("^  EC2")
    for url in (up.api_url + "/docs", ui, ec2 + "/moto-api/"):
        assert httpx.get(url, trust_env=False, follow_redirects=True).status_code == 200, url


def test_the_first_start_makes_an_admin_key(up: KilnUp) -> None:
    """It is shown once, kept with mode 0600, and opens the API."""
    file = up.home / "api-key"
    assert f"{up.api_key} (shown once; kept in {file})" in up.line("^  API key")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((up.home / "secret-key").stat().st_mode) == 0o600
    assert get(up, "/api/v1/builds").json() == {"builds": [], "next_cursor": None}


def test_every_part_is_ready_when_up_says_so(up: KilnUp) -> None:
    """`/readyz` answers 200."""
    ready = get(up, "/readyz")
    assert (ready.status_code, ready.json()["status"], ready.json()["ec2"]) == (200, "ready", "simulated")


def test_a_stack_without_an_engine_says_so_and_serves_all_else(up: KilnUp) -> None:
    """The reason is printed, and in `/readyz`; neither engine nor registry was started."""
    reason = up.line("^  Containers ").partition("off: ")[2]
    assert reason
    assert get(up, "/readyz").json()["parts"]["containers"] == f"off: {reason}"
    assert not [pid for pid in up.processes() if b"registry" in read_proc(pid, "cmdline")]


def test_no_part_sees_what_is_not_its_own(up: KilnUp) -> None:
    """AWS's credentials reach nobody while EC2 is simulated; the secret key reaches Kiln's own parts only."""
    key = (up.home / "secret-key").read_bytes().strip()
    seen = set()
    for pid in up.processes() - {up.pid}:
        environment, command = read_proc(pid, "environ"), read_proc(pid, "cmdline")
        assert b"not-for-the-stack" not in environment, command
        assert key not in command
        if key in environment:
            seen.add(command.split(b"\0")[3])
    assert seen == {b"worker", b"api"}


def test_the_runner_sees_nothing_but_its_own(up: KilnUp) -> None:
    """Neither a key nor where the catalog is, and nothing of AWS's; its token is in the home, with mode 0600."""
    seen = read_proc(runner_pid(up), "environ")
    token = up.home / "runner-token"
    assert f"KILN_RUNNER_TOKEN={token.read_text().strip()}".encode() in seen.split(b"\0")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    for secret in ((up.home / "secret-key").read_bytes().strip(), up.api_key.encode(), b"AWS_", b"CATALOG"):
        assert secret not in seen


def test_the_runner_local_is_online(up: KilnUp) -> None:
    """`kiln up` says where it is; it allows custom commands, and pods can be sent to it by its name."""
    assert up.line("^  Runner ").endswith(f"local, 4 pods at once in {up.runner_dir}")
    runner = get(up, "/api/v1/ext/orgs/default/runners/local").json()["runner"]
    assert (runner["name"], runner["status"], runner["current_pods"]) == ("local", "online", 0)
    listed = json.loads(run_kiln(up.home, "runners", "list", "--json").stdout)["runners"]
    assert [(row["name"], row["status"], row["allows_custom_commands"]) for row in listed] == [
        ("local", "online", True)
    ]


def test_a_second_stack_on_the_same_home_is_refused(up: KilnUp) -> None:
    """The first one is not disturbed."""
    answer = run_kiln(up.home, "up")
    assert answer.returncode == 1
    assert answer.stderr == f"kiln: another stack runs on {up.home}: stop it, or set KILN_HOME\n"
    assert get(up, "/readyz").status_code == 200


def test_a_killed_part_is_started_again(up: KilnUp) -> None:
    """Its death is said with the place of its log; soon everything is ready again."""
    worker = next(pid for pid in up.processes() if _module(pid) == b"worker" and pid != runner_pid(up))
    os.kill(worker, signal.SIGKILL)
    assert str(up.home / "logs" / "worker.log") in up.line(
        "^worker was killed by SIGKILL; .*starting it again in 0.5 s"
    )
    up.line("^worker is back")
    assert get(up, "/readyz").status_code == 200


def test_state_survives_a_restart_and_nothing_is_left_running(home: Path) -> None:
    """SIGTERM ends all within 30 s with exit code 0; the next start has the builds and makes no new key."""
    with KilnUp(home) as first:
        made = run_kiln(home, "build", "--provider", "claude-code", "--follow", KILN_URL=first.api_url)
        assert made.returncode == 0, made.stdout + made.stderr
        key = first.api_key
        code, seconds = first.end(signal.SIGTERM)
        assert code == 0
        assert seconds < 30
        assert eventually(lambda: not first.processes(), 2), "processes are left"
    with KilnUp(home) as second:
        assert second.line("^  API key").endswith(f"in {home / 'api-key'}")
        assert second.api_key == key
        (build,) = get(second, "/api/v1/builds").json()["builds"]
        assert build["status"] == "succeeded"
        assert build["image"]["simulated"] is True
        shown = run_kiln(home, "builds", "list", KILN_URL=second.api_url).stdout
        assert f"{build['image']['ami_id']} (simulated)" in shown


def test_a_killed_stack_leaves_nothing_running(home: Path) -> None:
    """SIGKILL to `kiln up` itself: the kernel tells its parts."""
    with KilnUp(home) as up:
        up.end(signal.SIGKILL)
        assert eventually(lambda: not up.processes(), 28), "processes are left"
