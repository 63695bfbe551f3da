"""Machines to create: what a request means, and the rows that order it."""

import math
from dataclasses import dataclass

from api.deps import Parts
from api.organization_requests import MACHINE_NAME_LENGTH, NOBODYS_ID, CreateMachines
from api.organization_views import machine_resource
from api.submit import TakenOn
from api.workstations import Workstation, choose, installed
from kiln.catalog import machines, templates
from kiln.catalog.keys import Identity
from kiln.catalog.machines import KnownMachine, NewMachine
from kiln.catalog.session import Transaction
from kiln.catalog.tables import Build, Template
from kiln.errors import InvalidRequestError, NotFoundError, RefusedError
from kiln.models import ClientCode, FriendlyStatus


@dataclass(frozen=True)
class _Source:
    """What machines are made from: an image, whose `build` is new if it is made for them, or a base image alone."""

    region: str
    size_gb: int
    template: Template | None = None
    build: Build | None = None
    base_image_id: int | None = None


class MachineCreation:
    """One POST of machines. Whatever is wrong with its form is raised at once; `insert` looks the rest up.

    Raises InvalidRequestError, which names the field, NotFoundError for an unknown base image.
    """

    def __init__(self, parts: Parts, identity: Identity, request: CreateMachines) -> None:
        self._parts, self._identity, self._request = parts, identity, request
        self._check_form()
        self._chosen = self._choose()

    def insert(self, tx: Transaction) -> TakenOn:
        """Writes the machines, with the image that is made for them. Raises NotFoundError, RefusedError,
        InvalidRequestError."""
        source = self._source(tx)
        rows = [machines.insert(tx, self._machine(source, name)) for name in self._names()]
        shown = [machine_resource(KnownMachine(row, source.template, FriendlyStatus.CREATING)) for row in rows]
        return TakenOn(
            [source.build] if source.build else [],
            {"machines": shown, "count": len(shown)},
            operations=[machines.operation_ref(row) for row in rows],
        )

    def _check_form(self) -> None:
        request, regions = self._request, self._parts.settings.regions
        if request.region is not None and request.region not in regions:
            raise InvalidRequestError("region", f"this server has machines in {', '.join(regions)} only")
        if request.image_id is not None and (request.software_ids or request.base_image_id is not None):
            raise InvalidRequestError("image_id", "goes without software_ids and base_image_id")
        if any(len(name or "") > MACHINE_NAME_LENGTH for name in self._names()):
            raise InvalidRequestError("name", f"with its number at most {MACHINE_NAME_LENGTH} characters")

    def _names(self) -> list[str | None]:
        name, quantity = self._request.name, self._request.quantity
        if name is None or quantity == 1:
            return [name] * quantity
        return [f"{name} {number}" for number in range(1, quantity + 1)]

    def _choose(self) -> Workstation | None:
        if self._request.image_id is not None:
            return None
        return choose(self._parts.software, self._request.software_ids, self._request.base_image_id)

    def _source(self, tx: Transaction) -> _Source:
        source = self._from_image(tx) if self._chosen is None else self._from_base(tx, self._chosen)
        disk = self._request.disk_size
        if disk is not None and disk < source.size_gb:
            raise RefusedError(
                f"disk_size: the image has {source.size_gb} GB, more than {disk}", ClientCode.IMAGE_TOO_LARGE
            )
        return source

    def _from_image(self, tx: Transaction) -> _Source:
        known = templates.find(tx, self._identity.organization_id, self._request.image_id or NOBODYS_ID, lock=True)
        if known is None:
            raise NotFoundError("no image of this organization has this id")
        templates.require_available(known)
        template = known.template
        if self._request.region not in (None, template.region):
            raise InvalidRequestError("region", f"the image is in {template.region}")
        return _Source(template.region, template.size_gb, template)

    def _from_base(self, tx: Transaction, chosen: Workstation) -> _Source:
        region = self._request.region or self._parts.settings.default_region
        if not chosen.programs:
            return _Source(region, math.ceil(chosen.base.size), base_image_id=chosen.base.id)
        known = templates.insert(tx, installed(self._identity, self._parts, chosen, region))
        return _Source(region, chosen.size_gb, known.template, known.build)

    def _machine(self, source: _Source, name: str | None) -> NewMachine:
        settings, request = self._parts.settings, self._request
        return NewMachine(
            organization_id=self._identity.organization_id,
            name=name,
            region=source.region,
            instance_type=request.machine_type or settings.instance_type,
            disk_gib=request.disk_size or max(settings.machine_disk_gb, source.size_gb),
            simulated=settings.simulated,
            template_id=source.template.id if source.template else None,
            base_image_id=source.base_image_id,
        )
