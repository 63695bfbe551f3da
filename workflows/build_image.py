"""The life of a build of any kind: claim, build, publish, clean up, record. It survives the death of any process."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ActivityError, ApplicationError, FailureError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from activities.cleanup import CleanupActivities
    from activities.containers import ContainerActivities, TransferActivities
    from activities.context import ContextActivities
    from activities.interceptor import CANCELLED_TYPE, OVER_TYPE
    from activities.packer import PackerActivities
    from activities.publication import PublicationActivities
    from activities.record import RecordActivities
    from activities.snapshot import SnapshotActivities
    from activities.verify import VerifyActivities
    from kiln.models import (
        BuildEnd,
        BuilderReport,
        BuildKind,
        BuildRef,
        BuildStatus,
        BuildStatusView,
        BuiltImage,
        Claim,
        ClaimRequest,
        CleanupReport,
        ContextRequest,
        ContextState,
        EndRequest,
        ErrorCode,
        Failure,
        Progress,
        PublishRequest,
    )
    from workflows import options
    from workflows.shielding import shielded

STATUS_ATTRIBUTE = SearchAttributeKey.for_keyword("KilnStatus")
IMAGE_ATTRIBUTE = SearchAttributeKey.for_keyword("KilnImage")


@dataclass(frozen=True)
class Line:
    """The activities that one kind of build goes through, and what its builder is called."""

    builder: str
    build: Callable[[Any, BuildRef], Awaitable[BuiltImage]]
    publish: Callable[[Any, PublishRequest], BuildEnd]
    clean_up: Callable[[Any, BuildRef], CleanupReport]


LINES = {
    BuildKind.MACHINE: Line("Packer", PackerActivities.build, VerifyActivities.publish, CleanupActivities.clean_up),
    BuildKind.SNAPSHOT: Line("machine", SnapshotActivities.build, VerifyActivities.publish, CleanupActivities.clean_up),
    BuildKind.CONTAINER: Line(
        "container", ContainerActivities.build, PublicationActivities.publish, PublicationActivities.clean_up
    ),
    BuildKind.TRANSFER: Line(
        "transfer", TransferActivities.transfer, PublicationActivities.publish, PublicationActivities.clean_up
    ),
}


@workflow.defn(name="build-image")
class BuildImageWorkflow:
    """One lifecycle for every kind. The catalog is the truth; the workflow drives it and shows itself to operators."""

    @workflow.init
    def __init__(self, build: BuildRef) -> None:
        self._build_ref = build
        self._status = BuildStatus.QUEUED
        self._attempt = 0
        self._phase = "claiming"
        self._detail = "taking the build over from the catalog"
        self._since: datetime | None = None
        self._end: BuildEnd | None = None
        self._announced = False

    @workflow.run
    async def run(self, build: BuildRef) -> BuildEnd:
        claim = await shielded(self._claim(build))
        if not claim.mine:
            return self._not_mine()
        try:
            self._refuse_if_cancelled(claim)
            await self._context_arrives(build)
            image = await self._build(build, claim)
            self._refuse_if_cancelled(claim)
            outcome = await shielded(self._publish(build, image))
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  whatever it was, the account is cleaned and the row closed
            outcome = self._outcome_of(error)
        await shielded(self._clean_up(build, outcome))
        self._end = await shielded(self._record(build, outcome))
        return self._close(self._end)

    @workflow.query(name="status")
    def status(self) -> BuildStatusView:
        """The build, less what only the catalog knows."""
        return BuildStatusView(
            id=self._build_ref.build_id,
            kind=self._build_ref.kind,
            status=self._status,
            attempt=self._attempt,
            image=self._end.image if self._end else None,
            error=self._end.error if self._end else None,
            progress=None
            if self._end
            else Progress(phase=self._phase, detail=self._detail, attempt=self._attempt, since=self._since),
        )

    @workflow.signal(name="context_uploaded")
    def context_uploaded(self) -> None:
        """Other services may say that a build's context has come; without the object, nothing follows from it."""
        self._announced = True

    @workflow.signal(name="builder_report")
    def builder_report(self, report: BuilderReport) -> None:
        """A builder says that its tool runs; a report that comes late changes nothing."""
        if self._phase in ("waiting", "building") and report.attempt >= self._attempt:
            self._attempt = report.attempt
            self._show(BuildStatus.BUILDING, "building", report.detail)

    async def _claim(self, build: BuildRef) -> Claim:
        # A reset gives the run a new id but keeps the original one: a reset run still owns its build.
        run_id = workflow.info().original_execution_run_id
        return await workflow.execute_activity_method(
            RecordActivities.claim, ClaimRequest(build=build, run_id=run_id), **options.record()
        )

    async def _context_arrives(self, build: BuildRef) -> None:
        """Waits for the signal, and looks into the catalog now and then: a signal may be lost with Temporal's absence."""
        if not build.awaits_context:
            return
        self._show(BuildStatus.AWAITING_CONTEXT, "awaiting_context", "waiting for the build context to be uploaded")
        pause = options.CONTEXT_FIRST_PAUSE
        while True:
            request = ContextRequest(build=build, announced=self._announced)
            self._announced = False
            answer = await workflow.execute_activity_method(
                ContextActivities.accept, request, **options.accept_context()
            )
            if answer.state is ContextState.READY:
                return
            if answer.state is ContextState.EXPIRED:
                raise ApplicationError(answer.message, type=ErrorCode.CONTEXT_MISSING.value, non_retryable=True)
            await self._announcement(min(pause, timedelta(seconds=answer.seconds_left)))
            pause = min(pause * 2, options.CONTEXT_LONGEST_PAUSE)

    async def _announcement(self, patience: timedelta) -> None:
        with contextlib.suppress(TimeoutError):
            await workflow.wait_condition(lambda: self._announced, timeout=patience)

    async def _build(self, build: BuildRef, claim: Claim) -> BuiltImage:
        line = LINES[build.kind]
        self._show(BuildStatus.QUEUED, "waiting", f"waiting for a {_place(build, line)} builder")
        return await workflow.execute_activity_method(
            line.build, build, **options.builder(build, claim), summary="build"
        )

    async def _publish(self, build: BuildRef, image: BuiltImage) -> BuildEnd:
        self._show(self._status, "publishing", f"verifying and publishing {image.image_id}")
        return await workflow.execute_activity_method(
            LINES[build.kind].publish, PublishRequest(build=build, image=image), **options.publish()
        )

    async def _clean_up(self, build: BuildRef, outcome: BuildEnd) -> None:
        if outcome.status is BuildStatus.CANCELLED:
            await workflow.execute_activity_method(RecordActivities.note_cancel, build, **options.record())
        self._show(
            outcome.status if outcome.status is BuildStatus.SUCCEEDED else self._status,
            "cleaning_up",
            f"{outcome.status}; removing what the build made and does not need",
        )
        await workflow.execute_activity_method(LINES[build.kind].clean_up, build, **options.cleanup())

    async def _record(self, build: BuildRef, outcome: BuildEnd) -> BuildEnd:
        end = await workflow.execute_activity_method(
            RecordActivities.record_end, EndRequest(build=build, end=outcome), **options.record()
        )
        self._show(end.status, "ended", _said(end))
        if end.image is not None:
            workflow.upsert_search_attributes([IMAGE_ATTRIBUTE.value_set(end.image.reference)])
        return end

    def _refuse_if_cancelled(self, claim: Claim) -> None:
        if claim.cancelled or workflow.cancellation_reason() is not None:
            raise asyncio.CancelledError

    def _outcome_of(self, error: BaseException) -> BuildEnd:
        """Whatever a cancelled build ends in (a lost worker's time-out, say), it ends because of its cancellation."""
        cancelled = workflow.cancellation_reason() is not None
        return BuildEnd(status=BuildStatus.CANCELLED) if cancelled else outcome_of(error)

    def _show(self, status: BuildStatus, phase: str, detail: str) -> None:
        """Makes what the build is doing readable in the Temporal UI, in searches and in the `status` query."""
        self._phase, self._detail, self._since = phase, detail, workflow.now()
        workflow.set_current_details(f"**{status}** — {detail}")
        if status is not self._status:
            workflow.upsert_search_attributes([STATUS_ATTRIBUTE.value_set(status.value)])
        self._status = status

    def _not_mine(self) -> BuildEnd:
        self._phase, self._detail = "ended", "the build is closed, or another run's"
        workflow.set_current_details("This run does nothing: the build is closed already, or another run has it.")
        return BuildEnd(status=BuildStatus.CANCELLED)

    def _close(self, end: BuildEnd) -> BuildEnd:
        """Ends the run with the colour that operators expect: failed builds red, cancelled ones grey."""
        if end.error is not None:
            raise ApplicationError(end.error.message, type=end.error.code.value, non_retryable=True)
        if end.status is BuildStatus.CANCELLED and workflow.cancellation_reason() is not None:
            raise asyncio.CancelledError
        return end


def _place(build: BuildRef, line: Line) -> str:
    return build.platform if build.kind is BuildKind.CONTAINER else line.builder


def outcome_of(error: BaseException) -> BuildEnd:
    """How a build ends that this error stopped."""
    if is_cancelled_exception(error):
        return BuildEnd(status=BuildStatus.CANCELLED)
    cause = error.cause if isinstance(error, ActivityError) and error.cause is not None else error
    kind = cause.type if isinstance(cause, ApplicationError) else None
    if kind in (CANCELLED_TYPE, OVER_TYPE):
        return BuildEnd(status=BuildStatus.CANCELLED)
    code = ErrorCode(kind) if kind in {code.value for code in ErrorCode} else ErrorCode.INTERNAL
    status = BuildStatus.TIMED_OUT if code is ErrorCode.TIMED_OUT else BuildStatus.FAILED
    return BuildEnd(status=status, error=Failure(code=code, message=_message_of(cause, code)))


def _message_of(cause: BaseException, code: ErrorCode) -> str:
    if code is not ErrorCode.INTERNAL:
        return cause.message if isinstance(cause, FailureError) else str(cause)
    # An unexpected error's text is for Kiln's operators; its users get one sentence without paths or internals.
    return "the build failed through a fault of Kiln's own; its operators find the cause in the workflow's history"


def _said(end: BuildEnd) -> str:
    if end.error is not None:
        return end.error.message
    return end.image.reference if end.image is not None else str(end.status)
