"""The demonstration of a container image, from nothing to the agent's first words."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from cli.container_demo import container_demo
from cli.docker_engine import BASE_IMAGE, docker
from packer.tools import Engine

IMAGE = "kiln/agent-claude-code:latest"


class TestRefused:
    def test_an_unknown_provider_is_named_in_one_line(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """No trace, and no engine is started for it."""
        assert container_demo(tmp_path, "copilot") == 1
        assert capfd.readouterr().out == (
            "error: unknown provider copilot; known are claude-code, codex, gemini, cursor\n"
        )

    def test_a_missing_packer_is_named_in_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """The line says what to install."""
        monkeypatch.setenv("PATH", str(tmp_path))
        assert container_demo(tmp_path) == 1
        assert capfd.readouterr().out == "error: packer is not installed: apt-get install packer\n"


def demo_program(home: Path, host: str, provider: str) -> subprocess.Popen[str]:
    """Starts the demonstration, in a session of its own, as a terminal would."""
    program = (
        "import signal, sys, pathlib, cli.container_demo as demo;"
        # A terminal's; a background job's, which the tests may run in, is ignored and stays so in what it starts.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"sys.exit(demo.container_demo(pathlib.Path({str(home)!r}), {provider!r}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"DOCKER_HOST": host, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def shown(
    engine: Engine, base_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.CompletedProcess[str]]:
    """The demonstration to its end, on a base image that is made already."""
    assert base_image == BASE_IMAGE
    made_here = docker(engine.host, "image", "inspect", IMAGE).returncode != 0
    with demo_program(tmp_path_factory.mktemp("home"), engine.host, "claude-code") as process:
        output, _ = process.communicate()
    yield subprocess.CompletedProcess(process.args, process.returncode, output)
    if made_here:
        engine.docker("image", "rm", IMAGE)


@pytest.mark.docker
@pytest.mark.long
class TestDemo:
    def test_it_ends_well(self, shown: subprocess.CompletedProcess[str]) -> None:
        """Exit code 0, on a base image without anything in it."""
        assert shown.returncode == 0, shown.stdout

    def test_the_build_is_shown_as_it_runs(self, shown: subprocess.CompletedProcess[str]) -> None:
        """Packer's own output is there."""
        assert "docker.agent: ==> installing @anthropic-ai/claude-code@latest" in shown.stdout

    def test_the_agent_answers_as_a_user_without_privileges(self, shown: subprocess.CompletedProcess[str]) -> None:
        """The answer to --version stands after the build, with the user's name."""
        answer = shown.stdout.partition("claude --version ─")[2]
        assert "(Claude Code)\n(as user agent)" in answer

    def test_it_says_how_to_remove_what_was_made(self, shown: subprocess.CompletedProcess[str]) -> None:
        """The command removes both images from an engine that is not the demonstration's own."""
        assert f"docker image rm {IMAGE} {BASE_IMAGE}" in " ".join(shown.stdout.split())

    def test_no_container_is_left(self, shown: subprocess.CompletedProcess[str], engine: Engine) -> None:
        """Neither Packer's container nor the agent's."""
        assert shown.returncode == 0
        assert containers_of_base(engine) == ""

    @pytest.mark.usefixtures("base_image")
    def test_ctrl_c_ends_it_with_nothing_left(self, engine: Engine, tmp_path: Path) -> None:
        """Packer removes its container, and the demonstration ends with the exit code of an interrupt."""
        with demo_program(tmp_path, engine.host, "codex") as process:
            assert process.stdout is not None
            output = "".join(iter_until(process.stdout, "making user agent"))
            os.killpg(process.pid, signal.SIGINT)
            output += process.stdout.read()
        assert (process.returncode, containers_of_base(engine)) == (130, ""), output


def containers_of_base(engine: Engine) -> str:
    """The containers of the base image and of all that was built on it."""
    return engine.docker("ps", "--all", "--quiet", f"--filter=ancestor={BASE_IMAGE}")


def iter_until(lines: IO[str], words: str) -> Iterator[str]:
    """The lines up to the first that has these words, or to the end."""
    for line in lines:
        yield line
        if words in line:
            return
