"""Taking a build context in: from a request's stream to the object store, checked on its way, off the event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from api.deps import Parts
from kiln.errors import ContextInvalidError, ContextTooLargeError
from kiln.ports import ContextFacts, ContextUpload

# What one call of a thread takes: much, because a call costs more than a megabyte's check would.
BATCH_BYTES = 1024 * 1024
# A caller who sends nothing for so long has gone, though nobody told us.
IDLE_SECONDS = 60.0
# How long a refused caller who is still sending is listened to: a connection that is closed on unread bytes is reset,
# and with it may go the answer.
LINGER_SECONDS = 5.0


class Intake(Protocol):
    """Where archives go: the object store, or what stands before it."""

    def receive(self, key: str, dockerfile: str) -> ContextUpload:
        """Begins an upload."""
        ...


async def receive(
    parts: Parts, chunks: AsyncIterator[bytes], key: str, dockerfile: str, intake: Intake | None = None
) -> ContextFacts:
    """Stores an archive under `key` (through `intake`, where there is one); whatever goes wrong, and however the request
    ends, the upload leaves nothing.

    Only a cancellation in the very end of it may leave the object; who cancels removes it. Raises ContextInvalidError,
    ContextTooLargeError, UnavailableError, and what `chunks` raises.
    """
    upload = _Upload(intake or parts.contexts, key, dockerfile)
    try:
        await _pass_on(chunks, upload, parts.settings.max_context_bytes)
        return await upload.commit()
    except BaseException:
        await asyncio.shield(asyncio.create_task(upload.abort()))
        raise


async def _pass_on(chunks: AsyncIterator[bytes], upload: "_Upload", limit_bytes: int) -> None:
    """One batch is written while the next one comes in; a slow store holds the caller up."""
    batch: list[bytes] = []
    size = total = 0
    async with _patience(upload) as patience:
        async for chunk in chunks:
            batch.append(chunk)
            size += len(chunk)
            total += len(chunk)
            if total > limit_bytes:
                raise ContextTooLargeError(f"the archive is longer than {limit_bytes} bytes")
            if size >= BATCH_BYTES:
                patience.reschedule(None)
                await upload.write(b"".join(batch))
                batch, size = [], 0
            patience.reschedule(_idle_deadline())
    await upload.write(b"".join(batch))


@contextlib.asynccontextmanager
async def _patience(upload: "_Upload") -> AsyncIterator[asyncio.Timeout]:
    """Ends the block when nothing comes for too long, and at once when what has come cannot be stored."""
    try:
        async with asyncio.timeout_at(_idle_deadline()) as patience:
            with upload.failure_calls(lambda: patience.reschedule(0)):
                yield patience
    except TimeoutError:
        if upload.failed:
            await upload.write(b"")
        raise ContextInvalidError(f"nothing came for {IDLE_SECONDS:.0f} seconds in the middle of the archive") from None


def _idle_deadline() -> float:
    return asyncio.get_running_loop().time() + IDLE_SECONDS


class _Upload:
    """An upload's calls, each in a thread, one after the other. A request that is cancelled leaves the one that runs
    alone, since a thread cannot be stopped; `abort` waits for it."""

    def __init__(self, contexts: Intake, key: str, dockerfile: str) -> None:
        self._begun = asyncio.create_task(run_in_threadpool(contexts.receive, key, dockerfile))
        self._last: asyncio.Task[object] = self._begun
        self._on_failure: Callable[[], None] | None = None

    @property
    def failed(self) -> bool:
        """Whether the last call has failed, as the next one will say."""
        return self._last.done() and self._last.exception() is not None

    @contextlib.contextmanager
    def failure_calls(self, alarm: Callable[[], None]) -> Iterator[None]:
        """Has a write that fails inside the block call this at once."""
        self._on_failure = alarm
        try:
            yield
        finally:
            self._on_failure = None

    async def write(self, batch: bytes) -> None:
        """Writes a batch once the one before is written, and does not wait for its end. Raises what that one raised."""
        upload = await self._after_last()
        self._last = asyncio.create_task(run_in_threadpool(upload.write, batch))
        self._last.add_done_callback(self._look_at)

    async def commit(self) -> ContextFacts:
        upload = await self._after_last()
        self._last = commit = asyncio.create_task(run_in_threadpool(upload.commit))
        return await asyncio.shield(commit)

    async def abort(self) -> None:
        await asyncio.gather(self._begun, self._last, return_exceptions=True)
        if self._begun.exception() is None:
            await run_in_threadpool(self._begun.result().abort)

    def _look_at(self, write: asyncio.Task[object]) -> None:
        if self._on_failure is not None and write.exception() is not None:
            self._on_failure()

    async def _after_last(self) -> ContextUpload:
        await asyncio.shield(self._last)
        return await asyncio.shield(self._begun)


class UploadRoute(APIRoute):
    """A route that may answer before it has read the body: the answer is sent at once, and then the connection closes."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(scope, receive, send)
        await super().handle(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its answer; `_unread` while the server has not heard the request's end."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        headers = Headers(scope=scope)
        self._unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers

    async def receive(self) -> Message:
        message = await self._receive()
        self._unread = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if self._unread and message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
        if not self._unread or message["type"] != "http.response.body" or message.get("more_body", False):
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        await self._linger()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _linger(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._unread:
                    await self.receive()
