"""Recorded histories replay: whoever changes a workflow so that running ones would break learns it here."""

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowHistory
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Replayer

from support import histories
from support.fakes import PackerRun
from support.harness import Harness
from support.histories import SECRET
from workflows.runner import WORKFLOWS, workflow_runner

SUCCEEDED = EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED
FAILED = EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED
CANCELLED = EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED
CONTINUED = EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CONTINUED_AS_NEW
CANCEL_REQUESTED = EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED
ENDS = {
    "success": SUCCEEDED,
    "failure": FAILED,
    "second_attempt": SUCCEEDED,
    "cancel_in_the_queue": CANCELLED,
    "cancel_while_building": CANCELLED,
    "not_mine": SUCCEEDED,
    "delete": SUCCEEDED,
    "container_success": SUCCEEDED,
    "container_cancel_awaiting": CANCELLED,
    "container_context_missing": FAILED,
    "container_publication_retried": SUCCEEDED,
    "transfer": SUCCEEDED,
    "rebuild_success": SUCCEEDED,
    "rebuild_failure": FAILED,
    "rebuild_cancel": CANCELLED,
    "rebuild_cancel_at_launch": CANCELLED,
    "power_success": SUCCEEDED,
    "power_failure": FAILED,
    "power_cancel": CANCELLED,
    "snapshot": SUCCEEDED,
    "pod_success": SUCCEEDED,
    "pod_failure": FAILED,
    "pod_not_mine": SUCCEEDED,
    "pod_cancel": CANCELLED,
    "pod_cancel_at_claim": CANCELLED,
    "pod_cancel_in_the_queue": CANCELLED,
    "pod_continued": CONTINUED,
}


@pytest.mark.parametrize("name", histories.names())
async def test_a_recorded_history_replays(name: str) -> None:
    """Today's workflows make of yesterday's history what was made of it then."""
    assert await failure_of_replay(histories.load(name)) is None


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(("cancel_while_building", step) for step in ("claim-build", "packer-build", "clean-up", "record-end")),
        *(("container_success", step) for step in ("accept-context", "container-build", "publish-container")),
        ("container_cancel_awaiting", "clean-up-container"),
        ("transfer", "transfer-image"),
        *(
            ("rebuild_success", step)
            for step in ("claim-operation", "find-source", "launch-instance", "adopt-instance")
        ),
        *(("rebuild_cancel", step) for step in ("abandon-operation", "end-retired")),
        ("power_failure", "power-machine"),
        ("snapshot", "snapshot-machine"),
        ("keep_house_machines", "find-lost-operations"),
        *(("pod_cancel", step) for step in ("claim-pod", "prompt-pod", "run-pod", "terminate-pod", "record-pod-end")),
        ("keep_house_pods", "look-after-pods"),
    ],
)
async def test_another_history_does_not(name: str, step: str) -> None:
    """A history in which a step was another one does not replay."""
    history = histories.load(name)
    for event in history.events:
        if event.activity_task_scheduled_event_attributes.activity_type.name == step:
            event.activity_task_scheduled_event_attributes.activity_type.name = "another-step"
    assert await failure_of_replay(history) is not None


async def failure_of_replay(history: WorkflowHistory) -> Exception | None:
    replayer = Replayer(workflows=WORKFLOWS, workflow_runner=workflow_runner(), data_converter=pydantic_data_converter)
    return (await replayer.replay_workflow(history, raise_on_replay_failure=False)).replay_failure


@pytest.mark.parametrize("name", histories.names())
def test_a_recorded_history_holds_no_secret(name: str) -> None:
    """A variable's secret value is in no payload, not even where its tool printed it."""
    assert SECRET not in histories.texts(histories.load(name))


@pytest.mark.parametrize(("name", "end"), ENDS.items())
def test_a_recorded_history_is_what_its_name_says(name: str, end: EventType.ValueType) -> None:
    """The recorded runs ended as they were meant to."""
    assert histories.load(name).events[-1].event_type == end


def test_a_recorded_failure_names_the_mask() -> None:
    """Packer's error line did hold the secret: what stands in its place is the mask."""
    assert "bad token ***" in histories.texts(histories.load("failure"))


def test_a_recorded_context_was_announced_too_soon() -> None:
    """The recorded wait has a signal that nothing followed from, and one that ended it."""
    text = histories.texts(histories.load("container_success"))
    assert [text.count(f'"state":"{state}"') for state in ("awaited", "ready")] == [2, 1]


def test_a_recorded_publication_was_retried() -> None:
    """The recorded publication needed three tries, and was asked to be cancelled meanwhile."""
    events = histories.load("container_publication_retried").events
    assert max(event.activity_task_started_event_attributes.attempt for event in events) == 3
    assert any(event.event_type == CANCEL_REQUESTED for event in events)


def test_a_recorded_round_closed_a_lost_build() -> None:
    """The recorded house-keeping cleaned up after a build and closed it."""
    scheduled = [
        event.activity_task_scheduled_event_attributes.activity_type.name
        for event in histories.load("keep_house").events
    ]
    assert {"find-lost-builds", "clean-up", "record-end", "observe-images", "sweep"} <= set(scheduled)


def test_a_recorded_round_looked_after_machines() -> None:
    """The recorded house-keeping did for machines what there is to do."""
    text = histories.texts(histories.load("keep_house_machines"))
    assert '"released":1' in text
    assert all(step in text for step in ("observe-machines", "end-retired-instances", "sweep-machines"))


def test_a_recorded_round_looked_after_pods() -> None:
    """The recorded house-keeping failed a pod, gave one back and settled one."""
    assert '"lapsed":1,"released":1,"settled":1' in histories.texts(histories.load("keep_house_pods"))


class TestSecrets:
    async def tells(self, run: PackerRun) -> int:
        """A run that prints its secret, and complains about it."""
        assert run.secret == SECRET
        run.says(f"exporting API_TOKEN={run.secret}")
        run.complains(f"bad token {run.secret}")
        return 1

    async def test_a_history_holds_none(self, kiln: Harness) -> None:
        """What a tool prints of its secrets reaches neither its workflow's history nor the log."""
        kiln.tools.script = self.tells
        async with kiln.workers():
            await kiln.failure(build := await kiln.submit(secret=SECRET))
            history = histories.texts(await kiln.handle(build).fetch_history())
        assert ("bad token ***" in history, SECRET in history) == (True, False)
        assert SECRET not in "\n".join(kiln.log(build))
