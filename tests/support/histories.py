"""Recorded histories: where they lie, how they are written, and what their payloads say."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from temporalio.client import WorkflowHistory

FOLDER = Path(__file__).resolve().parent.parent / "workflows" / "histories"
# In every recorded build: a variable's value that its tool prints, and that nobody may find again.
SECRET = "s3cr3t-4f1d-value"
# Of the machine that recorded, and of no use to a replay.
SCRUBBED = ("stackTrace",)


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def load(name: str) -> WorkflowHistory:
    return WorkflowHistory.from_json(name, (FOLDER / f"{name}.json").read_text())


def save(name: str, history: WorkflowHistory) -> None:
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(_scrubbed(history.to_json_dict()), indent=1)
    (FOLDER / f"{name}.json").write_text(text + "\n")


def texts(history: WorkflowHistory) -> str:
    """All that a history holds, payloads decoded."""
    as_dict = history.to_json_dict()
    return "\n".join([json.dumps(as_dict), *_payloads(as_dict)])


def _payloads(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("data"), str):
            yield base64.b64decode(part["data"]).decode(errors="replace")
        for value in part.values():
            yield from _payloads(value)
    elif isinstance(part, list):
        for value in part:
            yield from _payloads(value)


def _scrubbed(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _scrubbed(value) for key, value in part.items() if key not in SCRUBBED}
    return [_scrubbed(value) for value in part] if isinstance(part, list) else part
