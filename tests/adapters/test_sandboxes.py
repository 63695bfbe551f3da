"""What an agent finds in its sandbox, what it cannot get out of it, and what is left after it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kiln.errors import OperationFailedError
from kiln.models import PodLimits, PodSpec, SandboxType
from support.agents import printed
from support.pod_rig import runner_folder
from support.processes import MARK
from support.sandboxes import AS_ROOT, Sandboxed

KEY = "pod-aaaaaaaaaaaa"
OTHER = "pod-bbbbbbbbbbbb"
SECRET = "s3cr3t-v@lue"
needs_root = pytest.mark.skipif(not AS_ROOT, reason="only root can give agents users of their own")


@pytest.fixture
async def host(mark: str) -> AsyncIterator[Sandboxed]:
    with runner_folder() as root:
        host = Sandboxed(root, mark)
        yield host
        await host.close()


async def test_agent_works_in_its_sandbox(host: Sandboxed):
    """Working directory, HOME and TMPDIR are empty directories of the sandbox that only the agent's user may enter."""
    script = "pwd; echo $HOME; echo $TMPDIR; ls -A; ls -A $TMPDIR; stat -c '%a %u' . $HOME $TMPDIR; id -u"
    lines = await host.run(host.order(KEY, script))
    sandbox = host.sandbox(KEY)
    assert lines[:3] == [str(sandbox / name) for name in ("work", "home", "tmp")]
    assert lines[3:6] == [f"700 {lines[-1]}"] * 3


async def test_environment_is_the_pods_own(host: Sandboxed, monkeypatch: pytest.MonkeyPatch):
    """An agent sees what Kiln and its pod give it, the pod's word counting more, and nothing of the worker's."""
    for name in ("AWS_ACCESS_KEY_ID", "KILN_RUNNER_TOKEN", "PYTHONPATH"):
        monkeypatch.setenv(name, "of the worker")
    given = {"LANG": "C", "EXTRA": "1"}
    lines = await host.run(host.order(KEY, "env", environment=given))
    found = dict(line.split("=", 1) for line in lines)
    names = {
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "TERM",
        "TMPDIR",
        "KILN_POD",
        "EXTRA",
        MARK,
        "GIT_PAGER",
    }
    assert found.keys() - {"PWD", "OLDPWD", "SHLVL", "_"} == names
    assert (found["KILN_POD"], found["LANG"], found["EXTRA"]) == (KEY, "C", "1")


async def test_secrets_are_masked(host: Sandboxed):
    """Values of the pod's variables, and those in its MCP configuration, do not show in what the agent prints."""
    config = {"mcpServers": {"one": {"command": "one", "env": {"TOKEN": "in-the-config"}}}}
    order = host.order(KEY, "echo $PASS; cat $KILN_MCP_CONFIG", environment={"PASS": SECRET}, mcp_config=config)
    lines = await host.run(order)
    assert lines[0] == "***"
    assert '"TOKEN": "***"' in lines[1]


async def test_limits_are_the_smaller_ones(host: Sandboxed):
    """Of the pod's limit and the runner's, the smaller one holds."""
    order = host.order(KEY, "", limits=PodLimits(memory_mb=64, processes=100_000))
    shim_order = await host.sandboxes.prepare(order, host.say)
    assert (shim_order.memory_mb, shim_order.processes) == (64, 100)


@needs_root
async def test_agents_have_users_of_their_own(host: Sandboxed):
    """Two agents at once are two users, none of them root, with a group each, no other, and nothing to regain."""
    script = "id -u; id -G; grep -E '^(CapPrm|CapEff|CapBnd|NoNewPrivs)' /proc/self/status; echo up; read x"
    shims = [await host.start(host.order(key, script)) for key in (KEY, OTHER)]
    seen = []
    for shim in shims:
        await printed(shim, "up")
        seen.append([line.text for line in shim.lines(0)])
    assert seen[0][0] != seen[1][0]
    for lines in seen:
        assert lines[0] == lines[1] != "0"
        assert {line.split()[1] for line in lines if line.startswith(("CapPrm", "CapEff"))} == {"0" * 16}
        assert "NoNewPrivs:\t1" in lines


@needs_root
async def test_agent_reads_nothing_of_others(host: Sandboxed):
    """Neither another agent's environment and files, nor the runner's."""
    neighbour = await host.start(host.order(OTHER, "echo mine > kept; echo up; read x", environment={"PASS": SECRET}))
    await printed(neighbour, "up")
    pid = (await neighbour.status())["agent"]
    (host.root / "runners-own").write_text(SECRET)
    (host.root / "runners-own").chmod(0o600)
    paths = [
        f"/proc/{pid}/environ",
        f"/proc/{os.getpid()}/environ",
        host.sandbox(OTHER) / "work" / "kept",
        host.root / "runners-own",
        host.root / "pods" / KEY / "shim" / "order.json",
    ]
    script = "\n".join(f"cat {path} 2>/dev/null && echo read" for path in paths) + "\nls / > /dev/null && echo tried"
    assert await host.run(host.order(KEY, script)) == ["tried"]


@needs_root
async def test_agents_user_has_a_name(host: Sandboxed):
    """Programs that ask who they are get an answer: a user that is in the agent's own list, and not in the host's."""
    script = "getent passwd $(id -u) || cat /etc/passwd; echo x >> /etc/passwd"
    lines = await host.run(host.order(KEY, script))
    assert any(line.startswith("agent:x:") and line.endswith(f":{host.sandbox(KEY)}/home:/bin/sh") for line in lines)
    assert not _has("/etc/passwd", "agent:x:")
    assert any("ermission denied" in line for line in lines)


async def test_prepare_again_makes_anew(host: Sandboxed):
    """What an interrupted preparation has left is gone, and the agent's user is the same."""
    order = host.order(KEY, "ls -A; id -u")
    first = await host.sandboxes.prepare(order, host.say)
    (host.sandbox(KEY) / "work" / "left").touch()
    host.start_anew()
    lines = await host.run(order)
    assert lines == [first.user or str(os.getuid())]


async def test_remove_copes_with_what_agents_make(host: Sandboxed):
    """Directories without rights, a very deep one, and links to elsewhere: all of it goes, and nothing beyond."""
    outside = host.root / "outside"
    outside.mkdir(mode=0o777)
    (outside / "kept").touch()
    script = f"""
        ln -s {outside} link; ln -s {outside}/kept file; ln -s {outside} $HOME/link
        mkdir -p closed/in; touch closed/in/file; chmod 0 closed/in closed
        deep=$(printf 'd/%.0s' $(seq 1500)); cd $TMPDIR; mkdir -p $deep; cd $deep; mkdir -p $deep
    """
    await host.run(host.order(KEY, script))
    await host.sandboxes.remove(KEY)
    assert not (host.root / "pods" / KEY).exists()
    assert (outside / "kept").exists()
    await host.sandboxes.remove(KEY)


async def test_remove_of_a_deep_tree_leaves_room_for_others(host: Sandboxed):
    """While a sandbox goes in which an agent made directories hundreds deep, the runner has its descriptors for other pods."""
    script = "deep=$(printf 'd/%.0s' $(seq 900)); mkdir -p $deep; cd $deep; seq 5000 | xargs touch"
    await host.run(host.order(KEY, script))
    before = most = _descriptors()
    removal = asyncio.create_task(host.sandboxes.remove(KEY))
    while not removal.done():
        most = max(most, _descriptors())
        await asyncio.sleep(0.001)
    await removal
    assert most < before + 100


@needs_root
async def test_remove_ends_what_still_runs(host: Sandboxed):
    """A process of the agent's user that nobody knows of is dead once the sandbox is removed."""
    order = await host.sandboxes.prepare(host.order(KEY, ""), host.say)
    uid = int(order.user or "")
    stray = await asyncio.create_subprocess_exec("sleep", "600", user=uid, group=uid, extra_groups=[])
    await host.sandboxes.remove(KEY)
    assert await asyncio.wait_for(stray.wait(), 10) == -9


async def test_container_without_an_engine(host: Sandboxed):
    """A runner without an engine says so."""
    order = host.order(KEY, "", spec=PodSpec(sandbox_type=SandboxType.CONTAINER))
    with pytest.raises(OperationFailedError, match="no container engine"):
        await host.sandboxes.prepare(order, host.say)


async def test_disk_limit(host: Sandboxed):
    """A sandbox with a limit for its disk holds no more than that; its agent ended, it leaves no mount and no loop device."""
    if not await asyncio.to_thread(host.sandboxes.limits):
        pytest.skip("this host mounts no loop devices for this process")
    before = _loops()
    script = "head -c 30000000 /dev/zero > big; stat -c %s big; touch x && mkdir y && echo more; df --output=size . | tail -1"
    lines = await host.run(host.order(KEY, script, limits=PodLimits(disk_mb=16)))
    sizes = [int(line) for line in lines if line.strip().isdigit()]
    assert 0 < sizes[0] < 16 * 1024 * 1024
    await host.sandboxes.conclude(KEY, host.say)
    assert not _has("/proc/mounts", str(host.root))
    assert _loops() <= before
    host.start_anew()
    await host.sandboxes.remove(KEY)
    assert not (host.root / "pods" / KEY).exists()


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _has(path: str, text: str) -> bool:
    return text in Path(path).read_text()


def _loops() -> set[str]:
    """The loop devices that have a file."""
    return {path.parts[4] for path in Path("/sys/block").glob("../block/loop*/loop/backing_file")}


@needs_root
async def test_probe_of_a_killed_runner(host: Sandboxed):
    """A disk that a killed process had mounted to see whether it can is gone once the next one has tried it too."""
    code = f"""
import os, pathlib
from kiln.adapters import sandbox_disk
sandbox_disk.SandboxDisk.remove = lambda _: os.kill(os.getpid(), 9)
sandbox_disk.can_limit_disk(pathlib.Path({str(host.root)!r}))
"""
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await killed.wait() == -9
    assert list(host.root.glob(".disk-*/mount"))
    host.sandboxes.limits()
    assert not list(host.root.glob(".disk-*"))
