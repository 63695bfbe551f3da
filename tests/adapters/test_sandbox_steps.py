"""Programs that run as a pod's user, and what is left of them."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kiln.adapters.sandbox_steps import PodUser, Step, run
from support.processes import MARK, eventually, marked
from support.sandboxes import AS_ROOT
from support.tools import PATH

pytestmark = pytest.mark.skipif(not AS_ROOT, reason="only root can run programs as other users")

UID = 390_300
RUNNER = f"""
import asyncio, os
from pathlib import Path
from kiln.adapters.sandbox_steps import PodUser, Step, run
script = "(setsid sleep 600 &) ; sleep 600"
asyncio.run(run(Step(["sh", "-c", script], dict(os.environ), Path("/"), 600, PodUser({UID}, 512, 100))))
"""


@pytest.mark.parametrize(("script", "code"), [("id -u; exit 7", 7), ("id -u; kill -TERM $$", -signal.SIGTERM)])
async def test_end_is_the_programs_own(script: str, code: int):
    """A program runs as the pod's user, and its exit code or signal is told."""
    done = await run(Step(["sh", "-c", script], {"PATH": PATH}, Path("/"), 20, PodUser(UID, 512, 100)))
    assert (done.code, done.lines) == (code, [str(UID)])


async def test_time_is_over():
    """A program that takes too long is ended with all that it started."""
    step = Step(["sh", "-c", "(setsid sleep 600 &); sleep 600"], {"PATH": PATH}, Path("/"), 0.5, PodUser(UID, 512, 100))
    assert (await asyncio.wait_for(run(step), 20)).code == 124


def test_runner_is_killed(mark: str):
    """What an agent left in its repository (a filter, a hook) does not run on without a runner."""
    runner = subprocess.Popen([sys.executable, "-c", RUNNER], env={"PATH": PATH, MARK: mark})
    try:
        assert eventually(lambda: len(marked(mark)) >= 4)
    finally:
        runner.kill()
        runner.wait()
    assert eventually(lambda: not marked(mark))
