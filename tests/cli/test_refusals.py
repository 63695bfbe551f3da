"""What keeps `kiln up` from starting: one line that names the thing and its setting, and nothing left behind."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.checks import PortTakenError
from cli.home import locked_home, prepare_home
from cli.local_stack import LocalStack
from kiln.settings import Settings
from support.ports import free_ports
from support.stack import PORTS, run_kiln


def refused(home: Path, **env: str) -> str:
    """The one line of a `kiln up` that refuses."""
    ports = dict(zip(PORTS, map(str, free_ports(4)), strict=True))
    answer = run_kiln(home, "up", **{**ports, **env})
    assert answer.returncode == 1, answer.stdout
    assert answer.stdout == ""
    assert answer.stderr.count("\n") == 1, answer.stderr
    return answer.stderr


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield int(taken.getsockname()[1])


def test_up_names_a_taken_port_and_its_setting(tmp_path: Path, taken_port: int) -> None:
    """Exit code 1, one line, and the home is not even made."""
    line = refused(tmp_path / "home", KILN_API_PORT=str(taken_port))
    assert line == f"kiln: port {taken_port} is taken: set KILN_API_PORT\n"
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("setting", PORTS)
def test_every_port_is_checked_before_anything_starts(tmp_path: Path, taken_port: int, setting: str) -> None:
    """Temporal's two, EC2's and the API's."""
    ports = dict(zip(PORTS, free_ports(4), strict=True)) | {setting: taken_port}
    chosen = {name.removeprefix("KILN_").lower(): port for name, port in ports.items()}
    stack = LocalStack(Settings(home=tmp_path / "home", **chosen), embedded=True)  # type: ignore[arg-type]
    with pytest.raises(PortTakenError, match=f"port {taken_port} is taken: set {setting}"):
        stack.check()


def test_contexts_do_not_go_to_aws_beside_a_simulated_ec2(tmp_path: Path) -> None:
    """The parts have no credentials for it; an S3 that needs none may be named."""
    line = refused(tmp_path / "home", KILN_OBJECTS="s3://contexts/kiln")
    assert line.startswith("kiln: KILN_OBJECTS: beside a simulated EC2")
    assert not (tmp_path / "home").exists()


def test_ports_must_differ(tmp_path: Path) -> None:
    """Both settings are named."""
    (port,) = free_ports(1)
    stack = LocalStack(Settings(home=tmp_path / "home", api_port=port, ec2_port=port), embedded=True)
    with pytest.raises(PortTakenError, match=f"KILN_API_PORT and KILN_EC2_PORT are both {port}"):
        stack.check()


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"KILN_PACKER": "no-packer"}, "no-packer is not installed: apt-get install packer, or set KILN_PACKER"),
        ({"KILN_EC2": "gcp"}, "KILN_EC2: "),
        ({"TEMPORAL_ADDRESS": "127.0.0.1:1"}, "Temporal does not answer at 127.0.0.1:1 (TEMPORAL_ADDRESS)"),
        ({"KILN_SECRET_KEY": "short"}, "KILN_SECRET_KEY: must be 32 bytes"),
    ],
)
def test_up_names_a_wrong_setting(tmp_path: Path, env: dict[str, str], said: str) -> None:
    """Exit code 1, and no home is made."""
    assert said in refused(tmp_path / "home", **env)
    assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file stands where the home should be."""
    (tmp_path / "file").write_text("")
    line = refused(tmp_path / "file" / "home")
    assert line.startswith(f"kiln: KILN_HOME: cannot make {tmp_path / 'file' / 'home'}")


def test_a_home_has_one_stack(tmp_path: Path) -> None:
    """The second says where the first one is."""
    settings = Settings(home=tmp_path / "home")
    prepare_home(settings)
    with locked_home(settings):
        line = refused(tmp_path / "home")
    assert line == f"kiln: another stack runs on {tmp_path / 'home'}: stop it, or set KILN_HOME\n"


def test_a_client_without_an_api_is_told_how_to_start_one(tmp_path: Path) -> None:
    """Nobody listens at KILN_URL."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    answer = run_kiln(tmp_path, "builds", "list", KILN_URL=url, KILN_API_KEY="amk_0")
    assert answer.returncode == 1
    assert answer.stderr == f"kiln: the API does not answer at {url} (KILN_URL): kiln up starts it\n"
