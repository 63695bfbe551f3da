"""An organization that uses the API, and the builds that a test brings into the state it needs.

Builds are brought there by the catalog's own functions, as a workflow's activities call them.
"""

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from kiln.catalog import attempts, images, keys
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Base, Build, Image
from kiln.models import BuildEnd, BuildStatus, ErrorCode, Failure
from support.api_server import RunningApi, plain_client
from support.rows import ACCOUNT, LEASE, add_build, add_organization, ami, build_row, built, new_ami_id

LOG_TIME = datetime(2026, 3, 25, 14, 31, 7, 890000, UTC)
TIME_LIMIT = timedelta(minutes=30)


class Tenant:
    """One organization with an admin key; `http` sends that key as a Bearer token."""

    def __init__(self, api: RunningApi) -> None:
        self.api = api
        self.catalog: Catalog = api.catalog
        self.organization_id = add_organization(api.catalog, f"tenant-{uuid.uuid4()}")
        self.key = self.new_key("admin")
        self.http = plain_client(api.url, Authorization=f"Bearer {self.key}")

    def new_key(self, *scopes: str, expires_at: datetime | None = None) -> str:
        """A further key of this organization."""
        with self.catalog.transaction() as tx:
            organization = tx.get_one(keys.Organization, self.organization_id)
            return keys.create(tx, organization, "test", scopes, expires_at)[1]

    def submit(self, body: Any = None, **headers: str) -> httpx.Response:
        """POST of a machine build; header names with underscores for hyphens."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post("/api/v1/images/build", json=body or {"provider": "codex"}, headers=sent)

    def queued(self, **spec: Any) -> str:
        """A build that waits; Temporal does not know it."""
        return add_build(self.catalog, self.organization_id, **spec)

    def building(self, *, pending_image: str | None = None, **spec: Any) -> str:
        """A build whose first attempt's tool runs, and whose AMI EC2 is making if that is given."""
        build_id = self.queued(**spec)
        self.run(build_id)
        if pending_image is not None:
            with self.catalog.transaction() as tx:
                attempts.note_ids(tx, build_id, [pending_image])
        return build_id

    def succeeded(self, image_id: str = "", *, simulated: bool = True, **spec: Any) -> str:
        """A finished build with its AMI."""
        build_id = self.building(**spec)
        self.succeed(build_id, image_id, simulated=simulated)
        return build_id

    def failed(self, message: str, *, timed_out: bool = False, **spec: Any) -> str:
        """A build that ended with an error."""
        build_id = self.building(**spec)
        self.fail(build_id, message, timed_out=timed_out)
        return build_id

    def run(self, build_id: str) -> None:
        """What a waiting build's first attempt writes until its tool runs."""
        with self.catalog.transaction() as tx:
            attempts.claim(tx, build_id, run_id=str(uuid.uuid4()))
            attempts.begin(tx, build_id, "a worker", LEASE)
            attempts.prepare(tx, build_id, 1, ACCOUNT)
            attempts.tool_started(tx, build_id, 1, TIME_LIMIT)

    def succeed(self, build_id: str, image_id: str = "", *, simulated: bool = True) -> None:
        """What the end of a build that runs writes, with its AMI."""
        image_id = image_id or new_ami_id()
        with self.catalog.transaction() as tx:
            row = attempts.publish(tx, build_id, 1)
            made = built(image_id, 1).model_copy(update={"region": row.region})
            images.insert_ami(tx, row, ami(image_id), made, simulated=simulated)
            attempts.finish(tx, build_id, BuildEnd(status=BuildStatus.SUCCEEDED))

    def fail(self, build_id: str, message: str, *, timed_out: bool = False) -> None:
        """What the end of a build that runs and fails writes."""
        code = ErrorCode.TIMED_OUT if timed_out else ErrorCode.TOOL_FAILED
        status = BuildStatus.TIMED_OUT if timed_out else BuildStatus.FAILED
        with self.catalog.transaction() as tx:
            attempts.finish(tx, build_id, BuildEnd(status=status, error=Failure(code=code, message=message)))

    def end_cancelled(self, build_id: str) -> None:
        """What the workflow writes at the end of a cancelled build."""
        with self.catalog.transaction() as tx:
            attempts.finish(tx, build_id, BuildEnd(status=BuildStatus.CANCELLED))

    def mark_gone(self, build_id: str, reason: str) -> None:
        """What the house-keeping writes when EC2 no longer has a build's AMI."""
        with self.catalog.transaction() as tx:
            images.mark_gone(tx, [self.image_of(build_id).id], reason)

    def row(self, build_id: str) -> Build:
        return build_row(self.catalog, build_id)

    def image_of(self, build_id: str) -> Image:
        with self.catalog.read() as session:
            image = images.of_build(session, build_id)
        assert image is not None
        return image

    def write_log(self, build_id: str, *lines: str, stream: str = "stdout", status: str | None = None) -> None:
        """Adds lines to a build's log, and ends it if there is a status."""
        logs = self.api.logs
        if lines:
            logs.open_attempt(build_id, 1)
            logs.append(build_id, 1, [(LOG_TIME, stream, line) for line in lines])
        if status is not None:
            logs.end(build_id, status)

    def close(self) -> None:
        self.http.close()


on_both_databases = pytest.mark.parametrize("api", ["sqlite", "postgresql"], indirect=True)


def row_counts(catalog: Catalog) -> dict[str, int]:
    """How many rows each table of the catalog has."""
    with catalog.read() as session:
        tables = Base.metadata.sorted_tables
        return {table.name: session.execute(select(func.count()).select_from(table)).scalar_one() for table in tables}


def error(code: str, message: str) -> Mapping[str, object]:
    """The error body of machine-images and kiln."""
    return {"error": {"code": code, "message": message}}


def shared_error(code: str, message: str) -> Mapping[str, object]:
    """The error body of a POST that is refused before it is clear whose it is."""
    return {"error": {"code": code, "message": message}, "detail": message}
