"""How much longer a container build takes through Kiln than by `docker buildx build --push`, alone and many at once."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import median

from bench.build_phases import BUILDX, phase_notes, read_timelines
from bench.build_time import by_turns
from bench.container_build import ContainerBuilds
from bench.contexts import slow_context, small_context, working_context
from bench.figures import Figure, Result, differences, ratios, unmeasured
from bench.pacing import rounds
from bench.place import running_stack
from bench.plain_container import PlainContainers

ROUNDS = 15
SECONDS = 75.0
OVERHEAD_GOAL_SECONDS = 0.3
CROWD = 20
CROWD_ROUNDS = 5
CROWD_SECONDS = 120.0
CROWD_GOAL = 1.1
ALONE_NAME = "a container build, from POST to success"
CROWD_NAME = f"{CROWD} container builds at once, until the last"
CACHED_NAME = "an unchanged context again, of a 5 s step"
CACHED_ROUNDS = 3
CACHED_GOAL = 5.0
WORK_ROUNDS = 2
WORK_SECONDS = 60.0
WORK_NAME = f"{CROWD} at once with some seconds' work each"
NAMES = [ALONE_NAME, CACHED_NAME, CROWD_NAME, WORK_NAME]


def measure() -> Result:
    """Builds by turns, through Kiln and by hand, on the same engines. Raises MeasurementError."""
    small_context()
    with running_stack() as stack:
        if stack.containers.off:
            return unmeasured(NAMES, f"container builds are off: {stack.containers.off}")
        with ContainerBuilds(stack) as kiln, PlainContainers(stack) as plain:
            _warm_up(kiln, plain)
            through_kiln, without = by_turns(kiln, plain, ROUNDS, SECONDS)
            timelines = asyncio.run(read_timelines(stack.settings, through_kiln, BUILDX))
            cached = _cached(kiln)
            crowds = _crowds(kiln, plain, small_context, rounds(CROWD_ROUNDS, CROWD_SECONDS))
            working = _crowds(kiln, plain, working_context, rounds(WORK_ROUNDS, WORK_SECONDS))
    alone = _alone([build.seconds for build in through_kiln], [build.seconds for build in without])
    figures = [alone, cached, _crowd_figure(CROWD_NAME, *crowds), _crowd_figure(WORK_NAME, *working)]
    return Result(figures, phase_notes(timelines, without, BUILDX))


def _warm_up(kiln: ContainerBuilds, plain: PlainContainers) -> None:
    """What is made at first use is made, and every engine has the layers that do not change."""
    kiln.build(plain.build().seconds)
    kiln.crowd(_archives(4))
    plain.crowd(_archives(4))
    # The engine that the plain builds have is now the one that Kiln has for its own.
    kiln.build(0)


def _cached(kiln: ContainerBuilds) -> Figure:
    """How much sooner a build ends whose context was built before."""
    archives = [slow_context() for _ in range(CACHED_ROUNDS)]
    first: list[float] = []
    again: list[float] = []
    for archive in archives:
        first.append(kiln.crowd([archive]))
        again.append(kiln.crowd([archive]))
    spread = ratios(first, again)
    return Figure(
        name=CACHED_NAME,
        kiln=f"{median(again):.2f} s",
        reference=f"{median(first):.2f} s the first time",
        compared=f"{spread.middle:.1f} times faster ({spread.low:.1f} to {spread.high:.1f})",
        goal=f">= {CACHED_GOAL:g} times",
        met=spread.middle >= CACHED_GOAL,
        runs=f"{len(again)} x 2",
    )


def _crowds(
    kiln: ContainerBuilds, plain: PlainContainers, context: Callable[[], bytes], turns: Iterable[int]
) -> tuple[list[float], list[float]]:
    """Seconds by turns; each side is first as often as the other."""
    through_kiln: list[float] = []
    without: list[float] = []
    for number in turns:
        sides = [(kiln, through_kiln), (plain, without)]
        for side, seconds in sides if number % 2 else reversed(sides):
            seconds.append(side.crowd([context() for _ in range(CROWD)]))
    return through_kiln, without


def _archives(count: int) -> list[bytes]:
    return [small_context() for _ in range(count)]


def _alone(kiln: list[float], plain: list[float]) -> Figure:
    spread = differences(kiln, plain)
    return replace(
        _beside_plain(ALONE_NAME, kiln, plain),
        compared=f"{spread.middle:+.3f} s ({spread.low:+.3f} to {spread.high:+.3f})",
        goal=f"<= +{OVERHEAD_GOAL_SECONDS} s",
        met=spread.middle <= OVERHEAD_GOAL_SECONDS,
    )


def _crowd_figure(name: str, kiln: list[float], plain: list[float]) -> Figure:
    spread = ratios(kiln, plain)
    return replace(
        _beside_plain(name, kiln, plain, builds=CROWD),
        compared=f"{spread.middle:.2f} times ({spread.low:.2f} to {spread.high:.2f})",
        goal=f"<= {CROWD_GOAL} times",
        met=spread.middle <= CROWD_GOAL,
    )


def _beside_plain(name: str, kiln: list[float], plain: list[float], builds: int = 1) -> Figure:
    """The seconds of runs of so many builds each, not compared yet."""
    seconds, reference = f"{median(kiln):.2f} s", f"{median(plain):.2f} s docker buildx build"
    return Figure(name, seconds, reference, compared="-", goal="-", met=None, runs=f"{len(kiln)} x {builds}")
