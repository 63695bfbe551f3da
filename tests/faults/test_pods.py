"""Agents outlive the worker that runs them, and nothing outlives its agent's end; each is shown with real processes."""

import os
import signal
import uuid
from collections.abc import Iterator

import pytest

from support.pod_rig import PodRig, agent_processes, mark_of, running_pod_rig
from support.processes import eventually

pytestmark = [pytest.mark.fault, pytest.mark.long]

COUNTING = 'i=0; while :; do i=$((i+1)); echo "tick $i"; sleep 0.2; done'
LISTENING = 'echo ready; while read -r line; do echo "got: $line"; done'
STUBBORN_TREE = """
    trap '' TERM
    sleep 600 &
    setsid sleep 600 &
    (setsid sh -c 'trap "" TERM; sleep 600' &)
    echo ready
    while :; do sleep 1; done
"""
# Forks until it may not any more, and goes on trying.
FORK_BOMB = "echo ready; while :; do (while :; do sleep 30 & done) 2>/dev/null; done"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodRig]:
    with running_pod_rig(tmp_path_factory.mktemp("pods") / "home", pod_lease_seconds=25.0) as rig:
        yield rig


@pytest.fixture
def rig(shared: PodRig) -> Iterator[PodRig]:
    yield shared
    for name in ("temporal", "worker", "api", "runner"):
        if name not in shared.stack.parts:
            shared.stack.start_parts(name)
    shared.end_all()


@pytest.fixture
def mark() -> str:
    return uuid.uuid4().hex


def _started(rig: PodRig, script: str, mark: str, line: str = "ready") -> str:
    key = rig.create(script, environment_variables=mark_of(mark))
    rig.printed(key, line)
    return key


def _ticks(rig: PodRig, key: str) -> list[int]:
    return [int(line.split()[1]) for line in rig.log(key).splitlines() if line.startswith("tick ")]


def test_a_killed_worker_leaves_three_agents_to_the_next_one(rig: PodRig, mark: str) -> None:
    """SIGKILL of the runner's worker with three agents: the same processes go on under the next worker, their logs have
    neither gap nor double, a prompt and a terminate reach them."""
    counting = _started(rig, COUNTING, mark, "tick 1")
    listening = _started(rig, LISTENING, mark)
    ending = _started(rig, "echo ready; sleep 5; echo over; exit 3", mark)
    before = agent_processes(mark)
    rig.kill_runner()
    rig.stack.start_parts("runner")
    rig.prompt(listening, "are you there")
    rig.printed(listening, "got: are you there")
    assert rig.wait(ending)["exit_code"] == 3
    assert rig.log(ending).splitlines()[-2:] == ["ready", "over"]
    far = max(_ticks(rig, counting))
    assert eventually(lambda: max(_ticks(rig, counting)) > far + 3)
    assert _ticks(rig, counting) == list(range(1, max(_ticks(rig, counting)) + 1))
    assert agent_processes(mark) & before, "no process of before is there any more"
    rig.terminate(counting)
    rig.terminate(listening)
    assert eventually(lambda: not agent_processes(mark), 10)


def test_an_agent_that_ended_while_no_worker_was_there_is_told_of(rig: PodRig, mark: str) -> None:
    """Exit code and last lines of an agent that ended between two workers are the pod's all the same."""
    key = _started(rig, "echo ready; sleep 2; echo last; exit 7", mark)
    rig.kill_runner()
    assert eventually(lambda: not agent_processes(mark), 10)
    rig.stack.start_parts("runner")
    pod = rig.wait(key)
    assert (pod["status"], pod["exit_code"]) == ("failed", 7)
    assert rig.log(key).splitlines()[-1] == "last"


def test_a_killed_agent_fails_its_pod_alone(rig: PodRig, mark: str) -> None:
    """SIGKILL of one agent's process: its pod is failed and says by what; the other goes on."""
    other = uuid.uuid4().hex
    key = _started(rig, "echo ready; exec sleep 600", mark)
    bystander = _started(rig, LISTENING, other)
    for pid in agent_processes(mark):
        os.kill(pid, signal.SIGKILL)
    pod = rig.wait(key)
    assert (pod["status"], pod["error"]) == ("failed", "the agent was ended by SIGKILL")
    rig.prompt(bystander, "still there")
    rig.printed(bystander, "got: still there")


def test_temporal_away_for_a_minute_ends_no_agent(rig: PodRig, mark: str) -> None:
    """While Temporal is stopped, agents work on, take prompts and are terminated; afterwards the pods end as they should."""
    listening = _started(rig, LISTENING, mark)
    ended = uuid.uuid4().hex
    terminated = _started(rig, LISTENING, ended)
    pids = agent_processes(mark)
    rig.stack.stop_part("temporal")
    rig.terminate(terminated)
    assert eventually(lambda: not agent_processes(ended), 10)
    # Longer than the activity's heartbeat time-out: Temporal takes the attempt for lost when it comes back.
    assert not eventually(lambda: agent_processes(mark) != pids, 60)
    rig.stack.start_parts("temporal")
    rig.prompt(listening, "exit")
    rig.printed(listening, "got: exit")
    assert rig.pod(listening)["status"] == "running"
    assert agent_processes(mark) == pids
    rig.terminate(listening)
    assert eventually(lambda: not agent_processes(mark), 15)
    for key in (listening, terminated):
        assert rig.events(key)[-1] == ("end", {"status": "terminated"})


def test_a_vanished_runner_orphans_its_pods_and_comes_back_to_them(rig: PodRig, mark: str) -> None:
    """Its worker gone, the runner is offline and the pod orphaned within 30 s; prompts are refused; a worker that comes
    back before the lease is over has the pod running again."""
    key = _started(rig, LISTENING, mark)
    rig.kill_runner()
    assert rig.wait(key, "orphaned", seconds=30)["finished_at"] is None
    assert rig.runner()["status"] == "offline"
    answer = rig.http.post(f"/api/v1/ext/orgs/default/pods/{key}/prompt", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["code"]) == (503, "SERVICE_UNAVAILABLE")
    answer = rig.http.post("/api/v1/ext/orgs/default/pods", json={"runner_id": "local"})
    assert (answer.status_code, answer.json()["code"]) == (503, "NO_AVAILABLE_RUNNER")
    rig.stack.start_parts("runner")
    rig.wait(key, "running", seconds=10)
    rig.prompt(key, "again")
    rig.printed(key, "got: again")


def test_a_runner_that_does_not_come_back_loses_its_pods(rig: PodRig, mark: str) -> None:
    """The lease over, the pod is failed and its agent dead; the sandbox goes at the runner's next start."""
    key = _started(rig, LISTENING, mark)
    rig.kill_runner()
    pod = rig.wait(key, seconds=60)
    assert (pod["status"], pod["error"]) == ("failed", "its runner did not come back")
    assert eventually(lambda: not agent_processes(mark), 15)
    assert rig.events(key)[-1] == ("end", {"status": "failed"})
    assert rig.sandbox(key).exists()
    rig.stack.start_parts("runner")
    assert eventually(lambda: not rig.sandbox(key).exists(), 20)


def test_a_terminate_while_the_runner_is_away_holds(rig: PodRig, mark: str) -> None:
    """An orphaned pod can be terminated; its agent ends as soon as the runner hears of it, and starts no more."""
    key = _started(rig, LISTENING, mark)
    rig.kill_runner()
    rig.terminate(key)
    assert rig.pod(key)["status"] == "terminated"
    rig.stack.start_parts("runner")
    assert eventually(lambda: not agent_processes(mark), 15)
    assert eventually(lambda: not rig.sandbox(key).exists(), 15)


def test_a_tree_that_ignores_sigterm_is_killed_after_the_grace(rig: PodRig, mark: str) -> None:
    """Whatever the agent started, in sessions of its own or orphaned, is gone within the grace."""
    key = _started(rig, STUBBORN_TREE, mark)
    assert len(agent_processes(mark)) >= 5
    rig.terminate(key)
    assert rig.pod(key)["status"] == "terminated"
    assert eventually(lambda: not agent_processes(mark), 10)


def test_a_fork_bomb_stays_in_its_pod(rig: PodRig, mark: str) -> None:
    """A pod that forks without end has no more processes than its limit, another pod starts beside it, and a terminate
    ends it."""
    limits = rig.http.get("/api/v1/ext/orgs/default/runners/local").json()["runner"]["host_info"]
    assert limits
    key = rig.create(FORK_BOMB, environment_variables=mark_of(mark), limits={"processes": 64})
    rig.printed(key, "ready")
    assert eventually(lambda: len(agent_processes(mark)) > 40, 20)
    assert not eventually(lambda: len(agent_processes(mark)) > 64, 2)
    beside = rig.create("echo fine")
    assert rig.wait(beside)["status"] == "completed"
    rig.terminate(key)
    assert eventually(lambda: not agent_processes(mark), 20)


def test_an_operator_who_terminates_the_workflow_ends_no_agent(rig: PodRig, mark: str) -> None:
    """Termination in Temporal runs no code: the pod is given a run again, which joins the agent that is still there."""
    key = _started(rig, LISTENING, mark)
    pids = agent_processes(mark)
    terminated = rig.workflow(key)
    rig.temporal_cli("workflow", "terminate", "-w", key)
    assert eventually(lambda: rig.workflow(key)[0] != terminated[0] and rig.workflow(key)[1].endswith("RUNNING"), 40)
    rig.prompt(key, "hello")
    rig.printed(key, "got: hello")
    assert agent_processes(mark) == pids


def test_an_operator_who_cancels_the_workflow_terminates_the_pod(rig: PodRig, mark: str) -> None:
    """A cancel in Temporal's own tools is a terminate."""
    key = _started(rig, LISTENING, mark)
    rig.temporal_cli("workflow", "cancel", "-w", key)
    assert rig.wait(key)["status"] == "terminated"
    assert eventually(lambda: not agent_processes(mark), 10)


def test_a_signal_of_another_service_prompts_the_agent(rig: PodRig, mark: str) -> None:
    """The workflow's signal `prompt` reaches the agent's terminal."""
    key = _started(rig, LISTENING, mark)
    rig.temporal_cli("workflow", "signal", "-w", key, "--name", "prompt", "--input", '"from outside"')
    rig.printed(key, "got: from outside")


def test_everything_killed_at_once_ends_truthfully(rig: PodRig, mark: str) -> None:
    """Temporal, worker, API and runner SIGKILLed: once they are back, the agent is still the pod's, and ends as its own."""
    key = _started(rig, LISTENING, mark)
    pids = agent_processes(mark)
    for name in ("temporal", "worker", "api", "runner"):
        rig.stack.kill(name)
        rig.stack.wait_for_exit(name)
    rig.stack.start_parts("temporal")
    rig.stack.start_parts("worker", "api", "runner")
    rig.prompt(key, "after")
    rig.printed(key, "got: after")
    assert agent_processes(mark) == pids
    rig.terminate(key)
    assert eventually(lambda: not agent_processes(mark), 15)
