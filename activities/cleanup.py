"""What a build made and nobody needs goes, whichever way the build ended; a cleanup ends when EC2 shows nothing more."""

import time
from collections.abc import Iterable
from datetime import timedelta

from temporalio import activity

from kiln.errors import LeftoversError
from kiln.models import BuildRef, CleanupReport
from kiln.ports import Cloud, Footprint, Ledger, LogBook, Marks, Resource

FIRST_PAUSE = timedelta(milliseconds=200)
LONGEST_PAUSE = timedelta(seconds=5)
# One execution of the activity is short enough for its time-out; the next one goes on.
PATIENCE = timedelta(minutes=5)


class CleanupActivities:
    """`settle` is how long EC2 may hide what was just made: so long a disorderly end is watched."""

    def __init__(self, ledger: Ledger, cloud: Cloud, logs: LogBook, settle: timedelta) -> None:
        self._ledger = ledger
        self._cloud = cloud
        self._logs = logs
        self._settle = settle

    @activity.defn(name="clean-up")
    def clean_up(self, build: BuildRef) -> CleanupReport:
        """Removes what carries the build's tag, its name or an id from its log, less what is published.

        Raises LeftoversError while something is still there, CloudUnavailableError; both are retried without limit.
        """
        footprint = self._ledger.fence(build.build_id)
        wait(footprint.remaining_lease)
        if footprint.account is None:  # no attempt ever reached the cloud
            return CleanupReport()
        self._refuse_other_account(footprint)
        seen = self._until_nothing_is_left(footprint)
        for resource in sorted(seen):
            self._logs.note(build.build_id, footprint.attempt, f"removed {resource}")
        return CleanupReport(removed=tuple(sorted(seen)))

    def _refuse_other_account(self, footprint: Footprint) -> None:
        account = self._cloud.account(footprint.region)
        if account != footprint.account:
            raise LeftoversError(
                f"the build was made in account {footprint.account}, and these credentials are of {account}"
            )

    def _until_nothing_is_left(self, footprint: Footprint) -> set[str]:
        """Passes over EC2 until one finds nothing and EC2 has had its time to show everything."""
        marks = Marks(self._ledger.installation, footprint.build_id, footprint.known_ids)
        spare = {footprint.published} if footprint.published else set()
        began, pause, seen = time.monotonic(), FIRST_PAUSE, set[str]()
        settled_at = began + (0 if footprint.orderly else self._settle.total_seconds())
        while True:
            left = self._cloud.remove_leftovers(footprint.region, marks, spare)
            seen.update(_names(left))
            if not left and time.monotonic() >= settled_at:
                return seen
            if time.monotonic() - began > PATIENCE.total_seconds():
                raise LeftoversError("still there: " + ", ".join(sorted(_names(left))))
            wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE)


def _names(resources: Iterable[Resource]) -> set[str]:
    return {str(resource) for resource in resources}


def wait(duration: timedelta) -> None:
    """Sleeps, and stays alive in Temporal's eyes."""
    until = time.monotonic() + duration.total_seconds()
    while True:
        if activity.in_activity():
            activity.heartbeat()
        remaining = until - time.monotonic()
        if remaining <= 0:
            return
        time.sleep(min(remaining, 1.0))
