"""An organization's keys that sign, and what their requests are refused with."""

import re
from datetime import datetime

import httpx

from kiln.catalog import keys
from kiln.catalog.tables import ApiKey, Organization
from support.signing import SignedClient
from support.tenants import Tenant

REFUSED = "the API key is not known or no longer usable, or the signature is not this request's"
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def new_hmac_key(tenant: Tenant, *scopes: str, expires_at: datetime | None = None) -> tuple[ApiKey, SignedClient]:
    """A further HMAC key of the organization, and a client with it."""
    seal = tenant.api.parts.sealer.seal_text
    with tenant.catalog.transaction() as tx:
        owner = tx.get_one(Organization, tenant.organization_id)
        row, key, secret = keys.create_hmac(tx, owner, "test", scopes, expires_at, seal)
    return row, SignedClient(tenant.api.url, key, secret)


def new_signer(tenant: Tenant, *scopes: str) -> SignedClient:
    """A client with a further HMAC key of the organization."""
    return new_hmac_key(tenant, *scopes)[1]


def refusal(answer: httpx.Response) -> tuple[int, int, str]:
    """HTTP status, code and message of an error, which has nothing else but its time."""
    body = answer.json()
    assert TIMESTAMP.fullmatch(body.pop("timestamp"))
    assert set(body) == {"client_code", "message"}
    return answer.status_code, body["client_code"], body["message"]


def unauthorized(message: str) -> tuple[int, int, str]:
    """The refusal of a request that is nobody's."""
    return 401, 401, message
