"""Every retry policy, time-out and queue of Kiln's workflows. They stand here and nowhere else."""

from datetime import timedelta
from typing import Any, Final

from temporalio.common import Priority, RetryPolicy
from temporalio.workflow import ActivityCancellationType

from kiln.models import BuildKind, BuildRef, Claim, PodRef
from kiln.naming import CONTROL_QUEUE, MACHINES_QUEUE, PACKER_QUEUE, TRANSFER_QUEUE, container_queue, runner_queue

CONTEXT_FIRST_PAUSE: Final = timedelta(seconds=5)
CONTEXT_LONGEST_PAUSE: Final = timedelta(seconds=60)
SOURCE_FIRST_PAUSE: Final = timedelta(seconds=2)
SOURCE_LONGEST_PAUSE: Final = timedelta(seconds=60)

# A builder keeps its own deadline in the catalog, over all attempts; this only bounds an activity that lost its mind.
BUILDER_LIMIT: Final = timedelta(days=2)
CATALOG_TIMEOUT: Final = timedelta(seconds=30)
CLOUD_TIMEOUT: Final = timedelta(minutes=10)
CLOUD_HEARTBEAT: Final = timedelta(seconds=30)
# What is done to a machine gives a sign of life each second, and is soon taken up by another worker.
MACHINE_HEARTBEAT: Final = timedelta(seconds=15)
# Longer than an instance is waited for (activities/machines.py).
MACHINE_TIMEOUT: Final = timedelta(minutes=30)

# An agent lives as long as its users and its runner let it; this is only what Temporal wants to be told.
POD_LIMIT: Final = timedelta(days=1000)
POD_HEARTBEAT: Final = timedelta(seconds=15)

# A catalog that is down comes back: nothing is lost by waiting, and everything by giving up.
CATALOG_RETRY: Final = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_interval=timedelta(seconds=10))
# A catalog or an EC2 that is away must not cost a finished AMI; what is wrong with the AMI itself, the activity decides.
VERIFY_RETRY: Final = RetryPolicy(initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(seconds=10))
# A cleanup ends when nothing is left, and not before.
CLEANUP_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))
# House-keeping comes round again anyway.
HOUSE_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_attempts=2)
# A runner that comes back goes on with its agents at once.
POD_RETRY: Final = RetryPolicy(initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(seconds=5))

ROUNDS_A_RUN: Final = 200


def record() -> dict[str, Any]:
    """A short transaction in the catalog."""
    return {"task_queue": CONTROL_QUEUE, "start_to_close_timeout": CATALOG_TIMEOUT, "retry_policy": CATALOG_RETRY}


def builder(build: BuildRef, claim: Claim) -> dict[str, Any]:
    """A tool's run. Organizations share builders fairly; the run ends only when the tool is gone."""
    return {
        "task_queue": builder_queue(build),
        "start_to_close_timeout": BUILDER_LIMIT,
        "heartbeat_timeout": timedelta(seconds=claim.heartbeat_timeout_seconds),
        "cancellation_type": ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        "retry_policy": RetryPolicy(
            initial_interval=timedelta(seconds=1),
            maximum_interval=timedelta(seconds=30),
            maximum_attempts=claim.max_attempts,
        ),
        "priority": fairness(build),
    }


QUEUES: Final = {
    BuildKind.MACHINE: PACKER_QUEUE,
    BuildKind.SNAPSHOT: MACHINES_QUEUE,
    BuildKind.TRANSFER: TRANSFER_QUEUE,
}


def builder_queue(build: BuildRef) -> str:
    """Where the builders of this kind, and for a Dockerfile of this platform, listen."""
    if build.kind is BuildKind.CONTAINER:
        return container_queue(build.platform)
    return QUEUES[build.kind]


def accept_context() -> dict[str, Any]:
    """A look into the catalog, and the check of an archive that somebody announced."""
    return {"task_queue": CONTROL_QUEUE, "start_to_close_timeout": CLOUD_TIMEOUT, "retry_policy": CATALOG_RETRY}


def publish() -> dict[str, Any]:
    """Verification in EC2, and the transaction that makes the image public."""
    return {"task_queue": CONTROL_QUEUE, "start_to_close_timeout": CATALOG_TIMEOUT * 2, "retry_policy": VERIFY_RETRY}


def cleanup() -> dict[str, Any]:
    """One long pass over EC2, retried without limit."""
    return {
        "task_queue": CONTROL_QUEUE,
        "start_to_close_timeout": CLOUD_TIMEOUT,
        "heartbeat_timeout": CLOUD_HEARTBEAT,
        "retry_policy": CLEANUP_RETRY,
    }


def machine_record() -> dict[str, Any]:
    """A short transaction about a machine."""
    return {**record(), "task_queue": MACHINES_QUEUE}


def machine() -> dict[str, Any]:
    """Something that EC2 does to an instance, and waiting for it; the activity decides what cannot be helped."""
    return {
        "task_queue": MACHINES_QUEUE,
        "start_to_close_timeout": MACHINE_TIMEOUT,
        "heartbeat_timeout": MACHINE_HEARTBEAT,
        "cancellation_type": ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        "retry_policy": VERIFY_RETRY,
    }


def ending() -> dict[str, Any]:
    """The end of instances that no machine has any more, retried without limit."""
    return {**cleanup(), "task_queue": MACHINES_QUEUE, "heartbeat_timeout": MACHINE_HEARTBEAT}


def pod(ref: PodRef) -> dict[str, Any]:
    """An agent's life on its runner. It waits there for a place without limit, and whatever attempt is lost, the next one
    finds the same agent; a cancelled one ends when the agent is gone, or its runner."""
    return {
        "task_queue": runner_queue(ref.runner_id),
        "start_to_close_timeout": POD_LIMIT,
        "heartbeat_timeout": POD_HEARTBEAT,
        "cancellation_type": ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        "retry_policy": POD_RETRY,
    }


def house() -> dict[str, Any]:
    """A round of house-keeping, which the next round repeats if it fails."""
    return {**cleanup(), "retry_policy": HOUSE_RETRY, "start_to_close_timeout": timedelta(seconds=60)}


def fairness(build: BuildRef) -> Priority:
    """A fair order of starts among organizations (Temporal: task queue fairness)."""
    return Priority(fairness_key=build.organization_id)
