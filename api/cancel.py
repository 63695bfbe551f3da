"""Cancelling a build: the row first, so that it holds whatever happens next, and the workflow second."""

import contextlib
from collections.abc import Collection

from starlette.concurrency import run_in_threadpool

from api.deps import Parts
from api.patience import promptly
from kiln.catalog import builds
from kiln.catalog.builds import BuildWithImage
from kiln.catalog.keys import Identity
from kiln.errors import BuildNotFoundError, UnavailableError
from kiln.models import Api, BuildKind, BuildStatus
from kiln.naming import context_key
from workflows.start import cancel_build as cancel_workflow


async def cancel(parts: Parts, identity: Identity, build_id: str, apis: Api | Collection[Api] | None) -> BuildWithImage:
    """The build after the request for its cancellation; `apis` are those whose builds it may be, None any.

    Raises BuildNotFoundError.
    """
    found = await run_in_threadpool(_request, parts, identity, build_id, apis)
    status = BuildStatus(found.build.status)
    if status.is_open:
        # The row's request holds in any case: claim and builder honour it, and the dispatcher brings it to Temporal.
        with contextlib.suppress(UnavailableError):
            await promptly(cancel_workflow(parts.temporal, build_id))
    elif status is BuildStatus.CANCELLED:
        await run_in_threadpool(_forget, parts, found)
    return found


def _forget(parts: Parts, found: BuildWithImage) -> None:
    """What a build leaves that no worker ever saw. The sweep takes a context that cannot be deleted now."""
    parts.logs.end(found.build.id, found.build.status)
    if found.build.kind == BuildKind.CONTAINER:
        with contextlib.suppress(UnavailableError):
            parts.contexts.delete(context_key(found.build.id))


def _request(parts: Parts, identity: Identity, build_id: str, apis: Api | Collection[Api] | None) -> BuildWithImage:
    with parts.catalog.transaction() as tx:
        if builds.find(tx, identity.organization_id, build_id, apis) is not None:
            builds.request_cancel(tx, build_id)
        found = builds.find(tx, identity.organization_id, build_id, apis)
    if found is None:
        raise BuildNotFoundError("no build of this organization has this id")
    return found
