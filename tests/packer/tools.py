"""Packer and Docker for these tests: the installed programs, each in an environment of its own."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cli.docker_engine import docker

PACKER_FOLDER = Path(__file__).resolve().parents[2] / "packer"
TEMPLATE = PACKER_FOLDER / "agent.pkr.hcl"
WORKSTATION = PACKER_FOLDER / "workstation.pkr.hcl"
SCRIPTS = PACKER_FOLDER / "scripts"
UPLOAD_FOLDER = "/tmp/kiln-build"

AGENT_COMMANDS = {"claude-code": "claude", "codex": "codex", "gemini": "gemini", "cursor": "cursor-agent"}
SOURCES = ("amazon-ebs.agent", "docker.agent", "docker.published")

PACKER_TIMEOUT_SECONDS = 240


def ca_bundle() -> str:
    """The authorities that this host trusts: npm in a container needs them behind a proxy. Empty for none."""
    names = ("KILN_CA_BUNDLE", "SSL_CERT_FILE")
    return next((path for name in names if (path := os.environ.get(name, "")) and Path(path).is_file()), "")


@dataclass(frozen=True)
class Packer:
    """Runs the installed packer, with everything that it writes below `folder`, whose path must be short."""

    folder: Path
    environment: dict[str, str]
    template: Path = TEMPLATE
    timeout_seconds: float = PACKER_TIMEOUT_SECONDS

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["packer", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=self.timeout_seconds,
        )

    def validate(self, source: str, variables: Mapping[str, object]) -> subprocess.CompletedProcess[str]:
        return self.run("validate", f"-only={source}", self.write_variables(variables), str(self.template))

    def build(self, source: str, variables: Mapping[str, object]) -> subprocess.CompletedProcess[str]:
        return self.run("build", "-color=false", f"-only={source}", self.write_variables(variables), str(self.template))

    def write_variables(self, variables: Mapping[str, object]) -> str:
        """Writes the variable file that the next run reads, and returns the option that names it."""
        path = self.folder / "test.pkrvars.json"
        path.write_text(json.dumps(variables))
        return f"-var-file={path}"


def packer_in(folder: Path, **more: str) -> Packer:
    # Nothing of this host's account, and nothing that Packer would ask of the network by itself.
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "PACKER_CACHE_DIR": str(folder / "cache"),
        "CHECKPOINT_DISABLE": "1",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_POLL_DELAY_SECONDS": "1",
        "AWS_MAX_ATTEMPTS": "60",
    }
    return Packer(folder, environment | more)


@dataclass(frozen=True)
class Engine:
    """A Docker engine. Images that tests make in it are named kiln-test/…, and go at the session's end."""

    host: str

    def docker(self, *arguments: str) -> str:
        """The command's standard output. Fails with its error output."""
        finished = docker(self.host, *arguments)
        assert finished.returncode == 0, f"docker {' '.join(arguments)}: {finished.stderr}"
        return finished.stdout.strip()

    def run(self, image: str, script: str, *options: str) -> str:
        """The output of a shell script in a new container of `image`, by default as the image's own user."""
        return self.docker("run", "--rm", *options, image, "bash", "-c", script)

    def remove_test_images(self) -> None:
        names = self.docker("images", "--format", "{{.Repository}}:{{.Tag}}", "kiln-test/*").split()
        if names:
            self.docker("image", "rm", "--force", *names)
