"""What a build's workflow writes in the catalog: that it has the build, and how it ended."""

from temporalio import activity

from kiln.models import BuildEnd, BuildRef, Claim, ClaimRequest, EndRequest
from kiln.ports import Ledger, LogBook


class RecordActivities:
    """Short transactions, each harmless when repeated."""

    def __init__(self, ledger: Ledger, logs: LogBook) -> None:
        self._ledger = ledger
        self._logs = logs

    @activity.defn(name="claim-build")
    def claim(self, request: ClaimRequest) -> Claim:
        """Whether the build is this run's, and the terms on which it is carried out."""
        return self._ledger.claim(request.build.build_id, request.run_id)

    @activity.defn(name="note-cancel")
    def note_cancel(self, build: BuildRef) -> None:
        """A cancellation that came through Temporal shows in the APIs as one that came through them."""
        self._ledger.note_cancel(build.build_id)

    @activity.defn(name="record-end")
    def record_end(self, request: EndRequest) -> BuildEnd:
        """Closes the build and then its log; returns how the build really ended."""
        end = self._ledger.finish(request.build.build_id, request.end)
        self._logs.end(request.build.build_id, end.status.value)
        return end
