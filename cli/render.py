"""What the command line prints: tables, a build's page, log lines, JSON."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.client import LogEvent

# Nobody's terminal is that wide: what is piped into a file is not cut off.
PIPED_WIDTH = 240
# What a tool printed may not steer the reader's terminal.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")
STATUS_STYLES = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "building": "cyan"}


def console() -> Console:
    """Standard output; as wide as it takes where that is no terminal."""
    made = Console(highlight=False, markup=False, emoji=False)
    return made if made.is_terminal else Console(highlight=False, markup=False, emoji=False, width=PIPED_WIDTH)


def print_json(value: object) -> None:
    """One JSON document, or one a line for a stream."""
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201


def print_event_json(event: LogEvent) -> None:
    """One event as a JSON object on a line."""
    shown = {"event": event.name, "id": event.number, **event.data}
    print(json.dumps(shown, ensure_ascii=False), flush=True)  # noqa: T201


def print_rows(titles: Sequence[str], rows: Iterable[Sequence[str | Text]], empty: str) -> None:
    """A table; `empty` instead of one without rows."""
    table = Table(*titles, box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*row)
    console().print(table if table.row_count else empty)


def print_builds(builds: Iterable[Mapping[str, Any]]) -> None:
    rows = [
        (
            str(build["id"]),
            str(build["kind"]),
            what_text(build),
            status_text(build["status"]),
            image_text(build),
            str(build["created_at"]),
        )
        for build in builds
    ]
    print_rows(("ID", "KIND", "WHAT", "STATUS", "IMAGE", "CREATED"), rows, "No builds.")


def print_build(build: Mapping[str, Any]) -> None:
    """One build, a property a line."""
    image, error, progress = build["image"] or {}, build["error"] or {}, build["progress"] or {}
    shown: dict[str, object] = {
        "id": build["id"],
        "status": status_text(build["status"]),
        "doing": progress.get("waiting_for") or progress.get("detail"),
        "error": error.get("message") and f"{error['message']} ({error['code']})",
        "image": image_text(build),
        "image state": image.get("state_reason") or image.get("state"),
        "region": image.get("region") or build["spec"].get("region"),
        "provider": build["spec"].get("provider"),
        "source": build["spec"].get("reference"),
        "tag": target_text(build),
        "made of": machine_text(build),
        "template": build["spec"].get("template_source"),
        "attempt": build["attempt"],
        "created": build["created_at"],
        "started": build["started_at"],
        "completed": build["completed_at"],
        "workflow": build["workflow_url"] or build["workflow_id"],
    }
    print_properties(shown)


def print_properties(shown: Mapping[str, object]) -> None:
    """Names and values, those without a value left out."""
    table = Table.grid(padding=(0, 2))
    for name, value in shown.items():
        if value not in (None, ""):
            table.add_row(Text(name, "bold"), value if isinstance(value, Text) else plain_text(str(value)))
    console().print(table)


def print_keys(keys: Iterable[Mapping[str, Any]]) -> None:
    rows = [
        (
            str(key["id"]),
            plain(key["name"]),
            str(key["organization"]),
            str(key["kind"]),
            f"{key['hint']}…",
            ", ".join(key["scopes"]),
            str(key["state"]),
            str(key["created_at"]),
            str(key["expires_at"] or "never"),
        )
        for key in keys
    ]
    print_rows(
        ("ID", "NAME", "ORGANIZATION", "KIND", "KEY", "SCOPES", "STATE", "CREATED", "EXPIRES"), rows, "No API keys."
    )


def print_machines(machines: Iterable[Mapping[str, Any]]) -> None:
    rows = [
        (
            str(machine["id"]),
            plain(machine["name"]),
            str(machine["organization"]),
            str(machine["status"]),
            str(machine["instance_id"] or "none"),
            f"{machine['region']}{' (simulated)' if machine['simulated'] else ''}",
            str(machine["machine_type"]),
            f"{machine['disk_size']} GiB",
            plain(machine["error"] or ""),
        )
        for machine in machines
    ]
    print_rows(
        ("ID", "NAME", "ORGANIZATION", "STATUS", "INSTANCE", "REGION", "TYPE", "DISK", "LAST ERROR"),
        rows,
        "No machines.",
    )


def event_text(event: LogEvent) -> str:
    """A log's event as a line to read; the `end` has none."""
    match event.name:
        case "line":
            mark = "[kiln] " if event.data["stream"] == "kiln" else ""
            return mark + plain(event.data["line"])
        case "gap":
            return f"[kiln] lines {event.data['from']} to {event.data['to']} were lost: {event.data['reason']}"
        case _:
            return ""


def status_text(status: str) -> Text:
    return Text(status, STATUS_STYLES.get(status, ""))


def what_text(build: Mapping[str, Any]) -> str:
    """What the build makes, in a word: the agent of a machine image, the tag of a container image, the machine imaged."""
    return str(build["spec"].get("provider") or "") or target_text(build) or machine_text(build)


def target_text(build: Mapping[str, Any]) -> str:
    """`owner/name:tag` of a container image; nothing for others."""
    target = build["spec"].get("target")
    return f"{target['owner']}/{target['name']}:{target['tag']}" if target else ""


def machine_text(build: Mapping[str, Any]) -> str:
    """`machine 7` of an image that is made of a machine; nothing for others."""
    machine_id = build["spec"].get("machine_id")
    return f"machine {machine_id}" if machine_id else ""


def image_text(build: Mapping[str, Any]) -> str:
    """The image's reference, marked where it is simulated."""
    image = build["image"]
    return f"{image['reference']}{' (simulated)' if image['simulated'] else ''}" if image else ""


def plain(text: str) -> str:
    """A line without control characters but tabs."""
    return CONTROL_CHARACTERS.sub("�", text)


def plain_text(text: str) -> str:
    """The same of many lines."""
    return "\n".join(plain(line) for line in text.split("\n"))
