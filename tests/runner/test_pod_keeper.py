"""What a runner's process takes up from the one before, and what it lets go."""

import asyncio
import json

import pytest
from temporalio import activity
from temporalio.testing import ActivityEnvironment

from activities.pods import PodActivities
from kiln.catalog.pod_work import BEGUN_ELSEWHERE
from kiln.errors import RefusedError, WorkerStoppingError
from support.pod_rows import prompt, terminate
from support.processes import marked, soon
from support.runner_rig import LEASE_SECONDS, Relay, RunnerRig

LISTENING = 'echo ready; while read -r line; do echo "got: $line"; done'


async def test_next_process_takes_living_agents_up(rig: RunnerRig, mark: str):
    """An agent whose runner's process is replaced goes on, the same one; its log has neither gap nor double, and prompts
    and a terminate reach it without an activity."""
    ref = rig.pod(f"for n in $(seq 300); do echo $n; sleep 0.002; done; {LISTENING}")
    async with rig.process() as process:
        running = asyncio.create_task(process.run(ref))
        await rig.printed(ref, "20")
    with pytest.raises(WorkerStoppingError):
        await running
    before = marked(mark)
    async with rig.process():
        await rig.printed(ref, "ready")
        prompt(rig.api.catalog, ref, "hello")
        await rig.printed(ref, "got: hello")
        assert marked(mark) <= before
        terminate(rig.api.catalog, ref)
        assert await soon(lambda: not marked(mark))
    assert rig.log(ref)[:303] == ["the sandbox is prepared", *map(str, range(1, 301)), "ready", "got: hello"]


async def test_end_between_two_processes(rig: RunnerRig, mark: str):
    """The next process tells of an agent that ended while there was none, once, and gives its activity the result."""
    ref = rig.pod("echo ready; sleep 0.2; echo last; exit 7")
    async with rig.process() as process:
        running = asyncio.create_task(process.run(ref))
        await rig.printed(ref, "ready")
        running.cancel()
    assert await soon(lambda: not marked(mark))
    async with rig.process():
        assert await soon(lambda: rig.row(ref).status == "failed")
    async with rig.process() as process:
        assert (await process.run(ref)).exit_code == 7
    assert rig.row(ref).exit_code == 7
    assert rig.log(ref) == ["the sandbox is prepared", "ready", "last", "the sandbox is concluded"]


async def test_process_that_died_while_it_prepared(rig: RunnerRig, mark: str):
    """A pod whose process died before its agent started is begun again, and gets one agent."""
    ref = rig.pod("echo ready; read line; exit 0")
    async with rig.process() as process:
        process.sandboxes.hold = True
        running = asyncio.create_task(process.run(ref))
        await rig.printed(ref, "the sandbox is prepared")
        running.cancel()
    async with rig.process() as process:
        running = asyncio.create_task(process.run(ref))
        await rig.printed(ref, "ready")
        assert len(marked(mark)) == 1
        prompt(rig.api.catalog, ref, "go")
        assert (await running).exit_code == 0
    assert rig.log(ref)[1].startswith("the runner was restarted")


async def test_interrupted_start(rig: RunnerRig, monkeypatch: pytest.MonkeyPatch):
    """A pod whose shim was cut off at its start is failed, says so, and has no second agent."""
    ref = rig.pod("echo ready")
    monkeypatch.setattr("sys.executable", "/bin/true")
    async with rig.process() as process:
        assert (await process.run(ref)).error == "its start was interrupted"
    assert rig.row(ref).error == "its start was interrupted"
    assert rig.log(ref) == ["the sandbox is prepared", "the sandbox is concluded"]


async def test_older_process_lets_go(rig: RunnerRig, mark: str):
    """A process is refused once another one has registered: it stops, and its agents live on under the other one."""
    ref = rig.pod(LISTENING)
    async with rig.process() as older:
        running = asyncio.create_task(older.run(ref))
        await rig.printed(ref, "ready")
        async with rig.process():
            with pytest.raises(RefusedError):
                await asyncio.wait_for(older.serving, 10)
            with pytest.raises(WorkerStoppingError):
                await running
            prompt(rig.api.catalog, ref, "hello")
            await rig.printed(ref, "got: hello")


async def test_process_with_another_directory(rig: RunnerRig, mark: str):
    """A process that has the runner's token and not its directory starts no second agent: it says what became of the pod."""
    ref = rig.pod(LISTENING)
    async with rig.process() as older:
        running = asyncio.create_task(older.run(ref))
        await rig.printed(ref, "ready")
        running.cancel()
    before, rig.root = rig.root, rig.root.parent / "elsewhere" / "pods"
    agents = marked(mark)
    async with rig.process() as process:
        assert (await process.run(ref)).error == BEGUN_ELSEWHERE
        assert (marked(mark), rig.shims.keys()) == (agents, {ref.key})
    rig.root = before


async def test_kiln_away_for_a_while(rig: RunnerRig):
    """While Kiln cannot be reached agents work on; afterwards their log is whole, and their end is told."""
    relay = Relay(int(rig.api.url.rpartition(":")[2]))
    await relay.open()
    ref = rig.pod("echo ready; sleep 0.3; seq 500; exit 4")
    async with rig.process(url=relay.url) as process:
        running = asyncio.create_task(process.run(ref))
        await rig.printed(ref, "ready")
        await relay.shut()
        await asyncio.sleep(0.6)
        assert rig.row(ref).status == "running"
        await relay.open()
        assert (await running).exit_code == 4
    await relay.shut()
    assert rig.log(ref)[2:-1] == [str(number) for number in range(1, 501)]
    assert rig.row(ref).status == "failed"


async def test_leases_go_on_with_kilns_word(rig: RunnerRig):
    """A beat that Kiln answered renews the leases of living agents, and none is renewed without."""
    relay = Relay(int(rig.api.url.rpartition(":")[2]))
    await relay.open()
    ref = rig.pod(LISTENING)
    async with rig.process(url=relay.url) as process:
        running = asyncio.create_task(process.run(ref))
        await rig.printed(ref, "ready")
        shim = rig.shims.find(ref.key)
        assert shim is not None
        await shim.renew(50)
        assert await soon_left(shim, LEASE_SECONDS - 5)
        await relay.shut()
        await asyncio.sleep(0.3)
        await shim.renew(50)
        await asyncio.sleep(0.3)
        assert (await shim.status())["lease_seconds"] < 50
        running.cancel()


async def soon_left(shim, seconds: float) -> bool:
    async with asyncio.timeout(10):
        while (await shim.status())["lease_seconds"] < seconds:
            await asyncio.sleep(0.02)
    return True


async def test_cancel_of_the_activity(rig: RunnerRig, mark: str):
    """A cancel that was asked for ends the agent, and the activity after it."""
    ref = rig.pod("echo ready; trap '' TERM; while :; do sleep 1; done")
    async with rig.process() as process:
        environment, running = _activity(process.keeper, ref)
        await rig.printed(ref, "ready")
        environment.cancel(activity.ActivityCancellationDetails(cancel_requested=True))
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 10)
        assert marked(mark) == set()
    done = json.loads((rig.root / ref.key / "done").read_text())
    assert done["error"] == "terminated"


async def test_cancel_while_the_sandbox_is_removed(rig: RunnerRig):
    """A cancel of an ended pod's activity waits for no place, also where another process saw the end."""
    ended, living = rig.pod("exit 0", auto_close=True), rig.pod(LISTENING)
    async with rig.process() as process:
        process.sandboxes.removal = asyncio.Event()
        await process.run(ended)
    async with rig.process(places=1) as process:
        process.sandboxes.removal = asyncio.Event()
        running = asyncio.create_task(process.run(living))
        await rig.printed(living, "ready")
        environment, ending = _activity(process.keeper, ended)
        await asyncio.sleep(0.3)  # beats have come, and with them the removal
        environment.cancel(activity.ActivityCancellationDetails(cancel_requested=True))
        process.sandboxes.removal.set()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(ending, 5)
        running.cancel()


@pytest.mark.parametrize("why", ["worker_shutdown", "not_found"])
async def test_lost_activity(rig: RunnerRig, mark: str, why: str):
    """An attempt that Temporal or the worker ends leaves the agent alone, and the next attempt joins it."""
    ref = rig.pod(LISTENING)
    async with rig.process() as process:
        environment, running = _activity(process.keeper, ref)
        await rig.printed(ref, "ready")
        environment.cancel(activity.ActivityCancellationDetails(**{why: True}))
        with pytest.raises(Exception, match=r"another one takes this up|took this attempt away"):
            await asyncio.wait_for(running, 10)
        _, running = _activity(process.keeper, ref)
        prompt(rig.api.catalog, ref, "hello")
        await rig.printed(ref, "got: hello")
        terminate(rig.api.catalog, ref)
        assert (await asyncio.wait_for(running, 10)).error == "terminated"


def _activity(keeper, ref):
    environment = ActivityEnvironment()
    return environment, asyncio.create_task(environment.run(PodActivities(keeper).run, ref))
