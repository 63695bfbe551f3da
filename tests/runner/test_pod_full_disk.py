"""A runner whose disk was filled by an agent."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.pod_rig import runner_folder
from support.runner_rig import RunnerRig

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")

FILL = "echo ready; cat /dev/zero > zeros 2>/dev/null"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A runner's directory on a disk of 2 MB."""
    with runner_folder() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=711", "tmpfs", folder], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


async def test_end_on_a_full_disk(rig: RunnerRig, caplog: pytest.LogCaptureFixture):
    """An agent that filled the disk ends with its own exit code, and nothing of its run has to be tried again."""
    ref = rig.pod(f"{FILL}; exit 5")
    async with rig.process() as process:
        result = await process.run(ref)
    assert (result.exit_code, rig.row(ref).exit_code) == (5, 5)
    assert "trying again" not in caplog.text


async def test_log_after_a_full_disk(rig: RunnerRig):
    """Lines for which there was no room are counted, and those that come once there is some are in the log again."""
    script = (
        f"{FILL}; for n in $(seq 3000); do echo a rather long line $n; done; rm zeros; sleep 0.3; echo room; echo more"
    )
    ref = rig.pod(script)
    async with rig.process() as process:
        await process.run(ref)
    [told] = [line for line in rig.log(ref) if "lines of output are lost" in line]
    assert rig.log(ref)[-3:-1] == ["room", "more"]
    kept = sum(line.startswith("a rather") for line in rig.log(ref))
    # A line that the shim took in two pieces counts as two, and its beginning may be kept without its end.
    assert abs(int(told.split()[0].lstrip("[")) - (3000 - kept)) <= 2
