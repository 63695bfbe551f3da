"""Cancelling a build: the row first, so that it holds whatever happens next, and the workflow second."""

import contextlib

from starlette.concurrency import run_in_threadpool

from api.deps import Parts
from api.patience import promptly
from kiln.catalog import builds
from kiln.catalog.builds import BuildWithImage
from kiln.catalog.keys import Identity
from kiln.errors import BuildNotFoundError, UnavailableError
from kiln.models import Api, BuildStatus
from workflows.start import cancel_build as cancel_workflow


async def cancel(parts: Parts, identity: Identity, build_id: str, api: Api | None) -> BuildWithImage:
    """The build after the request for its cancellation. Raises BuildNotFoundError."""
    found = await run_in_threadpool(_request, parts, identity, build_id, api)
    status = BuildStatus(found.build.status)
    if status.is_open:
        # The row's request holds in any case: claim and builder honour it, and the dispatcher brings it to Temporal.
        with contextlib.suppress(UnavailableError):
            await promptly(cancel_workflow(parts.temporal, build_id))
    elif status is BuildStatus.CANCELLED:
        await run_in_threadpool(parts.logs.end, build_id, status.value)
    return found


def _request(parts: Parts, identity: Identity, build_id: str, api: Api | None) -> BuildWithImage:
    with parts.catalog.transaction() as tx:
        if builds.find(tx, identity.organization_id, build_id, api) is not None:
            builds.request_cancel(tx, build_id)
        found = builds.find(tx, identity.organization_id, build_id, api)
    if found is None:
        raise BuildNotFoundError("no build of this organization has this id")
    return found
