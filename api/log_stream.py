"""A build's or a pod's log as server-sent events or as text: from any line on, live, and complete or said to be otherwise."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool

from api.deps import Parts
from api.errors import invalid
from kiln.catalog.pod_tables import Pod
from kiln.catalog.tables import Build
from kiln.models import OPEN_POD_STATUSES, BuildStatus
from kiln.ports import End, Gap, LogLine

PING_SECONDS = 15.0
TEXT_PAGE_LINES = 1000
PING = b": ping\n\n"
# A line may have 1 MB, and a reader may be slow: no more than these wait for it in memory.
READY_EVENTS = 32
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
Translate = Callable[[BuildStatus], str]
# What an end's event says of the status that the log was closed with.
Say = Callable[[str], str]
# How a dialect writes an event; b"" for one that it does not tell.
Encode = Callable[[LogLine | Gap | End], bytes]
Ready = asyncio.Queue[bytes | None]
log = logging.getLogger("kiln.api")

AfterQuery = Annotated[int, Query(ge=0, le=2**53, description="resume after this line number")]
LastEventId = Annotated[
    str,
    Header(
        alias="Last-Event-ID",
        description="resume after this line number, as browsers send it when they connect again; goes before `after`",
        json_schema_extra={"pattern": "^[0-9]{0,16}$"},
    ),
]

EVENT_SCHEMA = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {"type": "string", "description": "of a line, its number; of a gap, that of its last line"},
        "event": {"enum": ["line", "gap", "end"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
LOG_RESPONSES: dict[int | str, dict[str, object]] = {
    200: {
        "description": "Events `line`, `gap` and, last, `end`; with `Accept: text/plain` the log so far",
        "content": {
            "text/event-stream": {
                "schema": EVENT_SCHEMA,
                "example": 'id: 1\nevent: line\ndata: {"line": "==> amazon-ebs.agent: Creating the AMI", '
                '"time": "2026-03-25T14:31:07Z", "stream": "stdout"}\n\nevent: end\ndata: {"status": "succeeded"}\n\n',
            },
            "text/plain": {"schema": {"type": "string"}},
        },
    }
}


def log_response(  # noqa: PLR0913, PLR0917  what a request carries
    request: Request, parts: Parts, build: Build, after: int, last_event_id: str, translate: Translate
) -> Response:
    """The log of a build that the caller may see; blocks a moment.

    Raises ApiError 422 for a `Last-Event-ID` that is no line number, UnavailableError.
    """
    start = _start(after, last_event_id)
    _end_if_over(parts, build)
    return _response(request, parts, build.id, start, lambda status: translate(BuildStatus(status)))


def pod_log_response(request: Request, parts: Parts, pod: Pod, after: int, last_event_id: str) -> Response:
    """The log of a pod that the caller may see; blocks a moment. Raises as `log_response`."""
    start = _start(after, last_event_id)
    end_if_nobody_else_does(parts, pod)
    return _response(request, parts, pod.id, start, str)


def _response(request: Request, parts: Parts, log_id: str, start: int, say: Say) -> Response:
    if _wants_text(request):
        text = iterate_in_threadpool(_text(parts, log_id, start))
        return StreamingResponse(text, media_type="text/plain; charset=utf-8", headers=HEADERS)
    events = _events(parts, log_id, start, lambda event: _event(event, say))
    return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)


def line_response(parts: Parts, build: Build) -> Response:
    """The whole log and then what comes, as events that are a line each and nothing else; blocks a moment.

    A client that knows no other events may read it: no ids, no names, and no event at the end. Raises UnavailableError.
    """
    _end_if_over(parts, build)
    events = _events(parts, build.id, 0, _line_alone)
    return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)


def _end_if_over(parts: Parts, build: Build) -> None:
    """Whoever closed the build ends its log next, but may have been killed in between."""
    if build.cleaned_at is not None:
        parts.logs.end(build.id, build.status)


def end_if_nobody_else_does(parts: Parts, pod: Pod) -> None:
    """Ends the log of a pod that has ended and never began, or whose workflow closed it and was killed before it came to
    this."""
    if pod.status not in OPEN_POD_STATUSES and (pod.run_id is None or pod.shim is None):
        parts.logs.end(pod.id, pod.status)


def _start(after: int, last_event_id: str) -> int:
    if not last_event_id:
        return after
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 17):
        raise invalid("Last-Event-ID", "must be the number of a line")
    return int(last_event_id)


def _wants_text(request: Request) -> bool:
    accept = request.headers.get("accept", "")
    return "text/plain" in accept and "text/event-stream" not in accept


async def _events(parts: Parts, log_id: str, after: int, encode: Encode) -> AsyncIterator[bytes]:
    """Events as they come, a comment when none has come for a while, and no more once the server stops."""
    ready: Ready = asyncio.Queue(READY_EVENTS)
    pump = asyncio.create_task(_pump(parts.logs.follow(log_id, after), ready, encode))
    closing = asyncio.create_task(parts.closing.wait())
    coming: asyncio.Task[list[bytes | None]] | None = None
    try:
        while not closing.done():
            coming = coming or asyncio.create_task(_take(ready))
            done, _ = await asyncio.wait({coming, closing}, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield PING
            if coming in done:
                batch, coming = coming.result(), None
                yield b"".join(event for event in batch if event is not None)
                if batch[-1] is None:
                    return
    finally:
        unfinished = [task for task in (pump, closing, coming) if task is not None]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)


async def _pump(source: AsyncIterator[LogLine | Gap | End], ready: Ready, encode: Encode) -> None:
    """Brings every event, and None after the last; a reader who is slow holds it up."""
    async with contextlib.aclosing(source):  # type: ignore[type-var]  # an async generator
        try:
            async for event in source:
                await ready.put(encode(event))
        except Exception:
            log.exception("a log cannot be followed any further; its readers may resume")
    await ready.put(None)


async def _take(ready: Ready) -> list[bytes | None]:
    """All that is ready, at least one: a log that has much to say is sent in few pieces."""
    batch = [await ready.get()]
    while not ready.empty():
        batch.append(ready.get_nowait())
    return batch


def _event(event: LogLine | Gap | End, say: Say) -> bytes:
    match event:
        case LogLine():
            data = {"line": event.text, "time": _time(event.time), "stream": event.stream}
            return _encode("line", data, event.number)
        case Gap():
            return _encode("gap", {"from": event.first, "to": event.last, "reason": event.reason}, event.last)
        case End():
            return _encode("end", {"status": say(event.status)}, None)


def _line_alone(event: LogLine | Gap | End) -> bytes:
    if isinstance(event, End):
        return b""
    return f"data: {json.dumps({'line': _text_line(event)})}\n\n".encode()


def _encode(name: str, data: Mapping[str, object], number: int | None) -> bytes:
    head = f"id: {number}\n" if number is not None else ""
    # JSON in ASCII holds no line end of any kind, so one event's data is one line.
    return f"{head}event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _text(parts: Parts, log_id: str, after: int) -> Iterator[str]:
    while True:
        lines = parts.logs.read(log_id, after, TEXT_PAGE_LINES)
        if not lines:
            return
        yield "".join(f"{_text_line(line)}\n" for line in lines)
        last = lines[-1]
        after = last.last if isinstance(last, Gap) else last.number


def _text_line(line: LogLine | Gap) -> str:
    if isinstance(line, Gap):
        return f"[kiln] lines {line.first} to {line.last} were lost: {line.reason}"
    return f"[kiln] {line.text}" if line.stream == "kiln" else line.text


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
