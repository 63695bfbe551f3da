"""`python -m api` as a process: how it starts, how it fails to, and how it stops."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from kiln.catalog import keys
from kiln.catalog.session import Catalog
from kiln.sealing import Sealer
from kiln.settings import PROJECT_ROOT
from support.ports import free_ports
from support.processes import eventually
from support.rows import add_build, add_organization

EXIT_SECONDS = 30
FOREIGN = ("KILN_", "TEMPORAL_")


def environment(home: Path, **settings: str) -> dict[str, str]:
    """This process's environment, with these settings of Kiln's and no other."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    own = {
        "KILN_HOME": str(home),
        "KILN_SECRET_KEY": Sealer.new_key(),
        "KILN_API_PORT": str(free_ports(1)[0]),
        "KILN_TEMPORAL_PORT": str(free_ports(1)[0]),
        "PYTHONPATH": str(PROJECT_ROOT),
    }
    return {**clean, **own, **settings}


def start(env: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "api"]
    return subprocess.Popen(argv, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def running(home: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A served API and its URL; ended at the block's end if it still runs."""
    env = environment(home)
    url = f"http://127.0.0.1:{env['KILN_API_PORT']}"
    process = start(env, home)
    try:
        assert eventually(lambda: process.poll() is not None or _answers(url), EXIT_SECONDS)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", verify=False).status_code == 200
    except httpx.TransportError:
        return False


def failure(home: Path, **settings: str) -> str:
    """What a process prints that cannot start."""
    process = start(environment(home, **settings), home)
    output, errors = process.communicate(timeout=EXIT_SECONDS)
    assert (process.returncode, output) == (1, "")
    return errors


def test_it_stops_in_order(tmp_path: Path) -> None:
    """At SIGTERM its live streams end, without an error, and it exits with 0 at once."""
    with running(tmp_path) as (process, url):
        catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.db'}")
        organization_id = add_organization(catalog)
        build_id = add_build(catalog, organization_id)
        with catalog.transaction() as tx:
            _, key = keys.create(tx, tx.get_one(keys.Organization, organization_id), "test", ["admin"])
        catalog.close()
        headers = {"X-API-Key": key}
        with httpx.stream("GET", f"{url}/api/v1/builds/{build_id}/logs", headers=headers, verify=False) as stream:
            assert stream.status_code == 200
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert stream.read() == b""
        output, errors = process.communicate(timeout=EXIT_SECONDS)
        assert time.monotonic() - began < 2.5
    assert (process.returncode, output) == (0, "")
    assert "Traceback" not in errors
    assert "ERROR" not in errors


def test_ctrl_c_stops_it_as_well(tmp_path: Path) -> None:
    """At SIGINT it exits with 0, and prints no stack trace."""
    with running(tmp_path) as (process, _):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=EXIT_SECONDS)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    """It names the address and the setting."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        errors = failure(tmp_path, KILN_API_PORT=str(port))
    place = f"127.0.0.1:{port}"
    assert errors == f"kiln api: KILN_API_PORT, KILN_API_HOST: {place} cannot be had: Address already in use\n"


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("KILN_SECRET_KEY", "", "must be 32 bytes in URL-safe base64"),
        ("KILN_SECRET_KEY", "short", "must be 32 bytes in URL-safe base64"),
        ("KILN_API_PORT", "x", "Input should be a valid integer"),
        ("KILN_EC2", "mars", "Input should be 'simulated' or 'aws'"),
        ("KILN_MACHINE_BUILD_RATE", "often", "must be a rate, such as 150/minute"),
        ("KILN_API_HOST", "no.such.host.invalid", "cannot be had"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(tmp_path: Path, name: str, value: str, problem: str) -> None:
    """It names the setting, and shows no stack trace."""
    errors = failure(tmp_path, **{name: value})
    assert errors.count("\n") == 1
    assert errors.startswith("kiln api: ")
    assert name in errors
    assert problem in errors


def test_a_missing_catalog_is_one_line(tmp_path: Path) -> None:
    """A database that does not answer is named as the catalog, without its password."""
    port = free_ports(1)[0]
    errors = failure(tmp_path, KILN_CATALOG_URL=f"postgresql://kiln:hunter2@127.0.0.1:{port}/kiln")
    assert "Traceback" not in errors
    assert "catalog" in errors.splitlines()[-1]
    assert "hunter2" not in errors
