"""Operators act in Temporal, and Temporal itself comes and goes: builds end clean and truthful all the same."""

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import WorkflowExecutionStatus

from support.account_checks import nothing_left, one_image_and_nothing_else
from support.moto import AccountState
from support.processes import eventually
from support.rig import Rig

pytestmark = pytest.mark.fault

WITHIN_A_MINUTE = 60
TEMPORAL_CLI = str(Path(sys.executable).with_name("temporal"))


def _temporal(rig: Rig, *arguments: str) -> str:
    """Runs Temporal's own command line."""
    address = f"127.0.0.1:{rig.stack.settings.temporal_port}"
    command = [TEMPORAL_CLI, *arguments, "--address", address, "--color", "never"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_cancelling_in_temporal_does_what_the_cancel_call_does(rig: Rig, before: AccountState) -> None:
    """Temporal's own command line cancels a build: tool ended, account clean, run Cancelled, row cancelled."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        await asyncio.to_thread(gate.wait_for_request, 20)
        _temporal(rig, "workflow", "cancel", "-w", f"build-{build_id}")
        gate.release()
    assert (await asyncio.to_thread(rig.wait, build_id))["status"] == "cancelled"
    nothing_left(rig, before)
    handle = (await rig.temporal()).get_workflow_handle(f"build-{build_id}")
    assert await _eventually_status(handle, WorkflowExecutionStatus.CANCELED)


async def test_a_terminated_workflow_is_cleaned_up_after_within_a_minute(rig: Rig, before: AccountState) -> None:
    """Termination runs no code of the workflow's: the house-keeping cleans the account and closes the row."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        await asyncio.to_thread(gate.wait_for_request, 20)
        _temporal(rig, "workflow", "terminate", "-w", f"build-{build_id}")
        gate.release()
    build = await asyncio.to_thread(rig.wait, build_id, seconds=WITHIN_A_MINUTE)
    assert (build["status"], build["error"]["code"]) == ("failed", "workflow_terminated")
    nothing_left(rig, before)


async def test_a_workflow_reset_in_mid_build_ends_clean_and_truthful(rig: Rig, before: AccountState) -> None:
    """A reset runs the workflow again from an earlier point: the build is still its own, and makes one AMI."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        await asyncio.to_thread(gate.wait_for_request, 20)
        await _reset(rig, build_id)
        gate.release()
    build = await asyncio.to_thread(rig.wait, build_id, seconds=WITHIN_A_MINUTE)
    assert build["status"] == "succeeded", build
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])


async def test_a_workflow_reset_after_its_end_changes_nothing(rig: Rig, before: AccountState) -> None:
    """The build is over: the new run finds that out, spares the published AMI and builds nothing."""
    build_id = rig.submit()
    build = await asyncio.to_thread(rig.wait, build_id, "succeeded")
    handle = (await rig.temporal()).get_workflow_handle(f"build-{build_id}")
    assert await _eventually_status(handle, WorkflowExecutionStatus.COMPLETED)
    launched = len(rig.proxy.calls_of("RunInstances"))
    await _reset(rig, build_id)
    fresh = (await rig.temporal()).get_workflow_handle(f"build-{build_id}")
    assert await _eventually_status(fresh, WorkflowExecutionStatus.COMPLETED)
    assert rig.build(build_id)["status"] == "succeeded"
    assert len(rig.proxy.calls_of("RunInstances")) == launched
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])


def test_a_submission_while_temporal_is_down_is_accepted_and_runs_later(rig: Rig, before: AccountState) -> None:
    """The row is the order: 202 now, built once Temporal is back."""
    rig.stack.kill("temporal", signal.SIGKILL)
    rig.stack.wait_for_exit("temporal")
    build_id = rig.submit()
    build = rig.build(build_id)
    assert (build["status"], build["progress"]) == ("queued", None)
    rig.stack.start_parts("temporal")
    build = rig.wait(build_id, "succeeded")
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])


def test_a_cancel_while_temporal_is_down_holds(rig: Rig, before: AccountState) -> None:
    """The builder honours the row: the tool ends while Temporal is away, and the build is cancelled when it is back."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        rig.stack.kill("temporal", signal.SIGKILL)
        rig.stack.wait_for_exit("temporal")
        rig.cancel(build_id)
        gate.release()
        assert eventually(lambda: not rig.packers(build_id), 30)
    rig.stack.start_parts("temporal")
    assert rig.wait(build_id)["status"] == "cancelled"
    nothing_left(rig, before)


def test_a_cancel_before_the_dispatch_holds(rig: Rig, before: AccountState) -> None:
    """Submitted and cancelled while Temporal is down: nothing of it ever runs."""
    rig.stack.kill("temporal", signal.SIGKILL)
    rig.stack.wait_for_exit("temporal")
    build_id = rig.submit()
    rig.cancel(build_id)
    assert rig.wait(build_id, seconds=5)["status"] == "cancelled"
    rig.stack.start_parts("temporal")
    second = rig.wait(rig.submit(), "succeeded")
    assert rig.build(build_id)["status"] == "cancelled"
    one_image_and_nothing_else(rig, before, second["image"]["ami_id"])


def test_a_build_outlasts_temporals_restart(rig: Rig, before: AccountState) -> None:
    """Temporal stopped and started in mid-build: nothing is lost, and one AMI comes of it."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        rig.stack.kill("temporal", signal.SIGTERM)
        rig.stack.wait_for_exit("temporal")
        rig.stack.start_parts("temporal")
    build = rig.wait(build_id, "succeeded", seconds=90)
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])


def test_the_api_killed_between_its_commit_and_the_start_loses_no_build(rig: Rig, before: AccountState) -> None:
    """The API dies while it waits for a frozen Temporal: its row is there, and the dispatcher starts the build."""
    known = _ids(rig)
    rig.stack.kill("temporal", signal.SIGSTOP)
    try:
        sending = threading.Thread(target=_submit_in_vain, args=(rig,))
        sending.start()
        assert eventually(lambda: _rows(rig) > len(known), 10), "the row was never committed"
        rig.stack.kill("api", signal.SIGKILL)
        rig.stack.wait_for_exit("api")
        sending.join(10)
        rig.stack.kill("temporal", signal.SIGKILL)  # and with it whatever the dead API had asked of it
        rig.stack.wait_for_exit("temporal")
    finally:
        rig.heal()
    (build_id,) = _ids(rig) - known
    build = rig.wait(build_id, "succeeded")
    one_image_and_nothing_else(rig, before, build["image"]["ami_id"])


def _submit_in_vain(rig: Rig) -> None:
    with httpx.Client(base_url=rig.stack.api_url, headers={"X-API-Key": rig.stack.api_key}, trust_env=False) as http:
        try:
            http.post("/api/v1/images/build", json={"provider": "codex"})
        except httpx.HTTPError:
            return


def _ids(rig: Rig) -> set[str]:
    return {build["id"] for build in rig.http.get("/api/v1/builds?limit=500").json()["builds"]}


def _rows(rig: Rig) -> int:
    """The builds in the catalog itself: the API would ask Temporal for their progress."""
    from kiln.catalog import builds  # noqa: PLC0415
    from kiln.catalog.session import Catalog  # noqa: PLC0415

    catalog = Catalog(rig.stack.settings.catalog_dsn)
    try:
        with catalog.read() as session:
            return sum(builds.count_by_status(session).values())
    finally:
        catalog.close()


async def _reset(rig: Rig, build_id: str) -> None:
    """Resets a workflow to its first task, as the Temporal UI's reset does."""
    client = await rig.temporal()
    await client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace="default",
            workflow_execution=WorkflowExecution(workflow_id=f"build-{build_id}"),
            reason="an operator wants it so",
            workflow_task_finish_event_id=4,
            request_id=build_id,
        )
    )


async def _eventually_status(handle: object, wanted: WorkflowExecutionStatus) -> bool:
    for _ in range(300):
        if (await handle.describe()).status is wanted:  # type: ignore[attr-defined]
            return True
        await asyncio.sleep(0.1)
    return False
