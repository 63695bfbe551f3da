"""What pods come to when their runner's worker dies or freezes at an awkward moment."""

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.pod_rig import PodRig, agent_processes, mark_of, running_pod_rig
from support.processes import eventually

pytestmark = [pytest.mark.fault, pytest.mark.long]

LEASE_SECONDS = 12.0
LINES = 500
KILLS = 6


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodRig]:
    home = tmp_path_factory.mktemp("pods") / "home"
    with running_pod_rig(home, pod_lease_seconds=LEASE_SECONDS, runner_places=3) as rig:
        yield rig


@pytest.fixture
def rig(shared: PodRig) -> Iterator[PodRig]:
    yield shared
    if "runner" not in shared.stack.parts:
        shared.stack.start_parts("runner")
    shared.end_all()


@pytest.fixture
def starts(rig: PodRig) -> Path:
    """A folder in which every agent may write."""
    folder = rig.folder / "starts"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def test_a_worker_that_dies_again_and_again(rig: PodRig, starts: Path) -> None:
    """SIGKILL of the worker at all moments of five pods' lives, more than there are places: each has one agent, its whole
    log with neither gap nor double, and its own exit code."""
    mark = uuid.uuid4().hex
    script = f"echo x >> {starts}/$NAME; seq {LINES}; sleep 0.5; seq {LINES}; exit 3"
    keys = {name: rig.create(script, environment_variables={**mark_of(mark), "NAME": name}) for name in "abcde"}
    for kill in range(KILLS):
        time.sleep(0.15 * kill)  # each time a little later in the pods' lives
        rig.kill_runner()
        rig.stack.start_parts("runner")
    for name, key in keys.items():
        assert rig.wait(key, seconds=90)["exit_code"] == 3
        assert (starts / name).read_text() == "x\n"
        numbers = [line for line in rig.log(key).splitlines() if line.isdecimal()]
        assert numbers == 2 * [str(number) for number in range(1, LINES + 1)]
        assert rig.events(key)[-1] == ("end", {"status": "failed"})
    assert not agent_processes(mark)
    assert eventually(lambda: (rig.runner()["status"], rig.runner()["current_pods"]) == ("online", 0))


def test_a_worker_that_is_frozen_past_the_lease(rig: PodRig) -> None:
    """Its agent ends by itself as its pod is failed; when the worker goes on, nothing of the pod comes back, and its sandbox
    goes."""
    mark = uuid.uuid4().hex
    key = rig.create("echo ready; exec sleep 600", environment_variables=mark_of(mark))
    rig.printed(key, "ready")
    worker = int(rig.runner()["host_info"]["pid"])
    os.kill(worker, signal.SIGSTOP)
    try:
        pod = rig.wait(key, seconds=LEASE_SECONDS + 20)
        assert (pod["status"], pod["error"]) == ("failed", "its runner did not come back")
        assert eventually(lambda: not agent_processes(mark), 10)
    finally:
        os.kill(worker, signal.SIGCONT)
    assert eventually(lambda: rig.runner()["status"] == "online")
    assert eventually(lambda: not rig.sandbox(key).exists(), 20)
    assert not agent_processes(mark)
    assert rig.pod(key)["status"] == "failed"
    assert rig.events(key)[-1] == ("end", {"status": "failed"})
