"""The machines of organization-images: what its clients' images page also calls (`/organization-management/v1/machines`)."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from api.body import IDEMPOTENCY_PARAMETER
from api.client_errors import envelope
from api.deps import P, Parts
from api.errors import client_errors
from api.ids import Name
from api.machine_creation import MachineCreation
from api.machine_work import start_machine_work
from api.organization_requests import (
    LAST_PAGE,
    PAGE_SIZE,
    CreateMachines,
    IdText,
    PageNumber,
    PageSize,
    Search,
    StartMachine,
    StopMachine,
    body_schema,
    path_id,
    posted,
    understand,
)
from api.organization_views import Envelope, MachineAnswer, MachinePage, NewMachines, machine_resource, page_body
from api.signed import SIGNED_SCHEMES, SignedReader, SignedWriter
from api.submit import answer_once
from kiln.catalog import machine_orders, machines
from kiln.catalog.session import Transaction
from kiln.errors import NotFoundError
from kiln.models import FriendlyStatus, OperationRef

router = APIRouter(
    prefix="/organization-management/v1/machines", tags=["organization-images"], dependencies=SIGNED_SCHEMES
)


@router.get("", summary="List machines", response_model=MachinePage, responses=client_errors(400, 401, 403, 500, 503))
def list_machines(  # noqa: PLR0913, PLR0917  the contract's query
    signed: SignedReader,
    parts: P,
    page: PageNumber = 1,
    per_page: PageSize = PAGE_SIZE,
    q: Search = "",
    status: Annotated[Name, Query(description=f"several joined with commas: {', '.join(FriendlyStatus)}")] = "",
) -> JSONResponse:
    """The organization's machines, oldest first."""
    with parts.catalog.read() as session:
        owner, wanted = signed.identity.organization_id, _statuses(status)
        found, count = machines.page(session, owner, q, wanted, min(page, LAST_PAGE), per_page)
    shown = [machine_resource(known) for known in found]
    return JSONResponse(envelope(**page_body("machines", shown, count, page, per_page)))


def _statuses(text: str) -> list[str] | None:
    """The statuses in a comma list, less those that there are not; None for no list."""
    if not text:
        return None
    named = {name.strip() for name in text.split(",")}
    return [status.value for status in FriendlyStatus if status.value in named]


@router.get(
    "/{machine_id}",
    summary="Get a machine",
    response_model=MachineAnswer,
    responses=client_errors(401, 403, 404, 500, 503),
)
def get_machine(machine_id: IdText, signed: SignedReader, parts: P) -> JSONResponse:
    """A machine as it stands now."""
    with parts.catalog.read() as session:
        known = machines.find(session, signed.identity.organization_id, path_id(machine_id))
    if known is None:
        raise NotFoundError("no machine of this organization has this id")
    return JSONResponse(envelope(**machine_resource(known)))


@router.post(
    "",
    summary="Create machines",
    response_model=NewMachines,
    responses=client_errors(400, 401, 403, 404, 409, 413, 500, 503),
    openapi_extra={"parameters": [IDEMPOTENCY_PARAMETER], **body_schema(CreateMachines, required=False)},
)
async def create_machines(request: Request, signed: SignedWriter, parts: P) -> JSONResponse:
    """Machines from an image; from a list of software, of which an image is made first; or from a base image alone."""
    wanted = MachineCreation(parts, signed.identity, understand(CreateMachines, signed.body))
    return JSONResponse(envelope(**await answer_once(parts, posted(request, signed), wanted.insert)))


@router.post(
    "/{machine_id}/start",
    summary="Start a machine",
    response_model=Envelope,
    responses=client_errors(400, 401, 403, 404, 413, 500, 503),
    openapi_extra=body_schema(StartMachine, required=False),
)
async def start_machine(machine_id: IdText, signed: SignedWriter, parts: P) -> JSONResponse:
    """Starts a machine that is off; one that awaits an image is recreated from it."""
    wanted = understand(StartMachine, signed.body)
    owner, number = signed.identity.organization_id, path_id(machine_id)
    await _operate(parts, lambda tx: machine_orders.order_start(tx, owner, number, wanted.region))
    return JSONResponse(envelope())


@router.post(
    "/{machine_id}/stop",
    summary="Stop a machine",
    response_model=Envelope,
    responses=client_errors(400, 401, 403, 404, 413, 500, 503),
    openapi_extra=body_schema(StopMachine, required=False),
)
async def stop_machine(machine_id: IdText, signed: SignedWriter, parts: P) -> JSONResponse:
    """Stops a machine that is ready."""
    wanted = understand(StopMachine, signed.body)
    owner, number = signed.identity.organization_id, path_id(machine_id)
    await _operate(parts, lambda tx: machine_orders.order_stop(tx, owner, number, force=not wanted.gracefully))
    return JSONResponse(envelope())


async def _operate(parts: Parts, order: Callable[[Transaction], OperationRef]) -> None:
    await start_machine_work(parts, await run_in_threadpool(_committed, parts, order))


def _committed(parts: Parts, order: Callable[[Transaction], OperationRef]) -> OperationRef:
    with parts.catalog.transaction() as tx:
        return order(tx)
