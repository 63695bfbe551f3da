"""The README's section on pods, run as it stands on a stack of its own: the runner `local`, an agent, and `kiln runners`."""

import sys
import uuid
from dataclasses import dataclass

import pytest

from support.pod_rig import agent_processes, mark_of, running_pod_rig
from support.readme import blocks, check_answer, printed_by, reader_environment

BLOCKS = blocks("pods")


@dataclass(frozen=True)
class Run:
    """What each block printed, and an agent's processes while the stack ran and after it."""

    answers: list[str]
    agents: set[int]
    left: set[int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One stack for all blocks. An agent that does not end by itself is there when it stops."""
    mark = uuid.uuid4().hex
    with running_pod_rig(tmp_path_factory.mktemp("kiln") / "home") as rig:
        deaf = "trap '' TERM; echo ready; while :; do sleep 600; done"
        key = rig.create(deaf, environment_variables=mark_of(mark))
        folder = tmp_path_factory.mktemp("reader")
        places = {".venv/bin/kiln": f"{sys.executable} -m cli.main"}
        rig.printed(key, "ready")
        environment = reader_environment(rig.stack, folder)
        answers = printed_by(BLOCKS, folder, places, environment, seconds=60)
        agents = agent_processes(mark)
    return Run(answers, agents, agent_processes(mark))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_answers_as_the_readme_says(run: Run, number: int) -> None:
    """It has the documented fields, with their values where these do not change from run to run; else no error."""
    check_answer(BLOCKS[number], run.answers[number])


@pytest.mark.slow
def test_no_agent_outlives_the_stack(run: Run) -> None:
    """It ends with the stack, though it ignores SIGTERM and its runner leaves it alive."""
    assert run.agents
    assert not run.left


def test_the_section_holds_what_is_to_be_run() -> None:
    """The curl lines are found, and most have their answer below."""
    assert len(BLOCKS) >= 10
    assert sum(bool(block.answer) for block in BLOCKS) >= 10
