"""The folder of Packer's runs, where the home's own path is too long for the sockets in it."""

from pathlib import Path

import pytest

from cli.local_stack import EC2, LocalStack
from kiln.settings import Settings
from support.ports import free_ports


@pytest.mark.parametrize("is_used", [False, True], ids=["empty", "used"])
def test_it_goes_with_the_stack_unless_a_run_is_in_it(tmp_path: Path, is_used: bool) -> None:
    """An empty folder outside the home is not left behind; one with a run in it stays as it is."""
    (port,) = free_ports(1)
    settings = Settings(home=tmp_path / ("a-long-name-" * 6), ec2_port=port, containers=False)
    assert not settings.runs_dir.is_relative_to(settings.home_dir)
    stack = LocalStack(settings, parts=[EC2], embedded=True)
    with stack:
        settings.runs_dir.mkdir()
        run = settings.runs_dir / "packer-1"
        if is_used:
            run.mkdir()
    assert settings.runs_dir.exists() is is_used
    if is_used:
        run.rmdir()
        settings.runs_dir.rmdir()
