"""Who calls organization-images: requests signed with an HMAC key, each of which is let in once.

`Authorization: HMAC {key}:{signature}:{nonce}:{timestamp}`; the signature is over the very bytes that came: path and
body are neither decoded nor written anew.
"""

import hashlib
import hmac
import re
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security.http import HTTPBase
from starlette.concurrency import run_in_threadpool

from api.body import bounded_body
from api.client_errors import ClientError
from api.deps import P, Parts
from kiln.catalog import keys, nonces
from kiln.catalog.keys import Identity
from kiln.catalog.session import Transaction
from kiln.models import ClientCode

SCHEME = "HMAC"
PARTS = 4
ORGANIZATION_READ = "organization:read"
ORGANIZATION_WRITE = "organization:write"
# How far a timestamp may be off, and so how long a signed request can be repeated: kiln/catalog/nonces.py remembers longer.
WINDOW = timedelta(minutes=5)
TIMESTAMP = re.compile(rb"-?[0-9]{1,20}")
FORM = f"{SCHEME} {{key}}:{{signature}}:{{nonce}}:{{timestamp}}"
# An unknown key and a wrong signature read the same: nobody learns which keys there are.
REFUSED = "the API key is not known or no longer usable, or the signature is not this request's"
# For OpenAPI's sake; the header is read below.
SIGNED_SCHEMES = [
    Depends(HTTPBase(scheme="hmac", scheme_name="HMAC", auto_error=False, description=f"`Authorization: {FORM}`"))
]


@dataclass(frozen=True)
class Signed:
    """A request that was signed by one of its organization's keys, and its body, whose bytes the signature holds."""

    identity: Identity
    body: bytes


@dataclass(frozen=True)
class _Credentials:
    key: bytes
    signature: bytes
    nonce: bytes
    timestamp: bytes


async def _signed(request: Request, parts: Parts, scope: str) -> Signed:
    """Raises ClientError: 401 for whatever is wrong with the signature, then 4710 for the scope; ApiError 413."""
    credentials = _credentials(request)
    body = await bounded_body(request, parts.settings.max_body_bytes)
    message = b"".join(
        (
            credentials.key,
            request.method.encode(),
            request.scope["raw_path"],
            credentials.timestamp,
            credentials.nonce,
            body,
        )
    )
    async with parts.signers:
        identity = await run_in_threadpool(_let_in, parts, credentials, message)
    if not identity.may(scope):
        raise ClientError(ClientCode.PERMISSION_REQUIRED, f"the API key lacks the scope {scope}")
    return Signed(identity, body)


def _credentials(request: Request) -> _Credentials:
    """The header's four parts as they came."""
    values = request.headers.getlist("authorization")
    if not values:
        raise _unauthorized(f"the Authorization header is missing: {FORM}")
    scheme, _, rest = values[0].partition(" ")
    pieces = rest.strip().encode("latin-1").split(b":")
    if len(values) > 1 or scheme.upper() != SCHEME or len(pieces) != PARTS:
        raise _unauthorized(f"the Authorization header must be sent once, in the form {FORM}")
    return _Credentials(*pieces)


def _let_in(parts: Parts, credentials: _Credentials, message: bytes) -> Identity:
    """Whose request it is, which cannot come again."""
    if not parts.catalog.writes_one_by_one:
        with parts.catalog.transaction() as tx:  # one saves a quarter of the time
            return _once(tx, _signer(tx, parts, credentials, message), credentials)
    # SQLite has one writer, who waits for no request that is signed wrongly.
    with parts.catalog.read() as session:
        identity = _signer(session, parts, credentials, message)
    with parts.catalog.transaction() as tx:
        return _once(tx, identity, credentials)


def _signer(session: Transaction, parts: Parts, credentials: _Credentials, message: bytes) -> Identity:
    """Whose signature it is, at a time that passes."""
    known = keys.find_hmac(session, credentials.key.decode("latin-1"))
    if known is None or not known.usable:
        raise _unauthorized(REFUSED)
    secret = parts.sealer.open_text(known.sealed_secret)
    expected = hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected.encode(), credentials.signature):
        raise _unauthorized(REFUSED)
    _check_timestamp(credentials.timestamp)
    return known.identity


def _once(tx: Transaction, identity: Identity, credentials: _Credentials) -> Identity:
    """Remembers the nonce, of a request that is signed rightly only: others could use up its signer's."""
    if not credentials.nonce:
        raise _unauthorized("the nonce is empty")
    if not nonces.remember(tx, identity.key_id, credentials.nonce):
        raise _unauthorized("the nonce was used before")
    return identity


def _check_timestamp(text: bytes) -> None:
    if not TIMESTAMP.fullmatch(text):
        raise _unauthorized("the timestamp must be an integer: milliseconds since 1970")
    if abs(time.time() - int(text) / 1000) > WINDOW.total_seconds():
        raise _unauthorized("the timestamp is more than 5 minutes off; it is in milliseconds")


def _unauthorized(message: str) -> ClientError:
    return ClientError(401, message, {"WWW-Authenticate": SCHEME})


async def _reader(request: Request, parts: P) -> Signed:
    return await _signed(request, parts, ORGANIZATION_READ)


async def _writer(request: Request, parts: P) -> Signed:
    return await _signed(request, parts, ORGANIZATION_WRITE)


SignedReader = Annotated[Signed, Depends(_reader)]
SignedWriter = Annotated[Signed, Depends(_writer)]
