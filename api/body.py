"""Reading a JSON body that may be anything: bounded, and refused before it is understood; and the key to repeat it by."""

import json
import re
from typing import Any

from fastapi import Request

from api.errors import ApiError, from_kiln
from kiln.errors import InvalidRequestError

IDEMPOTENCY_KEY = re.compile("[ -~]{1,255}")
IDEMPOTENCY_PARAMETER = {
    "in": "header",
    "name": "Idempotency-Key",
    "description": "makes a repeated POST answer as the first, for a day",
    "schema": {"type": "string", "pattern": f"^{IDEMPOTENCY_KEY.pattern}$"},
}


def idempotency_key(request: Request) -> str | None:
    """The key under which a repeated POST is answered as the first; None without one. Raises InvalidRequestError."""
    keys = request.headers.getlist("idempotency-key")
    if len(keys) > 1:
        raise InvalidRequestError("Idempotency-Key", "must be sent once")
    if keys and not IDEMPOTENCY_KEY.fullmatch(keys[0]):
        raise InvalidRequestError("Idempotency-Key", "must be 1 to 255 printable ASCII characters")
    return keys[0] if keys else None


async def json_object(request: Request, limit_bytes: int, *, shared: bool = False) -> tuple[bytes, dict[str, Any]]:
    """The raw body and the object in it.

    Raises ApiError 413 as soon as the body is known to be too long, 415 for another media type, 422 for what is no
    JSON object; with `shared`, in both contracts' shapes. What is left of a body that is too long, the server discards.
    """
    try:
        return await _json_object(request, limit_bytes)
    except ApiError as error:
        raise (error.as_shared() if shared else error) from None


async def _json_object(request: Request, limit_bytes: int) -> tuple[bytes, dict[str, Any]]:
    _check_media_type(request)
    raw = await bounded_body(request, limit_bytes)
    try:
        return raw, object_in(raw)
    except InvalidRequestError as error:
        raise from_kiln(error) from None


def object_in(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises InvalidRequestError that names `body` for anything else."""
    try:
        parsed = _parsed(raw.decode())
    except UnicodeError:
        raise InvalidRequestError("body", "not valid Unicode") from None
    except (ValueError, RecursionError):
        raise InvalidRequestError("body", "not valid JSON") from None
    if not isinstance(parsed, dict):
        raise InvalidRequestError("body", "must be a JSON object")
    return parsed


def object_of(body: bytes) -> dict[str, Any]:
    """The same of a body that need not be there: an empty one is an empty object."""
    return object_in(body) if body else {}


def _parsed(text: str) -> Any:
    """Raises ValueError for what is not JSON, UnicodeError for half a surrogate pair: no database keeps such text."""
    parsed = json.loads(text, parse_constant=_refuse_constant)
    if "\\u" in text:
        json.dumps(parsed, ensure_ascii=False).encode()
    return parsed


def _check_media_type(request: Request) -> None:
    header = request.headers.get("content-type", "application/json")
    media_type = header.split(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise ApiError(415, "unsupported_media_type", f"Content-Type: must be application/json, not {media_type[:100]}")


async def bounded_body(request: Request, limit_bytes: int) -> bytes:
    """The raw body. Raises ApiError 413 as soon as it is known to be longer than this."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise _too_large(limit_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)
    return bytes(body)


def _too_large(limit_bytes: int) -> ApiError:
    return ApiError(413, "payload_too_large", f"body: at most {limit_bytes} bytes are read")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
