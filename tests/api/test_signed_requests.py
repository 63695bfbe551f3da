"""Requests that are signed: what lets one in, what refuses it, and that each is let in once."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import update

from kiln.catalog.tables import Nonce
from kiln.settings import PROJECT_ROOT
from support.api_server import RunningApi, plain_client
from support.ports import free_ports
from support.processes import eventually
from support.signed_tenants import REFUSED, TIMESTAMP, new_signer, refusal, unauthorized
from support.signing import ORGANIZATION_API, SignedClient, milliseconds
from support.tenants import Tenant, on_both_databases

IMAGES = f"{ORGANIZATION_API}/images"
FORM = "HMAC {key}:{signature}:{nonce}:{timestamp}"
MISSING = f"the Authorization header is missing: {FORM}"
MALFORMED = f"the Authorization header must be sent once, in the form {FORM}"
NO_INTEGER = "the timestamp must be an integer: milliseconds since 1970"
OFF = "the timestamp is more than 5 minutes off; it is in milliseconds"
NONCE_EMPTY = "the nonce is empty"
NONCE_USED = "the nonce was used before"
START_SECONDS = 30
UNKNOWN_ID = "9007199254740993"
ASSIGN = f"{IMAGES}/{UNKNOWN_ID}/assign"


@pytest.fixture
def signer(tenant: Tenant) -> Iterator[SignedClient]:
    """A client with a key that may do everything."""
    with new_signer(tenant, "admin") as client:
        yield client


@pytest.fixture(scope="module")
def other_process(sqlite_api: RunningApi) -> Iterator[str]:
    """The URL of a second server, a process of its own, on the first one's catalog."""
    settings = sqlite_api.settings
    port = str(free_ports(1)[0])
    own = {"KILN_HOME": str(settings.home), "KILN_SECRET_KEY": settings.secret_key, "KILN_API_PORT": port}
    process = subprocess.Popen(
        [sys.executable, "-m", "api"], env={**os.environ, **own, "PYTHONPATH": str(PROJECT_ROOT)}, cwd=settings.home
    )
    try:
        with plain_client(f"http://127.0.0.1:{port}") as client:
            assert eventually(lambda: _answers(client), START_SECONDS)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


@on_both_databases
def test_a_signed_request_is_answered_in_the_envelope(signer: SignedClient) -> None:
    """Beside what was asked for stand the code 200, OK and the time in whole seconds."""
    answer = signer.get(IMAGES)
    body = answer.json()
    assert (answer.status_code, body["client_code"], body["message"]) == (200, 200, "OK")
    assert TIMESTAMP.fullmatch(body["timestamp"])
    assert abs(datetime.fromisoformat(body["timestamp"]) - datetime.now(UTC)) < timedelta(seconds=10)


def test_the_query_is_not_signed(signer: SignedClient) -> None:
    """Whatever stands behind the question mark."""
    signed = signer.authorize("GET", IMAGES)
    assert signer.get(f"{IMAGES}?page=1&q=%C3%A9%3A", authorization=signed).status_code == 200


@pytest.mark.parametrize("scheme", ["HMAC", "hmac", "Hmac"])
def test_the_schemes_name_has_no_case(signer: SignedClient, scheme: str) -> None:
    """As RFC 9110 says of every scheme."""
    signed = scheme + signer.authorize("GET", IMAGES).removeprefix("HMAC")
    assert signer.get(IMAGES, authorization=signed).status_code == 200


def test_the_path_is_signed_as_it_was_sent(signer: SignedClient) -> None:
    """What is percent-encoded on the wire is so in the signature."""
    sent = f"{ORGANIZATION_API}/im%61ges"
    assert signer.get(sent, authorization=signer.authorize("GET", sent)).status_code == 200
    assert refusal(signer.get(sent, authorization=signer.authorize("GET", IMAGES))) == unauthorized(REFUSED)


@pytest.mark.parametrize("body", [rb'{"machine_id": 0, "name": "n \u00e9"}', '{"name":"n é","machine_id":0}'.encode()])
@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/json"}, {"Content-Type": "text/plain"}])
def test_the_body_is_signed_as_it_was_sent(signer: SignedClient, body: bytes, headers: dict[str, str]) -> None:
    """However its JSON is written, and whatever it is said to be."""
    assert refusal(signer.post(IMAGES, body, headers=headers))[:2] == (404, 404)


def test_the_same_json_in_other_bytes_is_another_body(signer: SignedClient) -> None:
    """The signature holds bytes."""
    signed = signer.authorize("POST", ASSIGN, b'{"machine_ids": [7]}')
    assert refusal(signer.post(ASSIGN, b'{"machine_ids":[7]}', authorization=signed)) == unauthorized(REFUSED)


def test_a_request_without_a_body_is_signed_without_one(signer: SignedClient) -> None:
    """A POST may bring neither a body nor a Content-Type; what is missing is a matter of the form, not of the media type."""
    status, _, message = refusal(signer.post(f"{IMAGES}/install"))
    assert status == 400
    assert message.startswith("software_ids: ")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", ASSIGN, b'{"machine_ids": [7]}'),
        ("POST", f"{IMAGES}/2/assign", b'{"machine_ids": [7]}'),
        ("POST", ASSIGN, b'{"machine_ids": [8]}'),
        ("POST", ASSIGN, b""),
    ],
)
def test_a_signature_is_its_requests_alone(signer: SignedClient, method: str, path: str, body: bytes) -> None:
    """Under another's method, path or body it is wrong."""
    signed = signer.authorize(method, path, body)
    assert refusal(signer.post(ASSIGN, b'{"machine_ids": [7]}', authorization=signed)) == unauthorized(REFUSED)


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_an_altered_header_is_a_401(signer: SignedClient, part: int) -> None:
    """Key, signature, nonce and timestamp hold each other."""
    pieces = signer.authorize("GET", IMAGES).removeprefix("HMAC ").split(":")
    pieces[part] = pieces[part][:-1] + ("1" if pieces[part][-1] == "0" else "0")
    answer = signer.get(IMAGES, authorization=f"HMAC {':'.join(pieces)}")
    assert refusal(answer) == unauthorized(REFUSED)
    assert answer.headers["WWW-Authenticate"] == "HMAC"


def test_a_signature_is_lower_case_hex(signer: SignedClient) -> None:
    """The same number otherwise written is another text."""
    key, signed, nonce, timestamp = signer.authorize("GET", IMAGES).removeprefix("HMAC ").split(":")
    upper = f"HMAC {key}:{signed.upper()}:{nonce}:{timestamp}"
    assert refusal(signer.get(IMAGES, authorization=upper)) == unauthorized(REFUSED)


def test_a_missing_header_is_a_401(api: RunningApi) -> None:
    """The message shows the form."""
    assert refusal(api.http.get(IMAGES)) == unauthorized(MISSING)


@pytest.mark.parametrize(
    "header", ["", "HMAC", "HMAC a:b:c", "HMAC a:b:c:d:e", "a:b:c:1", "HMACa:b:c:1", "Bearer a:b:c:1", "HMAC \xe9"]
)
def test_a_malformed_header_is_a_401(api: RunningApi, header: str) -> None:
    """Anything but the scheme and exactly four parts."""
    answer = api.http.get(IMAGES, headers={"Authorization": header.encode("latin-1")})
    assert refusal(answer) == unauthorized(MALFORMED)


@pytest.mark.parametrize("header", ["HMAC :::", "HMAC a:b:c:d", "HMAC \xe9:\xe9:\xe9:\xe9", f"HMAC {'x' * 9000}:b:c:1"])
def test_nobodys_key_is_a_401(api: RunningApi, header: str) -> None:
    """Whatever it is."""
    answer = api.http.get(IMAGES, headers={"Authorization": header.encode("latin-1")})
    assert refusal(answer) == unauthorized(REFUSED)


def test_two_headers_are_a_401(signer: SignedClient) -> None:
    """Neither is preferred."""
    headers = [("Authorization", signer.authorize("GET", IMAGES)) for _ in range(2)]
    assert refusal(signer.http.get(IMAGES, headers=headers)) == unauthorized(MALFORMED)


@pytest.mark.parametrize("timestamp", ["", "soon", "1.7e12", "0x18bcfe56800", "+1700000000000", "1_7", "1 7", "9" * 21])
def test_a_timestamp_that_is_no_integer_is_a_401(signer: SignedClient, timestamp: str) -> None:
    """Though it is signed rightly."""
    assert refusal(signer.get(IMAGES, timestamp=timestamp)) == unauthorized(NO_INTEGER)


@pytest.mark.parametrize("seconds", [-301, 301, -86400, 10**9])
def test_a_timestamp_more_than_five_minutes_off_is_a_401(signer: SignedClient, seconds: int) -> None:
    """Before now or after it."""
    assert refusal(signer.get(IMAGES, timestamp=milliseconds(seconds))) == unauthorized(OFF)


def test_a_timestamp_in_seconds_is_a_401(signer: SignedClient) -> None:
    """It reads as a time in 1970; the message says the unit."""
    assert refusal(signer.get(IMAGES, timestamp=milliseconds()[:-3])) == unauthorized(OFF)


@pytest.mark.parametrize("seconds", [-295, 295])
def test_a_timestamp_less_than_five_minutes_off_passes(signer: SignedClient, seconds: int) -> None:
    """Clocks differ."""
    assert signer.get(IMAGES, timestamp=milliseconds(seconds)).status_code == 200


def test_an_empty_nonce_is_a_401(signer: SignedClient) -> None:
    """It is none."""
    assert refusal(signer.get(IMAGES, nonce="")) == unauthorized(NONCE_EMPTY)


@on_both_databases
def test_a_request_is_let_in_once(signer: SignedClient) -> None:
    """The same header again is refused, and so is another request with its nonce."""
    signed = signer.authorize("GET", IMAGES, nonce="n-1")
    assert signer.get(IMAGES, authorization=signed).status_code == 200
    assert refusal(signer.get(IMAGES, authorization=signed)) == unauthorized(NONCE_USED)
    assert refusal(signer.post(f"{IMAGES}/install", nonce="n-1")) == unauthorized(NONCE_USED)


@pytest.mark.parametrize("nonce", ["x" * 5000, "a nonce, with 'marks' and \t=%3A", "0"])
def test_a_nonce_has_any_length_and_characters(signer: SignedClient, nonce: str) -> None:
    """Any but the colon."""
    assert signer.get(IMAGES, nonce=nonce).status_code == 200
    assert refusal(signer.get(IMAGES, nonce=nonce)) == unauthorized(NONCE_USED)


def test_a_nonce_is_its_keys(tenant: Tenant, signer: SignedClient) -> None:
    """Another key may use it too."""
    with new_signer(tenant, "admin") as other:
        assert [each.get(IMAGES, nonce="n-1").status_code for each in (signer, other)] == [200, 200]


def test_a_forged_request_uses_up_no_nonce(signer: SignedClient) -> None:
    """The signature is checked first: nobody can spoil another's nonce."""
    signed = signer.authorize("GET", IMAGES, nonce="n-1")
    forged = re.sub(":[0-9a-f]{64}:", f":{'0' * 64}:", signed)
    assert refusal(signer.get(IMAGES, authorization=forged)) == unauthorized(REFUSED)
    assert signer.get(IMAGES, authorization=signed).status_code == 200


def test_another_api_process_knows_the_nonce(signer: SignedClient, other_process: str) -> None:
    """Two servers on one catalog let a request in once."""
    with SignedClient(other_process, signer.key, signer.secret) as other:
        signed = signer.authorize("GET", IMAGES)
        assert other.get(IMAGES, authorization=signed).status_code == 200
        assert refusal(signer.get(IMAGES, authorization=signed)) == unauthorized(NONCE_USED)


def test_a_nonce_is_forgotten_when_no_timestamp_can_bring_it_back(tenant: Tenant, signer: SignedClient) -> None:
    """After its time it passes again."""
    assert signer.get(IMAGES, nonce="n-1").status_code == 200
    assert refusal(signer.get(IMAGES, nonce="n-1")) == unauthorized(NONCE_USED)
    with tenant.catalog.transaction() as tx:
        tx.execute(update(Nonce).values(until=datetime.now(UTC)))
    assert signer.get(IMAGES, nonce="n-1").status_code == 200
