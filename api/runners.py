"""The runners of pods.md (`/api/v1/ext/orgs/{org}/runners`)."""

from typing import Annotated, Any

from fastapi import APIRouter, Path

from api.auth import AUTH_SCHEMES
from api.deps import P
from api.pod_auth import RunnersReader
from api.pod_submit import known_runner
from api.pod_views import RunnerAnswer, RunnerList, pod_errors, runner_body
from kiln.catalog import runners

RunnerId = Annotated[str, Path(description="the runner's id or name", examples=["local"])]
router = APIRouter(prefix="/api/v1/ext/orgs/{org}/runners", tags=["pods"], dependencies=AUTH_SCHEMES)


@router.get("", summary="List runners", response_model=RunnerList, responses=pod_errors(401, 403, 404, 500, 503))
def list_runners(identity: RunnersReader, parts: P) -> dict[str, Any]:
    """The organization's runners by name."""
    with parts.catalog.read() as session:
        return {"runners": [runner_body(known) for known in runners.of_organization(session, identity.organization_id)]}


@router.get(
    "/{runner_id}",
    summary="Get a runner",
    response_model=RunnerAnswer,
    responses=pod_errors(401, 403, 404, 500, 503),
)
def get_runner(runner_id: RunnerId, identity: RunnersReader, parts: P) -> dict[str, Any]:
    """A runner, `busy` when no place is left on it."""
    with parts.catalog.read() as session:
        return {"runner": runner_body(known_runner(session, identity, runner_id))}
