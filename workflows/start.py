"""How workflows are started: by the API after its commit, and by the worker's dispatcher for whatever was left behind."""

from datetime import timedelta

from temporalio.client import Client
from temporalio.common import (
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from kiln.errors import UnavailableError
from kiln.models import BuildRef, BuildStatus, HouseTerms, ImageRef, OperationRef, PodRef, PodRun
from kiln.naming import (
    CONTROL_QUEUE,
    KEEP_HOUSE_WORKFLOW_ID,
    build_workflow_id,
    delete_workflow_id,
    operation_workflow_id,
    pod_workflow_id,
)
from workflows.build_image import STATUS_ATTRIBUTE, BuildImageWorkflow
from workflows.delete_image import DeleteImageWorkflow
from workflows.keep_house import KeepHouseWorkflow
from workflows.operate_machine import PowerMachineWorkflow, RebuildMachineWorkflow
from workflows.options import fairness
from workflows.run_pod import RunPodWorkflow

# The row is the order; who cannot reach Temporal within a second leaves it to the dispatcher.
START_TIMEOUT = timedelta(seconds=1)
ORGANIZATION_ATTRIBUTE = SearchAttributeKey.for_keyword("KilnOrg")
KIND_ATTRIBUTE = SearchAttributeKey.for_keyword("KilnKind")
IMAGE_ATTRIBUTE = SearchAttributeKey.for_keyword("KilnImage")
SEARCH_ATTRIBUTES = (ORGANIZATION_ATTRIBUTE, KIND_ATTRIBUTE, STATUS_ATTRIBUTE, IMAGE_ATTRIBUTE)


async def start_build(client: Client, build: BuildRef) -> None:
    """Starts a build's workflow; one that was started before is left alone.

    Raises UnavailableError if Temporal does not answer within a second.
    """
    try:
        await client.start_workflow(
            BuildImageWorkflow.run,
            build,
            id=build_workflow_id(build.build_id),
            task_queue=CONTROL_QUEUE,
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
            search_attributes=_attributes(build),
            static_summary=f"{build.kind} image for {build.organization_id}",
            priority=fairness(build),
            rpc_timeout=START_TIMEOUT,
        )
    except WorkflowAlreadyStartedError:
        return
    except (RPCError, RuntimeError) as error:  # RuntimeError: a lazy client's first connection failed
        raise UnavailableError("Temporal does not answer") from error


async def start_deletion(client: Client, image: ImageRef) -> None:
    """Starts an image's deletion, or leaves the one that runs alone. Raises UnavailableError."""
    try:
        await client.start_workflow(
            DeleteImageWorkflow.run,
            image,
            id=delete_workflow_id(image.image_id),
            task_queue=CONTROL_QUEUE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            rpc_timeout=START_TIMEOUT,
        )
    except (RPCError, RuntimeError) as error:
        raise UnavailableError("Temporal does not answer") from error


async def start_operation(client: Client, ref: OperationRef) -> None:
    """Starts a machine's operation, or leaves the run that is at it alone. Raises UnavailableError."""
    attributes = [
        SearchAttributePair(ORGANIZATION_ATTRIBUTE, ref.organization_id),
        SearchAttributePair(KIND_ATTRIBUTE, f"machine-{ref.operation}"),
    ]
    try:
        await client.start_workflow(
            RebuildMachineWorkflow.run if ref.operation.launches else PowerMachineWorkflow.run,
            ref,
            id=operation_workflow_id(ref.machine_id, ref.number),
            task_queue=CONTROL_QUEUE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            search_attributes=TypedSearchAttributes(attributes),
            static_summary=f"{ref.operation} of machine {ref.machine_id} of {ref.organization_id}",
            rpc_timeout=START_TIMEOUT,
        )
    except (RPCError, RuntimeError) as error:
        raise UnavailableError("Temporal does not answer") from error


async def start_pod(client: Client, ref: PodRef) -> None:
    """Starts a pod's workflow, or leaves the run that is at it alone. Raises UnavailableError."""
    attributes = [
        SearchAttributePair(ORGANIZATION_ATTRIBUTE, ref.organization_id),
        SearchAttributePair(KIND_ATTRIBUTE, "pod"),
    ]
    try:
        await client.start_workflow(
            RunPodWorkflow.run,
            PodRun(**ref.model_dump()),
            id=pod_workflow_id(ref.key),
            task_queue=CONTROL_QUEUE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            search_attributes=TypedSearchAttributes(attributes),
            static_summary=f"pod of {ref.organization_id} on runner {ref.runner_id}",
            rpc_timeout=START_TIMEOUT,
        )
    except (RPCError, RuntimeError) as error:
        raise UnavailableError("Temporal does not answer") from error


async def start_house_keeping(client: Client, terms: HouseTerms) -> None:
    """Makes sure that the house-keeping workflow runs. Raises UnavailableError."""
    try:
        await client.start_workflow(
            KeepHouseWorkflow.run,
            terms,
            id=KEEP_HOUSE_WORKFLOW_ID,
            task_queue=CONTROL_QUEUE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            rpc_timeout=START_TIMEOUT,
        )
    except (RPCError, RuntimeError) as error:
        raise UnavailableError("Temporal does not answer") from error


async def cancel_build(client: Client, build_id: str) -> None:
    """Cancels a build's workflow if it runs. Raises UnavailableError; the row's own request holds all the same."""
    await _cancel(client, build_workflow_id(build_id))


async def cancel_pod(client: Client, key: str) -> None:
    """Cancels a pod's workflow if it runs. Raises UnavailableError; what the row says holds all the same."""
    await _cancel(client, pod_workflow_id(key))


async def _cancel(client: Client, workflow_id: str) -> None:
    try:
        await client.get_workflow_handle(workflow_id).cancel(rpc_timeout=START_TIMEOUT)
    except RPCError as error:
        if not _is_not_found(error):
            raise UnavailableError("Temporal does not answer") from error
    except RuntimeError as error:
        raise UnavailableError("Temporal does not answer") from error


async def announce_context(client: Client, build_id: str) -> None:
    """Signals a build's workflow that its context has come. Raises UnavailableError; it finds out by itself, later."""
    handle = client.get_workflow_handle(build_workflow_id(build_id))
    try:
        await handle.signal("context_uploaded", rpc_timeout=START_TIMEOUT)
    except RPCError as error:
        if not _is_not_found(error):
            raise UnavailableError("Temporal does not answer") from error
    except RuntimeError as error:
        raise UnavailableError("Temporal does not answer") from error


def _is_not_found(error: RPCError) -> bool:
    return error.status is RPCStatusCode.NOT_FOUND


def _attributes(build: BuildRef) -> TypedSearchAttributes:
    return TypedSearchAttributes(
        [
            SearchAttributePair(ORGANIZATION_ATTRIBUTE, build.organization_id),
            SearchAttributePair(KIND_ATTRIBUTE, build.kind.value),
            SearchAttributePair(STATUS_ATTRIBUTE, BuildStatus.QUEUED.value),
        ]
    )
