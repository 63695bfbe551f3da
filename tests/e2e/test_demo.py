"""`kiln demo` as a newcomer runs it."""

import re
import uuid

import pytest

from support.processes import MARK, eventually, marked
from support.stack import run_kiln


def test_the_demo_bakes_an_ami_and_leaves_no_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Exit code 0, Packer's log, the AMI's id, what was made, all of it marked as simulated."""
    mark = uuid.uuid4().hex
    # A short path: Packer's sockets, some folders below it, have 107 characters at most (unix(7)).
    home = tmp_path_factory.mktemp("demo") / "h"
    demo = run_kiln(home, "demo", KILN_EC2="aws", TEMPORAL_ADDRESS="127.0.0.1:1", **{MARK: mark})
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "Creating AMI" in demo.stdout or "Creating the AMI" in demo.stdout
    ami = re.search(r"^(ami-\w+) is available: an AMI with claude-code, in a simulated EC2", demo.stdout, re.MULTILINE)
    assert ami, demo.stdout
    table = demo.stdout[ami.end() :]
    assert re.search(rf"WHAT WAS MADE +IN SIMULATED EC2 *\nAMI +{ami[1]} *\n", table)
    assert re.search(r"snapshot +snap-\w+", table)
    assert "made-by = kiln-demo" in table
    assert eventually(lambda: not marked(mark), 2), "processes are left"
