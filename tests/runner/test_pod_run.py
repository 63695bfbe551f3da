"""Pods on their runner: real shims, a real catalog and log store behind the real API; shell scripts as agents."""

import asyncio

import pytest

from kiln.errors import OperationFailedError
from support.pod_rows import prompt, prompts_of, terminate
from support.processes import marked, soon
from support.runner_rig import RunnerRig

SAID_BEFORE, SAID_AFTER = "the sandbox is prepared", "the sandbox is concluded"
LISTENING = 'echo ready; while read -r line; do echo "got: $line"; done'


async def test_log_and_end(rig: RunnerRig):
    """A pod's log is what was said before, what its agent printed, what was said after, in this order; its exit code is
    the agent's."""
    ref = rig.pod("seq 2000; exit 3")
    async with rig.process() as process:
        result = await process.run(ref)
    assert (result.exit_code, result.error) == (3, "the agent exited with code 3")
    assert rig.log(ref) == [SAID_BEFORE, *map(str, range(1, 2001)), SAID_AFTER]
    row = rig.row(ref)
    assert (row.status, row.exit_code, row.error) == ("failed", 3, "the agent exited with code 3")


async def test_running_pod_is_told_of(rig: RunnerRig):
    """While its agent works, a pod is `running` and its log is there; exit code 0 makes it `completed`."""
    ref = rig.pod("echo ready; read line")
    async with rig.process() as process:
        running = asyncio.create_task(process.run(ref))
        await rig.printed(ref, "ready")
        assert await soon(lambda: rig.row(ref).status == "running")
        prompt(rig.api.catalog, ref, "go")
        assert (await running).exit_code == 0
    assert rig.row(ref).status == "completed"


async def test_prompts_in_their_order(rig: RunnerRig):
    """Prompts reach the agent in their order and once, those that came before its start too, and are noted as taken."""
    ref = rig.pod(LISTENING, initial_prompt="one")
    prompt(rig.api.catalog, ref, "two")
    async with rig.process() as process:
        running = asyncio.create_task(process.run(ref))
        await rig.printed(ref, "got: two")
        prompt(rig.api.catalog, ref, "three")
        await rig.printed(ref, "got: three")
        assert await soon(lambda: all(one.taken_at for one in prompts_of(rig.api.catalog, ref)))
        terminate(rig.api.catalog, ref)
        await running
    assert [line for line in rig.log(ref) if line.startswith("got")] == ["got: one", "got: two", "got: three"]


async def test_terminated_by_the_catalog(rig: RunnerRig, mark: str):
    """A pod that is terminated in the catalog is ended by the news of it, and its directory goes."""
    ref = rig.pod("echo ready; trap '' TERM; while :; do sleep 1; done")
    async with rig.process() as process:
        running = asyncio.create_task(process.run(ref))
        await rig.printed(ref, "ready")
        terminate(rig.api.catalog, ref)
        assert (await running).error == "terminated"
        assert marked(mark) == set()
        assert await soon(lambda: not rig.shims.keys())
    assert rig.row(ref).status == "terminated"


async def test_terminated_while_the_sandbox_is_prepared(rig: RunnerRig, mark: str):
    """A pod that is terminated before its agent starts gets none, and nothing of it is left."""
    ref = rig.pod("echo ready")
    async with rig.process() as process:
        process.sandboxes.hold = True
        running = asyncio.create_task(process.run(ref))
        await rig.printed(ref, SAID_BEFORE)
        terminate(rig.api.catalog, ref)
        assert (await running).error == "terminated"
    assert (rig.shims.keys(), marked(mark)) == (frozenset(), set())


async def test_sandbox_that_cannot_be_made(rig: RunnerRig):
    """Why there is no sandbox is the pod's error, stands in its log, and leaves no directory."""
    ref = rig.pod("echo ready")
    async with rig.process() as process:
        process.sandboxes.failure = OperationFailedError("there is no branch main")
        assert (await process.run(ref)).error == "there is no branch main"
    assert (rig.row(ref).status, rig.row(ref).error) == ("failed", "there is no branch main")
    assert rig.log(ref) == [SAID_BEFORE, "there is no branch main"]
    assert rig.shims.keys() == frozenset()


async def test_pod_that_is_over(rig: RunnerRig):
    """A pod that ended before its runner began with it is not run, and leaves no directory."""
    ref = terminate(rig.api.catalog, rig.pod("echo ready"))
    async with rig.process() as process:
        result = await process.run(ref)
    assert (result.exit_code, rig.log(ref), rig.shims.keys()) == (None, [], frozenset())


async def test_no_more_agents_than_places(rig: RunnerRig, mark: str):
    """A pod waits until one of the places is free; agents of an earlier process take places too."""
    first, second = rig.pod("echo ready; exec sleep 600"), rig.pod("echo second")
    async with rig.process(places=1) as process:
        running = asyncio.create_task(process.run(first))
        await rig.printed(first, "ready")
        running.cancel()
    async with rig.process(places=1) as process:
        waiting = asyncio.create_task(process.run(second))
        await asyncio.sleep(0.3)
        assert (rig.row(second).status, rig.log(second)) == ("creating", [])
        assert len(marked(mark)) == 1
        terminate(rig.api.catalog, first)
        assert (await waiting).exit_code == 0


@pytest.mark.parametrize("script", ["yes | head -n 20000", "head -c 3000000 /dev/zero | tr '\\0' x"])
async def test_much_output(rig: RunnerRig, script: str):
    """Much output, in many lines or in a few long ones, comes whole."""
    ref = rig.pod(script)
    async with rig.process() as process:
        await process.run(ref)
    [first, *printed, last] = rig.log(ref)
    assert (first, last) == (SAID_BEFORE, SAID_AFTER)
    assert "".join(printed) in ("y" * 20_000, "x" * 3_000_000)
