"""How much longer a build takes through Kiln than by Packer alone."""

import asyncio
from statistics import median
from typing import Protocol

from bench.build_phases import PACKER, phase_notes, read_timelines
from bench.figures import Figure, Result, differences
from bench.kiln_build import KilnBuild, KilnBuilds
from bench.pacing import rounds
from bench.place import running_stack
from bench.plain_build import PlainBuild, PlainBuilds

ROUNDS = 15
SECONDS = 65.0
OVERHEAD_GOAL_SECONDS = 0.25


class PlainSide(Protocol):
    """Builds by a tool alone."""

    def build(self) -> PlainBuild:
        """One build. Raises MeasurementError unless it makes an image."""
        ...


def measure() -> Result:
    """Builds by turns, through Kiln and by plain `packer build`. Raises MeasurementError."""
    with running_stack(containers=False) as stack, KilnBuilds(stack) as kiln, PlainBuilds(stack.settings) as plain:
        kiln.build(plain.build().seconds)  # what is made or read at first use is now
        through_kiln, without = by_turns(kiln, plain, ROUNDS, SECONDS)
        timelines = asyncio.run(read_timelines(stack.settings, through_kiln, PACKER))
    figure = _figure([build.seconds for build in through_kiln], [build.seconds for build in without])
    return Result([figure], phase_notes(timelines, without, PACKER))


def by_turns(kiln: KilnBuilds, plain: PlainSide, most: int, seconds: float) -> tuple[list[KilnBuild], list[PlainBuild]]:
    """Each side is first as often as the other. Kiln's client does not ask before the tool alone could be done."""
    through_kiln: list[KilnBuild] = []
    without = [plain.build()]
    for number in rounds(most, seconds):
        if number % 2:
            without.append(plain.build())
        through_kiln.append(kiln.build(min(build.seconds for build in without)))
        if not number % 2:
            without.append(plain.build())
    return through_kiln, without[1:]


def _figure(kiln: list[float], plain: list[float]) -> Figure:
    spread = differences(kiln, plain)
    return Figure(
        name="a build, from POST to succeeded",
        kiln=f"{median(kiln):.2f} s",
        reference=f"{median(plain):.2f} s packer build",
        compared=f"{spread.middle:+.3f} s ({spread.low:+.3f} to {spread.high:+.3f})",
        goal=f"<= +{OVERHEAD_GOAL_SECONDS} s",
        met=spread.middle <= OVERHEAD_GOAL_SECONDS,
        runs=f"{len(kiln)} x 1",
    )
