"""Records the histories that `test_replay.py` replays, from real runs on a local Temporal server.

python tests/workflows/record_histories.py [NAME…]

Without a name, those that are missing. Record anew only before a release: a history of released code that no longer
replays is a break, not a nuisance.
"""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from temporalio.client import Client, WorkflowHistory  # noqa: E402
from temporalio.contrib.pydantic import pydantic_data_converter  # noqa: E402
from temporalio.testing import WorkflowEnvironment  # noqa: E402

from kiln.catalog.session import Catalog  # noqa: E402
from kiln.errors import CapacityError  # noqa: E402
from kiln.models import HouseTerms  # noqa: E402
from kiln.naming import KEEP_HOUSE_WORKFLOW_ID, delete_workflow_id  # noqa: E402
from support import container_tools, histories  # noqa: E402  the paths come first
from support.container_harness import ContainerHarness  # noqa: E402
from support.container_tools import ContainerRun  # noqa: E402
from support.fakes import PackerRun, bakes, hangs  # noqa: E402
from support.harness import Harness  # noqa: E402
from support.histories import SECRET  # noqa: E402
from support.machine_harness import MachineHarness  # noqa: E402
from support.pod_harness import PodHarness  # noqa: E402
from support.pod_scenarios import POD_SCENARIOS  # noqa: E402
from support.rows import make_older  # noqa: E402
from support.troubled_registry import registry_site  # noqa: E402
from workflows.start import SEARCH_ATTRIBUTES, start_deletion, start_house_keeping  # noqa: E402

Scenario = Callable[[Harness], Awaitable[WorkflowHistory]]
ContainerScenario = Callable[[ContainerHarness], Awaitable[WorkflowHistory]]
MachineScenario = Callable[[MachineHarness], Awaitable[WorkflowHistory]]
# Long enough ago for the house-keeping to ask where a build is.
LONG_AGO = timedelta(minutes=1)
# Of events, at which the server suggests to continue as new.
LONG_HISTORY = 60


async def bakes_and_tells(run: PackerRun) -> int:
    run.says(f"exporting API_TOKEN={run.secret}")
    return await bakes(run)


async def fails_and_tells(run: PackerRun) -> int:
    run.complains(f"Script exited with non-zero exit status: 1: bad token {run.secret}")
    return 1


async def of_build(kiln: Harness, build: str) -> WorkflowHistory:
    return await kiln.handle(build).fetch_history()


async def of_house(kiln: Harness) -> WorkflowHistory:
    """The house-keeping's history so far; the next scenario's begins anew."""
    handle = kiln.client.get_workflow_handle(KEEP_HOUSE_WORKFLOW_ID)
    history = await handle.fetch_history()
    await handle.terminate()
    return history


async def success(kiln: Harness) -> WorkflowHistory:
    kiln.tools.script = bakes_and_tells
    async with kiln.workers():
        await kiln.end(build := await kiln.submit(secret=SECRET))
        return await of_build(kiln, build)


async def failure(kiln: Harness) -> WorkflowHistory:
    kiln.tools.script = fails_and_tells
    async with kiln.workers():
        await kiln.failure(build := await kiln.submit(secret=SECRET))
        return await of_build(kiln, build)


async def second_attempt(kiln: Harness) -> WorkflowHistory:
    """A worker stops while it builds, and another takes the build up."""
    kiln.tools.scripts = {1: hangs, 2: bakes_and_tells}
    async with kiln.control():
        async with kiln.builder("worker-1"):
            build = await kiln.submit(secret=SECRET)
            await kiln.reaches(build, "building")
        async with kiln.builder("worker-2"):
            await kiln.end(build)
        return await of_build(kiln, build)


async def cancel_in_the_queue(kiln: Harness) -> WorkflowHistory:
    async with kiln.control():
        build = await kiln.submit(secret=SECRET)
        await kiln.reaches(build, "waiting")
        await kiln.handle(build).cancel()
        await kiln.is_cancelled(build)
        return await of_build(kiln, build)


async def cancel_while_building(kiln: Harness) -> WorkflowHistory:
    """Cancelled twice, the second time during the cleanup."""
    kiln.tools.script = hangs
    async with kiln.workers():
        build = await kiln.submit(secret=SECRET)
        await kiln.reaches(build, "building")
        kiln.gate.hold("clean-up")
        await kiln.handle(build).cancel()
        await kiln.gate.is_reached()
        await kiln.handle(build).cancel()
        kiln.gate.open()
        await kiln.is_cancelled(build)
        return await of_build(kiln, build)


async def not_mine(kiln: Harness) -> WorkflowHistory:
    """Another run has the build."""
    build = kiln.order(secret=SECRET)
    kiln.ledger.claim(build, "another run")
    async with kiln.workers():
        await kiln.start(build)
        await kiln.end(build)
        return await of_build(kiln, build)


async def delete(kiln: Harness) -> WorkflowHistory:
    async with kiln.workers():
        await kiln.end(build := await kiln.submit(secret=SECRET))
        image = kiln.published(build)
        kiln.begin_deletion(image)
        await start_deletion(kiln.client, image)
        handle = kiln.client.get_workflow_handle(delete_workflow_id(image.image_id))
        await handle.result()
        return await handle.fetch_history()


async def keep_house(kiln: Harness) -> WorkflowHistory:
    """Rounds that close a lost build, sweep, fail once, and go on."""
    async with kiln.workers():
        await kiln.end(await kiln.submit(secret=SECRET))
        kiln.tools.script = hangs
        lost = await kiln.submit(secret=SECRET)
        await kiln.reaches(lost, "building")
        make_older(kiln.catalog, lost, LONG_AGO)
        await kiln.handle(lost).terminate()
        kiln.cloud.fail("own_images", times=2)
        await start_house_keeping(kiln.client, HouseTerms(pause_seconds=0.2, rounds_a_sweep=2))
        await kiln.until(lambda: has_observed(kiln, 3))
        return await of_house(kiln)


async def has_observed(kiln: Harness, times: int) -> bool:
    return kiln.finished["observe-images"] >= times


async def makes_and_tells(run: ContainerRun) -> int:
    run.says(f"exporting API_TOKEN={run.secret}")
    return await container_tools.makes(run)


async def container_success(kiln: ContainerHarness) -> WorkflowHistory:
    """The context is announced before it is there, and again when it is."""
    kiln.tools.script = makes_and_tells
    async with kiln.workers():
        build = await kiln.awaits_context(secret=SECRET)
        await kiln.until(lambda: has_asked(kiln, 1))
        await kiln.announce(build)
        await kiln.until(lambda: has_asked(kiln, 2))
        kiln.receive(build)
        await kiln.announce(build)
        await kiln.end(build)
        return await of_build(kiln, build)


async def container_cancel_awaiting(kiln: ContainerHarness) -> WorkflowHistory:
    """Nobody uploads the context; after a second look the build is cancelled."""
    async with kiln.control():
        build = await kiln.awaits_context(secret=SECRET)
        await kiln.until(lambda: has_asked(kiln, 2))
        await kiln.handle(build).cancel()
        await kiln.is_cancelled(build)
        return await of_build(kiln, build)


async def container_context_missing(kiln: ContainerHarness) -> WorkflowHistory:
    async with kiln.control():
        build = await kiln.awaits_context(timedelta(seconds=1), secret=SECRET)
        await kiln.failure(build)
        return await of_build(kiln, build)


async def container_publication_retried(kiln: ContainerHarness) -> WorkflowHistory:
    """The registry fails after the catalog's commit, and the build is cancelled before it answers again."""
    kiln.tools.script = makes_and_tells
    async with kiln.workers():
        kiln.registry.fail("tag", times=2)
        build = await kiln.submit(secret=SECRET)
        await kiln.until(lambda: is_committed(kiln, build))
        await kiln.handle(build).cancel()
        await kiln.end(build)
        return await of_build(kiln, build)


async def transfer(kiln: ContainerHarness) -> WorkflowHistory:
    async with kiln.control(), kiln.transferrer():
        build = kiln.order_transfer()
        await kiln.start(build)
        await kiln.end(build)
        return await of_build(kiln, build)


async def rebuild_success(kiln: MachineHarness) -> WorkflowHistory:
    """A creation waits for its image, and EC2 loses a reply."""
    template = kiln.template("pending")
    kiln.machines.lose_reply("launch")
    async with kiln.workers():
        creation = await kiln.begin(kiln.order_creation(template_id=template))
        await kiln.says(creation, "waiting for image")
        kiln.finish(template, "available")
        await kiln.done(creation)
        return await kiln.operation(creation).fetch_history()


async def rebuild_failure(kiln: MachineHarness) -> WorkflowHistory:
    """The new instance dies."""
    kiln.machines.dies = "Client.VolumeLimitExceeded: Volume limit exceeded"
    async with kiln.workers():
        await kiln.reason(rebuild := await kiln.begin(kiln.order_rebuild()))
        return await kiln.operation(rebuild).fetch_history()


async def rebuild_cancel(kiln: MachineHarness) -> WorkflowHistory:
    """Cancelled while the new instance is pending, and again while it is ended."""
    kiln.machines.settles = False
    async with kiln.workers():
        rebuild = await kiln.begin(kiln.order_rebuild())
        await kiln.waits_for_ec2(rebuild)
        await kiln.cancel(rebuild)
        await kiln.says(rebuild, "ending instances")
        await kiln.operation(rebuild).cancel()
        kiln.machines.settles = True
        await kiln.was_cancelled(rebuild)
        return await kiln.operation(rebuild).fetch_history()


async def rebuild_cancel_at_launch(kiln: MachineHarness) -> WorkflowHistory:
    """Cancelled while it launches, which is seen through."""
    kiln.gate.hold("launch-instance")
    async with kiln.workers():
        rebuild = await kiln.begin(kiln.order_rebuild())
        await kiln.gate.is_reached()
        await kiln.cancel(rebuild)
        kiln.gate.open()
        await kiln.was_cancelled(rebuild)
        return await kiln.operation(rebuild).fetch_history()


async def power_success(kiln: MachineHarness) -> WorkflowHistory:
    async with kiln.workers():
        await kiln.done(start := await kiln.begin(kiln.order_start(kiln.machine())))
        return await kiln.operation(start).fetch_history()


async def power_failure(kiln: MachineHarness) -> WorkflowHistory:
    """EC2 has no room."""
    kiln.machines.fail("start_instance", CapacityError("no t3.medium in us-east-1 now"), times=3)
    async with kiln.workers():
        await kiln.reason(start := await kiln.begin(kiln.order_start(kiln.machine())))
        return await kiln.operation(start).fetch_history()


async def power_cancel(kiln: MachineHarness) -> WorkflowHistory:
    kiln.machines.settles = False
    async with kiln.workers():
        start = await kiln.begin(kiln.order_start(kiln.machine()))
        await kiln.asked("instances", times=2)
        await kiln.cancel(start)
        await kiln.was_cancelled(start)
        return await kiln.operation(start).fetch_history()


async def snapshot(kiln: MachineHarness) -> WorkflowHistory:
    """An image of a machine, which a second attempt adopts."""
    kiln.machines.lose_reply("create_image")
    build = kiln.order_image(kiln.machine())
    async with kiln.workers():
        await kiln.start(build)
        await kiln.end(build)
        return await of_build(kiln, build)


async def keep_house_machines(kiln: MachineHarness) -> WorkflowHistory:
    """Rounds that give a lost operation back, end an instance that nobody has, fail once, and go on."""
    machine = kiln.machine("running")
    kiln.launched(machine)
    kiln.machine_ledger.claim_operation(rebuild := kiln.order_rebuild(), "a run of long ago")
    kiln.make_operation_older(rebuild)
    kiln.machines.fail("instances", times=2)
    async with kiln.control():
        await kiln.keep_house(rounds=3)
        return await of_house(kiln)


async def has_asked(kiln: ContainerHarness, times: int) -> bool:
    return kiln.finished["accept-context"] >= times


async def is_committed(kiln: ContainerHarness, build: str) -> bool:
    return kiln.registry.calls["tag"] > 0 and kiln.row(build).publishing_at is not None


SCENARIOS: dict[str, Scenario] = {
    "success": success,
    "failure": failure,
    "second_attempt": second_attempt,
    "cancel_in_the_queue": cancel_in_the_queue,
    "cancel_while_building": cancel_while_building,
    "not_mine": not_mine,
    "delete": delete,
    "keep_house": keep_house,
}
CONTAINER_SCENARIOS: dict[str, ContainerScenario] = {
    "container_success": container_success,
    "container_cancel_awaiting": container_cancel_awaiting,
    "container_context_missing": container_context_missing,
    "container_publication_retried": container_publication_retried,
    "transfer": transfer,
}
MACHINE_SCENARIOS: dict[str, MachineScenario] = {
    "rebuild_success": rebuild_success,
    "rebuild_failure": rebuild_failure,
    "rebuild_cancel": rebuild_cancel,
    "rebuild_cancel_at_launch": rebuild_cancel_at_launch,
    "power_success": power_success,
    "power_failure": power_failure,
    "power_cancel": power_cancel,
    "snapshot": snapshot,
    "keep_house_machines": keep_house_machines,
}


async def main(names: list[str]) -> None:
    program = str(Path(sys.executable).with_name("temporal"))
    known = {*SCENARIOS, *CONTAINER_SCENARIOS, *MACHINE_SCENARIOS, *POD_SCENARIOS}
    async with await WorkflowEnvironment.start_local(
        dev_server_existing_path=program,
        dev_server_log_level="error",
        data_converter=pydantic_data_converter,
        search_attributes=SEARCH_ATTRIBUTES,
        identity="recorder",
        dev_server_extra_args=["--dynamic-config-value", f"limit.historyCount.suggestContinueAsNew={LONG_HISTORY}"],
    ) as environment:
        for name in names or sorted(known - set(histories.names())):
            history = await recorded(name, environment.client)
            histories.save(name, history)
            print(f"{name}: {len(history.events)} events")  # noqa: T201  a script


async def recorded(name: str, client: Client) -> WorkflowHistory:
    """The history of a scenario, on a catalog of its own."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        catalog = Catalog(f"sqlite:///{folder}/catalog.db")
        catalog.migrate()
        if name in SCENARIOS:
            kiln = Harness(client, catalog, folder, skips_time=False)
            stack.callback(kiln.close)
            return await SCENARIOS[name](kiln)
        if name in MACHINE_SCENARIOS:
            machines = MachineHarness(client, catalog, folder, skips_time=False)
            stack.callback(machines.close)
            return await MACHINE_SCENARIOS[name](machines)
        if name in POD_SCENARIOS:
            pods = PodHarness(client, catalog, folder, skips_time=False)
            stack.callback(pods.close)
            history = await POD_SCENARIOS[name](pods)
            await pods.leave()
            return history
        containers = ContainerHarness(
            client, catalog, folder, stack.enter_context(registry_site(folder)), skips_time=False
        )
        stack.callback(containers.close)
        return await CONTAINER_SCENARIOS[name](containers)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
