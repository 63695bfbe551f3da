"""Deleting a finished image: the AMI first, then every snapshot behind it."""

import time
from datetime import timedelta

from temporalio import activity

from kiln.errors import LeftoversError
from kiln.models import ImageRef
from kiln.ports import Cloud, ImageDeletion, Ledger

PAUSE = timedelta(milliseconds=500)
PATIENCE = timedelta(minutes=2)


class DeletionActivities:
    """The image's row reads `deleting` before any of this runs, so nothing new can refer to it."""

    def __init__(self, ledger: Ledger, cloud: Cloud) -> None:
        self._ledger = ledger
        self._cloud = cloud

    @activity.defn(name="delete-image")
    def delete(self, image: ImageRef) -> None:
        """Returns once AMI and snapshots are gone and recorded so; an image deleted already is left alone.

        Raises LeftoversError, CloudUnavailableError; both are retried without limit.
        """
        doomed = self._ledger.doomed(image.image_id)
        if doomed is None:
            return
        if self._cloud.account(doomed.region) != doomed.account:
            raise LeftoversError(
                f"{doomed.reference} is in account {doomed.account}, and these credentials are another's"
            )
        began = time.monotonic()
        while True:
            activity.heartbeat()
            pass_ = self._cloud.delete_image(doomed.region, doomed.reference, doomed.snapshot_ids)
            if pass_.done:
                break
            _give_up_after_patience(began, pass_)
            time.sleep(PAUSE.total_seconds())
        self._ledger.finish_deletion(image.image_id, pass_.kept)


def _give_up_after_patience(began: float, pass_: ImageDeletion) -> None:
    if time.monotonic() - began > PATIENCE.total_seconds():
        raise LeftoversError("still there: " + ", ".join(pass_.remaining))
