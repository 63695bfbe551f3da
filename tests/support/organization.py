"""An organization with machines and images, as organization-images shows them, brought into the states that a test needs.

What EC2 and the workflows would do is written by the catalog's own functions, as their activities call them.
"""

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import httpx
from sqlalchemy import update

from kiln.catalog import keys, machines
from kiln.catalog.tables import Machine, Template
from kiln.ports import Instance
from support.api_server import RunningApi
from support.rows import ACCOUNT, REGION, new_ami_id
from support.signing import NOTHING, ORGANIZATION_API, SignedClient
from support.tenants import Tenant, row_counts

Json = dict[str, Any]


class OrganizationTenant(Tenant):
    """An organization whose requests are signed; paths are below the contract's base."""

    def __init__(self, api: RunningApi) -> None:
        super().__init__(api)
        self.signed = self.new_signed("admin")

    def new_signed(self, *scopes: str) -> SignedClient:
        """A client with a further HMAC key of this organization. Whoever asks closes it."""
        with self.catalog.transaction() as tx:
            organization = tx.get_one(keys.Organization, self.organization_id)
            seal = self.api.parts.sealer.seal_text
            _, key, secret = keys.create_hmac(tx, organization, "test", scopes, None, seal)
        return SignedClient(self.api.url, key, secret)

    def call(self, method: str, path: str, body: Any = NOTHING, **how: Any) -> httpx.Response:
        return self.signed.request(method, ORGANIZATION_API + path, body, **how)

    def get(self, path: str) -> Json:
        return answered(self.call("GET", path))

    def post(self, path: str, body: Any = NOTHING, **how: Any) -> Json:
        return answered(self.call("POST", path, body, **how))

    def delete(self, path: str) -> Json:
        return answered(self.call("DELETE", path))

    def image(self, image_id: int) -> Json:
        """The attributes of an image."""
        attributes: Json = self.get(f"/images/{image_id}")["attributes"]
        return attributes

    def machine(self, machine_id: int) -> Json:
        """The attributes of a machine."""
        attributes: Json = self.get(f"/machines/{machine_id}")["attributes"]
        return attributes

    def new_machine(self, state: str = "stopped", *, disk_gib: int = 100, region: str = REGION, name: str = "") -> int:
        """An instance that was taken in as a machine."""
        instance = Instance(
            instance_id=f"i-{uuid.uuid4().hex[:17]}",
            region=region,
            state=state,
            instance_type="t3.medium",
            image_id=new_ami_id(),
            launched_at=datetime.now(UTC),
        )
        with self.catalog.transaction() as tx:
            place = {"account": ACCOUNT, "simulated": True, "disk_gib": disk_gib, "name": name or None}
            return machines.take_in(tx, self.organization_id, instance, **place).id

    def new_image(self, status: str = "available", **body: Any) -> int:
        """An image of a base image, in a status."""
        image_id = int(self.post("/images/install", body or {"base_image_id": self.base_image_id})["id"])
        if status != "pending":
            self.bring(image_id, status)
        return image_id

    @property
    def base_image_id(self) -> int:
        """The newest base image."""
        return self.api.parts.software.newest_base.id

    def bring(self, image_id: int, status: str) -> None:
        """What the workflow of an image's build writes until it has this status."""
        build_id = self.build_of(image_id)
        self.run(build_id)
        if status == "available":
            self.succeed(build_id)
        if status == "failed":
            self.fail(build_id, "no")

    def build_of(self, image_id: int) -> str:
        """The build that makes an image."""
        with self.catalog.read() as session:
            return session.get_one(Template, image_id).build_id

    def rewrite_machine(self, machine_id: int, **values: Any) -> None:
        """Changes columns of a machine behind everybody's back."""
        with self.catalog.transaction() as tx:
            tx.execute(update(Machine).where(Machine.id == machine_id).values(**values))

    def machine_row(self, machine_id: int) -> Machine:
        with self.catalog.read() as session:
            return session.get_one(Machine, machine_id)

    def kept(self) -> Mapping[str, int]:
        """How many rows each table has, but for that of nonces, which every request fills."""
        return {name: count for name, count in row_counts(self.catalog).items() if name != "nonces"}

    def close(self) -> None:
        self.signed.close()
        super().close()


def answered(answer: httpx.Response) -> Json:
    """The body of a success, less its envelope, which is right."""
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    assert (body.pop("client_code"), body.pop("message")) == (200, "OK")
    datetime.strptime(body.pop("timestamp"), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return body


def refused(answer: httpx.Response) -> tuple[int, int, str]:
    """The HTTP status, the code and the message of a refusal; it says nothing more than these and the time."""
    body = answer.json()
    assert list(body) == ["client_code", "message", "timestamp"]
    return answer.status_code, body["client_code"], body["message"]
