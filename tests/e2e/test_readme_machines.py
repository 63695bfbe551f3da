"""The README's section on organization-images, run as it stands: a key, every signed line, and `kiln machines`."""

import sys
from collections.abc import Iterator

import pytest

from cli.local_stack import LocalStack
from support.readme import blocks, check_answer, printed_by, reader_environment
from support.stack import running_stack

SECTION = "organization-images"
BLOCKS = blocks(SECTION)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with running_stack(tmp_path_factory.mktemp("kiln")) as stack:
        yield stack


@pytest.fixture(scope="module")
def answers(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each block printed."""
    places = {
        ".venv/bin/kiln": f"{sys.executable} -m cli.main",
        "127.0.0.1:5555": f"127.0.0.1:{stack.settings.ec2_port}",
    }
    folder = tmp_path_factory.mktemp("reader")
    return printed_by(BLOCKS, folder, places, reader_environment(stack, folder), seconds=100)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_answers_as_the_readme_says(answers: list[str], number: int) -> None:
    """It has the documented fields, with their values where these do not change from run to run; else no error."""
    check_answer(BLOCKS[number], answers[number])


def test_the_section_holds_what_is_to_be_run() -> None:
    """The curl lines are found, and most have their answer below."""
    assert len(BLOCKS) >= 15
    assert sum(bool(block.answer) for block in BLOCKS) >= 10
