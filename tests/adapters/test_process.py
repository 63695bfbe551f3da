"""Tools as real child processes: what they print, how they end, and that nothing of them is left."""

import array
import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.processes import MARK, children_of, eventually, marked, read_proc, soon, state_of

from kiln.adapters.process import (
    Command,
    Exit,
    ExitReason,
    GuardLostError,
    Line,
    ToolNotStartedError,
    ToolProcess,
    start_tool,
)
from kiln.redact import Redactor

PATH = "/usr/bin:/bin"
LINE_LIMIT = 2 * 1024 * 1024
SECRET = "correct-horse-battery"

# Besides itself: a child, one with its own session, one orphaned by a double fork, one orphaned in its own session.
TREE = """
    trap '' INT TERM HUP
    sleep 600 &
    setsid sleep 600 &
    (sleep 600 &)
    (setsid sh -c 'trap "" INT TERM HUP; sleep 600' &)
    echo ready
    while :; do sleep 600; done
"""
TREE_SIZE = 7

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


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark for this test's tools; whatever still carries it at the end is killed."""
    mark = uuid.uuid4().hex
    yield mark
    for pid in marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Tools:
    """Starts shell and Python scripts as tools in the test's directory, under the test's mark."""

    def __init__(self, cwd: Path, mark: str) -> None:
        self.cwd = cwd
        self.env = {"PATH": PATH, MARK: mark}

    async def start(self, *argv: str, lease: float | None = None, secrets: tuple[str, ...] = ()) -> ToolProcess:
        command = Command(argv, self.env, self.cwd)
        term = None if lease is None else timedelta(seconds=lease)
        return await start_tool(command, redactor=Redactor(secrets), lease=term)

    @asynccontextmanager
    async def sh(self, script: str, *, lease: float | None = None) -> AsyncIterator[ToolProcess]:
        async with await self.start("sh", "-c", script, lease=lease) as tool:
            yield tool

    async def python(self, script: str, *, secrets: tuple[str, ...] = ()) -> tuple[list[Line], Exit]:
        """What the script prints, and how it ends."""
        async with await self.start(sys.executable, "-c", textwrap.dedent(script), secrets=secrets) as tool:
            lines = [line async for line in tool.lines()]
            return lines, await tool.wait()


@pytest.fixture
def tools(tmp_path: Path, mark: str) -> Tools:
    return Tools(tmp_path, mark)


async def first(lines: AsyncIterator[Line]) -> str:
    return (await anext(lines)).text


# What a tool prints


async def test_both_streams(tools: Tools):
    """A tool's lines come with their stream, in the order in which they were printed, and its exit code after them."""
    before = datetime.now(UTC)
    async with tools.sh("echo one; sleep 0.05; echo two >&2; sleep 0.05; printf three; exit 7") as tool:
        lines = [line async for line in tool.lines()]
        assert [(line.stream, line.text) for line in lines] == [
            ("stdout", "one"),
            ("stderr", "two"),
            ("stdout", "three"),
        ]
        assert before <= lines[0].time <= lines[1].time <= lines[2].time <= datetime.now(UTC)
        assert await tool.wait() == Exit(7, None, ExitReason.EXITED)


async def test_line_is_read_while_the_tool_runs(tools: Tools):
    """A line is there as soon as it is printed."""
    async with tools.sh("echo ready; sleep 600") as tool:
        assert await first(tool.lines()) == "ready"


async def test_hundred_thousand_lines(tools: Tools):
    """100,000 lines arrive in order, none missing."""
    lines, _ = await tools.python("for number in range(100_000): print(number, 'x' * 50)")
    assert [line.text for line in lines] == [f"{number} {'x' * 50}" for number in range(100_000)]


async def test_megabyte_line(tools: Tools):
    """A line of a megabyte passes as one."""
    lines, _ = await tools.python("print('x' * 1_000_000); print('next')")
    assert [line.text for line in lines] == ["x" * 1_000_000, "next"]


async def test_five_megabyte_line(tools: Tools):
    """A line above the limit passes in pieces, nothing of it missing."""
    lines, _ = await tools.python("print('x' * 5_000_000); print('next')")
    assert [len(line.text) for line in lines] == [LINE_LIMIT, LINE_LIMIT, 5_000_000 - 2 * LINE_LIMIT, 4]


async def test_secret_across_the_cut(tools: Tools):
    """A secret is masked also where a line is cut in two."""
    script = f"print('x' * ({LINE_LIMIT} - 5) + '{SECRET}' + 'y' * {LINE_LIMIT})"
    lines, _ = await tools.python(script, secrets=(SECRET,))
    assert "".join(line.text for line in lines) == "x" * (LINE_LIMIT - 5) + "***" + "y" * LINE_LIMIT


async def test_secrets_are_masked(tools: Tools):
    """A secret leaves the module in neither stream."""
    script = f"import sys; print('out {SECRET}'); print('err {SECRET}', file=sys.stderr)"
    lines, _ = await tools.python(script, secrets=(SECRET,))
    assert {line.text for line in lines} == {"out ***", "err ***"}


async def test_not_utf_8(tools: Tools):
    """Bytes that are not UTF-8 stay visible."""
    lines, _ = await tools.python(r"import os; os.write(1, b'caf\xe9\n')")
    assert [line.text for line in lines] == ["caf\\xe9"]


async def test_slow_reader_holds_the_tool(tools: Tools, tmp_path: Path):
    """A tool whose lines nobody takes waits in its writes, instead of filling the worker's memory."""
    counter = tmp_path / "count"
    script = f"""
        for number in range(10_000_000):
            print('x' * 1000, flush=True)
            if number % 10 == 0:
                open({str(counter)!r}, 'w').write(str(number))
    """
    async with await tools.start(sys.executable, "-c", textwrap.dedent(script)) as tool:
        lines = tool.lines()
        await first(lines)
        assert await soon(lambda: state_of(tool.pid) == "S" and counter.exists() and _is_still(counter))
        assert int(counter.read_text()) < 500


def _is_still(counter: Path) -> bool:
    before = counter.stat().st_mtime_ns
    return not eventually(lambda: counter.stat().st_mtime_ns != before, seconds=0.3)


# What a tool gets


async def test_environment(tools: Tools, monkeypatch: pytest.MonkeyPatch):
    """A tool sees the variables that it is given, and none of the worker's."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    async with await tools.start("env") as tool:
        assert {line.text async for line in tool.lines()} == {f"{name}={value}" for name, value in tools.env.items()}


async def test_guard_has_no_environment(tools: Tools, monkeypatch: pytest.MonkeyPatch):
    """The guard has nothing of the worker's environment, and shows nothing of the tool's."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    async with tools.sh("sleep 600") as tool:
        guard = _parent_of(tool.pid)
        assert read_proc(guard, "environ") == b""
        assert tools.env[MARK].encode() not in read_proc(guard, "cmdline")


async def test_descriptors(tools: Tools):
    """A tool has its standard input, which is at its end, its two outputs, and no other descriptor."""
    inherited = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        lines, _ = await tools.python(
            """
            import os, sys
            print(repr(sys.stdin.read()), os.readlink('/proc/self/fd/0'))
            for fd in range(1024):
                try: os.fstat(fd)
                except OSError: continue
                print(fd)
            """
        )
    finally:
        os.close(inherited)
    assert [line.text for line in lines] == ["'' /dev/null", "0", "1", "2"]


async def test_signals_are_not_ignored(tools: Tools):
    """What the guard ignores, the tool does not."""
    lines, _ = await tools.python(
        "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('SigIgn')][0])"
    )
    python_ignores = (1 << (signal.SIGPIPE - 1)) | (1 << (signal.SIGXFSZ - 1))
    assert int(lines[0].text, 16) & ~python_ignores == 0


async def test_directory(tools: Tools, tmp_path: Path):
    """A tool runs in the directory that it is given."""
    async with await tools.start("pwd") as tool:
        assert await first(tool.lines()) == str(tmp_path)


# Tools that do not start


async def test_missing_program(tools: Tools):
    """A program that does not exist is named, without the secrets of its command line."""
    with pytest.raises(ToolNotStartedError, match=r"no-such-tool --key=\*\*\*: No such file") as error:
        await tools.start("no-such-tool", f"--key={SECRET}", secrets=(SECRET,))
    assert error.value.missing


async def test_not_executable(tools: Tools, tmp_path: Path):
    """A file that is not executable is named with the reason."""
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    with pytest.raises(ToolNotStartedError, match="Permission denied"):
        await tools.start(str(tool))


async def test_missing_directory(tools: Tools, tmp_path: Path):
    """A directory that does not exist is told apart from a program that does not."""
    tools.cwd = tmp_path / "nowhere"
    with pytest.raises(ToolNotStartedError, match="nowhere: No such file") as error:
        await tools.start("true")
    assert not error.value.missing


async def test_impossible_environment(tools: Tools):
    """A variable that no environment can hold stops the start, and the message does not show it."""
    tools.env["BAD"] = f"{SECRET}\0"
    with pytest.raises(ToolNotStartedError, match="null byte") as error:
        await tools.start("true")
    assert SECRET not in str(error.value)


async def test_no_program_at_all(tools: Tools):
    """An empty command does not start."""
    with pytest.raises(ToolNotStartedError):
        await tools.start()


def test_command_hides_its_secrets(tmp_path: Path):
    """A command's representation shows neither its arguments nor its environment."""
    assert SECRET not in repr(Command(("tool", SECRET), {"KEY": SECRET}, tmp_path))


@pytest.mark.parametrize("milliseconds", range(0, 45, 3))
async def test_start_cancelled(tools: Tools, mark: str, milliseconds: int):
    """A start that is cancelled leaves nothing, however far it got."""
    starting = asyncio.create_task(tools.start("sh", "-c", TREE))
    await asyncio.sleep(milliseconds / 1000)
    if not starting.cancel():
        await (await starting).close()
    await asyncio.gather(starting, return_exceptions=True)
    assert (marked(mark), _guards()) == (set(), set())


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
    assert (marked(mark), _guards()) == (set(), set())


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
    assert (marked(mark), _guards()) == (set(), set())


async def test_descriptors_are_given_back(tools: Tools):
    """Tools that came and went leave no descriptor open in the worker."""
    with suppress(ToolNotStartedError):
        await tools.start("no-such-tool")
    before = _descriptors()
    for script in ["true", "exit 1", "sleep 600"]:
        async with tools.sh(script):
            pass
    with suppress(ToolNotStartedError):
        await tools.start("no-such-tool")
    assert _descriptors() == before


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
        os.kill(_parent_of(tool.pid), signal.SIGKILL)
        with pytest.raises(GuardLostError):
            await tool.wait()
        assert await soon(lambda: not marked(mark))


def _parent_of(pid: int) -> int:
    return int(read_proc(pid, "stat").rpartition(b")")[2].split()[1])


def _guards() -> set[int]:
    return {pid for pid in children_of(os.getpid()) if b"guard.py" in read_proc(pid, "cmdline")}


def _descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}
