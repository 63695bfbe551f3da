"""A build's log as server-sent events or as text: from any line on, live, and complete or said to be otherwise."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool

from api.deps import Parts
from api.errors import invalid
from kiln.models import BuildStatus
from kiln.ports import End, Gap, LogLine

PING_SECONDS = 15.0
TEXT_PAGE_LINES = 1000
PING = b": ping\n\n"
Translate = Callable[[BuildStatus], str]

AfterQuery = Annotated[int, Query(ge=0, le=2**53, description="resume after this line number")]
LastEventId = Annotated[str | None, Header(description="resume after this line number, as browsers send it")]

LOG_RESPONSES: dict[int | str, dict[str, object]] = {
    200: {
        "description": "Events `line`, `gap` and, last, `end`; with `Accept: text/plain` the log so far",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'id: 1\nevent: line\ndata: {"line": "==> amazon-ebs.agent: Creating the AMI", '
                '"time": "2026-03-25T14:31:07Z", "stream": "stdout"}\n\nevent: end\ndata: {"status": "succeeded"}\n\n',
            },
            "text/plain": {"schema": {"type": "string"}},
        },
    }
}


def log_response(  # noqa: PLR0913, PLR0917  what a request carries
    request: Request, parts: Parts, build_id: str, after: int, last_event_id: str | None, translate: Translate
) -> Response:
    """The log of a build that the caller may see. Raises ApiError 422 for a `Last-Event-ID` that is no line number."""
    start = _start(after, last_event_id)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    if _wants_text(request):
        text = iterate_in_threadpool(_text(parts, build_id, start))
        return StreamingResponse(text, media_type="text/plain; charset=utf-8", headers=headers)
    events = _events(parts, build_id, start, translate)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def _start(after: int, last_event_id: str | None) -> int:
    if not last_event_id:
        return after
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 17):
        raise invalid("Last-Event-ID", "must be the number of a line")
    return int(last_event_id)


def _wants_text(request: Request) -> bool:
    accept = request.headers.get("accept", "")
    return "text/plain" in accept and "text/event-stream" not in accept


async def _events(parts: Parts, build_id: str, after: int, translate: Translate) -> AsyncIterator[bytes]:
    """Events as they come, a comment when none has come for a while, and no more once the server stops."""
    source = aiter(parts.logs.follow(build_id, after))
    closing = asyncio.create_task(parts.closing.wait())
    coming: asyncio.Task[LogLine | Gap | End] | None = None
    try:
        while True:
            coming = coming or asyncio.create_task(_next(source))
            await asyncio.wait({coming, closing}, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                event, coming = coming.result(), None
                yield _event(event, translate)
                if isinstance(event, End):
                    return
            elif closing.done():
                return
            else:
                yield PING
    finally:
        closing.cancel()
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await source.aclose()  # type: ignore[attr-defined]  # an async generator's


async def _next(source: AsyncIterator[LogLine | Gap | End]) -> LogLine | Gap | End:
    return await anext(source)


def _event(event: LogLine | Gap | End, translate: Translate) -> bytes:
    match event:
        case LogLine():
            data = {"line": event.text, "time": _time(event.time), "stream": event.stream}
            return _encode("line", data, event.number)
        case Gap():
            return _encode("gap", {"from": event.first, "to": event.last, "reason": event.reason}, event.last)
        case End():
            return _encode("end", {"status": translate(BuildStatus(event.status))}, None)


def _encode(name: str, data: Mapping[str, object], number: int | None) -> bytes:
    head = f"id: {number}\n" if number is not None else ""
    # JSON in ASCII holds no line end of any kind, so one event's data is one line.
    return f"{head}event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _text(parts: Parts, build_id: str, after: int) -> Iterator[str]:
    while True:
        lines = parts.logs.read(build_id, after, TEXT_PAGE_LINES)
        if not lines:
            return
        yield "".join(_text_line(line) for line in lines)
        last = lines[-1]
        after = last.last if isinstance(last, Gap) else last.number


def _text_line(line: LogLine | Gap) -> str:
    if isinstance(line, Gap):
        return f"[kiln] lines {line.first} to {line.last} were lost: {line.reason}\n"
    return f"[kiln] {line.text}\n" if line.stream == "kiln" else f"{line.text}\n"


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
