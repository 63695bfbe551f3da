"""What a pod costs: pods of `true` a second beside the same commands by hand, and how soon a pod's first line is read."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench.figures import Figure, MeasurementError, Result, Spread, percentile, ratios
from bench.kiln_build import api_client, body_of, wait
from bench.pacing import rounds
from bench.place import running_stack
from cli.local_stack import API, EC2, RUNNER, TEMPORAL, WORKER
from kiln.catalog.keys import DEFAULT_ORGANIZATION

PODS = 200
PLACES = 10
ROUNDS = 3
SECONDS = 180.0
FIRST_LINES = 40
FIRST_LINE_GOAL_MS = 300
OPEN = "creating,running,orphaned"
MS = 1000


def measure() -> Result:
    """One stack, one runner with ten places. Raises MeasurementError."""
    with _runner_folder() as folder:
        settings = {"runner_dir": folder, "runner_places": PLACES, "runner_custom_commands": True}
        parts = (TEMPORAL, EC2, WORKER, API, RUNNER)
        with running_stack(parts=parts, workers=(("control",),), **settings) as stack, api_client(stack) as api:
            pods = Pods(api)
            first_lines = [pods.first_line_ms() for _ in range(FIRST_LINES)]
            kiln, by_hand = _run(pods)
    return Result([_rate_figure(kiln, by_hand), _first_line_figure(first_lines)])


@contextmanager
def _runner_folder() -> Iterator[Path]:
    """The users that agents run as must get there."""
    folder = Path(tempfile.mkdtemp(prefix="kiln-bench-", dir="/var/tmp"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class Pods:
    """A client that runs short commands as pods of the stack's runner."""

    def __init__(self, api: httpx.Client) -> None:
        self._api = api
        self._base = f"/api/v1/ext/orgs/{DEFAULT_ORGANIZATION}"

    def first_line_ms(self) -> float:
        """From the request to the line that the pod's agent prints first, as a reader of its log gets it."""
        asked = time.perf_counter()
        key = self._create("echo", "hello")
        with self._api.stream("GET", f"{self._base}/pods/{key}/logs") as answer:
            for line in answer.iter_lines():
                if line.startswith("data:") and json.loads(line[5:]).get("line") == "hello":
                    return (time.perf_counter() - asked) * MS
        raise MeasurementError(f"the log of {key} ended without its line")

    def rate(self, count: int) -> float:
        """So many pods of `true`, submitted one after the other; ended pods a second."""
        began = time.perf_counter()
        for _ in range(count):
            self._create("true")
        wait(lambda: self._count(OPEN) == 0, f"{count} pods do not end", SECONDS)
        return count / (time.perf_counter() - began)

    def failed(self) -> int:
        return self._count("failed,terminated")

    def _create(self, command: str, *args: str) -> str:
        body: dict[str, Any] = {"runner_id": "local", "custom_agent_command": command, "auto_close": True}
        if args:
            body["custom_agent_args"] = list(args)
        answer = self._api.post(f"{self._base}/pods", json=body)
        return str(body_of(answer, httpx.codes.CREATED)["pod"]["key"])

    def _count(self, statuses: str) -> int:
        answer = self._api.get(f"{self._base}/pods", params={"status": statuses, "limit": 1})
        return int(body_of(answer, httpx.codes.OK)["total"])


def _run(pods: Pods) -> tuple[list[float], list[float]]:
    """Both sides by turns."""
    kiln, by_hand = list[float](), list[float]()
    pods.rate(PLACES)  # what is made at first use is made now
    for _ in rounds(ROUNDS, SECONDS):
        by_hand.append(_rate_by_hand(PODS))
        kiln.append(pods.rate(PODS))
    if pods.failed():
        raise MeasurementError(f"{pods.failed()} pods of `true` failed")
    return kiln, by_hand


def _rate_by_hand(count: int) -> float:
    """`true` in a new folder each, ten at once; ended commands a second."""
    began = time.perf_counter()
    with ThreadPoolExecutor(PLACES) as pool:
        list(pool.map(_by_hand, range(count)))
    return count / (time.perf_counter() - began)


def _by_hand(_: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["true"], cwd=folder, check=True, start_new_session=True)


def _rate_figure(kiln: list[float], by_hand: list[float]) -> Figure:
    mine, other, spread = Spread.of(kiln), Spread.of(by_hand), ratios(kiln, by_hand)
    return Figure(
        name=f"{PODS} pods of `true`, {PLACES} places",
        kiln=f"{mine.middle:.1f}/s",
        reference=f"{other.middle:.0f}/s by hand",
        compared=f"{spread.middle:.3f} times ({spread.low:.3f} to {spread.high:.3f})",
        goal="-",
        met=None,
        runs=f"{len(kiln)} x {PODS}",
    )


def _first_line_figure(taken_ms: list[float]) -> Figure:
    middle = percentile(taken_ms, 50)
    return Figure(
        name="a pod's creation to its first log line",
        kiln=f"p50 {middle:.0f} ms, p95 {percentile(taken_ms, 95):.0f} ms",
        reference="-",
        compared="-",
        goal=f"p50 < {FIRST_LINE_GOAL_MS} ms",
        met=middle < FIRST_LINE_GOAL_MS,
        runs=str(len(taken_ms)),
    )
