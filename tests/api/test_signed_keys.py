"""Keys that sign: which open what, and that neither kind of key passes for the other."""

import base64
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from kiln.catalog import keys
from support.signed_tenants import REFUSED, new_hmac_key, new_signer, refusal, unauthorized
from support.signing import ORGANIZATION_API, SignedClient
from support.tenants import Tenant

IMAGES = f"{ORGANIZATION_API}/images"
MACHINES = f"{ORGANIZATION_API}/machines"
UNKNOWN = f"{IMAGES}/9007199254740993"
LACKS_READ = (403, 4710, "the API key lacks the scope organization:read")
LACKS_WRITE = (403, 4710, "the API key lacks the scope organization:write")
READS = [IMAGES, UNKNOWN, f"{ORGANIZATION_API}/software", MACHINES, f"{MACHINES}/1"]
WRITES = [
    ("POST", IMAGES),
    ("POST", f"{IMAGES}/install"),
    ("POST", f"{UNKNOWN}/assign"),
    ("DELETE", UNKNOWN),
    ("POST", MACHINES),
    ("POST", f"{MACHINES}/1/start"),
    ("POST", f"{MACHINES}/1/stop"),
]


@pytest.fixture
def reader(tenant: Tenant) -> Iterator[SignedClient]:
    """A client whose key may only read."""
    with new_signer(tenant, "organization:read") as client:
        yield client


def test_an_unknown_key_reads_as_a_wrong_signature(tenant: Tenant) -> None:
    """Nobody learns which keys there are."""
    with SignedClient(tenant.api.url, f"hk_{'0' * 32}", "0" * 64) as nobody:
        assert refusal(nobody.get(IMAGES)) == unauthorized(REFUSED)


def test_a_wrong_secret_is_a_401(reader: SignedClient) -> None:
    """The key's id alone opens nothing."""
    reader.secret = "0" * 64
    assert refusal(reader.get(IMAGES)) == unauthorized(REFUSED)


def test_a_disabled_key_is_a_401(tenant: Tenant) -> None:
    """From the moment on that it is shut."""
    row, client = new_hmac_key(tenant, "admin")
    with client:
        assert client.get(IMAGES).status_code == 200
        with tenant.catalog.transaction() as tx:
            keys.disable(tx, row.id)
        assert refusal(client.get(IMAGES)) == unauthorized(REFUSED)


def test_an_expired_key_is_a_401(tenant: Tenant) -> None:
    """A key signs until its expiry and not after."""
    now = datetime.now(UTC)
    _, expired = new_hmac_key(tenant, "admin", expires_at=now - timedelta(seconds=1))
    _, living = new_hmac_key(tenant, "admin", expires_at=now + timedelta(hours=1))
    with expired, living:
        assert refusal(expired.get(IMAGES)) == unauthorized(REFUSED)
        assert living.get(IMAGES).status_code == 200


@pytest.mark.parametrize("secret", ["", "the key"])
def test_a_plain_key_signs_nothing(tenant: Tenant, secret: str) -> None:
    """Whatever is taken for its secret."""
    with SignedClient(tenant.api.url, tenant.key, tenant.key if secret else "") as client:
        assert refusal(client.get(IMAGES)) == unauthorized(REFUSED)


@pytest.mark.parametrize("header", ["Authorization", "X-API-Key"])
def test_a_plain_key_does_not_open_it(tenant: Tenant, header: str) -> None:
    """Neither as a Bearer token nor as X-API-Key."""
    value = f"Bearer {tenant.key}" if header == "Authorization" else tenant.key
    answer = tenant.api.http.get(IMAGES, headers={header: value})
    assert refusal(answer)[:2] == (401, 401)


@pytest.mark.parametrize("path", ["/api/v1/builds", "/api/v1/images", "/api/v1/images?limit=1"])
def test_an_hmac_key_is_no_bearer_token_and_no_x_api_key(tenant: Tenant, path: str) -> None:
    """Neither its id nor its secret opens another API, whatever its scopes."""
    with new_signer(tenant, "admin") as client:
        for text in (client.key, client.secret):
            assert tenant.api.http.get(path, headers={"Authorization": f"Bearer {text}"}).status_code == 401
            assert tenant.api.http.get(path, headers={"X-API-Key": text}).status_code == 401
        signed = client.authorize("GET", path.split("?", maxsplit=1)[0])
        assert tenant.api.http.get(path, headers={"Authorization": signed}).status_code == 401


def test_an_hmac_key_is_no_key_of_cloud_builds_and_the_registry(tenant: Tenant) -> None:
    """Nor is it a password there."""
    with new_signer(tenant, "admin") as client:
        account = {"x-api-key": client.key, "x-selected-account-id": tenant.organization_id}
        assert tenant.api.http.get("/v5/builds", headers=account).status_code == 401
        basic = base64.b64encode(f"any:{client.key}".encode()).decode()
        token = tenant.api.http.get(
            "/registry/token?service=kiln-registry", headers={"Authorization": f"Basic {basic}"}
        )
        assert token.status_code == 401


@pytest.mark.parametrize("path", READS)
@pytest.mark.parametrize("scopes", [["organization:read"], ["organization:write"], ["admin"]])
def test_scopes_that_let_read(tenant: Tenant, path: str, scopes: list[str]) -> None:
    """`organization:write` implies `organization:read`, and `admin` implies all."""
    with new_signer(tenant, *scopes) as client:
        assert client.get(path).status_code in (200, 404)


@pytest.mark.parametrize("path", READS)
def test_scopes_that_do_not_let_read(tenant: Tenant, path: str) -> None:
    """Other APIs' scopes open nothing here: HTTP 403 with the contract's own code."""
    with new_signer(tenant, "builds:write", "pods:write", "runners:read") as client:
        assert refusal(client.get(path)) == LACKS_READ


@pytest.mark.parametrize(("method", "path"), WRITES)
def test_a_reader_cannot_write(reader: SignedClient, method: str, path: str) -> None:
    """Before anything is said of the body, or of what the path names."""
    assert refusal(reader.request(method, path, b"no JSON")) == LACKS_WRITE


@pytest.mark.parametrize(("method", "path"), WRITES)
def test_a_writer_may_write(tenant: Tenant, method: str, path: str) -> None:
    """`organization:write` is all that is needed: what is refused then is the body, or an unknown id."""
    with new_signer(tenant, "organization:write") as client:
        assert refusal(client.request(method, path, b"no JSON"))[0] in (400, 404)


def test_an_unknown_caller_learns_nothing_of_the_form(tenant: Tenant) -> None:
    """401 comes before 400 and 404."""
    with SignedClient(tenant.api.url, "hk_nobody", "secret") as nobody:
        assert refusal(nobody.get(f"{IMAGES}?page=0")) == unauthorized(REFUSED)
        assert refusal(nobody.post(IMAGES, b"no JSON")) == unauthorized(REFUSED)
        assert refusal(nobody.get(f"{IMAGES}/none")) == unauthorized(REFUSED)


def test_scope_comes_before_form(tenant: Tenant) -> None:
    """4710 comes before 400."""
    with new_signer(tenant, "builds:write") as client:
        assert refusal(client.get(f"{IMAGES}?page=0")) == LACKS_READ
