"""The README's container sections, run as they stand: both published clients, every curl line, and Docker's own client."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kiln.settings import PROJECT_ROOT, Settings
from support.container_rig import ContainerRig, container_rig
from support.oci_images import Pusher, image, index
from support.registry import running_registry

README = (PROJECT_ROOT / "README.md").read_text()
SECTIONS = ("cloud-builds", "container-images", "Pulling images", "Errors")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ("sh", "python")
BLOCK_MARK = "----- the README's next block"
# What differs from run to run.
CHANGING = (
    (re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "ID"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"), "TIME"),
    (re.compile(r"[0-9a-f]{8,}"), "HEX"),
    (re.compile(r"\d+\.\ds"), "SECONDS"),
    (re.compile(r"\d{4,}"), "NUMBER"),
)
# How far a build has come when it is looked at is not settled.
RACING = frozenset({"status", "build_status"})
# `kiln up` tells its parts by it; it is nobody else's to set.
OWN_SETTINGS = frozenset({"containers_off"})


@dataclass(frozen=True)
class Block:
    """What a reader is to run, and the answer that stands below it, if one does."""

    language: str
    text: str
    answer: str
    answer_language: str


def _section(title: str) -> str:
    """A section's text, to the next heading."""
    return README.partition(f"\n### {title}\n")[2].partition("\n##")[0]


def _blocks() -> list[Block]:
    found = []
    for title in SECTIONS:
        section = _section(title)
        fences = list(FENCE.finditer(section))
        for number, fence in enumerate(fences):
            if fence[1] in RUN:
                after = fences[number + 1] if number + 1 < len(fences) else None
                below = after if after is not None and after.start() == fence.end() + 1 else None
                found.append(Block(fence[1], fence[2], below[2] if below else "", below[1] if below else ""))
    return found


BLOCKS = _blocks()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that stands in for the public ones; the port of it."""
    with running_registry(tmp_path_factory.mktemp("foreign")) as host:
        pusher = Pusher(host)
        for name, tag in (("pause", "3.9"), ("prometheus/busybox", "latest")):
            pusher.push(name, index(image(name), image(f"{name} for arm", "linux/arm64")), tag)
        pusher.close()
        yield host.rpartition(":")[2]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, foreign: str) -> Iterator[ContainerRig]:
    allowed = f"127.0.0.1:{foreign},localhost:{foreign}"
    with container_rig(tmp_path_factory.mktemp("kiln"), KILN_TRANSFER_REGISTRIES=allowed) as rig:
        yield rig


@pytest.fixture(scope="module")
def answers(rig: ContainerRig, foreign: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each block printed, with the hosts that the README has."""
    places = {
        "127.0.0.1:5000": rig.registry,
        "127.0.0.1:8000": rig.stack.api_url.removeprefix("http://"),
        "registry.k8s.io": f"127.0.0.1:{foreign}",
        "quay.io": f"localhost:{foreign}",
    }
    folder = tmp_path_factory.mktemp("reader")
    finished = subprocess.run(
        ["bash", "-c", _script(folder, places)],
        cwd=folder,
        env=_environment(rig, folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    return _replaced(finished.stdout, {ours: theirs for theirs, ours in places.items()}).split(BLOCK_MARK)[1:]


def _script(folder: Path, places: Mapping[str, str]) -> str:
    """All blocks in one shell, since later ones use what earlier ones set."""
    lines = ["set -euo pipefail"]
    for number, block in enumerate(BLOCKS):
        text = _replaced(block.text, places)
        lines.append(f"echo {shlex.quote(BLOCK_MARK)}")
        if block.language == "python":
            snippet = folder / f"snippet{number}.py"
            snippet.write_text(text)
            text = shlex.join([sys.executable, str(snippet)])
        lines.append(text)
    return "\n".join(lines)


def _environment(rig: ContainerRig, folder: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "KILN_URL": rig.stack.api_url,
        "KILN_API_KEY": rig.admin.key,
        "AUTH": f"Authorization: Bearer {rig.admin.key}",
        "JSON": "Content-Type: application/json",
        "DOCKER_HOST": rig.stack.containers.hosts[0],
        "DOCKER_CONFIG": str(folder / "docker"),
    }


def _replaced(text: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=lambda number: f"{BLOCKS[number].language}-{number}")
def test_a_block_answers_as_the_readme_says(answers: list[str], number: int) -> None:
    """It has the documented fields, with their values where these do not change from run to run; else no error."""
    block, printed = BLOCKS[number], answers[number]
    if block.answer_language == "json":
        _compare(json.loads(block.answer), json.loads(printed), "answer")
    elif block.answer:
        lines = {_steady(line) for line in printed.splitlines()}
        missing = [line for line in block.answer.splitlines() if line != "…" and _steady(line) not in lines]
        assert not missing, printed
    else:
        assert not printed.strip().startswith(('{"detail"', '{"error"')), printed


def test_the_sections_hold_what_is_to_be_run() -> None:
    """Both clients' snippets and the curl lines are found, each section's."""
    languages = [block.language for block in BLOCKS]
    assert languages.count("python") == 2
    assert languages.count("sh") >= 20
    for title in SECTIONS:
        assert "```sh" in _section(title), title


def test_every_setting_has_its_row() -> None:
    """The table names each setting, and no setting that is not there."""
    rows = set(re.findall(r"^\| `KILN_(\w+)` \|", README, re.MULTILINE))
    assert rows == {name.upper() for name in Settings.model_fields.keys() - OWN_SETTINGS}


def _compare(documented: Any, printed: Any, place: str) -> None:
    """Same fields, same items, same words; `…` stands for the rest of a text. Null stands for what may be there or not."""
    if isinstance(documented, dict) and isinstance(printed, dict):
        assert documented.keys() == printed.keys(), place
        for name in documented.keys() - RACING:
            _compare(documented[name], printed[name], f"{place}.{name}")
    elif isinstance(documented, list) and isinstance(printed, list):
        assert len(documented) == len(printed), place
        for number, (one, other) in enumerate(zip(documented, printed, strict=True)):
            _compare(one, other, f"{place}[{number}]")
    elif isinstance(documented, str) and isinstance(printed, str):
        begin, cut, _ = documented.partition("…")
        same = _steady(printed).startswith(_steady(begin)) if cut else _steady(printed) == _steady(begin)
        assert same, f"{place}: {printed!r}"
    elif documented is not None and printed is not None:
        assert type(documented) is type(printed), f"{place}: {printed!r}"
        assert not isinstance(documented, bool) or documented == printed, f"{place}: {printed!r}"


def _steady(text: str) -> str:
    for pattern, name in CHANGING:
        text = pattern.sub(name, text)
    return text
