"""Where a build's time goes, by the clocks of those who did the work: client, catalog, Temporal and log."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from statistics import median

from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client

from bench.figures import MeasurementError
from bench.kiln_build import POLL_SECONDS, KilnBuild
from bench.plain_build import PlainBuild
from kiln.adapters.logs import LogStore
from kiln.catalog import builds
from kiln.catalog.session import Catalog
from kiln.naming import build_workflow_id
from kiln.ports import LogLine
from kiln.settings import Settings
from kiln.temporal import connected_client

LOG_LINES = 100_000
MS = 1000


@dataclass(frozen=True)
class Builder:
    """Who builds: its activity, its tool, and what it does before the tool and after, in words."""

    activity: str
    tool: str
    before: str
    after: str
    publishing: str


PACKER = Builder(
    activity="packer-build",
    tool="Packer",
    before="attempt, security group, variables, guard",
    after="Packer's exit, log, account, lease",
    publishing="verify and publish",
)
BUILDX = Builder(
    activity="container-build",
    tool="buildx",
    before="attempt, engine, context, login, guard",
    after="buildx's exit, digest, tidying of folder and engine, log, lease",
    publishing="look at the staged manifest, copy it, tag it",
)


def phases_of(builder: Builder) -> dict[str, str]:
    """A build's moments in their order, and what passes before each of them."""
    return {
        "row": "the request until its row is in the catalog",
        "workflow": "until Temporal has the workflow",
        "wanted": "until the workflow has claimed the build and asks for a builder",
        "builder": "until a builder takes it up",
        "tool": f"until {builder.tool} runs: {builder.before}",
        "last_line": f"{builder.tool}, until its last line",
        "built": f"until its builder is done: {builder.after}",
        "published": builder.publishing,
        "seen": f"until the client sees it, which asks every {POLL_SECONDS * MS:.0f} ms",
    }


Timeline = Mapping[str, float]


async def read_timelines(settings: Settings, seen: Sequence[KilnBuild], builder: Builder) -> list[Timeline]:
    """The moments of each build (s since the epoch), of which `asked` and `answered` are the client's own."""
    client = await connected_client(settings, "bench")
    catalog, logs = Catalog(settings.catalog_dsn, pool_size=1), LogStore(settings.logs_dsn)
    try:
        return [
            {
                "asked": build.asked,
                **_of_catalog(catalog, build.build_id),
                **await _of_temporal(client, build.build_id, builder),
                "last_line": _last_line(logs, build.build_id),
                "answered": build.answered,
                "seen": build.seen,
            }
            for build in seen
        ]
    finally:
        logs.close()
        catalog.close()


def phase_notes(timelines: Sequence[Timeline], plain: Sequence[PlainBuild], builder: Builder) -> list[str]:
    """Each phase's median, for people."""
    phases = phases_of(builder)
    moments = ["asked", *phases]
    lines = ["Where a build's time goes (medians):"]
    for before, moment in itertools.pairwise(moments):
        spent = median(each[moment] - each[before] for each in timelines)
        lines.append(f"  {spent * MS:7.0f} ms  {phases[moment]}")
    answered = median(each["answered"] - each["asked"] for each in timelines)
    until_last = median(run.seconds - run.exit_seconds for run in plain)
    exiting = median(run.exit_seconds for run in plain)
    lines.append(f"The client has its answer after {answered * MS:.0f} ms.")
    lines.append(f"Plain {builder.tool}: {until_last * MS:.0f} ms until its last line, {exiting * MS:.0f} ms to exit.")
    return lines


def _of_catalog(catalog: Catalog, build_id: str) -> Timeline:
    with catalog.read() as session:
        row = builds.get(session, build_id)
        if row is None or row.started_at is None or row.completed_at is None:
            raise MeasurementError(f"the catalog does not know when build {build_id} ran")
        return {
            "row": row.created_at.timestamp(),
            "tool": row.started_at.timestamp(),
            "published": row.completed_at.timestamp(),
        }


async def _of_temporal(client: Client, build_id: str, builder: Builder) -> Timeline:
    handle = client.get_workflow_handle(build_workflow_id(build_id))
    events = [event async for event in handle.fetch_history_events()]
    wanted = _first(
        events, lambda event: event.activity_task_scheduled_event_attributes.activity_type.name == builder.activity
    )
    scheduled_id = wanted.event_id
    builder = _first(
        events, lambda event: event.activity_task_started_event_attributes.scheduled_event_id == scheduled_id
    )
    built = _first(
        events, lambda event: event.activity_task_completed_event_attributes.scheduled_event_id == scheduled_id
    )
    return {
        "workflow": _time(events[0]),
        "wanted": _time(wanted),
        "builder": _time(builder),
        "built": _time(built),
    }


def _first(events: Sequence[HistoryEvent], wanted: Callable[[HistoryEvent], bool]) -> HistoryEvent:
    for event in events:
        if wanted(event):
            return event
    raise MeasurementError("a build's history tells of no builder's run from its scheduling to its completion")


def _time(event: HistoryEvent) -> float:
    return event.event_time.ToDatetime(UTC).timestamp()


def _last_line(logs: LogStore, build_id: str) -> float:
    """When the tool's last line was read."""
    lines = [line for line in logs.read(build_id, 0, LOG_LINES) if isinstance(line, LogLine)]
    times = [line.time for line in lines if line.stream != "kiln"]
    if not times:
        raise MeasurementError(f"the log of build {build_id} has no line of its tool's")
    return times[-1].timestamp()
