"""What a pod's workflow writes in the catalog: that it has the pod, prompts that were signalled, and how it ended."""

from temporalio import activity

from kiln.errors import NotFoundError, RefusedError
from kiln.models import PodClaimRequest, PodEnd, PodPromptRequest, PodRef, PodStatus
from kiln.ports import LogBook
from kiln.ports.pods import PodLedger

# A pod's log has one writer, its runner; what Kiln itself adds comes after it.
RUNNERS_ATTEMPT = 0
UNTOLD = "Kiln did not hear from the runner how the agent ended: lines that it printed last may be missing"


class PodRecord:
    """Short transactions. Each is harmless when repeated, but for a prompt, which may then come twice."""

    def __init__(self, ledger: PodLedger, logs: LogBook) -> None:
        self._ledger = ledger
        self._logs = logs

    @activity.defn(name="claim-pod")
    def claim(self, request: PodClaimRequest) -> bool:
        """Whether the pod is this run's."""
        return self._ledger.claim_pod(request.pod, request.run_id) is not None

    @activity.defn(name="terminate-pod")
    def terminate(self, ref: PodRef) -> None:
        """A cancellation that came through Temporal shows in the API as one that came through it."""
        self._ledger.terminate_pod(ref)

    @activity.defn(name="prompt-pod")
    def prompt(self, request: PodPromptRequest) -> None:
        """Keeps a prompt for the agent. One that came too late is logged: who signalled it cannot be told."""
        try:
            self._ledger.add_prompt(request.pod, request.text)
        except (RefusedError, NotFoundError) as error:
            activity.logger.warning("a prompt was dropped: %s", error)

    @activity.defn(name="record-pod-end")
    def record_end(self, end: PodEnd) -> PodStatus:
        """Closes the pod and then its log; returns how the pod really ended."""
        status = self._ledger.finish_pod(end.pod, end.result)
        if not end.told and status is PodStatus.FAILED:
            self._logs.note(end.pod.pod_id, RUNNERS_ATTEMPT, UNTOLD)
        self._logs.end(end.pod.pod_id, status.value)
        return status
