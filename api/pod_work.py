"""Telling Temporal of a pod that is to run, or to end: after the commit, for the row is the order."""

import contextlib
import logging

from api.deps import Parts
from api.patience import promptly
from kiln.errors import UnavailableError
from kiln.models import PodRef
from workflows.start import cancel_pod, start_pod

log = logging.getLogger("kiln.api")


async def start_pod_work(parts: Parts, ref: PodRef) -> None:
    """Starts a pod's workflow; where Temporal does not answer, the dispatcher does it later."""
    try:
        await promptly(start_pod(parts.temporal, ref))
    except UnavailableError:
        log.warning("Temporal does not answer; %s waits for the dispatcher", ref.key)


async def end_pod_work(parts: Parts, ref: PodRef) -> None:
    """Cancels a terminated pod's workflow; where Temporal does not answer, the runner hears of it all the same."""
    with contextlib.suppress(UnavailableError):
        await promptly(cancel_pod(parts.temporal, ref.key))
