"""What the bench prints: figures beside their references, and the statistics behind them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from cli.render import print_rows

TITLES = ("FIGURE", "KILN", "REFERENCE", "COMPARED", "GOAL", "MET", "RUNS")


class MeasurementError(Exception):
    """A figure could not be measured; the message says why."""


@dataclass(frozen=True)
class Figure:
    """One line of the table. `met` is None where there is no goal."""

    name: str
    kiln: str
    reference: str
    compared: str
    goal: str
    met: bool | None
    runs: str

    @property
    def missed(self) -> bool:
        return self.met is False


@dataclass(frozen=True)
class Result:
    """A part's figures, and lines that explain them."""

    figures: list[Figure]
    notes: list[str] = field(default_factory=list)


def unmeasured(names: Iterable[str], why: str) -> Result:
    """Lines of the table without figures, where this machine has not what they need."""
    return Result([Figure(name, "-", "-", "-", "-", None, "-") for name in names], [f"Not measured: {why}"])


@dataclass(frozen=True)
class Spread:
    """The median of some runs, between their quartiles."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Raises MeasurementError if there are none."""
        ordered = sorted(values)
        return cls(median(ordered), percentile(ordered, 25), percentile(ordered, 75))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of all do not exceed. Raises MeasurementError if there are none."""
    if not values:
        raise MeasurementError("nothing was measured")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def ratios(mine: Sequence[float], reference: Sequence[float]) -> Spread:
    """Run by run, since both runs of a pair saw about the same machine."""
    return Spread.of([one / other for one, other in zip(mine, reference, strict=True)])


def differences(mine: Sequence[float], reference: Sequence[float]) -> Spread:
    """Run by run, as `ratios`."""
    return Spread.of([one - other for one, other in zip(mine, reference, strict=True)])


def print_figures(figures: Sequence[Figure]) -> None:
    print_rows(TITLES, [_row(figure) for figure in figures], "Nothing was measured.")


def _row(figure: Figure) -> tuple[str, ...]:
    met = {True: "yes", False: "NO", None: "-"}[figure.met]
    return (
        figure.name,
        figure.kiln,
        figure.reference,
        figure.compared,
        figure.goal,
        met,
        figure.runs,
    )
