"""Rows to test with: builds, organizations and AMIs that differ only where a test says so."""

import itertools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from sqlalchemy import make_url, select, update
from sqlalchemy.orm import Session

from kiln.catalog import builds, keys
from kiln.catalog.builds import NewBuild
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Base, Build, Installation
from kiln.models import Api, BuildKind, BuildRef, BuiltImage, MachineBuildSpec
from kiln.ports import Ami

REGION = "us-east-1"
ACCOUNT = "123456789012"
LEASE = timedelta(seconds=30)
# A lease of this length is over before anybody can look at it.
NO_LEASE = timedelta(seconds=-1)
# Not UTC, and with summer time: a time that loses its zone on its way shows.
DATABASE_ZONE = "America/New_York"

_numbers = itertools.count(1)


@contextmanager
def fresh_database(server_url: str) -> Iterator[str]:
    """The URL of an empty database on a PostgreSQL server, dropped at the end of the block."""
    name = f"kiln_{uuid.uuid4().hex}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        connection.execute(f"ALTER DATABASE {name} SET timezone TO '{DATABASE_ZONE}'")
        try:
            yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def empty_tables(url: str) -> None:
    """Takes every row but the installation's out of a PostgreSQL database; whoever still uses it is cut off."""
    tables = ", ".join(name for name in Base.metadata.tables if name != Installation.__tablename__)
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with psycopg.connect(url) as connection:
        connection.execute(f"SELECT pg_terminate_backend(pid) {others}")
        connection.execute(f"TRUNCATE {tables}")


def machine_spec(**changes: Any) -> MachineBuildSpec:
    spec = {"provider": "codex", "region": REGION, "instance_type": "t3.medium", "template": "builtin://default-ec2"}
    return MachineBuildSpec.model_validate({**spec, **changes})


def add_organization(catalog: Catalog, slug: str = "") -> str:
    """The id of a new organization."""
    with catalog.transaction() as tx:
        return keys.ensure_organization(tx, slug or f"organization-{next(_numbers)}").id


def add_build(catalog: Catalog, organization_id: str, *, secrets: bytes | None = None, **spec: Any) -> str:
    """The id of a new build, `queued`."""
    new = NewBuild(organization_id, Api.MACHINE_IMAGES, machine_spec(**spec), created_by="a-key", secrets=secrets)
    with catalog.transaction() as tx:
        return builds.insert(tx, new).id


def ref(organization_id: str, build_id: str) -> BuildRef:
    return BuildRef(build_id=build_id, organization_id=organization_id, kind=BuildKind.MACHINE)


def build_row(catalog: Catalog, build_id: str) -> Build:
    with catalog.read() as session:
        row = builds.get(session, build_id)
    assert row is not None
    return row


def rewrite(catalog: Catalog, build_id: str, **values: Any) -> None:
    """Changes columns of a build behind everybody's back."""
    with catalog.transaction() as tx:
        tx.execute(update(Build).where(Build.id == build_id).values(**values))


def make_older(catalog: Catalog, build_id: str, by: timedelta) -> None:
    """Moves a build's creation into the past."""
    rewrite(catalog, build_id, created_at=build_row(catalog, build_id).created_at - by)


def request_cancel(catalog: Catalog, build_id: str) -> None:
    with catalog.transaction() as tx:
        builds.request_cancel(tx, build_id)


def new_ami_id() -> str:
    return f"ami-{next(_numbers):017x}"


def ami(image_id: str = "", **changes: Any) -> Ami:
    """An available AMI with one snapshot."""
    image_id = image_id or new_ami_id()
    values: dict[str, Any] = {
        "image_id": image_id,
        "name": f"kiln-codex-{image_id}",
        "state": "available",
        "created_at": datetime.now(UTC),
        "tags": {},
        "snapshot_ids": (image_id.replace("ami-", "snap-"),),
        "size_gib": 8,
        "architecture": "x86_64",
    }
    return Ami(**{**values, **changes})


def built(image_id: str, attempt: int) -> BuiltImage:
    """What the builder of this attempt reports."""
    return BuiltImage(image_id=image_id, region=REGION, account=ACCOUNT, attempt=attempt)


def dump(session: Session) -> str:
    """Everything that stands in the catalog, as text."""
    return "\n".join(repr(row) for table in Base.metadata.sorted_tables for row in session.execute(select(table)))
