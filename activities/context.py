"""Waiting for a build's context: what the workflow asks between its signal and its patience's end."""

from temporalio import activity

from kiln.errors import BuildOverError
from kiln.models import ContextAnswer, ContextRequest, ContextState
from kiln.ports import Contexts, Ledger


class ContextActivities:
    """Light work on the control queue, but for the check of an archive that somebody only signalled."""

    def __init__(self, ledger: Ledger, contexts: Contexts) -> None:
        self._ledger = ledger
        self._contexts = contexts

    @activity.defn(name="accept-context")
    def accept(self, request: ContextRequest) -> ContextAnswer:
        """Whether the context is there. One that was announced is checked, and then stands as started.

        Raises ContextInvalidError, ContextTooLargeError (of an announced one), BuildOverError, UnavailableError.
        """
        build_id = request.build.build_id
        order = self._ledger.context(build_id)
        if order is None or not order.wanted:
            raise BuildOverError(f"build {build_id} wants no context")
        if order.started:
            return ContextAnswer(state=ContextState.READY)
        if request.announced and self._contexts.exists(order.key):
            facts = self._contexts.check(order.key, order.dockerfile)
            if not self._ledger.start_context(build_id, facts):
                raise BuildOverError(f"build {build_id} wants no context any more")
            return ContextAnswer(state=ContextState.READY)
        if order.seconds_left <= 0:
            message = f"the build context was not uploaded within {order.patience_seconds} seconds"
            return ContextAnswer(state=ContextState.EXPIRED, message=message)
        return ContextAnswer(state=ContextState.AWAITED, seconds_left=order.seconds_left)
