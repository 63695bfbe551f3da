"""What a pod's shim does for its agent, and to it."""

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kiln.adapters.pod_shim_cgroups import make
from kiln.adapters.shims import HostShim, HostShims
from support.agents import Agents, all_lines, printed, shim_pid, texts
from support.processes import eventually, marked, read_proc, soon
from support.tools import TREE, TREE_SIZE, parent_of

SECRET = "s3cr3t-v@lue"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
needs_cgroups = pytest.mark.skipif(len(HostShims(Path()).limits()) < 2, reason="no control groups can be had here")


@pytest.fixture
async def agents(tmp_path: Path, mark: str) -> AsyncIterator[Agents]:
    agents = Agents(tmp_path, mark)
    yield agents
    await agents.close()


async def ended(shim: HostShim) -> str | None:
    return (await asyncio.wait_for(shim.wait(), 20)).error


# What it prints


async def test_lines_are_numbered_in_order(agents: Agents):
    """Both streams' lines come in the order in which they were printed, numbered from 1 without a gap."""
    shim = await agents.sh("for n in $(seq 300); do echo out $n; echo err $n >&2; done")
    assert await ended(shim) is None
    lines = all_lines(shim)
    assert [line.text for line in lines] == [f"{stream} {n}" for n in range(1, 301) for stream in ("out", "err")]
    assert [line.number for line in lines] == list(range(1, 601))
    assert lines == sorted(lines, key=lambda line: line.time)


async def test_binary_output(agents: Agents):
    """Bytes that are no text show as replacement characters, NUL too."""
    shim = await agents.sh(r"printf 'a\377\376b\0c\n\303'")
    await shim.wait()
    assert texts(shim) == ["a\ufffd\ufffdb\ufffdc", "\ufffd"]


async def test_unfinished_line_is_shown(agents: Agents):
    """A question without a line end shows after a pause, and its answer's line end makes no empty line."""
    shim = await agents.sh("printf 'go on? '; read answer; echo; echo $answer")
    await printed(shim, "go on? ")
    await shim.prompt("yes")
    await shim.wait()
    assert texts(shim) == ["go on? ", "yes"]


async def test_secrets_are_masked(agents: Agents):
    """A secret that the agent prints is masked, also where it comes in two halves; no file and no argument has it."""
    shim = await agents.sh(
        'echo "is $KEY."; printf "now s3cr3t"; sleep 0.8; echo -v@lue; read x',
        environment={"KEY": SECRET},
        secrets=[SECRET],
    )
    await printed(shim, "***")
    assert texts(shim) == ["is ***.", "now ", "***"]
    pid = await shim_pid(shim)
    assert SECRET.encode() not in b"".join(
        read_proc(p, f) for p in (pid, parent_of(pid)) for f in ("cmdline", "environ")
    )
    files = [path.read_bytes() for path in agents.root.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not any(SECRET.encode() in content for content in files)


# What it is given


async def test_prompt_is_one_line(agents: Agents):
    """An agent that reads lines gets each prompt as one line, without what would act as a key."""
    shim = await agents.sh('echo ready; while read -r line; do echo "<$line>"; done')
    await shim.prompt("first\nsecond\x03 \x1bhalf\x04")
    await shim.prompt("third\n")
    await printed(shim, "<third>")
    assert texts(shim) == ["ready", "<first second half>", "<third>"]


async def test_long_prompt(agents: Agents):
    """A prompt of a megabyte, on one line, arrives whole, though the kernel keeps 4095 bytes of an unfinished line."""
    shim = await agents.python("""
        import hashlib
        print("ready", flush=True)
        text = input()
        print(len(text), hashlib.sha256(text.encode()).hexdigest(), flush=True)
    """)
    prompt = "".join(f"{n} äö€\t" for n in range(120_000))
    assert len(prompt.encode()) > 1024 * 1024
    await shim.prompt(prompt)
    await shim.wait()
    assert texts(shim)[1:] == [f"{len(prompt)} {hashlib.sha256(prompt.encode()).hexdigest()}"]


@pytest.mark.parametrize(
    ("switch", "expected"),
    [("\x1b[?2004h", b"\x1b[200~one\rtwo\x1b[201~\r"), ("", b"one\ntwo\r")],
    ids=["paste", "keys"],
)
async def test_prompt_to_keys(agents: Agents, switch: str, expected: bytes):
    """An agent that takes pastes gets the prompt as one, and one that reads keys gets Return only at the end."""
    shim = await agents.python(f"""
        import os, tty
        tty.setraw(0)
        os.write(1, {switch!r}.encode() + b"ready\\n")
        got = b""
        while not got.endswith({expected!r}):
            got += os.read(0, 100)
        print(got == {expected!r}, flush=True)
    """)
    await shim.prompt("one\ntwo\n")
    await shim.wait()
    assert texts(shim)[-1] == "True"


async def test_environment_is_what_is_given(agents: Agents):
    """The agent's environment has what it was given and nothing else, no descriptor but its terminal, and its own cwd."""
    script = "import os; print(dict(os.environ), sorted(os.listdir('/proc/self/fd')), os.getcwd(), os.getsid(0) == os.getpid())"
    order = agents.order("/usr/bin/env", "-i", "true")
    shim = await agents.start("/usr/bin/python3", "-ISc", script, environment={"LC_CTYPE": "C.UTF-8"})
    await shim.wait()
    expected = {**order.environment, "LC_CTYPE": "C.UTF-8"}
    # The fourth is the directory that is being listed.
    assert texts(shim) == [f"{expected} {['0', '1', '2', '3']} {agents.root} True"]


@needs_root
async def test_user_is_dropped(agents: Agents):
    """An agent with a user is that user for good: no rights, no groups of root's, no way to its shim."""
    control = agents.root / "pods"
    script = f"id -u; id -G; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status; ls {control} 2>&1; echo >/dev/tty mine"
    shim = await agents.sh(script, user="nobody", cwd=Path("/"))
    await shim.wait()
    user, groups, capabilities, privileges, *answer, mine = texts(shim)
    assert (user, "0" in groups.split()) == ("65534", False)
    assert (capabilities.split()[1], privileges.split()[1]) == ("0" * 16, "1")
    assert "denied" in answer[0]
    assert mine == "mine"


# How it ends


@pytest.mark.parametrize(
    ("script", "code", "error"),
    [
        ("exit 0", 0, None),
        ("exit 3", 3, "the agent exited with code 3"),
        ("kill -SEGV $$", None, "the agent was ended by SIGSEGV"),
    ],
)
async def test_exit(agents: Agents, script: str, code: int | None, error: str | None):
    """The agent's exit code is told, or the signal that ended it."""
    result = await (await agents.sh(script)).wait()
    assert (result.exit_code, result.error, result.ended_at is not None) == (code, error, True)


@pytest.mark.parametrize("order", [{"argv": ["/nonsense"]}, {"cwd": Path("/nonsense")}, {"user": "nonsense"}])
async def test_agent_that_cannot_start(agents: Agents, order: dict):
    """An agent whose program, directory or user is not there is told of as such, and leaves no shim."""
    shim = await agents.start(*order.get("argv", ["true"]), **{name: order[name] for name in order if name != "argv"})
    assert "nonsense" in str(order)
    assert (await ended(shim) or "").startswith("cannot start the agent: ")


async def test_nothing_outlives_the_agent(agents: Agents, mark: str):
    """What the agent started ends with it, whatever that did to get away."""
    shim = await agents.sh(TREE.replace("while :; do sleep 600; done", "read x"))
    assert await soon(lambda: len(marked(mark)) == TREE_SIZE - 1)
    await shim.prompt("end")
    assert await ended(shim) is None
    assert marked(mark) == set()


async def test_terminate_kills_after_the_grace(agents: Agents, mark: str):
    """A tree that ignores SIGTERM and left its session is killed once the grace is over, not before."""
    shim = await agents.sh(TREE, grace_seconds=0.6)
    assert await soon(lambda: len(marked(mark)) == TREE_SIZE)
    before = time.monotonic()
    await shim.terminate()
    assert await ended(shim) == "terminated"
    assert 0.6 <= time.monotonic() - before < 5
    assert marked(mark) == set()


async def test_terminate_lets_the_agent_say_goodbye(agents: Agents):
    """An agent that ends itself at SIGTERM is not waited for longer than it takes, and its last words are kept."""
    shim = await agents.sh("trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.05; done", grace_seconds=60)
    await printed(shim, "ready")
    await shim.terminate()
    result = await asyncio.wait_for(shim.wait(), 10)
    assert (result.exit_code, result.error, texts(shim)[-1]) == (7, "terminated", "bye")


async def test_time_limit(agents: Agents, mark: str):
    """An agent that runs longer than it may is ended, with a renewed lease too."""
    shim = await agents.sh("sleep 600", limit_seconds=0.5)
    await shim.renew(300)
    assert await ended(shim) == "pod timed out after 1 minutes"
    assert marked(mark) == set()


async def test_lease(agents: Agents, mark: str):
    """An agent lives while its lease is renewed, and ends when nobody does it any more."""
    shim = await agents.sh("sleep 600", lease_seconds=0.5)
    for _ in range(4):
        await asyncio.sleep(0.2)
        await shim.renew(0.5)
    assert shim.is_alive()
    assert await ended(shim) == "no worker came back within 0.5 seconds"
    assert marked(mark) == set()


@pytest.mark.fault
async def test_killed_shim(agents: Agents, mark: str):
    """When the shim is killed, its keeper ends all of the agent's tree, and `wait` says what happened."""
    shim = await agents.sh(TREE)
    assert await soon(lambda: len(marked(mark)) == TREE_SIZE)
    os.kill(await shim_pid(shim), signal.SIGKILL)
    assert await ended(shim) == "the agent's shim died: its status was -9"
    assert marked(mark) == set()


@pytest.mark.fault
async def test_crashed_shim(agents: Agents, mark: str):
    """A shim that cannot go on ends its agent too, and says where it failed."""
    shim = await agents.sh("echo ready; sleep 600")
    await printed(shim, "ready")
    [control] = agents.root.rglob("control")
    # Stands in the way of the shim's result, not of the keeper's.
    in_the_way = control.with_name(f".result.json.{await shim_pid(shim)}")
    in_the_way.unlink()
    in_the_way.mkdir()
    await shim.terminate()
    error = await ended(shim) or ""
    assert error.startswith("the agent's shim died: Is a directory at pod_shim_tree.py:")
    assert marked(mark) == set()


@pytest.mark.fault
@needs_cgroups
async def test_killed_shim_and_keeper(agents: Agents, mark: str):
    """When shim and keeper are killed, the agent dies with them, and whoever waits clears up the rest."""
    shim = await agents.sh(TREE)
    assert await soon(lambda: len(marked(mark)) == TREE_SIZE)
    agent, pid = (await shim.status())["agent"], await shim_pid(shim)
    os.kill(parent_of(pid), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    assert await soon(lambda: agent not in marked(mark))
    assert await ended(shim) == "the agent's shim died"
    assert await soon(lambda: marked(mark) == set())


# What it may use


@needs_cgroups
async def test_memory_limit(agents: Agents):
    """An agent that takes more memory than it may is killed, and the log and the result say so."""
    shim = await agents.python("print('ready', flush=True); data = b'x' * (256 << 20); print(len(data))", memory_mb=64)
    assert await ended(shim) == "the agent was killed at the limit of 64 MB of memory"
    assert texts(shim) == ["ready", "[processes killed at the limit of 64 MB of memory: 1]"]


@pytest.mark.fault
@needs_cgroups
async def test_fork_bomb_stays_inside(agents: Agents, mark: str):
    """A fork bomb fills its own pod alone, and can be ended."""
    bomb = """
        import os, signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """
    shim = await agents.python(bomb, processes=25)
    assert await soon(lambda: len(marked(mark)) >= 20)
    assert len(marked(mark)) <= 25
    await shim.terminate()
    assert await ended(shim) == "terminated"
    assert marked(mark) == set()


@needs_cgroups
def test_groups_stand_below_the_runners_own(mark: str):
    """A pod's groups are below the runner's, so that the runner's limits hold for them, and are gone once removed."""
    groups = make(f"kiln-{mark}")
    paths = [Path(path) for path in groups.paths.values()]
    own = Path("/proc/self/cgroup").read_text().splitlines()
    names = [line.split(":", 2)[2] for line in own]
    assert all(any(str(path.parent).endswith(name.rstrip("/")) for name in names) for path in paths)
    groups.remove()
    assert eventually(lambda: not any(path.exists() for path in paths))
