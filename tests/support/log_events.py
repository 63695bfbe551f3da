"""A log's stream as a client reads it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from support.tenants import Tenant

EVENTS = {"Accept": "text/event-stream"}
TEXT = {"Accept": "text/plain"}
LOG_TIME = "2026-03-25T14:31:07Z"


def line(number: int, text: str, stream: str = "stdout") -> dict[str, Any]:
    return {"id": str(number), "event": "line", "data": {"line": text, "time": LOG_TIME, "stream": stream}}


def end(status: str) -> dict[str, Any]:
    return {"event": "end", "data": {"status": status}}


def parsed(block: str) -> dict[str, Any]:
    """One event's fields, its data decoded; a comment under the key `comment`."""
    fields: dict[str, Any] = {}
    for row in block.split("\n"):
        name, _, value = row.partition(": ")
        assert name not in fields, block
        fields[name or "comment"] = json.loads(value) if name == "data" else value
    return fields


def blocks(response: httpx.Response) -> Iterator[str]:
    """Events as they come, each without the empty line that ends it."""
    rest = ""
    for piece in response.iter_text():
        *whole, rest = (rest + piece).split("\n\n")
        yield from whole
    assert rest == ""


@contextmanager
def following(tenant: Tenant, path: str, **headers: str) -> Iterator[Iterator[dict[str, Any]]]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    with tenant.http.stream("GET", path, headers={**EVENTS, **sent}) as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        yield (parsed(block) for block in blocks(response))


def events(tenant: Tenant, path: str, **headers: str) -> list[dict[str, Any]]:
    """All events of a stream that ends."""
    with following(tenant, path, **headers) as stream:
        return list(stream)
