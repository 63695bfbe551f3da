"""How much slower it is to submit a build than to start its workflow: rate and latency, alone and many at once."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

from bench.children import Answer, Child
from bench.figures import Figure, MeasurementError, Result, ratios
from bench.pacing import rounds
from bench.place import running_stack
from cli.local_stack import API, TEMPORAL, LocalStack

ROUNDS = 5
SECONDS = 60.0
RATE_GOAL = 0.7
LATENCY_GOAL = 1.5
MS = 1000


@dataclass(frozen=True)
class Level:
    """So many calls a run, so many of them at once."""

    at_once: int
    count: int


ALONE = Level(at_once=1, count=60)
MANY = Level(at_once=32, count=320)


@dataclass
class Series:
    """One side's runs at one level: workflows started a second, median latencies in ms, and calls without a start."""

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    not_started: int = 0

    def add(self, answer: Answer, count: int) -> None:
        if len(answer["latencies"]) != count:
            raise MeasurementError(f"{len(answer['latencies'])} calls were answered instead of {count}")
        self.rates.append(answer["started"] / answer["seconds"])
        self.latencies.append(median(answer["latencies"]) * MS)
        self.not_started += count - answer["started"]


@dataclass
class Pair:
    """Both sides at one level."""

    kiln: Series = field(default_factory=Series)
    bare: Series = field(default_factory=Series)


def measure() -> Result:
    """Submissions beside bare starts on the same Temporal server, while no worker runs. Raises MeasurementError."""
    with running_stack(parts=(TEMPORAL, API)) as stack, ExitStack() as children:
        submitter = children.enter_context(Child("submitter", _api(stack)))
        starter = children.enter_context(Child("starter", {"port": stack.settings.temporal_port}))
        pairs = _run(submitter, starter)
    figures = [figure for level, pair in pairs.items() for figure in _figures(level, pair)]
    return Result(figures, [note for level, pair in pairs.items() for note in _notes(level, pair)])


def _api(stack: LocalStack) -> dict[str, object]:
    settings = stack.settings
    return {"port": settings.api_port, "key": stack.api_key, "temporal_port": settings.temporal_port}


def _run(submitter: Child, starter: Child) -> dict[Level, Pair]:
    """Both sides by turns, and each of them first as often as the other."""
    for at_once in (ALONE.at_once, MANY.at_once):  # what is made at first use is made now
        submitter.ask("submit", at_once=at_once, count=at_once)
        starter.ask("start", at_once=at_once, count=at_once)
    pairs = {ALONE: Pair(), MANY: Pair()}
    for number in rounds(ROUNDS, SECONDS):
        for level, pair in pairs.items():
            sides = [(submitter, "submit", pair.kiln), (starter, "start", pair.bare)]
            for child, do, series in sides if number % 2 else reversed(sides):
                series.add(child.ask(do, at_once=level.at_once, count=level.count), level.count)
    return pairs


def _figures(level: Level, pair: Pair) -> list[Figure]:
    return [_rate_figure(level, pair), _latency_figure(level, pair)]


def _rate_figure(level: Level, pair: Pair) -> Figure:
    spread = ratios(pair.kiln.rates, pair.bare.rates)
    return Figure(
        name=f"submissions a second, {level.at_once} at once",
        kiln=f"{median(pair.kiln.rates):.1f}/s",
        reference=f"{median(pair.bare.rates):.1f}/s start_workflow",
        compared=f"{spread.middle:.2f} times ({spread.low:.2f} to {spread.high:.2f})",
        goal=f">= {RATE_GOAL} times",
        met=spread.middle >= RATE_GOAL,
        runs=f"{len(pair.kiln.rates)} x {level.count}",
    )


def _latency_figure(level: Level, pair: Pair) -> Figure:
    spread = ratios(pair.kiln.latencies, pair.bare.latencies)
    return Figure(
        name=f"median latency of a submission, {level.at_once} at once",
        kiln=f"{median(pair.kiln.latencies):.1f} ms",
        reference=f"{median(pair.bare.latencies):.1f} ms start_workflow",
        compared=f"{spread.middle:.2f} times ({spread.low:.2f} to {spread.high:.2f})",
        goal=f"<= {LATENCY_GOAL} times",
        met=spread.middle <= LATENCY_GOAL,
        runs=f"{len(pair.kiln.rates)} x {level.count}",
    )


def _notes(level: Level, pair: Pair) -> list[str]:
    """A submission whose workflow Kiln could not start in time is accepted all the same; its rate does not count it."""
    if not pair.kiln.not_started:
        return []
    asked = len(pair.kiln.rates) * level.count
    return [f"{level.at_once} at once: {pair.kiln.not_started} of {asked} submissions were left to the dispatcher."]
