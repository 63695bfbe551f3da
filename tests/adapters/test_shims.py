"""Shims as a worker meets them: started once, found again, and telling all."""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kiln.adapters.pod_shim_spool import MAX_LINE_CHARS, Spool, TerminalLines
from kiln.adapters.shims import HostShim, HostShims
from kiln.errors import OperationOverError
from support.agents import Agents, all_lines, printed, texts
from support.processes import MARK, marked, soon
from support.tools import PATH

WORKER = """
    import asyncio, sys
    from pathlib import Path
    from kiln.adapters.shims import HostShims
    from kiln.ports.pods import ShimOrder

    async def main():
        root, key, script, path, name, mark = sys.argv[1:]
        order = ShimOrder("nonce", ["sh", "-c", script], Path("/"), {"PATH": path, name: mark}, grace_seconds=0.3)
        shim = await HostShims(Path(root)).start(key, order)
        await shim.wait()

    asyncio.run(main())
"""
SPOOL_BYTES = 1024 * 1024


@pytest.fixture
async def agents(tmp_path: Path, mark: str) -> AsyncIterator[Agents]:
    agents = Agents(tmp_path, mark)
    yield agents
    await agents.close()


@pytest.fixture
async def small(tmp_path: Path, mark: str) -> AsyncIterator[Agents]:
    """Agents whose spools have little room."""
    agents = Agents(tmp_path, mark, spool_bytes=SPOOL_BYTES)
    yield agents
    await agents.close()


# Once, and found again


@pytest.mark.fault
async def test_worker_is_killed_and_another_misses_no_line(agents: Agents, mark: str):
    """An agent lives on when its worker is killed, and the next worker gets each line that it printed meanwhile."""
    script = "for n in $(seq 200); do echo $n; sleep 0.002; done; read x; echo $x; exit 5"
    argv = [sys.executable, "-c", textwrap.dedent(WORKER), agents.root / "pods", "pod-a", script, PATH, MARK, mark]
    # A group of its own, killed as a whole: the shim is not in it.
    worker = await asyncio.to_thread(subprocess.Popen, argv, process_group=0)
    assert await soon(lambda: (shim := agents.shims.find("pod-a")) and texts(shim))
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    shim = agents.shims.find("pod-a")
    assert shim is not None
    await shim.prompt("still here")
    assert (await shim.wait()).exit_code == 5
    assert texts(shim) == [*map(str, range(1, 201)), "still here"]


async def test_one_shim_a_pod(agents: Agents, mark: str):
    """Of two workers that start a pod's agent at once, one does."""
    order = agents.order("sleep", "600")
    others = HostShims(agents.root / "pods")
    started = await asyncio.gather(
        *(shims.start("pod-a", order) for shims in (agents.shims, others)), return_exceptions=True
    )
    assert [type(one) for one in started].count(FileExistsError) == 1
    assert len(marked(mark)) == 1


async def test_ended_pod_is_not_started_again(agents: Agents):
    """A pod whose agent has ended keeps its result, and gets no second agent."""
    shim = await agents.sh("exit 4")
    await shim.wait()
    [key] = agents.shims.keys()
    with pytest.raises(FileExistsError):
        await agents.shims.start(key, agents.order("true"))
    found = agents.shims.find(key)
    assert found is not None
    assert (await found.wait()).exit_code == 4


async def test_pod_without_a_shim(agents: Agents):
    """A directory of a pod, its sandbox in it, is no shim, and does not hinder one."""
    (agents.root / "pods" / "pod-a" / "sandbox").mkdir(parents=True)
    assert (agents.shims.find("pod-a"), agents.shims.find("pod-b"), agents.shims.keys()) == (None, None, {"pod-a"})
    shim = await agents.shims.start("pod-a", agents.order("true"))
    assert (await shim.wait()).exit_code == 0


async def test_interrupted_start(agents: Agents, monkeypatch: pytest.MonkeyPatch):
    """A worker that dies before it has told the shim what to run leaves a pod that says so, and stays a pod's only one."""
    monkeypatch.setattr(sys, "executable", "/bin/true")
    shim = await agents.sh("exit 0")
    assert not shim.is_alive()
    assert (await shim.wait()).error == "its start was interrupted"
    with pytest.raises(FileExistsError):
        await agents.shims.start(*agents.shims.keys(), agents.order("true"))


async def test_long_path(tmp_path: Path, mark: str):
    """A shim is spoken to wherever its directory is, though a socket's path may have 107 bytes only."""
    agents = Agents(tmp_path / ("long" * 30), mark)
    agents.root.mkdir()
    shim = await agents.sh("echo ready; read x; echo $x")
    await shim.prompt("hello")
    await shim.wait()
    assert texts(shim) == ["ready", "hello"]


# What it answers


async def test_ended_agent_takes_no_prompt(agents: Agents):
    """A prompt to an agent that has ended is refused; ending it again is no error."""
    shim = await agents.sh("true")
    await shim.wait()
    with pytest.raises(OperationOverError):
        await shim.prompt("hello")
    await shim.terminate()


async def test_numbered_prompt_comes_once(agents: Agents):
    """A prompt that a worker repeats, as it does not know whether the last one sent it, is written once."""
    shim = await agents.sh('echo ready; while read -r line; do echo "<$line>"; done')
    for text, number in [("one", 1), ("two", 2), ("one", 1), ("two", 2), ("three", 3)]:
        await shim.prompt(text, number)
    await printed(shim, "<three>")
    assert texts(shim)[1:] == ["<one>", "<two>", "<three>"]
    assert (await shim.status())["prompted"] == 3


async def test_nonsense_is_answered(agents: Agents, monkeypatch: pytest.MonkeyPatch):
    """A request that makes no sense is refused, whatever it is, and the next one is served."""
    shim = await agents.sh("sleep 600")
    [control] = agents.root.rglob("control")
    monkeypatch.chdir(control.parent)
    reader, writer = await asyncio.open_unix_connection("control")
    writer.write(b'{\n[]\n{}\n{"do": "dance"}\n{"do": "renew", "seconds": "x"}\n\xff\n{"do": "ack", "number": 0}\n')
    answers = [json.loads(await reader.readline())["ok"] for _ in range(7)]
    writer.close()
    assert answers == [False] * 6 + [True]
    assert control.stat().st_mode & 0o777 == 0o600
    assert shim.is_alive()


async def test_arrival_is_told(agents: Agents):
    """Who waits for lines hears of them when they come, not later, and of the end."""
    shim = await agents.sh("echo ready; read x; echo $x; read x")
    await printed(shim, "ready")
    assert not await shim.arrived(1, 0.1)
    waiting = asyncio.create_task(shim.arrived(1, 30))
    await shim.prompt("hello")
    assert await asyncio.wait_for(waiting, 10)
    await shim.terminate()
    assert not await asyncio.wait_for(shim.arrived(2, 30), 10)


# The spool


async def test_full_spool_says_what_is_lost(small: Agents):
    """Output that nobody takes away is kept up to the bound; what is lost then is counted, and no number is missing."""
    shim = await small.sh("yes 0123456789012345678901234567890123456789 | head -n 30000; read x; echo last")
    while (status := await shim.status())["lost"] + status["last"] < 30_000:
        await asyncio.sleep(0.02)
    assert status["lost"] > 0
    assert SPOOL_BYTES * 0.99 < spooled_bytes(small) <= SPOOL_BYTES
    lines = all_lines(shim)
    await shim.acknowledge(len(lines))
    await shim.prompt("go on")
    await shim.wait()
    lines += all_lines(shim, after=len(lines))
    assert [line.number for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-2].text.startswith(f"[{30_000 - len(lines) + 2} lines of output are lost")
    assert (lines[-2].stream, lines[-1].text) == ("kiln", "last")


async def test_acknowledged_lines_make_room(small: Agents):
    """Lines that were taken away go, so that output without end fits in a spool that has one."""
    shim = await small.sh("echo ready; while read -r x; do seq 10000; echo $x; done")
    last = total = 0
    for text in ("one", "two", "three"):
        await shim.prompt(text)
        await printed(shim, text)
        total += spooled_bytes(small)
        last = all_lines(shim, after=last)[-1].number
        await shim.acknowledge(last)
    assert total > SPOOL_BYTES
    assert (last, (await shim.status())["lost"]) == (30_004, 0)
    assert spooled_bytes(small) < SPOOL_BYTES / 4


def test_full_disk_keeps_the_numbers(tmp_path: Path):
    """Lines for which the disk has no room are counted, those that come once it has some are there, and the last line's
    number is known although every line was taken away."""
    spool = Spool(tmp_path, 800)
    for text in ("one", "two"):
        spool.add("stdout", text)
    with no_room():
        spool.add("stdout", "three" * 10)
        spool.acknowledge(2)
    assert (HostShim(tmp_path).last(), all_lines(HostShim(tmp_path))) == (2, [])
    spool.add("stdout", "four")
    told = "[1 lines of output are lost: the runner had no room for more]"
    assert [(line.number, line.text) for line in all_lines(HostShim(tmp_path))] == [(3, told), (4, "four")]


@contextmanager
def no_room() -> Iterator[None]:
    """Within it, this process can write to no file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def spooled_bytes(agents: Agents) -> int:
    return sum(path.stat().st_size for path in agents.root.rglob("spool-*"))


@pytest.mark.parametrize("size", [1, 2, 7, 4096])
def test_lines_do_not_depend_on_reads(size: int):
    """However a terminal's bytes are divided into reads, they make the same lines."""
    data = "one\r\ntwo\n\n10 %\r20 %\r\r30 %\r\nä€😀\r\r\nend".encode()
    lines = TerminalLines([])
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    found = [line for part in parts for line in lines.feed(part)] + list(lines.finish())
    assert found == ["one", "two", "", "10 %", "20 %", "30 %", "ä€😀", "end"]


def test_long_line_comes_in_pieces():
    """A line without end comes in pieces as it grows, none of which ends within a secret."""
    secret = "s3cr3t-v@lue"
    text = "x" * (MAX_LINE_CHARS - 5) + secret + "y" * 3 * MAX_LINE_CHARS
    lines = TerminalLines([secret])
    early = list(lines.feed(text.encode()))
    found = early + list(lines.feed(b"\n"))
    assert early
    assert max(map(len, found)) <= MAX_LINE_CHARS
    assert "".join(found) == text.replace(secret, "***")


@pytest.mark.parametrize("shown", [b64encode(b"s3cr3t-v@lue").decode(), "begin\ns3cr3t-v@lue", "s3cr3t-v%40lue"])
def test_secret_in_two_halves(shown: str):
    """A secret that an agent prints in two halves is masked in whichever form it comes, and so is each of its lines."""
    lines = TerminalLines(["s3cr3t-v@lue", "begin\ns3cr3t-v@lue"])
    found = [*lines.feed(shown[:-4].encode()), *lines.flush(), *lines.feed(f"{shown[-4:]}\n".encode())]
    assert set(found) == {"***"}
