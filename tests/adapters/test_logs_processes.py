"""One log store, several processes."""

import subprocess
import sys
import textwrap
from pathlib import Path

from kiln.adapters.logs import LogStore
from support.logs import entries, read_all, texts

BUILD = "build-1"
ALL = 1_000_000

APPEND = """
    import sys
    from datetime import UTC, datetime
    from kiln.adapters.logs import LogFenced, LogStore

    url, build, attempt, count, action = sys.argv[1:]
    store = LogStore(url)
    store.create()
    if action == "open":
        store.open_attempt(build, int(attempt))
    print("ready", flush=True)
    sys.stdin.readline()
    written = 0
    try:
        for number in range(int(count)):
            store.append(build, int(attempt), [(datetime.now(UTC), "stdout", f"{attempt}: {number}")])
            written += 1
    except LogFenced:
        print("fenced", flush=True)
    print(written, flush=True)
    store.close()
"""


class Appender:
    """A process that appends lines one by one, once it is told to begin."""

    def __init__(self, url: str, build_id: str, attempt: int, count: int, action: str = "open") -> None:
        argv = [sys.executable, "-c", textwrap.dedent(APPEND), url, build_id, str(attempt), str(count), action]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, cwd=Path(__file__).parents[2], stdin=pipe, stdout=pipe, text=True)

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self) -> list[str]:
        """What it said: `fenced` if it was, and how many lines it wrote."""
        said, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return said.split()


def test_two_processes_create_at_once(log_url: str):
    """Processes that make the tables at the same time do not get into each other's way."""
    appenders = [Appender(log_url, f"build-{number}", 1, 1) for number in range(4)]
    for appender in appenders:
        appender.begin()
    assert [appender.finish() for appender in appenders] == [["ready", "1"]] * 4


def test_two_processes_write_at_once(store: LogStore, log_url: str):
    """Two processes that write different builds to one store lose nothing and mix nothing."""
    appenders = [Appender(log_url, f"build-{number}", 1, 300) for number in (1, 2)]
    for appender in appenders:
        appender.wait_until_ready()
    for appender in appenders:
        appender.begin()
    assert [appender.finish() for appender in appenders] == [["300"], ["300"]]
    for number in (1, 2):
        assert texts(read_all(store, f"build-{number}")) == [f"1: {line}" for line in range(300)]


def test_attempt_fenced_from_another_process(store: LogStore, log_url: str):
    """An attempt in one process is fenced by the next one in another while it writes: all of it comes before."""
    dead = Appender(log_url, BUILD, 1, ALL)
    dead.wait_until_ready()
    dead.begin()
    while store.heads([BUILD])[BUILD].lines < 20:
        pass
    store.open_attempt(BUILD, 2)
    taken = store.heads([BUILD])[BUILD].lines
    store.append(BUILD, 2, entries(50, word="2:"))
    assert dead.finish() == ["fenced", str(taken)]
    assert texts(read_all(store, BUILD)) == [f"1: {n}" for n in range(taken)] + [f"2: {n}" for n in range(1, 51)]
