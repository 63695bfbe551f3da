"""User ids for agents: one a pod, taken by nobody else."""

import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kiln.adapters.agent_users import AgentUsers
from kiln.errors import OperationFailedError

UIDS = range(390_200, 390_204)
KEYS = [f"pod-{number:012}" for number in range(4)]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give agents users of their own")


@pytest.fixture
def pods(tmp_path: Path) -> Path:
    for key in KEYS:
        (tmp_path / "pods" / key).mkdir(parents=True)
    return tmp_path / "pods"


def take(pods: Path, key: str) -> int | None:
    return AgentUsers(pods, UIDS).take(key)


def test_processes_that_take_at_once(pods: Path):
    """Several processes that take ids at the same time get different ones, all of the range."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        taken = pool.starmap(take, [(pods, key) for key in KEYS])
    assert sorted(taken) == list(UIDS)


def test_a_pod_keeps_its_id_until_it_is_gone(pods: Path):
    """A pod's id is the same each time; with its directory it is free again, and not before."""
    taken = [take(pods, key) for key in KEYS]
    assert [take(pods, key) for key in KEYS] == taken
    (pods / "pod-late").mkdir()
    with pytest.raises(OperationFailedError, match="all 4 user ids"):
        take(pods, "pod-late")
    shutil.rmtree(pods / KEYS[1])
    assert take(pods, "pod-late") == taken[1]


def test_id_that_something_runs_as(pods: Path):
    """An id that a process of the host has is left alone, whoever gave it."""
    with subprocess.Popen(["sleep", "600"], user=UIDS[0], group=UIDS[0], extra_groups=[]) as process:
        try:
            assert sorted(take(pods, key) or 0 for key in KEYS[:3]) == list(UIDS[1:])
            with pytest.raises(OperationFailedError):
                take(pods, KEYS[3])
        finally:
            process.kill()
