"""The log of a pod: the stream of builds, with the pod's own word at the end."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from kiln.models import PodRef, PodResult
from support.api_server import RunningApi
from support.log_events import EVENTS, TEXT, end, events, following, line
from support.pod_tenants import PodTenant, pod_refusal

LOG_TIME = datetime(2026, 3, 25, 14, 31, 7, 890000, UTC)


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[PodTenant]:
    tenant = PodTenant(api)
    yield tenant
    tenant.close()


def running(tenant: PodTenant) -> tuple[PodRef, str]:
    """A pod at work, and the path of its log."""
    runner = tenant.runner()
    ref = tenant.pod(runner)
    tenant.start(runner, ref)
    return ref, f"{tenant.base}/pods/{ref.key}/logs"


def write(tenant: PodTenant, ref: PodRef, first: int, *texts: str) -> None:
    """What the pod's runner sends."""
    tenant.api.logs.keep(ref.pod_id, first, [(LOG_TIME, "stdout", text) for text in texts])


@pytest.mark.parametrize(("code", "word"), [(0, "completed"), (1, "failed")])
def test_an_ended_pods_log(tenant: PodTenant, code: int, word: str) -> None:
    """Every line, then the end in the words of pods; whoever was to close it may have died before."""
    ref, path = running(tenant)
    write(tenant, ref, 1, "hello", "world")
    tenant.finish(ref, PodResult(exit_code=code))
    assert events(tenant, path) == [line(1, "hello"), line(2, "world"), end(word)]
    assert events(tenant, path, Last_Event_ID="1") == [line(2, "world"), end(word)]
    assert events(tenant, f"{path}?after=2") == [end(word)]


def test_a_living_pods_log_is_followed(tenant: PodTenant) -> None:
    """Lines come as the runner sends them, one that was lost shows as a gap, and a termination ends it all."""
    ref, path = running(tenant)
    write(tenant, ref, 1, "one")
    with following(tenant, path) as stream:
        assert next(stream) == line(1, "one")
        write(tenant, ref, 3, "three")
        assert next(stream)["event"] == "gap"
        assert next(stream) == line(3, "three")
        tenant.post(f"/pods/{ref.key}/terminate")
        tenant.api.logs.end(ref.pod_id, "terminated")
        assert list(stream) == [end("terminated")]


def test_an_agent_that_is_being_ended_still_speaks(tenant: PodTenant) -> None:
    """A terminated pod's log stays open until its workflow has let go of it."""
    ref, path = running(tenant)
    tenant.post(f"/pods/{ref.key}/terminate")
    with following(tenant, path) as stream:
        write(tenant, ref, 1, "goodbye")
        assert next(stream) == line(1, "goodbye")
    tenant.finish(ref, PodResult(exit_code=143))
    assert events(tenant, path) == [line(1, "goodbye"), end("terminated")]


def test_the_log_so_far_as_text(tenant: PodTenant) -> None:
    """For whoever asks for it."""
    ref, path = running(tenant)
    write(tenant, ref, 1, "one", "two")
    assert tenant.http.get(path, headers=TEXT).text == "one\ntwo\n"


@pytest.mark.parametrize(
    ("query", "headers", "named"),
    [("?after=-1", {}, "after"), ("?after=x", {}, "after"), ("", {"Last-Event-ID": "x"}, "Last-Event-ID")],
)
def test_a_wrong_place_to_resume_is_named(tenant: PodTenant, query: str, headers: dict[str, str], named: str) -> None:
    """400, as whatever else is wrong with a request."""
    _, path = running(tenant)
    status, code, message = pod_refusal(tenant.http.get(path + query, headers={**EVENTS, **headers}))
    assert (status, code) == (400, "VALIDATION_FAILED")
    assert message.startswith(f"{named}: ")
