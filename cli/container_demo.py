"""What `make demo ARGS=--container` shows: an agent's container image, built by Packer with the scripts of the AMI."""

import json
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli.docker_engine import (
    BASE_IMAGE,
    BaseImageError,
    EngineUnavailable,
    container_network,
    docker,
    docker_engine,
    make_base_image,
    require_tools,
)

TEMPLATE = Path(__file__).resolve().parent.parent / "packer" / "agent.pkr.hcl"
AGENT_COMMANDS = {"claude-code": "claude", "codex": "codex", "gemini": "gemini", "cursor": "cursor-agent"}

INTERRUPT_TIMEOUT = timedelta(seconds=30)
INTERRUPTED = 128 + signal.SIGINT
MEGABYTE_BYTES = 1_000_000


class DemoError(RuntimeError):
    """A step of the demonstration failed. The text is one line that says which."""


def container_demo(home: Path, provider: str = "claude-code") -> int:
    """Builds the image of `provider`'s agent, starts the agent in it, and shows what was made. Returns an exit code.

    Needs Docker, mmdebstrap and Packer. Uses the Docker engine that answers; else a private one, which ends with the
    demonstration and keeps its images in `home`/docker. Nothing that runs is left behind.
    """
    console = Console()
    data_root = home / "docker"
    try:
        require_tools("packer", "mmdebstrap")
        command = _agent_command(provider)
        with docker_engine(data_root) as host:
            _show_build(console, host, provider, command)
            console.print(_summary(host, [_image(provider), BASE_IMAGE], _engine_folder(host, data_root)))
    except (EngineUnavailable, BaseImageError, DemoError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left running")
        return INTERRUPTED
    return 0


def _agent_command(provider: str) -> str:
    if provider not in AGENT_COMMANDS:
        raise DemoError(f"unknown provider {provider}; known are {', '.join(AGENT_COMMANDS)}")
    return AGENT_COMMANDS[provider]


def _image(provider: str) -> str:
    return f"kiln/agent-{provider}:latest"


def _show_build(console: Console, host: str, provider: str, command: str) -> None:
    image = _image(provider)
    console.rule("base image")
    console.print(f"{BASE_IMAGE}: minimal Debian, made once by mmdebstrap", highlight=False)
    make_base_image(host)
    console.rule(f"packer build -only=docker.agent, provider {provider}")
    with _replaced(host, image):
        _build(console, host, provider)
    console.rule(f"docker run --rm {image} {command} --version")
    console.print(_first_words(host, image, command), highlight=False)


@contextmanager
def _replaced(host: str, image: str) -> Iterator[None]:
    """Removes the image that had this name before the block, and that nobody could name after it."""
    before = docker(host, "image", "inspect", "--format", "{{.Id}}", image).stdout.strip()
    yield
    if before and docker(host, "image", "inspect", "--format", "{{.Id}}", image).stdout.strip() != before:
        docker(host, "image", "rm", before)


def _build(console: Console, host: str, provider: str) -> None:
    """Runs Packer to its end, with its output on this process's own."""
    # A short folder, because the path of Packer's sockets in it has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="kiln-", dir="/tmp") as folder:
        variables = Path(folder) / "demo.pkrvars.json"
        variables.write_text(json.dumps(_variables(host, provider)))
        color = "true" if console.is_terminal else "false"
        command = ["packer", "build", f"-color={color}", "-only=docker.agent", f"-var-file={variables}", str(TEMPLATE)]
        exit_code = _wait(subprocess.Popen(command, env=_packer_environment(host, folder), stdin=subprocess.DEVNULL))
    if exit_code != 0:
        raise DemoError(f"{shlex.join(command)} ended with exit code {exit_code}")


def _variables(host: str, provider: str) -> dict[str, str]:
    return {
        "provider": provider,
        "kiln_base_image": BASE_IMAGE,
        "kiln_container_reference": _image(provider),
        "kiln_container_network": container_network(host),
        "kiln_ca_bundle": _ca_bundle(),
    }


def _packer_environment(host: str, folder: str) -> dict[str, str]:
    # Packer keeps its caches, sockets and logs below these, so they go with the folder.
    return {
        "PATH": os.environ["PATH"],
        "DOCKER_HOST": host,
        "HOME": folder,
        "TMPDIR": folder,
        "PACKER_CACHE_DIR": folder,
        "CHECKPOINT_DISABLE": "1",
    }


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Waits for the process; on Ctrl-C, which it gets as well, until it has cleaned up."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait(INTERRUPT_TIMEOUT.total_seconds())
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _ca_bundle() -> str:
    """The extra CA bundle: Kiln's setting, or the one that this process itself trusts. Empty for none."""
    for name in ("KILN_CA_BUNDLE", "SSL_CERT_FILE"):
        path = os.environ.get(name, "")
        if path and Path(path).is_file():
            return path
    return ""


def _first_words(host: str, image: str, command: str) -> str:
    finished = docker(host, "run", "--rm", image, "sh", "-c", f'{command} --version && echo "(as user $(id -un))"')
    if finished.returncode != 0:
        raise DemoError(f"{command} --version failed in {image}: {finished.stderr.strip()}")
    return finished.stdout.strip()


def _engine_folder(host: str, data_root: Path) -> Path | None:
    """The folder of the private engine's images; None where the engine is somebody else's."""
    root = docker(host, "info", "--format", "{{.DockerRootDir}}").stdout.strip()
    return data_root if Path(root) == data_root.resolve() else None


def _summary(host: str, images: list[str], folder: Path | None) -> Table:
    table = Table(title="What was made", title_justify="left")
    for heading in ("image", "id", "size"):
        table.add_column(heading, overflow="fold")
    for image in images:
        image_id, size = docker(host, "image", "inspect", "--format", "{{.Id}} {{.Size}}", image).stdout.split()
        table.add_row(image, image_id.removeprefix("sha256:")[:12], f"{int(size) / MEGABYTE_BYTES:.0f} MB")
    remove = f"rm -r {folder}" if folder else f"docker image rm {' '.join(images)}"
    table.caption = f"To remove them: {remove}"
    table.caption_justify = "left"
    return table
