"""Pods as their users see them: a stack with the runner `local`, and scripts as agents."""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.pod_rig import INSTALLED, POD_MARK, PODS, PodRig, agent_processes, mark_of, running_pod_rig
from support.processes import eventually

LISTENING = 'echo ready; while read -r line; do echo "got: $line"; done'


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodRig]:
    with running_pod_rig(tmp_path_factory.mktemp("pods") / "home") as rig:
        yield rig


@pytest.fixture
def rig(shared: PodRig) -> Iterator[PodRig]:
    yield shared
    shared.end_all()


@pytest.fixture
def mark() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A bare repository with the branches main and feature."""
    work, bare = tmp_path / "work", tmp_path / "origin.git"
    _git(tmp_path, "init", "-q", "-b", "main", str(work))
    (work / "README").write_text("hello\n")
    _git(work, "add", ".")
    _git(work, "commit", "-qm", "first")
    _git(work, "branch", "feature")
    _git(tmp_path, "clone", "-q", "--bare", str(work), str(bare))
    return bare


def _git(cwd: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    return subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout


def _register(rig: PodRig, name: str, origin: Path) -> int:
    """The id of a repository that an operator registers by the command line."""
    command = [sys.executable, "-m", "cli.main", "repositories", "add", name, str(origin), "--json"]
    env = {"KILN_HOME": str(rig.stack.settings.home_dir), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["id"])


def test_a_pods_life(rig: PodRig) -> None:
    """Created, running, prompted, ended by itself: status, exit code, times and log say so."""
    key = rig.create(
        'echo ready; read -r a; echo "got: $a"; read -r b; echo "got: $b"', initial_prompt="first\nof two lines"
    )
    created = rig.pod(key)
    assert created["initial_prompt"] == "first\nof two lines"
    rig.printed(key, "got: first of two lines")
    assert rig.pod(key)["status"] == "running"
    rig.prompt(key, "second")
    pod = rig.wait(key)
    assert (pod["status"], pod["exit_code"], pod["error"]) == ("completed", 0, None)
    assert pod["created_at"] <= pod["started_at"] <= pod["finished_at"]
    events = rig.events(key)
    assert [data["line"] for name, data in events if name == "line"][-3:] == [
        "ready",
        "got: first of two lines",
        "got: second",
    ]
    assert events[-1] == ("end", {"status": "completed"})


def test_a_prompt_before_the_start_comes_at_the_start(rig: PodRig, mark: str) -> None:
    """A pod that waits for a place takes prompts, and its agent has them all, in their order."""
    holders = [rig.create("read -r _", environment_variables=mark_of(mark)) for _ in range(4)]
    for key in holders:
        rig.wait(key, "running")
    waiting = rig.create('for i in 1 2 3; do read -r a; echo "got: $a"; done', initial_prompt="one")
    rig.prompt(waiting, "two")
    rig.prompt(waiting, "three")
    assert rig.pod(waiting)["status"] == "creating"
    assert rig.runner()["status"] == "busy"
    rig.terminate(holders[0])
    rig.wait(waiting)
    assert rig.log(waiting).splitlines()[-3:] == ["got: one", "got: two", "got: three"]


def test_an_agent_is_started_by_its_type(rig: PodRig) -> None:
    """A runner offers what it finds installed. Each is called by its own program, with prompt, turns and MCP configuration
    as that takes them: to work something off and end, or to stay for more."""
    assert rig.runner()["available_agents"] == list(INSTALLED)
    servers = {"mcpServers": {"files": {"command": "files-server"}}}
    task = {"initial_prompt": "fix it", "max_turns": 3, "custom_mcp_config": servers}
    working = rig.create(agent_type_id="claude-code", **task)
    assert rig.wait(working)["status"] == "completed"
    said = rig.log(working).splitlines()
    home = rig.sandbox(working) / "sandbox" / "home"
    assert said[0] == "claude"
    assert {"<--print>", "<--max-turns=3>", f"<--mcp-config={home}/mcp.json>", "<fix it>", "turns: 3"} <= set(said)
    assert json.loads(said[-1]) == servers
    staying = rig.create(agent_type_id="codex", initial_prompt="begin")
    rig.printed(staying, "<begin>")
    rig.prompt(staying, "go on")
    rig.printed(staying, "got: go on")
    assert rig.log(staying).splitlines()[0] == "codex"
    refused = rig.http.post(PODS, json={"runner_id": "local", "agent_type_id": "gemini"})
    assert (refused.status_code, refused.json()["code"]) == (400, "VALIDATION_FAILED")
    assert refused.json()["error"].startswith("agent_type_id: ")


def test_an_agents_failure_is_its_exit_code(rig: PodRig) -> None:
    """Exit code other than 0: failed, with the code, and the last lines in the log."""
    pod = rig.wait(key := rig.create("echo it broke; exit 42"))
    assert (pod["status"], pod["exit_code"], pod["error"]) == ("failed", 42, "the agent exited with code 42")
    assert rig.log(key).splitlines()[-1] == "it broke"


def test_a_command_that_is_not_there_fails_the_pod(rig: PodRig) -> None:
    """The reason is a sentence in the pod's error."""
    pod = rig.wait(rig.create(custom_agent_command="no-such-agent"))
    assert pod["status"] == "failed"
    assert "No such file" in pod["error"]


def test_the_agent_is_alone_with_what_it_was_given(rig: PodRig, mark: str) -> None:
    """Neither root nor in another's directory, with a terminal, and no variable but its own and the short list."""
    key = rig.create(
        "id -u; pwd; echo $HOME; test -t 0 && echo terminal; env | cut -d= -f1 | sort | tr '\\n' ' '; echo",
        environment_variables={**mark_of(mark), "MINE": "x y"},
    )
    assert rig.wait(key)["status"] == "completed"
    uid, cwd, home, terminal, names = rig.log(key).splitlines()[-5:]
    assert int(uid) >= 200000
    assert Path(cwd).is_relative_to(rig.sandbox(key))
    assert Path(home).is_relative_to(rig.sandbox(key))
    assert terminal == "terminal"
    allowed = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TERM", "TMPDIR", "PWD", "OLDPWD", "SHLVL", "_"}
    assert set(names.split()) - allowed == {"KILN_POD", "MINE", POD_MARK}


def test_a_secret_is_nowhere_but_with_its_agent(rig: PodRig, mark: str) -> None:
    """The value of a variable is in no answer, no log, no file of Kiln's, no history of Temporal's, no other pod's reach,
    though the agent prints it."""
    secret = f"s3cret-{uuid.uuid4().hex}"
    spy = rig.create(
        "for p in /proc/[0-9]*; do cat $p/environ 2>/dev/null | tr '\\0' '\\n'; done; read -r _; "
        "for p in /proc/[0-9]*; do cat $p/environ 2>/dev/null | tr '\\0' '\\n'; done; echo spied"
    )
    rig.wait(spy, "running")
    key = rig.create(
        'echo "it is $TOKEN"; sleep 2; echo done', environment_variables={**mark_of(mark), "TOKEN": secret}
    )
    rig.printed(key, "done")
    rig.prompt(spy, "now")
    rig.printed(spy, "spied")
    assert rig.wait(key)["status"] == "completed"
    assert any(line.startswith("it is ") for line in rig.log(key).splitlines())
    assert secret not in rig.http.get(PODS).text + rig.log(key) + rig.log(spy)
    needle = secret.encode()
    places = [rig.stack.settings.home_dir, rig.folder]
    holding = [path for place in places for path in place.rglob("*") if path.is_file() and needle in path.read_bytes()]
    assert holding == []
    assert secret not in rig.temporal_cli("workflow", "show", "-w", key, "--output", "json")


def test_a_terminated_pod_leaves_nothing_on_the_host(rig: PodRig, mark: str) -> None:
    """At once `terminated`; then no process and no sandbox; a second time is refused."""
    key = rig.create("sleep 600 & sleep 600", environment_variables=mark_of(mark))
    assert eventually(lambda: len(agent_processes(mark)) >= 3, 15)
    rig.terminate(key)
    assert rig.pod(key)["status"] == "terminated"
    again = rig.http.post(f"{PODS}/{key}/terminate")
    assert (again.status_code, again.json()) == (400, {"error": "Pod already terminated", "code": "VALIDATION_FAILED"})
    assert eventually(lambda: not agent_processes(mark), 10)
    assert eventually(lambda: not rig.sandbox(key).exists(), 15)


def test_auto_close_removes_the_sandbox_after_its_delay(rig: PodRig) -> None:
    """Not before the delay, and soon after it; without auto_close it stays."""
    closing = rig.create("echo x > left", auto_close=True, auto_close_delay_seconds=3)
    staying = rig.create("echo x > left")
    rig.wait(closing)
    assert rig.sandbox(closing).exists()
    ended = time.monotonic()
    assert eventually(lambda: not rig.sandbox(closing).exists(), 20)
    assert time.monotonic() - ended > 1.5
    rig.wait(staying)
    assert (rig.sandbox(staying) / "sandbox" / "work" / "left").exists()


def test_two_pods_work_on_one_branch_and_lose_nothing(rig: PodRig, origin: Path) -> None:
    """Each has a worktree of its own at the branch; what they did not push is on branches of the repository."""
    repository = _register(rig, f"app-{uuid.uuid4().hex[:6]}", origin)
    body = {"repository_id": repository, "branch": "feature", "sandbox_type": "worktree", "auto_close": True}
    script = 'git branch --show-current; echo "$KILN_POD" > mine; git add mine; git commit -qm mine; echo more > loose; sleep 1'
    keys = [rig.create(script, **body) for _ in range(2)]
    for key in keys:
        pod = rig.wait(key)
        assert pod["status"] == "completed", (pod, rig.log(key))
        assert "feature" in rig.log(key).splitlines()
        assert f"kiln/{key}" in rig.log(key)
        assert _git(origin, "show", f"kiln/{key}:mine").strip() == key
        assert _git(origin, "show", f"kiln/{key}:loose") == "more\n"
    assert _git(origin, "log", "--format=%s", "feature").split() == ["first"]
    assert eventually(lambda: not any(rig.sandbox(key).exists() for key in keys), 20)


def test_an_unknown_branch_is_refused(rig: PodRig, origin: Path) -> None:
    """A repository that Kiln reaches is asked; nothing of the pod is there."""
    repository = _register(rig, f"app-{uuid.uuid4().hex[:6]}", origin)
    before = rig.http.get(PODS).json()["total"]
    answer = rig.http.post(
        PODS,
        json={"runner_id": "local", "custom_agent_command": "true", "repository_id": repository, "branch": "no-such"},
    )
    assert (answer.status_code, answer.json()) == (
        400,
        {"error": "branch: branch no-such is not in the repository", "code": "VALIDATION_FAILED"},
    )
    assert rig.http.get(PODS).json()["total"] == before


def test_a_branch_that_only_the_runner_can_look_for_fails_the_pod(rig: PodRig, origin: Path) -> None:
    """The repository's default branch, which is gone: the pod says so, and nothing of it stays."""
    repository = _register(rig, f"app-{uuid.uuid4().hex[:6]}", origin)
    _git(origin, "branch", "-m", "main", "trunk")
    pod = rig.wait(key := rig.create("true", repository_id=repository, auto_close=True))
    assert (pod["status"], pod["error"]) == ("failed", "branch main is not in the repository")
    assert eventually(lambda: not rig.sandbox(key).exists(), 20)


def test_a_disk_limit_holds_where_the_host_has_one(rig: PodRig) -> None:
    """What the agent may write is bounded, other pods are not; the disk goes with the sandbox."""
    script = "dd if=/dev/zero of=big bs=1M count=64; du -m big | cut -f1; exit 0"
    command = {"custom_agent_command": "sh", "custom_agent_args": ["-c", script]}
    body = {"runner_id": "local", **command, "limits": {"disk_mb": 24}, "auto_close": True}
    answer = rig.http.post(PODS, json=body)
    if answer.status_code == 400:
        pytest.skip(answer.json()["error"])
    key = answer.json()["pod"]["key"]
    assert rig.wait(key)["status"] == "completed"
    assert "No space left on device" in rig.log(key)
    assert 0 < int(rig.log(key).splitlines()[-1]) < 24
    assert eventually(lambda: not rig.sandbox(key).exists(), 20)
    assert str(rig.folder) not in Path("/proc/mounts").read_text()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"runner_id": "nobody"}, "RESOURCE_NOT_FOUND"),
        ({"repository_id": 10**9}, "RESOURCE_NOT_FOUND"),
        ({"image": "no-such:v1"}, "RESOURCE_NOT_FOUND"),
        ({"custom_agent_command": None, "agent_type_id": "aider"}, "VALIDATION_FAILED"),
        ({"initial_prompt": "x" * 1024 * 1024}, "VALIDATION_FAILED"),
        ({"limits": {"memory_mb": -1}}, "VALIDATION_FAILED"),
    ],
)
def test_a_refused_pod_leaves_nothing(rig: PodRig, changes: dict[str, object], code: str) -> None:
    """No row, no workflow without a row, no new directory on the runner's host."""
    total, there = rig.http.get(PODS).json()["total"], set((rig.folder / "pods").iterdir())
    answer = rig.http.post(PODS, json={"runner_id": "local", "custom_agent_command": "true", **changes})
    assert answer.json()["code"] == code
    assert rig.http.get(PODS).json()["total"] == total
    counted = rig.temporal_cli("workflow", "count", "--query", 'WorkflowType = "run-pod"')
    assert int(counted.split()[-1]) <= total
    assert set((rig.folder / "pods").iterdir()) <= there


@pytest.mark.long
def test_a_pods_time_limit(rig: PodRig, mark: str) -> None:
    """Past it the pod is failed, with the contract's sentence, and its processes are gone."""
    key = rig.create(
        "trap '' TERM; echo ready; while :; do sleep 1; done",
        pod_timeout_minutes=1,
        environment_variables=mark_of(mark),
    )
    pod = rig.wait(key, seconds=90)
    assert (pod["status"], pod["error"]) == ("failed", "pod timed out after 1 minutes")
    assert not agent_processes(mark)
