"""House-keeping for pods: those that nobody vouches for, those that lost their workflow, workflows that missed the end."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

from temporalio import activity
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.service import RPCError, RPCStatusCode

from activities.pod_record import RUNNERS_ATTEMPT
from kiln.models import LostPods, PodRef, PodResult
from kiln.naming import pod_workflow_id
from kiln.ports import LogBook
from kiln.ports.pods import PodBrief, PodLedger

T = TypeVar("T")
TEMPORAL_TIMEOUT = timedelta(seconds=5)
# A pod has this long to get from its row to its workflow before anybody asks where it is.
START_PATIENCE = timedelta(seconds=5)
# Who ended a pod tells its workflow, and that one closes its log, if they can.
END_PATIENCE = timedelta(seconds=30)
# Installations may have thousands of pods.
ASKED_AT_ONCE = 20
LAPSED = "nobody vouches for this pod any more: Kiln gave it up, and lines that its agent printed last may be missing"


class PodHouse:
    """One pass, which the next round repeats."""

    def __init__(self, ledger: PodLedger, logs: LogBook, client: Client) -> None:
        self._ledger = ledger
        self._logs = logs
        self._client = client

    @activity.defn(name="look-after-pods")
    async def look_after(self) -> LostPods:
        """Closes pods whose lease is over, gives those without a run back to the dispatcher, and sees to it that what
        has ended in the catalog ends in Temporal and in the log too."""
        lapsed = await asyncio.to_thread(self._ledger.lapse_pods)
        await _for_each(lapsed, self._note_lapse)
        opened = await asyncio.to_thread(self._ledger.open_pods, START_PATIENCE)
        released = await _for_each((brief for brief in opened if brief.run_id is not None), self._release_if_lost)
        unsettled = await asyncio.to_thread(self._ledger.unsettled_pods, END_PATIENCE)
        settled = await _for_each(unsettled, self._settle)
        return LostPods(lapsed=len(lapsed), released=released, settled=settled)

    async def _note_lapse(self, ref: PodRef) -> bool:
        """If it fails half-way, the pod is unsettled, and a later round tells its workflow."""
        await asyncio.to_thread(self._logs.note, ref.pod_id, RUNNERS_ATTEMPT, LAPSED)
        await self._cancel(ref)
        return True

    async def _release_if_lost(self, brief: PodBrief) -> bool:
        if brief.run_id is None or await self._has_open_run(brief.ref):
            return False
        return await asyncio.to_thread(self._ledger.release_pod, brief.ref, brief.run_id)

    async def _settle(self, brief: PodBrief) -> bool:
        """What the workflow would have done at its end; one that still runs did not hear of it."""
        if await self._has_open_run(brief.ref):
            await self._cancel(brief.ref)
            return False
        status = await asyncio.to_thread(self._ledger.finish_pod, brief.ref, PodResult())
        await asyncio.to_thread(self._logs.end, brief.ref.pod_id, status.value)
        return True

    async def _has_open_run(self, ref: PodRef) -> bool:
        try:
            description = await self._handle(ref).describe(rpc_timeout=TEMPORAL_TIMEOUT)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            return False
        return description.status is WorkflowExecutionStatus.RUNNING

    async def _cancel(self, ref: PodRef) -> None:
        try:
            await self._handle(ref).cancel(rpc_timeout=TEMPORAL_TIMEOUT)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise

    def _handle(self, ref: PodRef) -> WorkflowHandle[Any, Any]:
        return self._client.get_workflow_handle(pod_workflow_id(ref.key))


async def _for_each(items: Iterable[T], step: Callable[[T], Awaitable[bool]]) -> int:
    """How often the step was one; some at once, with a sign of life between."""
    done, rest = 0, iter(items)
    while some := list(islice(rest, ASKED_AT_ONCE)):
        activity.heartbeat()
        done += sum(await asyncio.gather(*map(step, some)))
    return done
