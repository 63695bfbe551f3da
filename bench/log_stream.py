"""How long a log line takes from its writer to its readers, and how fast a finished log is read."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.children import Child
from bench.figures import Figure, MeasurementError, Result, percentile, ratios
from bench.kiln_build import KilnBuilds
from bench.pacing import rounds
from bench.place import running_stack
from cli.local_stack import API, TEMPORAL, LocalStack

ROUNDS = 4
SECONDS = 30.0
READERS = 20
LINES = 150
EVERY_SECONDS = 0.02
LATENCY_GOAL_MS = 200
CATCH_UP_ROUNDS = 3
CATCH_UP_LINES = 100_000
MS = 1000


@dataclass(frozen=True)
class Bench:
    """A running API, a process that writes logs into its store, and one that reads them from it."""

    stack: LocalStack
    client: KilnBuilds
    writer: Child
    readers: Child

    def log(self) -> tuple[str, str]:
        """A fresh build without a worker, and the path of its log."""
        build_id = self.client.submit()
        return build_id, f"/api/v1/builds/{build_id}/logs"


def measure() -> Result:
    """Log latency and catch-up, while no worker runs. Raises MeasurementError."""
    with (
        running_stack(parts=(TEMPORAL, API)) as stack,
        KilnBuilds(stack) as client,
        Child("log_writer", {"logs_dsn": stack.settings.logs_dsn}) as writer,
        Child("log_readers", {"key": stack.api_key, "logs_dsn": stack.settings.logs_dsn}) as readers,
    ):
        bench = Bench(stack, client, writer, readers)
        live = _live(bench)
        return Result([live, *_catch_up(bench)])


def _live(bench: Bench) -> Figure:
    port = bench.writer.ask("port")["port"]
    kiln: list[list[float]] = []
    bare: list[list[float]] = []
    for number in rounds(ROUNDS, SECONDS):
        if number % 2:
            bare.append(_through_socket(bench, port))
        kiln.append(_through_kiln(bench))
        if not number % 2:
            bare.append(_through_socket(bench, port))
    return _live_figure(kiln, bare)


def _through_kiln(bench: Bench) -> list[float]:
    """Every line's latency at every reader, in seconds."""
    build_id, path = bench.log()
    bench.readers.ask("open", port=bench.stack.settings.api_port, path=path, readers=READERS)
    bench.readers.order("read_stamps", count=LINES)
    bench.writer.ask("write_stamps", build_id=build_id, count=LINES, every_seconds=EVERY_SECONDS)
    return _all_latencies(bench)


def _through_socket(bench: Bench, port: int) -> list[float]:
    """The same from the writer's own socket: what the machine itself takes."""
    bench.readers.ask("open", port=port, path="/", readers=READERS)
    bench.readers.order("read_stamps", count=LINES)
    bench.writer.ask("send_stamps", count=LINES, every_seconds=EVERY_SECONDS)
    return _all_latencies(bench)


def _all_latencies(bench: Bench) -> list[float]:
    latencies: list[float] = bench.readers.answer()["latencies"]
    if len(latencies) != LINES * READERS:
        raise MeasurementError(f"{len(latencies)} lines arrived instead of {LINES} at each of {READERS} readers")
    return latencies


def _live_figure(kiln: Sequence[list[float]], bare: Sequence[list[float]]) -> Figure:
    all_kiln, all_bare = (list(itertools.chain.from_iterable(rounds)) for rounds in (kiln, bare))
    p99 = percentile(all_kiln, 99) * MS
    return Figure(
        name=f"a log line to its {READERS} readers, p50 / p99",
        kiln=f"{median(all_kiln) * MS:.0f} / {p99:.0f} ms",
        reference=f"{median(all_bare) * MS:.1f} / {percentile(all_bare, 99) * MS:.1f} ms bare socket",
        compared=f"{p99 - percentile(all_bare, 99) * MS:+.0f} ms at p99",
        goal=f"p99 < {LATENCY_GOAL_MS} ms",
        met=p99 < LATENCY_GOAL_MS,
        runs=f"{len(kiln)} x {LINES} x {READERS}",
    )


def _catch_up(bench: Bench) -> list[Figure]:
    """A finished log, over HTTP and from the store itself by turns; and how fast it was written."""
    build_id, path = bench.log()
    written = bench.writer.ask("fill", build_id=build_id, count=CATCH_UP_LINES)["seconds"]
    port = bench.stack.settings.api_port
    kiln, store = [], []
    for _ in rounds(CATCH_UP_ROUNDS, SECONDS):
        kiln.append(bench.readers.ask("catch_up", port=port, path=path, count=CATCH_UP_LINES)["seconds"])
        store.append(bench.readers.ask("read_store", build_id=build_id, count=CATCH_UP_LINES)["seconds"])
    spread = ratios(store, kiln)
    return [
        Figure(
            name=f"catching up with {CATCH_UP_LINES:,} lines",
            kiln=f"{_rate(median(kiln))} lines/s",
            reference=f"{_rate(median(store))} lines/s log store alone",
            compared=f"{spread.middle:.2f} times ({spread.low:.2f} to {spread.high:.2f})",
            goal="-",
            met=None,
            runs=f"{len(kiln)} x 1",
        ),
        Figure(
            name=f"writing {CATCH_UP_LINES:,} lines",
            kiln=f"{_rate(written)} lines/s",
            reference="-",
            compared="-",
            goal="-",
            met=None,
            runs="1 x 1",
        ),
    ]


def _rate(seconds: float) -> str:
    return f"{CATCH_UP_LINES / seconds:,.0f}"
