"""`make test` never reaches anything but this machine."""

import os
import socket
import subprocess
import sys

import pytest

from support.loopback import refusal


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KILN_EC2", "aws"),
        ("KILN_EC2_ENDPOINT", "https://ec2.us-east-1.amazonaws.com"),
        ("AWS_ENDPOINT_URL_EC2", "https://ec2.us-east-1.amazonaws.com"),
        ("TEMPORAL_ADDRESS", "temporal.example.com:7233"),
        ("KILN_CATALOG_URL", "postgresql://kiln@db.example.com/kiln"),
    ],
)
def test_an_endpoint_elsewhere_is_refused_by_name(name: str, value: str) -> None:
    """The line names the setting."""
    assert str(refusal({name: value})).startswith(name)


def test_loopback_endpoints_are_taken() -> None:
    """Everything that the tests start is on loopback."""
    assert refusal({"KILN_EC2_ENDPOINT": "http://127.0.0.1:5555", "TEMPORAL_ADDRESS": "localhost:7233"}) is None


def test_the_run_ends_before_any_test_with_such_an_endpoint() -> None:
    """pytest itself exits with the line, and runs nothing."""
    command = [sys.executable, "-m", "pytest", "tests/test_loopback.py", "-q"]
    done = subprocess.run(
        command, env={**os.environ, "KILN_EC2": "aws"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "KILN_EC2: the tests run against the simulated EC2 only" in done.stdout + done.stderr
    assert "passed" not in done.stdout


def test_a_connection_to_another_host_raises() -> None:
    """Also by accident: 192.0.2.1 is nobody's (RFC 5737)."""
    with socket.socket() as sock, pytest.raises(PermissionError, match=r"192\.0\.2\.1"):
        sock.connect(("192.0.2.1", 80))
