"""Organizations with many images, written to the catalog's tables: what years of use leave behind."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import insert, text

from kiln.catalog import keys
from kiln.catalog.images import AMI, AVAILABLE, GIB
from kiln.catalog.names import search_key
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Build, Image, Template
from kiln.models import Api, BuildKind, BuildStatus, TemplateSource
from kiln.naming import WORKSTATION_TEMPLATE
from kiln.sealing import Sealer

REGION = "us-east-1"
PLATFORM = "linux/amd64"
SIZE_GB = 21
BUILD_TIME = timedelta(minutes=20)
# The `number % every == rest` of each name, and the name; all others are called by the last.
NAMES = (
    (5_000, 3, "Cathedral walk {number}"),
    (1_000, 7, "Noise at 50% {number}"),
    (100, 11, "Wind tunnel {number}"),
    (2, 0, "Render farm {number}"),
    (1, 0, "Studio {number}"),
)
# Of a hundred builds, 96 made an image; the others' statuses.
UNFINISHED = {
    17: BuildStatus.FAILED,
    39: BuildStatus.CANCELLED,
    61: BuildStatus.TIMED_OUT,
    83: BuildStatus.FAILED,
}
SPEC = {
    "kind": BuildKind.MACHINE.value,
    "provider": "workstation",
    "region": REGION,
    "instance_type": "t3.medium",
    "template": WORKSTATION_TEMPLATE,
    "variables": {"software": "blender,docker", "ssh_username": "ubuntu", "volume_size_gb": str(SIZE_GB)},
    "secret_names": [],
    "tags": {},
}
SOFTWARE = [{"id": 1, "name": "Blender", "size": 1.4}, {"id": 2, "name": "Docker", "size": 0.5}]


@dataclass(frozen=True)
class Owner:
    """An organization with so many images, and an HMAC key of it."""

    images: int
    key: str
    secret: str

    def matching(self, q: str) -> int:
        """How many images' names hold a text, all of them if it is empty."""
        return sum(search_key(q) in search_key(name_of(number)) for number in range(self.images))


def name_of(number: int) -> str:
    """The name of an organization's image, from 0 on."""
    name = next(name for every, rest, name in NAMES if number % every == rest)
    return name.format(number=number)


def add_owner(catalog: Catalog, sealer: Sealer, slug: str, count: int) -> Owner:
    """A new organization with `count` images, nearly all of which are finished."""
    with catalog.transaction() as tx:
        organization = keys.ensure_organization(tx, slug)
        _, key, secret = keys.create_hmac(tx, organization, "bench", ["organization:read"], None, sealer.seal_text)
        builds = [_build(organization.id, number) for number in range(count)]
        tx.execute(insert(Build), builds)
    # Before anything refers to them: PostgreSQL would look for each as it does in a table of few rows.
    _vacuum(catalog)
    made = [build for build in builds if build["status"] == BuildStatus.SUCCEEDED.value]
    with catalog.transaction() as tx:
        tx.execute(insert(Template), [_template(build, number) for number, build in enumerate(builds)])
        tx.execute(insert(Image), [_image(build) for build in made])
    _vacuum(catalog)
    return Owner(count, key, secret)


def _vacuum(catalog: Catalog) -> None:
    """What PostgreSQL does by itself within minutes of such a change; Kiln never asks SQLite for the like."""
    if catalog.engine.dialect.name == "postgresql":
        with catalog.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))


def _build(organization_id: str, number: int) -> dict[str, Any]:
    created_at = datetime.now(UTC) - timedelta(days=365) + timedelta(seconds=number)
    return {
        "id": str(uuid.uuid4()),
        "organization_id": organization_id,
        "kind": BuildKind.MACHINE.value,
        "api": Api.ORGANIZATION_IMAGES.value,
        "platform": PLATFORM,
        "status": UNFINISHED.get(number % 100, BuildStatus.SUCCEEDED).value,
        "spec": SPEC,
        "created_by": str(uuid.uuid4()),
        "created_at": created_at,
        "attempt": 1,
        "known_ids": [],
        "region": REGION,
        "started_at": created_at,
        "completed_at": created_at + BUILD_TIME,
        "cleaned_at": created_at + BUILD_TIME,
    }


def _template(build: dict[str, Any], number: int) -> dict[str, Any]:
    name = name_of(number)
    return {
        "organization_id": build["organization_id"],
        "name": name,
        "name_key": search_key(name),
        "region": REGION,
        "size_gb": SIZE_GB,
        "source": TemplateSource.PRE_INSTALLATION.value,
        "software": SOFTWARE,
        "build_id": build["id"],
        "created_at": build["created_at"],
    }


def _image(build: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "organization_id": build["organization_id"],
        "build_id": build["id"],
        "kind": AMI,
        "api": build["api"],
        "reference": f"ami-{uuid.uuid4().hex[:17]}",
        "account": "123456789012",
        "region": REGION,
        "platform": PLATFORM,
        "provider": SPEC["provider"],
        "size_bytes": SIZE_GB * GIB,
        "snapshot_ids": [f"snap-{uuid.uuid4().hex[:17]}"],
        "kept_snapshot_ids": [],
        "simulated": True,
        "status": AVAILABLE,
        "created_at": build["completed_at"],
    }
