"""Container builds through Kiln, from the archive's POST on."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, sleep

import httpx

from bench.contexts import small_context
from bench.figures import MeasurementError
from bench.kiln_build import KilnBuilds, body_of
from cli.local_stack import LocalStack
from kiln.catalog.keys import DEFAULT_ORGANIZATION

PATH = "/v5/builds"
NAME, TAG, AGENT = "bench", "latest", "bench"
UNDER_WAY = frozenset({"queued", "running"})
CROWD_SECONDS = 300.0
CROWD_POLL_SECONDS = 0.1


class ContainerBuilds(KilnBuilds):
    """A client of cloud-builds, as a context manager."""

    def __init__(self, stack: LocalStack) -> None:
        super().__init__(stack)
        self._http.headers["x-selected-account-id"] = DEFAULT_ORGANIZATION
        self._archive = b""

    def submit(self) -> str:
        """The id of a new build of the prepared archive."""
        return self._post(self._archive, TAG)

    def crowd(self, archives: Sequence[bytes]) -> float:
        """The seconds from the first of as many requests, sent at once, until all their builds have succeeded."""
        with ThreadPoolExecutor(len(archives)) as senders:
            began = perf_counter()
            tags = [f"at-once-{number}" for number in range(len(archives))]
            wanted = set(senders.map(self._post, archives, tags))
        while self._left(wanted):
            if perf_counter() - began > CROWD_SECONDS:
                raise MeasurementError(f"{len(archives)} builds at once do not succeed within {CROWD_SECONDS:.0f} s")
            sleep(CROWD_POLL_SECONDS)
        seconds = perf_counter() - began
        self.settle(wanted)
        return seconds

    def _prepare(self) -> None:
        self._archive = small_context()

    def _post(self, archive: bytes, tag: str) -> str:
        form = {"image_name": NAME, "image_tag": tag, "agent_name": AGENT}
        answer = self._http.post(PATH, data=form, files={"context_archive": archive})
        return str(body_of(answer, httpx.codes.OK)["id"])

    def _has_succeeded(self, build_id: str) -> bool:
        return _has_succeeded(body_of(self._http.get(f"{PATH}/{build_id}"), httpx.codes.OK))

    def _left(self, wanted: set[str]) -> bool:
        """Whether some have not succeeded yet; they are the newest ones."""
        page = body_of(self._http.get(PATH, params={"limit": len(wanted)}), httpx.codes.OK)["items"]
        return any(not _has_succeeded(build) for build in page if build["id"] in wanted)


def _has_succeeded(build: dict[str, object]) -> bool:
    if build["build_status"] not in UNDER_WAY | {"success"}:
        raise MeasurementError(f"build {build['id']} ended as {build['build_status']}")
    return build["build_status"] == "success"
