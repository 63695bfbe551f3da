"""The log of a build: `GET …/builds/{build_id}/logs`, the same stream under both contracts' paths."""

import time
from pathlib import Path

import pytest
from sqlalchemy import delete

from api import log_stream
from kiln.adapters.log_database import chunks
from support.api_server import RunningApi, settings_for
from support.dev_temporal import DevTemporal
from support.log_events import EVENTS, TEXT, blocks, end, events, following, line, parsed
from support.parallel import Pending
from support.tenants import Tenant, error

MACHINE, KILN = "/api/v1/images/builds", "/api/v1/builds"
BOTH = pytest.mark.parametrize("base", [MACHINE, KILN])
BAD_EVENT_ID = error("invalid_request", "Last-Event-ID: must be the number of a line")


@BOTH
def test_an_ended_builds_log(tenant: Tenant, base: str) -> None:
    """Every line with its number, text, time and stream, then the end, and no more."""
    build_id = tenant.succeeded()
    tenant.write_log(build_id, "==> amazon-ebs.agent: Creating the AMI", "")
    tenant.write_log(build_id, "no space left", stream="stderr")
    tenant.write_log(build_id, "cleaning up", stream="kiln", status="succeeded")
    assert events(tenant, f"{base}/{build_id}/logs") == [
        line(1, "==> amazon-ebs.agent: Creating the AMI"),
        line(2, ""),
        line(3, "no space left", "stderr"),
        line(4, "cleaning up", "kiln"),
        end("succeeded"),
    ]


@pytest.mark.parametrize(
    ("stored", "machine"),
    [
        ("succeeded", "succeeded"),
        ("failed", "failed"),
        ("timed_out", "failed"),
        ("cancelled", "cancelled"),
    ],
)
def test_the_end_is_in_the_words_of_the_path(tenant: Tenant, stored: str, machine: str) -> None:
    """machine-images has no word for a time-out; kiln has."""
    build_id = tenant.building()
    tenant.write_log(build_id, status=stored)
    assert events(tenant, f"{MACHINE}/{build_id}/logs") == [end(machine)]
    assert events(tenant, f"{KILN}/{build_id}/logs") == [end(stored)]


@BOTH
def test_the_wire_is_one_line_a_field(tenant: Tenant, base: str) -> None:
    """Whatever a line holds, an event's data is one line of JSON, and nothing in it ends the event."""
    texts = ["a\rb", "a\u2028b\u0085c", "caf\u00e9 \U0001f525", "\x1b[31mred\x1b[0m", "data: {}", "x" * 1_000_000]
    build_id = tenant.succeeded()
    tenant.write_log(build_id, *texts, status="succeeded")
    answer = tenant.http.get(f"{base}/{build_id}/logs", headers=EVENTS)
    raw = answer.content.decode("ascii")
    assert "\r" not in raw
    assert [parsed(block)["data"].get("line") for block in raw.split("\n\n")[:-1]] == [*texts, None]
    assert raw.startswith('id: 1\nevent: line\ndata: {"line": ')


@BOTH
def test_ten_thousand_lines_come_without_a_gap(tenant: Tenant, base: str) -> None:
    """Numbers run from 1, none missing and none twice."""
    build_id = tenant.succeeded()
    tenant.write_log(build_id, *(f"line {number}" for number in range(1, 10_001)), status="succeeded")
    found = events(tenant, f"{base}/{build_id}/logs")
    assert [int(event["id"]) for event in found[:-1]] == list(range(1, 10_001))
    assert found[9_999] == line(10_000, "line 10000")


@BOTH
def test_after_resumes(tenant: Tenant, base: str) -> None:
    """`?after=N` begins at the line after N; beyond the last line only the end comes."""
    build_id = tenant.succeeded()
    tenant.write_log(build_id, "one", "two", "three", status="succeeded")
    path = f"{base}/{build_id}/logs"
    assert events(tenant, f"{path}?after=0")[0] == line(1, "one")
    assert events(tenant, f"{path}?after=2") == [line(3, "three"), end("succeeded")]
    assert events(tenant, f"{path}?after=3") == events(tenant, f"{path}?after=9007199254740992") == [end("succeeded")]


@BOTH
def test_last_event_id_resumes(tenant: Tenant, base: str) -> None:
    """What a browser sends when it connects again; it is newer than the `after` of its first address, and goes first."""
    build_id = tenant.succeeded()
    tenant.write_log(build_id, "one", "two", "three", status="succeeded")
    path = f"{base}/{build_id}/logs"
    assert events(tenant, path, Last_Event_ID="2") == [line(3, "three"), end("succeeded")]
    assert events(tenant, f"{path}?after=1", Last_Event_ID="2") == [line(3, "three"), end("succeeded")]
    assert events(tenant, f"{path}?after=1", Last_Event_ID="")[0] == line(2, "two")


@BOTH
@pytest.mark.parametrize("bad", ["x", "-1", "1.5", "1e3", "99999999999999999999", "\xb2"])
def test_a_malformed_last_event_id_is_a_422(tenant: Tenant, base: str, bad: str) -> None:
    """What is no line's number cannot be resumed after."""
    headers = {"Last-Event-ID": bad.encode("latin-1")}
    answer = tenant.http.get(f"{base}/{tenant.succeeded()}/logs", headers=headers)
    assert (answer.status_code, answer.json()) == (422, BAD_EVENT_ID)


@BOTH
@pytest.mark.parametrize("bad", ["x", "-1", "1.5", "9007199254740993", "", "%00"])
def test_a_malformed_after_is_a_422(tenant: Tenant, base: str, bad: str) -> None:
    """The message names the parameter."""
    answer = tenant.http.get(f"{base}/{tenant.succeeded()}/logs?after={bad}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
    assert answer.json()["error"]["message"].startswith("after: ")


@BOTH
def test_lines_come_live(tenant: Tenant, base: str) -> None:
    """A reader has a line well within a second of its writing, and the end as soon as the log ends."""
    build_id = tenant.building()
    tenant.write_log(build_id, "one")
    with following(tenant, f"{base}/{build_id}/logs") as stream:
        assert next(stream) == line(1, "one")
        for number, text in ((2, "two"), (3, "three")):
            began = time.monotonic()
            tenant.write_log(build_id, text)
            assert next(stream) == line(number, text)
            assert time.monotonic() - began < 1
        tenant.write_log(build_id, status="failed")
        assert next(stream) == end("failed")
        assert next(stream, None) is None


def test_a_log_may_begin_after_its_reader(tenant: Tenant) -> None:
    """Whoever follows a queued build waits for its first line."""
    build_id = tenant.queued()
    with following(tenant, f"{MACHINE}/{build_id}/logs") as stream:
        pending = Pending(lambda: next(stream))
        assert pending.is_waiting(0.2)
        tenant.write_log(build_id, "one")
        assert pending.result() == line(1, "one")
        tenant.write_log(build_id, status="succeeded")
        assert next(stream) == end("succeeded")


def test_silence_is_filled_with_pings(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment now and then keeps proxies from closing the connection; it is no event."""
    monkeypatch.setattr(log_stream, "PING_SECONDS", 0.1)
    build_id = tenant.building()
    with tenant.http.stream("GET", f"{KILN}/{build_id}/logs", headers=EVENTS) as response:
        stream = blocks(response)
        assert [next(stream), next(stream)] == [": ping", ": ping"]
        tenant.write_log(build_id, "one")
        assert parsed(next(block for block in stream if block != ": ping")) == line(1, "one")


def test_a_ping_comes_every_fifteen_seconds() -> None:
    """The contract's interval."""
    assert log_stream.PING_SECONDS == 15


@BOTH
def test_lines_that_were_lost_are_a_gap(tenant: Tenant, base: str) -> None:
    """What could not be kept is said with its numbers and the reason; the numbers go on after it."""
    build_id = tenant.succeeded()
    for text in ("one", "two", "three"):
        tenant.write_log(build_id, text)
    tenant.write_log(build_id, status="succeeded")
    with tenant.api.logs._database.writing() as connection:
        connection.execute(delete(chunks).where(chunks.c.build_id == build_id, chunks.c.first_line == 2))
    reason = "these lines are missing from the log store"
    gap = {"id": "2", "event": "gap", "data": {"from": 2, "to": 2, "reason": reason}}
    path = f"{base}/{build_id}/logs"
    assert events(tenant, path) == [line(1, "one"), gap, line(3, "three"), end("succeeded")]
    assert events(tenant, path, Last_Event_ID="2") == [line(3, "three"), end("succeeded")]
    text = tenant.http.get(path, headers=TEXT).text
    assert text == f"one\n[kiln] lines 2 to 2 were lost: {reason}\nthree\n"


@BOTH
def test_the_log_as_text(tenant: Tenant, base: str) -> None:
    """`Accept: text/plain` gives the lines so far, of a live build as well, and does not wait."""
    build_id = tenant.building()
    path = f"{base}/{build_id}/logs"
    assert tenant.http.get(path, headers=TEXT).text == ""
    tenant.write_log(build_id, "one", "caf\u00e9")
    tenant.write_log(build_id, "attempt 1 is over", stream="kiln")
    answer = tenant.http.get(path, headers=TEXT)
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.text == "one\ncaf\u00e9\n[kiln] attempt 1 is over\n"
    assert tenant.http.get(f"{path}?after=1", headers=TEXT).text == "caf\u00e9\n[kiln] attempt 1 is over\n"


def test_a_long_log_as_text(tenant: Tenant) -> None:
    """More lines than are read at once."""
    build_id = tenant.succeeded()
    tenant.write_log(build_id, *map(str, range(5_000)), status="succeeded")
    answer = tenant.http.get(f"{KILN}/{build_id}/logs", headers=TEXT)
    assert answer.text.splitlines() == [str(number) for number in range(5_000)]


@pytest.mark.parametrize("accept", ["*/*", "", "text/event-stream, text/plain", "application/json"])
def test_events_are_the_default(tenant: Tenant, accept: str) -> None:
    """Only who asks for text, and not for events, gets text."""
    build_id = tenant.succeeded()
    tenant.write_log(build_id, status="succeeded")
    answer = tenant.http.get(f"{KILN}/{build_id}/logs", headers={"Accept": accept})
    assert answer.headers["Content-Type"].startswith("text/event-stream")


def test_a_stream_is_not_to_be_cached(tenant: Tenant) -> None:
    """Neither a cache nor a buffering proxy may hold lines back."""
    build_id = tenant.succeeded()
    tenant.write_log(build_id, status="succeeded")
    headers = tenant.http.get(f"{KILN}/{build_id}/logs").headers
    assert (headers["Cache-Control"], headers["X-Accel-Buffering"]) == ("no-store", "no")


@BOTH
def test_another_organizations_log_is_a_404(tenant: Tenant, neighbour: Tenant, base: str) -> None:
    """As an unknown build's."""
    foreign = neighbour.succeeded()
    neighbour.write_log(foreign, "secret", status="succeeded")
    answers = [tenant.http.get(f"{base}/{build_id}/logs") for build_id in (foreign, tenant.organization_id)]
    not_found = error("build_not_found", "no build of this organization has this id")
    assert [(answer.status_code, answer.json()) for answer in answers] == [(404, not_found)] * 2


@BOTH
def test_a_build_that_was_cancelled_in_the_queue_has_an_ended_log(tenant: Tenant, base: str) -> None:
    """No worker ever saw it, and still nobody waits for its log."""
    build_id = tenant.queued()
    tenant.http.post(f"{base}/{build_id}/cancel")
    assert events(tenant, f"{base}/{build_id}/logs") == [end("cancelled")]


@BOTH
def test_a_closed_build_has_an_ended_log(tenant: Tenant, base: str) -> None:
    """Also where whoever closed the build was killed before it could end the log."""
    build_id = tenant.failed("no")
    tenant.write_log(build_id, "one")
    assert events(tenant, f"{base}/{build_id}/logs") == [line(1, "one"), end("failed")]


def test_a_stopping_server_ends_its_streams(tmp_path: Path, temporal: DevTemporal) -> None:
    """A reader of a live log gets a clean end of the response, and the server stops at once."""
    with RunningApi(settings_for(tmp_path, temporal.port)) as api:
        tenant = Tenant(api)
        build_id = tenant.building()
        tenant.write_log(build_id, "one")
        with following(tenant, f"{KILN}/{build_id}/logs") as stream:
            assert next(stream) == line(1, "one")
            api.stop()
            assert next(stream, None) is None
        tenant.close()
    assert api.stopped_in < 1.5


def test_readers_that_leave_are_forgotten(tenant: Tenant) -> None:
    """A closed connection ends its reading of the log store."""
    build_id = tenant.building()
    tenant.write_log(build_id, "one")
    for _ in range(3):
        with following(tenant, f"{KILN}/{build_id}/logs") as stream:
            assert next(stream) == line(1, "one")
    feeds = tenant.api.parts.logs._tail._feeds  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while feeds and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not feeds
