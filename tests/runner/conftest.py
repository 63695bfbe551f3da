"""One API for all tests of a file; each has an organization, a runner and a host's directory of its own."""

import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support.api_server import RunningApi, settings_for
from support.pod_rig import runner_folder
from support.ports import free_ports
from support.processes import marked
from support.runner_rig import RunnerRig


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    """A served API; Temporal is away."""
    with RunningApi(settings_for(tmp_path_factory.mktemp("api"), free_ports(1)[0])) as api:
        yield api


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark for this test's agents; whatever still carries it at the end is killed."""
    mark = uuid.uuid4().hex
    yield mark
    for pid in marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A runner's directory."""
    with runner_folder() as folder:
        yield folder


@pytest.fixture
async def rig(api: RunningApi, folder: Path, mark: str) -> AsyncIterator[RunnerRig]:
    rig = RunnerRig(api, folder, mark)
    yield rig
    await rig.close()
