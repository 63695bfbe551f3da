"""What becomes of agents when their stack stops and starts again, with the runner's folder where `kiln up` has it."""

import uuid
from pathlib import Path

import pytest

from support.pod_rig import agent_processes, mark_of, running_pod_rig
from support.processes import eventually

DEAF = "trap '' TERM; echo ready; while :; do sleep 600; done"


@pytest.mark.long
def test_the_next_start_tells_how_an_agent_ended(tmp_path: Path) -> None:
    """It ended with the stack, though it ignores SIGTERM; what is left of it goes then, and no folder stays behind."""
    home, mark = tmp_path / "home", uuid.uuid4().hex
    with running_pod_rig(home, runner_dir=None) as rig:
        key = rig.create(DEAF, auto_close=True, environment_variables=mark_of(mark))
        rig.printed(key, "ready")
        sandbox = rig.stack.settings.pods_dir / "pods" / key
        assert agent_processes(mark)
        assert sandbox.exists()
    assert not agent_processes(mark)
    assert sandbox.exists()
    with running_pod_rig(home, runner_dir=None) as rig:
        assert rig.wait(key)["status"] in {"failed", "terminated"}
        assert eventually(lambda: not sandbox.exists())
        assert rig.runner()["current_pods"] == 0
        pods_dir = rig.stack.settings.pods_dir
    assert pods_dir.is_relative_to(home) or not pods_dir.exists()
