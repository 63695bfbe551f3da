"""The README's sections on machine-images and on builds of every kind, run as they stand on a stack of their own."""

from collections.abc import Iterator

import pytest

from support.readme import blocks, check_answer, printed_by, reader_environment
from support.stack import running_stack

SECTIONS = ("machine-images", "kiln: builds of every kind through one lens")
BLOCKS = blocks(*SECTIONS)
# What depends on the host or on how long things took: there only a refusal would be wrong.
WITHOUT_ANSWER = ("/metrics", "/logs")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What each block printed."""
    with running_stack(tmp_path_factory.mktemp("kiln")) as stack:
        folder = tmp_path_factory.mktemp("reader")
        places = {"127.0.0.1:8233": f"127.0.0.1:{stack.settings.temporal_ui_port}"}
        yield printed_by(BLOCKS, folder, places, reader_environment(stack, folder), seconds=100)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_answers_as_the_readme_says(answers: list[str], number: int) -> None:
    """It has the documented fields, with their values where these do not change from run to run; else no error."""
    block, printed = BLOCKS[number], answers[number]
    if any(path in block.text for path in WITHOUT_ANSWER):
        assert printed.strip()
        assert '"error":{' not in printed
    else:
        check_answer(block, printed)


def test_the_sections_hold_what_is_to_be_run() -> None:
    """The curl lines are found, and most have their answer below."""
    assert len(BLOCKS) >= 14
    assert sum(bool(block.answer) for block in BLOCKS) >= 8
