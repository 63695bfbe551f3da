"""`kiln machines`: the organizations' machines, in the catalog and in EC2 themselves; no server needs to run."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from cli.home import open_catalog
from cli.keys import time_text
from kiln.adapters.ec2 import Ec2Cloud
from kiln.catalog import keys, machines
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Machine
from kiln.errors import KilnError
from kiln.models import FriendlyStatus
from kiln.naming import BUILD_TAG, INSTALLATION_TAG, machine_tags
from kiln.ports import Instance
from kiln.settings import Settings

INSTANCE_ID = re.compile(r"i-[0-9a-f]{8,17}")
NAME_LENGTH = 255
ENDED_STATES = frozenset({"shutting-down", "terminated"})


class MachineCommandError(KilnError):
    """An option of `kiln machines` is wrong, or what it names is not there."""


def import_machine(settings: Settings, instance_id: str, organization: str, region: str, name: str) -> dict[str, Any]:
    """Makes an EC2 instance a machine of an organization. Raises KilnError; then nothing is changed.

    `region` "" is the first of KILN_REGIONS; `name` "" is the instance's Name tag, or its id.
    """
    place = region or settings.default_region
    _check(settings, instance_id, place, name)
    with open_catalog(settings) as catalog, _open_cloud(settings) as cloud:
        instance = cloud.instances(place, [instance_id]).get(instance_id)
        if instance is None or instance.state in ENDED_STATES:
            raise MachineCommandError(f"EC2 in {place} has no instance {instance_id} that lives")
        _require_free(catalog, instance)
        row, slug = _take_in(catalog, cloud, instance, organization, name or instance.tags.get("Name") or instance_id)
        _mark(catalog, cloud, row)
        return _view(row, slug, FriendlyStatus.OFF if instance.state == "stopped" else None)


def list_machines(settings: Settings) -> list[dict[str, Any]]:
    """Every machine of every organization, by id. Raises KilnError."""
    with open_catalog(settings) as catalog, catalog.read() as session:
        return [_view(known.machine, slug, known.status) for known, slug in machines.listing(session)]


def remove_machine(settings: Settings, machine_id: int) -> None:
    """Forgets a machine whose instance is terminated. Raises KilnError."""
    with open_catalog(settings) as catalog, catalog.transaction() as tx:
        machines.remove(tx, machine_id)


def _check(settings: Settings, instance_id: str, region: str, name: str) -> None:
    if not INSTANCE_ID.fullmatch(instance_id):
        raise MachineCommandError(f"{instance_id}: not the id of an EC2 instance, such as i-0123456789abcdef0")
    if region not in settings.regions:
        raise MachineCommandError(f"--region {region}: KILN_REGIONS names {', '.join(settings.regions)}")
    if len(name) > NAME_LENGTH or not name.isprintable():
        raise MachineCommandError(f"--name: at most {NAME_LENGTH} printable characters")


def _require_free(catalog: Catalog, instance: Instance) -> None:
    """Nobody else's: neither a build's own instance, nor another installation's machine."""
    if BUILD_TAG in instance.tags:
        raise MachineCommandError(
            f"{instance.instance_id} is a build's: it goes when build {instance.tags[BUILD_TAG]} does"
        )
    if instance.tags.get(INSTALLATION_TAG, catalog.installation()) != catalog.installation():
        raise MachineCommandError(
            f"{instance.instance_id} is another installation's: its tag {INSTALLATION_TAG} says so"
        )


def _take_in(
    catalog: Catalog, cloud: Ec2Cloud, instance: Instance, organization: str, name: str
) -> tuple[Machine, str]:
    account = cloud.account(instance.region)
    disk_gib = cloud.disk_gib(instance.region, instance.instance_id)
    with catalog.transaction() as tx:
        owner = keys.ensure_organization(tx, organization)
        row = machines.take_in(
            tx,
            owner.id,
            instance,
            account=account,
            simulated=cloud.simulated,
            disk_gib=disk_gib,
            name=name[:NAME_LENGTH],
        )
    return row, owner.slug


def _mark(catalog: Catalog, cloud: Ec2Cloud, row: Machine) -> None:
    """The instance's tags say whose it is. What cannot be tagged is not taken in."""
    try:
        cloud.tag(row.region, [str(row.instance_id)], machine_tags(catalog.installation(), row.id))
    except KilnError:
        with catalog.transaction() as tx:
            machines.let_go(tx, row.id)
        raise


@contextlib.contextmanager
def _open_cloud(settings: Settings) -> Iterator[Ec2Cloud]:
    cloud = Ec2Cloud(simulated=settings.simulated, endpoint_url=settings.ec2_url)
    try:
        yield cloud
    finally:
        cloud.close()


def _view(row: Machine, organization: str, status: FriendlyStatus | None) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "organization": organization,
        "status": status.value if status else row.ec2_state,
        "instance_id": row.instance_id,
        "ec2_state": row.ec2_state,
        "region": row.region,
        "account": row.account,
        "machine_type": row.instance_type,
        "disk_size": row.disk_gib,
        "simulated": row.simulated,
        "error": row.operation_error,
        "created_at": time_text(row.created_at),
        "state_at": time_text(row.state_at),
    }
