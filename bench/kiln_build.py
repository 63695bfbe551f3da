"""Builds through Kiln, as a client sees them."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import httpx

from bench.figures import MeasurementError
from cli.local_stack import LocalStack
from kiln.catalog import builds
from kiln.catalog.session import Catalog

PATH = "/api/v1/images/build"
BODY = {"provider": "claude-code"}
POLL_SECONDS = 0.02
BUILD_SECONDS = 60.0
# A build begins when the one before has done all its work.
QUIET_SECONDS = 0.3


@dataclass(frozen=True)
class KilnBuild:
    """What the client saw, by the wall clock (s since the epoch): its request, the answer, and `succeeded`."""

    build_id: str
    asked: float
    answered: float
    seen: float

    @property
    def seconds(self) -> float:
        return self.seen - self.asked


class KilnBuilds:
    """A client of a stack's API that builds machine images, as a context manager."""

    def __init__(self, stack: LocalStack) -> None:
        self._http = api_client(stack)
        self._catalog = Catalog(stack.settings.catalog_dsn, pool_size=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()
        self._catalog.close()

    def build(self, quickest_seconds: float) -> KilnBuild:
        """One build, and the end of its workflow's work. Raises MeasurementError unless it succeeds.

        The client begins to ask for the status after `quickest_seconds`: each question costs the build CPU time.
        """
        self._http.get("/healthz")  # a connection that is not measured
        self._prepare()
        time.sleep(QUIET_SECONDS)
        asked = time.time()
        build_id = self.submit()
        answered = time.time()
        time.sleep(max(0.0, asked + quickest_seconds - answered))
        wait(lambda: self._has_succeeded(build_id), f"build {build_id} does not succeed")
        seen = time.time()
        self.settle({build_id})
        return KilnBuild(build_id, asked, answered, seen)

    def settle(self, build_ids: Iterable[str]) -> None:
        """Returns once these builds' workflows have done all their work."""
        for build_id in build_ids:
            wait(partial(self._is_cleaned_up, build_id), f"build {build_id} is not cleaned up")

    def submit(self) -> str:
        """The id of a new build."""
        answer = self._http.post(PATH, json=BODY)
        return str(body_of(answer, httpx.codes.ACCEPTED)["build_id"])

    def _prepare(self) -> None:
        """What a build needs before its time begins."""

    def _has_succeeded(self, build_id: str) -> bool:
        build = body_of(self._http.get(f"/api/v1/images/builds/{build_id}"), httpx.codes.OK)
        if build["status"] not in ("queued", "building", "succeeded"):
            raise MeasurementError(f"build {build_id} {build['status']}: {build['error']}")
        return bool(build["status"] == "succeeded")

    def _is_cleaned_up(self, build_id: str) -> bool:
        with self._catalog.read() as session:
            row = builds.get(session, build_id)
            return row is not None and row.cleaned_at is not None


def api_client(stack: LocalStack) -> httpx.Client:
    """A client of the stack's API with its admin key."""
    return httpx.Client(
        base_url=stack.api_url,
        headers={"X-API-Key": stack.api_key},
        trust_env=False,
        timeout=BUILD_SECONDS,
    )


def wait(done: Callable[[], bool], problem: str, seconds: float = BUILD_SECONDS) -> None:
    """Returns once it is done. Raises MeasurementError with the problem if that takes too long."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise MeasurementError(f"{problem} within {seconds:.0f} s")
        time.sleep(POLL_SECONDS)


def body_of(answer: httpx.Response, expected: int) -> dict[str, Any]:
    """The object in an answer. Raises MeasurementError for another status."""
    if answer.status_code != expected:
        raise MeasurementError(f"{answer.request.method} {answer.url}: {answer.status_code} {answer.text}")
    return dict(answer.json())
