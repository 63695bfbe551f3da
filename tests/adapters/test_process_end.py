"""How tools end, and that nothing of them is left."""

import array
import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from kiln.adapters.process import Exit, ExitReason, GuardLostError, ToolNotStartedError
from support.processes import MARK, eventually, marked, soon, state_of
from support.tools import PATH, TREE, TREE_SIZE, Tools, descriptors, first, guards, parent_of

WORKER = """
    import asyncio, os, sys
    from datetime import timedelta
    from pathlib import Path
    from kiln.adapters.process import Command, start_tool
    from kiln.redact import Redactor

    async def main():
        script, cwd, lease, name, mark = sys.argv[1:]
        command = Command(("sh", "-c", script), {"PATH": "/usr/bin:/bin", name: mark}, Path(cwd))
        async with await start_tool(command, redactor=Redactor(), lease=timedelta(seconds=float(lease))) as tool:
            print((await tool.wait()).reason, flush=True)

    asyncio.run(main())
"""


# How a tool ends


async def test_exit_is_never_missed(tools: Tools):
    """A tool that exits at once is waited for like any other."""
    for _ in range(20):
        async with await tools.start("true") as tool:
            assert await tool.wait() == Exit(0, None, ExitReason.EXITED)


async def test_killed_by_its_own_signal(tools: Tools):
    """A tool that a signal ended says which."""
    async with tools.sh("kill -TERM $$") as tool:
        assert await tool.wait() == Exit(None, signal.SIGTERM, ExitReason.EXITED)


async def test_leaving_the_context(tools: Tools, mark: str):
    """Leaving the context ends the tool and all its descendants, whatever they did to get away."""
    async with tools.sh(TREE) as tool:
        assert await soon(lambda: len(marked(mark)) == TREE_SIZE)
        assert tool.pid in marked(mark)
    assert (marked(mark), guards()) == (set(), set())


async def test_kill(tools: Tools, mark: str):
    """Killing ends the whole tree."""
    async with tools.sh(TREE) as tool:
        assert await soon(lambda: len(marked(mark)) == TREE_SIZE)
        await tool.kill()
        assert await tool.wait() == Exit(None, signal.SIGKILL, ExitReason.KILLED)
        assert marked(mark) == set()


async def test_kill_while_it_forks(tools: Tools, mark: str):
    """A tool that keeps starting orphans is killed with the last of them."""
    async with tools.sh("while :; do (setsid sleep 600 &); done") as tool:
        assert await soon(lambda: len(marked(mark)) > 30)
        await tool.kill()
        await tool.wait()
        assert marked(mark) == set()


async def test_what_an_exit_leaves_running(tools: Tools, mark: str):
    """What a tool leaves running when it exits ends with it, and does not hold its lines open."""
    async with tools.sh("(setsid sleep 600 &); echo done; exit 3") as tool:
        assert [line.text async for line in tool.lines()] == ["done"]
        assert await tool.wait() == Exit(3, None, ExitReason.EXITED)
        assert marked(mark) == set()


async def test_pipe_handed_to_a_stranger(tools: Tools, tmp_path: Path):
    """A process outside the tree that was handed the tool's output does not hold its lines open."""
    script = """
        import array, socket, sys
        peer = socket.socket(socket.AF_UNIX); peer.connect('socket')
        peer.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1]))])
        peer.recv(1)
        print('last words')
    """
    with socket.socket(socket.AF_UNIX) as listener:
        path = os.open(tmp_path, os.O_PATH)
        listener.bind(f"/proc/self/fd/{path}/socket")
        os.close(path)
        listener.listen()
        async with await tools.start(sys.executable, "-c", textwrap.dedent(script)) as tool:
            peer, _ = await asyncio.to_thread(listener.accept)
            _, [(_, _, data)], *_ = peer.recvmsg(1, socket.CMSG_SPACE(4))
            [handed] = array.array("i", data)
            peer.send(b"x")
            assert [line.text async for line in tool.lines()] == ["last words"]
        peer.close()
        os.close(handed)


async def test_interrupt_reaches_the_group(tools: Tools):
    """An interrupt reaches the tool's whole process group, not its first process alone."""
    script = """
        import os, signal, sys, time
        name = 'child' if os.fork() == 0 else 'parent'
        def interrupted(*_):
            os.write(1, name.encode() + b'\\n')
            if name == 'parent': os.wait()
            os._exit(5)
        signal.signal(signal.SIGINT, interrupted)
        print('ready', flush=True)
        while True: time.sleep(0.05)
    """
    async with await tools.start(sys.executable, "-c", textwrap.dedent(script)) as tool:
        lines = tool.lines()
        assert [await first(lines), await first(lines)] == ["ready", "ready"]
        await tool.interrupt()
        assert {line.text async for line in lines} == {"parent", "child"}
        assert await tool.wait() == Exit(5, None, ExitReason.INTERRUPTED)


async def test_stop_in_time(tools: Tools):
    """A tool that cleans up within the grace ends by itself."""
    async with tools.sh("trap 'sleep 0.1; exit 4' INT; echo ready; while :; do sleep 0.05; done") as tool:
        assert await first(tool.lines()) == "ready"
        assert await tool.stop(timedelta(seconds=30)) == Exit(4, None, ExitReason.INTERRUPTED)


async def test_stop_too_late(tools: Tools, mark: str):
    """A tool that is not gone after the grace is killed with all its descendants."""
    async with tools.sh(TREE) as tool:
        assert await first(tool.lines()) == "ready"
        assert await tool.stop(timedelta(seconds=0.1)) == Exit(None, signal.SIGKILL, ExitReason.KILLED)
        assert marked(mark) == set()


async def test_stop_of_what_has_ended(tools: Tools):
    """Stopping a tool that ended by itself says how it ended."""
    async with tools.sh("exit 6") as tool:
        await tool.wait()
        assert await tool.stop(timedelta(0)) == Exit(6, None, ExitReason.EXITED)


async def test_many_wait(tools: Tools):
    """Any number of tasks may wait, and one that gives up takes nothing from the others."""
    async with tools.sh("sleep 0.2; exit 9") as tool:
        waiting = [asyncio.create_task(tool.wait()) for _ in range(5)]
        await asyncio.sleep(0.05)
        waiting[0].cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert ended[1:] == [Exit(9, None, ExitReason.EXITED)] * 4


async def test_cancelled_while_leaving(tools: Tools, mark: str):
    """A second cancel while the context is being left does not leave the tool alive."""

    async def run() -> None:
        async with tools.sh(TREE):
            await asyncio.sleep(600)

    running = asyncio.create_task(run())
    assert await soon(lambda: len(marked(mark)) == TREE_SIZE)
    running.cancel()
    await asyncio.sleep(0)
    while not running.done():
        running.cancel()
        await asyncio.sleep(0)
    assert running.cancelled()
    assert (marked(mark), guards()) == (set(), set())


async def test_descriptors_are_given_back(tools: Tools):
    """Tools that came and went leave no descriptor open in the worker."""
    with suppress(ToolNotStartedError):
        await tools.start("no-such-tool")
    before = descriptors()
    for script in ["true", "exit 1", "sleep 600"]:
        async with tools.sh(script):
            pass
    with suppress(ToolNotStartedError):
        await tools.start("no-such-tool")
    assert descriptors() == before


async def test_reader_outlives_the_tool(tools: Tools):
    """Lines that are still being read when the context is left come to an end."""
    async with tools.sh("echo one; sleep 600") as tool:
        lines = tool.lines()
        assert await first(lines) == "one"
        reading = asyncio.create_task(anext(lines, None))
        await asyncio.sleep(0)
    assert await asyncio.wait_for(reading, 10) is None


# Leases, dead workers, dead guards


async def test_lease_ends(tools: Tools, mark: str):
    """A tool whose lease is not renewed is killed with all its descendants."""
    async with tools.sh(TREE, lease=0.3) as tool:
        assert await tool.wait() == Exit(None, signal.SIGKILL, ExitReason.LEASE_ENDED)
        assert marked(mark) == set()


async def test_lease_is_renewed(tools: Tools):
    """A tool lives on as long as its lease is renewed."""
    async with tools.sh("sleep 600", lease=1) as tool:
        for _ in range(15):
            await asyncio.sleep(0.1)
            await tool.renew(1)
        assert state_of(tool.pid) == "S"


async def test_renewal_shortens(tools: Tools):
    """A renewal counts from now, so a shorter one ends a long lease early."""
    async with tools.sh("sleep 600", lease=600) as tool:
        await tool.renew(0.1)
        assert (await tool.wait()).reason is ExitReason.LEASE_ENDED


async def test_renewal_of_what_has_ended(tools: Tools):
    """Messages to a tool that has ended do nothing."""
    async with tools.sh("exit 2", lease=5) as tool:
        await tool.wait()
        await tool.renew(5)
        await tool.interrupt()
        await tool.kill()
        assert await tool.wait() == Exit(2, None, ExitReason.EXITED)


@pytest.fixture
def worker(tmp_path: Path, mark: str) -> Iterator[subprocess.Popen[str]]:
    """A worker of its own that runs the tree under a lease of a second and prints why it ended."""
    argv = [sys.executable, "-c", textwrap.dedent(WORKER), TREE, str(tmp_path), "1", MARK, mark]
    env = {"PATH": PATH, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as worker:
        assert eventually(lambda: len(marked(mark)) == TREE_SIZE)
        yield worker
        worker.kill()


@pytest.mark.fault
def test_worker_killed(worker: subprocess.Popen[str], mark: str):
    """A tool and all its descendants are gone within a second of their worker's death."""
    worker.kill()
    assert eventually(lambda: not marked(mark), seconds=0.9)


@pytest.mark.fault
def test_worker_stopped(worker: subprocess.Popen[str], mark: str):
    """The tool of a stopped worker dies when its lease ends, and the worker learns it when it goes on."""
    worker.send_signal(signal.SIGSTOP)
    assert eventually(lambda: not marked(mark))
    assert state_of(worker.pid) == "T"
    worker.send_signal(signal.SIGCONT)
    assert worker.communicate()[0] == "lease_ended\n"


@pytest.mark.fault
async def test_guard_killed(tools: Tools, mark: str):
    """A guard that is killed takes the tool's process group with it, and the worker says that it knows no more."""
    async with tools.sh("sleep 600 & echo ready; wait") as tool:
        assert await first(tool.lines()) == "ready"
        os.kill(parent_of(tool.pid), signal.SIGKILL)
        with pytest.raises(GuardLostError):
            await tool.wait()
        assert await soon(lambda: not marked(mark))
