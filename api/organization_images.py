"""The contract organization-images: an organization's images, or templates (`/organization-management/v1/images`)."""

import contextlib
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from api.body import IDEMPOTENCY_PARAMETER
from api.cancel import cancel
from api.client_errors import envelope
from api.deps import P, Parts
from api.errors import client_errors
from api.organization_requests import (
    LAST_PAGE,
    PAGE_SIZE,
    AssignImage,
    CreateImage,
    IdText,
    InstallImage,
    PageNumber,
    PageSize,
    Search,
    body_schema,
    path_id,
    posted,
    understand,
)
from api.organization_views import (
    Envelope,
    ImageAnswer,
    ImagePage,
    SoftwareAnswer,
    image_resource,
    page_body,
    shelf_body,
)
from api.patience import promptly
from api.signed import SIGNED_SCHEMES, Signed, SignedReader, SignedWriter
from api.submit import TakenOn, answer_once
from api.workstations import choose, installed, new_build
from kiln.catalog import machine_orders, templates
from kiln.catalog.keys import Identity
from kiln.catalog.session import Transaction
from kiln.catalog.tables import Machine
from kiln.catalog.templates import Deleted, KnownTemplate, NewTemplate
from kiln.errors import InvalidRequestError, NotFoundError, UnavailableError
from kiln.models import Api, SnapshotSpec, TemplateSource
from workflows.start import start_deletion

router = APIRouter(prefix="/organization-management/v1", tags=["organization-images"], dependencies=SIGNED_SCHEMES)


@router.get(
    "/images", summary="List images", response_model=ImagePage, responses=client_errors(400, 401, 403, 500, 503)
)
def list_images(
    signed: SignedReader, parts: P, page: PageNumber = 1, per_page: PageSize = PAGE_SIZE, q: Search = ""
) -> JSONResponse:
    """The organization's images, newest first."""
    with parts.catalog.read() as session:
        owner = signed.identity.organization_id
        found, count = templates.page(session, owner, q, min(page, LAST_PAGE), per_page)
    shown = [image_resource(known) for known in found]
    return JSONResponse(envelope(**page_body("images", shown, count, page, per_page)))


@router.get(
    "/images/{image_id}",
    summary="Get an image",
    response_model=ImageAnswer,
    responses=client_errors(401, 403, 404, 500, 503),
)
def get_image(image_id: IdText, signed: SignedReader, parts: P) -> JSONResponse:
    """An image as it stands now."""
    with parts.catalog.read() as session:
        known = templates.find(session, signed.identity.organization_id, path_id(image_id))
    if known is None:
        raise NotFoundError("no image of this organization has this id")
    return JSONResponse(envelope(**image_resource(known)))


@router.post(
    "/images",
    summary="Create an image from a machine",
    response_model=ImageAnswer,
    responses=client_errors(400, 401, 403, 404, 409, 413, 500, 503),
    openapi_extra={"parameters": [IDEMPOTENCY_PARAMETER], **body_schema(CreateImage)},
)
async def create_image(request: Request, signed: SignedWriter, parts: P) -> JSONResponse:
    """An AMI of the disks of a machine that is off. The machine is `installing` until it is made."""
    wanted = understand(CreateImage, signed.body)

    def template_of(machine: Machine) -> NewTemplate:
        return _from_machine(signed.identity, machine, wanted.name)

    def insert(tx: Transaction) -> TakenOn:
        owner = signed.identity.organization_id
        return _taken_on(machine_orders.order_image(tx, owner, wanted.machine_id, template_of))

    return JSONResponse(envelope(**await answer_once(parts, posted(request, signed), insert)))


def _from_machine(identity: Identity, machine: Machine, name: str | None) -> NewTemplate:
    spec = SnapshotSpec(machine_id=machine.id, instance_id=machine.instance_id or "", region=machine.region)
    return NewTemplate(
        organization_id=identity.organization_id,
        new_build=new_build(identity, spec),
        size_gb=machine.disk_gib,
        source=TemplateSource.SEAT,
        region=machine.region,
        name=name,
        machine_id=machine.id,
    )


@router.post(
    "/images/install",
    summary="Create an image from a list of software",
    response_model=ImageAnswer,
    responses=client_errors(400, 401, 403, 404, 409, 413, 500, 503),
    openapi_extra={"parameters": [IDEMPOTENCY_PARAMETER], **body_schema(InstallImage, required=False)},
)
async def install_image(request: Request, signed: SignedWriter, parts: P) -> JSONResponse:
    """Packer installs the software on a base image. Its size has room for 5 % more."""
    wanted = understand(InstallImage, signed.body)
    if not wanted.software_ids and wanted.base_image_id is None:
        raise InvalidRequestError("software_ids", "either it or base_image_id must be sent")
    chosen = choose(parts.software, wanted.software_ids, wanted.base_image_id)
    new = installed(signed.identity, parts, chosen, parts.settings.default_region, wanted.name)

    def insert(tx: Transaction) -> TakenOn:
        return _taken_on(templates.insert(tx, new))

    return JSONResponse(envelope(**await answer_once(parts, posted(request, signed), insert)))


def _taken_on(known: KnownTemplate) -> TakenOn:
    return TakenOn([known.build], image_resource(known))


@router.post(
    "/images/{image_id}/assign",
    summary="Assign an image to machines",
    response_model=Envelope,
    responses=client_errors(400, 401, 403, 404, 413, 500, 503),
    openapi_extra=body_schema(AssignImage),
)
def assign_image(image_id: IdText, signed: SignedWriter, parts: P) -> JSONResponse:
    """At its next start each machine is terminated and recreated from the image: all of the machines, or none."""
    wanted = understand(AssignImage, signed.body)
    with parts.catalog.transaction() as tx:
        machine_orders.assign(tx, signed.identity.organization_id, path_id(image_id), wanted.machine_ids)
    return JSONResponse(envelope())


@router.delete(
    "/images/{image_id}",
    summary="Delete an image",
    response_model=Envelope,
    responses=client_errors(400, 401, 403, 404, 500, 503),
)
async def delete_image(image_id: IdText, signed: SignedWriter, parts: P) -> JSONResponse:
    """Gone from the list at once; behind it a build that waits is cancelled, or the AMI and its snapshots deleted."""
    deleted = await run_in_threadpool(_delete, parts, signed, path_id(image_id))
    if deleted.build_to_cancel is not None:
        await cancel(parts, signed.identity, deleted.build_to_cancel, Api.ORGANIZATION_IMAGES)
    if deleted.image is not None:
        with contextlib.suppress(UnavailableError):  # the row stands; the dispatcher starts the deletion later
            await promptly(start_deletion(parts.temporal, deleted.image))
    return JSONResponse(envelope())


def _delete(parts: Parts, signed: Signed, template_id: int) -> Deleted:
    with parts.catalog.transaction() as tx:
        return templates.delete(tx, signed.identity.organization_id, template_id)


@router.get(
    "/software",
    summary="List software and base images",
    response_model=SoftwareAnswer,
    responses=client_errors(401, 403, 500, 503),
)
def list_software(signed: SignedReader, parts: P) -> JSONResponse:  # noqa: ARG001  who may not read learns nothing
    """What `POST /images/install` and `POST /machines` can install, and on what."""
    shelf: dict[str, Any] = shelf_body(parts.software)
    return JSONResponse(envelope(**shelf))
