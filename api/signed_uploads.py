"""Uploads of build contexts by a URL that is itself the right to make them: the object store's own, or Kiln's."""

import hmac
import time
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.concurrency import run_in_threadpool

from api.container_views import UploadAnswer
from api.deps import P, Parts
from api.errors import IMAGES_PATH, DetailError, detail_errors
from api.ids import UUID_EXAMPLE
from api.uploads import UploadRoute, receive
from kiln.catalog import attempts, contexts
from kiln.catalog.contexts import ContextRow
from kiln.catalog.session import Catalog, Transaction
from kiln.errors import BuildNotFoundError, ConflictError, ContextTooLargeError
from kiln.models import BuildStatus
from kiln.naming import context_key
from kiln.ports import ContextFacts, ContextUpload

EXPIRES_DIGITS = 12
REFUSED = "the upload URL has expired, or is not as it was given out"
router = APIRouter(prefix=f"{IMAGES_PATH}/uploads", tags=["container-images"], route_class=UploadRoute)


async def upload_url(parts: Parts, request: Request, build_id: str, until: datetime) -> str:
    """The URL that takes a build's context until then. Raises UnavailableError."""
    left = until - datetime.now(UTC)
    stores = await run_in_threadpool(parts.contexts.upload_url, context_key(build_id), left)
    return stores or _own_url(parts, request, build_id, until)


def takes_uploads_itself(parts: Parts, build_id: str) -> bool:
    """Whether contexts come into the object store without Kiln's hearing of it."""
    return parts.contexts.upload_url(context_key(build_id), timedelta(minutes=1)) is not None


@router.put(
    "/{build_id}",
    summary="Upload a build context",
    response_model=UploadAnswer,
    responses=detail_errors(403, 404, 409, 413, 422, 500, 503),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def put_context(
    request: Request,
    build_id: Annotated[str, Path(description="the build's id", examples=[UUID_EXAMPLE])],
    parts: P,
    expires: Annotated[str, Query(description="until when the URL is good, in seconds since 1970")] = "",
    signature: Annotated[str, Query(description="what makes the URL Kiln's own")] = "",
) -> dict[str, object]:
    """Takes the tar.gz; needs no key. Repeating it before the build's start replaces the context."""
    _check_signature(parts, build_id, expires, signature)
    _check_length(request, parts.settings.max_context_bytes)
    context = await run_in_threadpool(_waiting, parts.catalog, build_id)
    key, intake = context_key(build_id), _Intake(parts, build_id)
    facts = await receive(parts, request.stream(), key, context.dockerfile, intake)
    return {"success": True, "sizeBytes": facts.size_bytes, "sha256": facts.sha256}


def _own_url(parts: Parts, request: Request, build_id: str, until: datetime) -> str:
    base = (parts.settings.public_url or str(request.base_url)).rstrip("/")
    expires = str(int(until.timestamp()))
    signature = _signature(parts, build_id, expires)
    return f"{base}{router.prefix}/{build_id}?expires={expires}&signature={signature}"


def _signature(parts: Parts, build_id: str, expires: str) -> str:
    return parts.sealer.digest(f"upload\0{build_id}\0{expires}".encode())


def _check_signature(parts: Parts, build_id: str, expires: str, signature: str) -> None:
    genuine = hmac.compare_digest(_signature(parts, build_id, expires).encode(), signature.encode())
    readable = expires.isascii() and expires.isdigit() and len(expires) <= EXPIRES_DIGITS
    if not (genuine and readable and time.time() < int(expires)):
        raise DetailError(403, REFUSED)


def _check_length(request: Request, limit_bytes: int) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise ContextTooLargeError(f"the build context is longer than {limit_bytes} bytes")


def _waiting(catalog: Catalog, build_id: str) -> ContextRow:
    with catalog.read() as session:
        return _waiting_in(session, build_id)


def _waiting_in(session: Transaction, build_id: str) -> ContextRow:
    """The build's context, which may still be uploaded. Raises BuildNotFoundError, ConflictError."""
    context = contexts.of(session, build_id)
    if context is None:
        raise BuildNotFoundError("the build is no more")
    if not context.open:
        raise ConflictError("the build has ended")
    if context.status is BuildStatus.CANCELLING:
        raise ConflictError("the build is being cancelled")
    if context.started:
        raise ConflictError("the build has begun with the context that it has")
    return context


class _Intake:
    """The object store for one build's upload: a context that has come too late does not replace the one before."""

    def __init__(self, parts: Parts, build_id: str) -> None:
        self._contexts = parts.contexts
        self._catalog = parts.catalog
        self._build_id = build_id

    def receive(self, key: str, dockerfile: str) -> "_NotedUpload":
        return _NotedUpload(self._contexts.receive(key, dockerfile), self)

    def commit(self, upload: ContextUpload) -> ContextFacts:
        """Raises ConflictError if the build has begun or ended meanwhile; then nothing of the upload is left."""
        if _waiting(self._catalog, self._build_id).uploaded:
            return self._replace(upload)
        # Nobody can start the build yet: the store may take its time without holding up the catalog.
        facts = upload.commit()
        with self._catalog.transaction() as tx:
            noted = contexts.note_uploaded(tx, self._build_id, facts)
            late = None if noted else contexts.of(tx, self._build_id)
        if late is not None and not late.started:
            self._contexts.delete(context_key(self._build_id))
        if not noted:
            raise ConflictError("the build takes no context any more")
        return facts

    def _replace(self, upload: ContextUpload) -> ContextFacts:
        with self._catalog.transaction() as tx:
            attempts.row_of(tx, self._build_id, lock=True)  # a start waits until the object and its digest agree
            _waiting_in(tx, self._build_id)
            facts = upload.commit()
            contexts.note_uploaded(tx, self._build_id, facts)
        return facts


class _NotedUpload:
    """An upload whose end is noted in the catalog."""

    def __init__(self, upload: ContextUpload, intake: _Intake) -> None:
        self._upload = upload
        self._intake = intake

    def write(self, data: bytes) -> None:
        self._upload.write(data)

    def commit(self) -> ContextFacts:
        return self._intake.commit(self._upload)

    def abort(self) -> None:
        self._upload.abort()
