"""House-keeping: builds whose workflow is no more, images that EC2 no longer has, resources that nobody owns."""

import asyncio
from collections import defaultdict
from datetime import UTC, datetime, timedelta

from temporalio import activity
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from kiln.models import BuildStatus, HouseReport, LostBuild
from kiln.naming import build_of_context, build_workflow_id
from kiln.ports import BuildBrief, Cloud, Contexts, Ledger, LivingImage, Resource

LOST_AT_ONCE = 20
DESCRIBE_TIMEOUT = timedelta(seconds=5)
# A build has this long to get from its row to its workflow before anybody asks where it is.
START_PATIENCE = timedelta(seconds=5)
# The sweep leaves alone what a build ended only just now may still be cleaning up itself.
SWEEP_GRACE = timedelta(minutes=5)

# An upload in progress is a client's for so long; what is older, a server left behind when it was killed.
UPLOAD_PATIENCE = timedelta(hours=2)
CONTEXT_GRACE = timedelta(minutes=5)

# A succeeded build's AMI and snapshots are its users', whatever became of the catalog's row of them.
IMAGE_KINDS = frozenset({"image", "snapshot"})

SIMULATED_IMAGE_GONE = "the simulated EC2 no longer has it: simulated AMIs live only as long as the simulated EC2 runs"
IMAGE_GONE = "deregistered in EC2 by somebody else than Kiln"


class HouseActivities:
    """Each is a pass that the next round repeats. Unknown means keep."""

    def __init__(  # noqa: PLR0913  what it looks after
        self,
        *,
        ledger: Ledger,
        cloud: Cloud,
        client: Client,
        regions: tuple[str, ...],
        contexts: Contexts | None = None,
        sweep_grace: timedelta = SWEEP_GRACE,
    ) -> None:
        self._ledger = ledger
        self._cloud = cloud
        self._client = client
        self._regions = regions
        self._contexts = contexts
        self._sweep_grace = sweep_grace

    @activity.defn(name="find-lost-builds")
    async def find_lost_builds(self) -> HouseReport:
        """Open builds whose workflow was terminated, forgotten, or ended without closing them."""
        await asyncio.to_thread(self._ledger.requeue_lapsed)
        briefs = await asyncio.to_thread(self._ledger.open_builds, START_PATIENCE)
        lost: list[LostBuild] = []
        for brief in briefs:
            activity.heartbeat()
            if await self._is_lost(brief):
                lost.append(LostBuild(build=brief.ref, cancelled=brief.cancel_requested))
            if len(lost) == LOST_AT_ONCE:
                break
        return HouseReport(lost=tuple(lost))

    async def _is_lost(self, brief: BuildBrief) -> bool:
        if await self._has_open_run(brief):
            return False
        # Asked again after Temporal's answer: the workflow may have closed the row and then itself in between.
        now = await asyncio.to_thread(self._ledger.build_of, brief.ref.build_id)
        return now is not None and now.status.is_open

    async def _has_open_run(self, brief: BuildBrief) -> bool:
        handle = self._client.get_workflow_handle(build_workflow_id(brief.ref.build_id))
        try:
            description = await handle.describe(rpc_timeout=DESCRIBE_TIMEOUT)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            return brief.run_id is None  # never started: the dispatcher's to start
        return description.status is WorkflowExecutionStatus.RUNNING

    @activity.defn(name="observe-images")
    def observe_images(self) -> None:
        """Marks images that EC2 no longer has. Only a complete answer for the right account proves an absence."""
        by_region: dict[tuple[str, str], list[LivingImage]] = defaultdict(list)
        for image in self._ledger.living_images():
            by_region[image.region, image.account].append(image)
        for (region, account), images in by_region.items():
            activity.heartbeat()
            if images[0].simulated is self._cloud.simulated and self._cloud.account(region) == account:
                self._mark_missing(region, images)

    def _mark_missing(self, region: str, images: list[LivingImage]) -> None:
        there = self._cloud.own_images(region, [image.reference for image in images])
        gone = [image.image_id for image in images if image.reference not in there]
        if gone:
            self._ledger.mark_gone(gone, SIMULATED_IMAGE_GONE if self._cloud.simulated else IMAGE_GONE)

    @activity.defn(name="sweep")
    def sweep(self) -> None:
        """Removes what carries this installation's tag, whose build is over, and which no image needs."""
        self._ledger.tidy()
        for region in self._regions:
            for resource in self._cloud.tagged_resources(region, self._ledger.installation):
                activity.heartbeat()
                if self._is_nobodys(resource):
                    self._cloud.remove(resource)
        if self._contexts is not None:
            self._sweep_contexts(self._contexts)

    def _sweep_contexts(self, contexts: Contexts) -> None:
        """Contexts whose build is over, or was never written down: an upload is older than its row."""
        contexts.sweep_unfinished(UPLOAD_PATIENCE)
        stale = {build_of_context(key): key for key in contexts.stale(max(self._sweep_grace, CONTEXT_GRACE))}
        for build_id in self._ledger.over(stale):
            activity.heartbeat()
            contexts.delete(stale[build_id])

    def _is_nobodys(self, resource: Resource) -> bool:
        brief = self._ledger.build_of(resource.build_id) if resource.build_id else None
        if brief is None or brief.status.is_open or brief.completed_at is None:
            return False
        if datetime.now(UTC) - brief.completed_at < self._sweep_grace:
            return False
        return brief.status is not BuildStatus.SUCCEEDED or resource.kind not in IMAGE_KINDS
