"""The role `runner` as a process of its own, without Temporal: what it needs, what it takes up, how it stops."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import worker
from cli.parts import environment_of
from kiln.catalog import runners
from kiln.catalog.pod_tables import Runner
from kiln.errors import KilnError, RefusedError
from kiln.models import PodRef
from kiln.settings import PROJECT_ROOT, Settings, SettingsError
from support.pod_rows import prompt
from support.processes import marked, soon
from support.runner_rig import RunnerRig
from worker_runner import run_runner

LISTENING = 'echo ready; while read -r line; do echo "got: $line"; done'
ENDS_SECONDS = 20


def test_roles_stand_apart(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A runner serves no other role, and its name is no other role's: one line each, and exit 1."""
    monkeypatch.setenv("KILN_HOME", str(tmp_path))
    assert "stands alone" in refusal(capsys, monkeypatch, "--role", "runner", "--role", "packer")
    assert "--role runner" in refusal(capsys, monkeypatch, "--role", "packer", "--runner-name", "x")


def test_token_is_needed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A runner without a token says which setting is missing, and exits with 1."""
    monkeypatch.setenv("KILN_HOME", str(tmp_path))
    monkeypatch.delenv("KILN_RUNNER_TOKEN", raising=False)
    assert "KILN_RUNNER_TOKEN" in refusal(capsys, monkeypatch, "--role", "runner")


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The line with which a worker does not even start."""
    monkeypatch.setattr(sys, "argv", ["worker.py", *arguments])
    assert worker.main() == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


async def test_name_must_be_the_tokens(rig: RunnerRig):
    """A runner whose token is another's says whose it is, and does not push that one's process out."""
    running = incarnation_of(rig)
    with pytest.raises(KilnError, match=f"runner_name: KILN_RUNNER_TOKEN belongs to the runner {rig.runner.name}"):
        await run_runner(settings_of(rig), "elsewhere", asyncio.Event())
    assert incarnation_of(rig) == running


def incarnation_of(rig: RunnerRig) -> str | None:
    """The process that is the runner's now."""
    with rig.api.catalog.read() as session:
        return session.get_one(Runner, rig.runner.id).incarnation


async def test_disabled_token_ends_the_process(rig: RunnerRig, mark: str):
    """A runner whose token is disabled ends, and leaves its agents to their leases."""
    ref = await left_alone(rig)
    running = asyncio.create_task(run_runner(settings_of(rig), rig.runner.name, asyncio.Event()))
    await answered(rig, ref, "one")
    with rig.api.catalog.transaction() as tx:
        runners.disable(tx, rig.runner.id)
    with pytest.raises(RefusedError):
        await asyncio.wait_for(running, ENDS_SECONDS)
    assert len(marked(mark)) == 1


async def test_process_without_temporal(rig: RunnerRig, mark: str):
    """Without Temporal a process keeps the agents that it finds; a second one in its directory gives way, one after its
    death takes over at once, and SIGTERM leaves the agents alive."""
    ref = await left_alone(rig)
    with started(rig) as first:
        await answered(rig, ref, "one")
        with pytest.raises(SettingsError, match="another runner's process"):
            await run_runner(settings_of(rig), None, asyncio.Event())
        first.kill()
        first.wait()
    with started(rig) as second:
        await answered(rig, ref, "two")
        began = time.monotonic()
        second.terminate()
        assert await soon(lambda: second.poll() is not None, ENDS_SECONDS)
        assert (second.returncode, time.monotonic() - began < 5) == (0, True)
    assert len(marked(mark)) == 1


async def test_what_it_writes_is_its_own(rig: RunnerRig):
    """What a runner writes of a pod, beside its sandbox, no other user may read: other pods' agents are such."""
    ref = await left_alone(rig)
    written = rig.root / ref.key / "acknowledged"
    written.unlink()
    with started(rig):
        await answered(rig, ref, "one")
        assert await soon(written.exists)
    assert written.stat().st_mode & 0o077 == 0


async def left_alone(rig: RunnerRig) -> PodRef:
    """A pod whose agent listens, and whose process is gone."""
    ref = rig.pod(LISTENING)
    async with rig.process() as process:
        running = asyncio.create_task(process.run(ref))
        await rig.printed(ref, "ready")
        running.cancel()
    return ref


def settings_of(rig: RunnerRig) -> Settings:
    return Settings(
        home=rig.root.parent / "home",
        runner_dir=rig.root.parent,
        runner_token=rig.token,
        api_url=rig.api.url,
        temporal_port=rig.api.settings.temporal_port,
        log_level="ERROR",
    )


@contextmanager
def started(rig: RunnerRig) -> Iterator[subprocess.Popen[bytes]]:
    """A runner's process, killed at the block's end at the latest."""
    command = [sys.executable, "-m", "worker", "--role", "runner", "--runner-name", rig.runner.name]
    own = {"PATH": os.environ["PATH"], "TEMPORAL_CONFIG_FILE": os.devnull}
    with subprocess.Popen(command, env={**own, **environment_of(settings_of(rig))}, cwd=PROJECT_ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


async def answered(rig: RunnerRig, ref: PodRef, text: str) -> None:
    """Returns once the agent has had a prompt."""
    prompt(rig.api.catalog, ref, text)
    await rig.printed(ref, f"got: {text}")
