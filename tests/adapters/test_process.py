"""Tools as real child processes: what they print, what they get, and why they do not start."""

import asyncio
import os
import signal
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kiln.adapters.process import Command, Exit, ExitReason, ToolNotStartedError, start_tool
from kiln.redact import Redactor
from support.processes import MARK, eventually, marked, read_proc, soon, state_of
from support.tools import TREE, Tools, first, guards, parent_of

LINE_LIMIT = 2 * 1024 * 1024
SECRET = "correct-horse-battery"


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
        guard = parent_of(tool.pid)
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


async def test_input(tools: Tools, tmp_path: Path):
    """A tool reads the file that it is given, and cannot write to it."""
    file = tmp_path / "input"
    file.write_bytes(b"one\ntwo\n")
    command = Command(("sh", "-c", "cat; echo three >&0 || echo refused"), tools.env, tools.cwd, stdin=file)
    async with await start_tool(command, redactor=Redactor(), lease=None) as tool:
        lines = [line.text async for line in tool.lines() if line.stream == "stdout"]
    assert lines == ["one", "two", "refused"]


async def test_signals_are_not_ignored(tools: Tools):
    """What the guard ignores, the tool does not."""
    lines, _ = await tools.python(
        "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('SigIgn')][0])"
    )
    ignored = {number for number in range(1, 65) if int(lines[0].text, 16) & (1 << (number - 1))}
    # Python ignores two itself; what the C library keeps for its threads nobody above it can set, only inherit.
    assert ignored & signal.valid_signals() <= {signal.SIGPIPE, signal.SIGXFSZ}


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


async def test_missing_input(tools: Tools, tmp_path: Path):
    """An input that does not exist is named, and told apart from a program that does not."""
    command = Command(("true",), tools.env, tools.cwd, stdin=tmp_path / "nowhere")
    with pytest.raises(ToolNotStartedError, match=r"a tool that reads .*nowhere: No such file") as error:
        await start_tool(command, redactor=Redactor(), lease=None)
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
    assert (marked(mark), guards()) == (set(), set())
