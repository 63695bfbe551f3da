"""A document's code blocks, run in one shell as a reader would, and what they printed beside what the document says."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.local_stack import LocalStack
from kiln.settings import PROJECT_ROOT

README = (PROJECT_ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ("sh", "python")
BLOCK_MARK = "----- the document's next block"
# What differs from run to run.
CHANGING = (
    (re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "ID"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{3})?Z"), "TIME"),
    (re.compile(r"[0-9a-f]{8,}"), "HEX"),
    (re.compile(r"\d+\.\ds"), "SECONDS"),
    (re.compile(r"\d{4,}"), "NUMBER"),
)
# How far a build has come when it is looked at is not settled.
RACING = frozenset({"status", "build_status"})
RACING_PROGRESS = frozenset({"phase", "detail", "waiting_for"})
REST = "…"
# How an error begins, in each contract's shape.
REFUSALS = ('{"detail"', '{"error"', '{"client_code":4', '{"client_code":5')


@dataclass(frozen=True)
class Block:
    """What a reader is to run, and the answer that stands below it, if one does."""

    language: str
    text: str
    answer: str
    answer_language: str


def section(title: str) -> str:
    """The text below a `###` heading of the README, to the next heading."""
    return README.partition(f"\n### {title}\n")[2].partition("\n##")[0]


def blocks(*titles: str) -> list[Block]:
    """What is to be run in these sections, in their order."""
    found = []
    for title in titles:
        fences = list(FENCE.finditer(section(title)))
        for number, fence in enumerate(fences):
            if fence[1] in RUN:
                after = fences[number + 1] if number + 1 < len(fences) else None
                below = after if after is not None and after.start() == fence.end() + 1 else None
                found.append(Block(fence[1], fence[2], below[2] if below else "", below[1] if below else ""))
    return found


def printed_by(
    ran: Sequence[Block], folder: Path, places: Mapping[str, str], env: Mapping[str, str], seconds: float = 120
) -> list[str]:
    """What each block printed, all in one shell, since later ones use what earlier ones set.

    `places` are the document's hosts and programs, and this run's own; what was printed has the document's again.
    """
    finished = subprocess.run(
        ["bash", "-c", _script(ran, folder, places)],
        cwd=folder,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    return _replaced(finished.stdout, {ours: theirs for theirs, ours in places.items()}).split(BLOCK_MARK)[1:]


def reader_environment(stack: LocalStack, folder: Path) -> dict[str, str]:
    """What a reader's shell has at hand on a stack of their own, once the README's first lines were run."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(PROJECT_ROOT),
        "HOME": str(folder),
        "COLUMNS": "120",
        "KILN_HOME": str(stack.settings.home_dir),
        "KILN_EC2_PORT": str(stack.settings.ec2_port),
        "KILN_URL": stack.api_url,
        "AUTH": f"Authorization: Bearer {stack.api_key}",
        "JSON": "Content-Type: application/json",
    }


def _script(ran: Sequence[Block], folder: Path, places: Mapping[str, str]) -> str:
    lines = ["set -euo pipefail"]
    for number, block in enumerate(ran):
        text = _replaced(block.text, places)
        lines.append(f"echo {shlex.quote(BLOCK_MARK)}")
        if block.language == "python":
            snippet = folder / f"snippet{number}.py"
            snippet.write_text(text)
            text = shlex.join([sys.executable, str(snippet)])
        lines.append(text)
    return "\n".join(lines)


def _replaced(text: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


def check_answer(block: Block, printed: str) -> None:
    """It has the documented fields, with their values where these do not change from run to run; else no error."""
    if block.answer_language == "json":
        _compare(json.loads(block.answer), json.loads(printed), "answer")
    elif block.answer:
        lines = {_steady(line.rstrip()) for line in printed.splitlines()}
        missing = [line for line in block.answer.splitlines() if line != REST and _steady(line) not in lines]
        assert not missing, printed
    else:
        assert not printed.strip().startswith(REFUSALS), printed


def _compare(documented: Any, printed: Any, place: str) -> None:
    """Same fields, same items, same words; `…` stands for the rest of a text or a list. Null stands for what may be there
    or not."""
    if isinstance(documented, dict) and isinstance(printed, dict):
        assert documented.keys() == printed.keys(), place
        for name in documented.keys() - (RACING_PROGRESS if place.endswith(".progress") else RACING):
            _compare(documented[name], printed[name], f"{place}.{name}")
    elif isinstance(documented, list) and isinstance(printed, list):
        _compare_lists(documented, printed, place)
    elif isinstance(documented, str) and isinstance(printed, str):
        begin, cut, _ = documented.partition(REST)
        same = _steady(printed).startswith(_steady(begin)) if cut else _steady(printed) == _steady(begin)
        assert same, f"{place}: {printed!r}"
    elif documented is not None and printed is not None:
        assert type(documented) is type(printed), f"{place}: {printed!r}"
        assert not isinstance(documented, bool) or documented == printed, f"{place}: {printed!r}"


def _compare_lists(documented: list[Any], printed: list[Any], place: str) -> None:
    shown, compared = documented, printed
    if documented[-1:] == [REST]:
        shown = documented[:-1]
        compared = printed[: len(shown)]
    assert len(shown) == len(compared), place
    for number, (one, other) in enumerate(zip(shown, compared, strict=True)):
        _compare(one, other, f"{place}[{number}]")


def _steady(text: str) -> str:
    for pattern, name in CHANGING:
        text = pattern.sub(name, text)
    return text
