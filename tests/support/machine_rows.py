"""Templates and machines to test the catalog with, in the states that a test needs."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import update

from kiln.catalog import attempts, images, machine_orders, machines, templates
from kiln.catalog.builds import NewBuild
from kiln.catalog.machines import KnownMachine, NewMachine
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Image, Machine
from kiln.catalog.templates import Deleted, KnownTemplate, NewTemplate
from kiln.errors import RefusedError
from kiln.models import (
    Api,
    BuildEnd,
    BuildStatus,
    ClientCode,
    ErrorCode,
    Failure,
    OperationRef,
    SnapshotSpec,
    TemplateSource,
)
from kiln.ports import Instance
from support.rows import ACCOUNT, LEASE, REGION, ami, built, machine_spec

FAILED = BuildEnd(status=BuildStatus.FAILED, error=Failure(code=ErrorCode.TOOL_FAILED, message="no room on the disk"))

_numbers = itertools.count(1)


def new_template(organization_id: str, **changes: Any) -> NewTemplate:
    spec = machine_spec(provider="workstation")
    build = NewBuild(organization_id, Api.ORGANIZATION_IMAGES, spec, created_by="a-key")
    values = {"size_gb": 10, "source": TemplateSource.PRE_INSTALLATION, "region": REGION}
    return NewTemplate(organization_id, build, **{**values, **changes})


def snapshot_of(machine: Machine) -> NewTemplate:
    """The template that `POST /images` asks for."""
    spec = SnapshotSpec(machine_id=machine.id, instance_id=machine.instance_id or "", region=machine.region)
    build = NewBuild(machine.organization_id, Api.ORGANIZATION_IMAGES, spec, created_by="a-key")
    return NewTemplate(machine.organization_id, build, machine.disk_gib, TemplateSource.SEAT, machine.region)


def add_template(catalog: Catalog, organization_id: str, status: str = "available", **changes: Any) -> int:
    """The id of a new template in a status; `gone` for an available one whose AMI is no longer in EC2."""
    with catalog.transaction() as tx:
        known = templates.insert(tx, new_template(organization_id, **changes))
    bring(catalog, known.build.id, status)
    return known.template.id


def bring(catalog: Catalog, build_id: str, status: str) -> None:
    """What activities write until the template of a build has this status."""
    if status == "pending":
        return
    with catalog.transaction() as tx:
        attempts.begin(tx, build_id, "worker", LEASE)
        attempts.tool_started(tx, build_id, 1, LEASE)
        if status == "failed":
            attempts.finish(tx, build_id, FAILED)
        if status in ("available", "gone"):
            image = ami()
            row = attempts.publish(tx, build_id, 1)
            images.insert_ami(tx, row, image, built(image.image_id, 1), simulated=True)
    if status == "gone":
        with catalog.transaction() as tx:
            images.mark_gone(tx, [image_of(catalog, build_id).id], "deregistered elsewhere")


def image_of(catalog: Catalog, build_id: str) -> Image:
    with catalog.read() as session:
        image = images.of_build(session, build_id)
    assert image is not None
    return image


def template_of(catalog: Catalog, organization_id: str, template_id: int) -> KnownTemplate:
    with catalog.read() as session:
        known = templates.find(session, organization_id, template_id)
    assert known is not None
    return known


def delete(catalog: Catalog, organization_id: str, template_id: int) -> Deleted:
    with catalog.transaction() as tx:
        return templates.delete(tx, organization_id, template_id)


def instance(state: str = "running", **changes: Any) -> Instance:
    """An EC2 instance with an id of its own."""
    values: dict[str, Any] = {
        "instance_id": f"i-{next(_numbers):017x}",
        "region": REGION,
        "state": state,
        "instance_type": "t3.medium",
        "image_id": "ami-0123456789abcdef0",
        "launched_at": datetime.now(UTC),
    }
    return Instance(**{**values, **changes})


def add_machine(
    catalog: Catalog, organization_id: str, state: str = "stopped", *, disk_gib: int = 100, **changes: Any
) -> int:
    """The id of a machine that was taken in with an instance in this state."""
    with catalog.transaction() as tx:
        place = {"account": ACCOUNT, "simulated": True, "disk_gib": disk_gib, "name": changes.pop("name", None)}
        return machines.take_in(tx, organization_id, instance(state, **changes), **place).id


def create_machine(catalog: Catalog, organization_id: str, **source: Any) -> OperationRef:
    """The creation of a new machine, from `template_id` or `base_image_id`."""
    values = {"name": None, "region": REGION, "instance_type": "t3.medium", "disk_gib": 100, "simulated": True}
    with catalog.transaction() as tx:
        return machines.operation_ref(machines.insert(tx, NewMachine(organization_id, **{**values, **source})))


def machine_row(catalog: Catalog, machine_id: int) -> Machine:
    with catalog.read() as session:
        return session.get_one(Machine, machine_id)


def machine_of(catalog: Catalog, organization_id: str, machine_id: int) -> KnownMachine:
    with catalog.read() as session:
        known = machines.find(session, organization_id, machine_id)
    assert known is not None
    return known


def rewrite_machine(catalog: Catalog, machine_id: int, **values: Any) -> None:
    """Changes columns of a machine behind everybody's back."""
    with catalog.transaction() as tx:
        tx.execute(update(Machine).where(Machine.id == machine_id).values(**values))


def assign(catalog: Catalog, organization_id: str, template_id: int, *machine_ids: int) -> None:
    with catalog.transaction() as tx:
        machine_orders.assign(tx, organization_id, template_id, machine_ids)


def start(catalog: Catalog, organization_id: str, machine_id: int, region: str | None = None) -> OperationRef:
    with catalog.transaction() as tx:
        return machine_orders.order_start(tx, organization_id, machine_id, region)


def stop(catalog: Catalog, organization_id: str, machine_id: int, *, force: bool = False) -> OperationRef:
    with catalog.transaction() as tx:
        return machine_orders.order_stop(tx, organization_id, machine_id, force=force)


def make_image(catalog: Catalog, organization_id: str, machine_id: int) -> KnownTemplate:
    with catalog.transaction() as tx:
        return machine_orders.order_image(tx, organization_id, machine_id, snapshot_of)


@contextmanager
def refused(code: ClientCode | None, match: str | None = None) -> Iterator[None]:
    """The block is refused with this code, and a message in which the pattern is found."""
    with pytest.raises(RefusedError, match=match) as caught:
        yield
    assert caught.value.code == code
