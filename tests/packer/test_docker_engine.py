"""The Docker engine that builds images where none runs: it is private, and leaves nothing."""

import re
import subprocess
from pathlib import Path

import pytest

from cli.docker_engine import (
    BaseImageError,
    EngineUnavailable,
    container_network,
    docker,
    docker_engine,
    make_base_image,
    require_tools,
)
from packer.tools import Engine

# Links and firewall chains of builder slots, and the neighbours that their tests make.
OF_STACKS = re.compile(r"kiln[0-9a-f]{6}-\d|cloud\d")
NOBODYS_SOCKET = "unix:///nonexistent/docker.sock"


def host_state() -> dict[str, str]:
    """What an engine changes of the machine that it runs on, less what the engines of stacks have there meanwhile."""
    commands = ("ip -brief address", "iptables -S", "iptables -t nat -S", "cat /proc/sys/net/ipv4/ip_forward", "mount")
    lines = {command: subprocess.getoutput(command).splitlines() for command in commands}
    return {
        command: "\n".join(line for line in found if not OF_STACKS.search(line)) for command, found in lines.items()
    }


def processes_that_name(folder: str) -> list[str]:
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if folder in line]


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine answers at the usual places, whatever runs on this machine."""
    monkeypatch.setenv("DOCKER_HOST", NOBODYS_SOCKET)
    monkeypatch.setattr("cli.docker_engine.DEFAULT_HOST", NOBODYS_SOCKET)


class TestUnavailable:
    def test_a_missing_docker_is_named_with_its_package(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The line says what to install."""
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(EngineUnavailable, match=r"^docker is not installed: apt-get install docker\.io$"):
            docker_engine().__enter__()

    @pytest.mark.usefixtures("no_engine")
    def test_a_missing_dockerd_is_named_with_its_package(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The client alone starts no engine."""
        client = tmp_path / "docker"
        client.write_text("#!/bin/sh\nexit 1\n")
        client.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(EngineUnavailable, match=r"dockerd is not installed: apt-get install docker\.io$"):
            docker_engine().__enter__()

    @pytest.mark.parametrize("tool", ["packer", "mmdebstrap"])
    def test_a_missing_tool_is_named_with_its_package(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tool: str
    ) -> None:
        """What a demonstration needs is said before it begins."""
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(EngineUnavailable, match=f"^{tool} is not installed: apt-get install {tool}$"):
            require_tools(tool)


@pytest.mark.docker
@pytest.mark.usefixtures("engine", "no_engine")  # engine: skips these where none can be had
class TestPrivateEngine:
    def test_it_leaves_no_process(self) -> None:
        """Its containerd and its containers end with it, also those that ignore SIGTERM."""
        with docker_engine() as host:
            folder = host.removeprefix("unix://").removesuffix("/docker.sock")
            assert len(processes_that_name(folder)) >= 2
        assert processes_that_name(folder) == []

    def test_it_leaves_no_folder(self) -> None:
        """Its images, sockets and log are gone."""
        with docker_engine() as host:
            folder = Path(host.removeprefix("unix://")).parent
            assert (folder / "data").is_dir()
        assert not folder.exists()

    def test_it_leaves_the_network_and_the_mounts_as_they_were(self) -> None:
        """Its bridge, firewall rules and mounts go, whatever other engines have."""
        before = host_state()
        with docker_engine():
            assert host_state() != before
        assert host_state() == before

    def test_a_failure_inside_the_block_ends_it_as_well(self) -> None:
        """The engine goes however the block ends."""
        with pytest.raises(KeyboardInterrupt), docker_engine() as host:
            raise KeyboardInterrupt
        assert processes_that_name(host.removeprefix("unix://").removesuffix("/docker.sock")) == []

    def test_images_stay_in_a_data_root_that_is_given(self, tmp_path: Path) -> None:
        """A second run finds what the first one made."""
        with docker_engine(tmp_path) as host:
            subprocess.run(
                f"tar -cf - -C {tmp_path} --files-from=/dev/null | docker --host {host} import - kiln-test/empty",
                shell=True, check=True, capture_output=True,
            )  # fmt: skip
        with docker_engine(tmp_path) as host:
            assert docker(host, "image", "inspect", "kiln-test/empty").returncode == 0

    def test_a_data_root_serves_one_engine_at_a_time(self, tmp_path: Path) -> None:
        """The second is told whose it is."""
        with docker_engine(tmp_path), pytest.raises(EngineUnavailable, match=f"runs on {tmp_path}$"):
            docker_engine(tmp_path).__enter__()

    def test_two_engines_run_side_by_side(self) -> None:
        """Each has a network of its own."""
        with docker_engine() as first, docker_engine() as second:
            assert (container_network(first), container_network(second)) == ("bridge", "bridge")


@pytest.mark.docker
class TestAnyEngine:
    def test_an_engine_that_answers_is_used_and_goes_on(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """$DOCKER_HOST comes before an engine of one's own."""
        monkeypatch.setenv("DOCKER_HOST", engine.host)
        with docker_engine() as host:
            assert host == engine.host
        assert docker(engine.host, "version").returncode == 0

    def test_a_root_that_broke_off_is_no_base_image(self, engine: Engine) -> None:
        """A release that does not exist gives an error with its name, and no image."""
        with pytest.raises(BaseImageError, match=r"^mmdebstrap --variant=minbase nosuchsuite failed: ."):
            make_base_image(engine.host, "kiln-test/broken:latest", "nosuchsuite")
        assert docker(engine.host, "image", "inspect", "kiln-test/broken:latest").returncode == 1
