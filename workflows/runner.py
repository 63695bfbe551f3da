"""The one workflow runner: the same sandbox for workers, tests and the replayer."""

from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from workflows.build_image import BuildImageWorkflow
from workflows.delete_image import DeleteImageWorkflow
from workflows.keep_house import KeepHouseWorkflow
from workflows.operate_machine import PowerMachineWorkflow, RebuildMachineWorkflow
from workflows.run_pod import RunPodWorkflow

WORKFLOWS = (
    BuildImageWorkflow,
    DeleteImageWorkflow,
    KeepHouseWorkflow,
    RebuildMachineWorkflow,
    PowerMachineWorkflow,
    RunPodWorkflow,
)


def workflow_runner() -> SandboxedWorkflowRunner:
    """The SDK's own sandbox; Kiln's modules reach workflows through `imports_passed_through` only."""
    return SandboxedWorkflowRunner(restrictions=SandboxRestrictions.default)
