"""Agents' container images, built by real Packer with the scripts that also make the AMIs, and used for real."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from cli.docker_engine import container_network
from packer.npm_registry import NpmRegistry, npm_registry
from packer.tools import AGENT_COMMANDS, SCRIPTS, UPLOAD_FOLDER, Engine, Packer, ca_bundle

pytestmark = [pytest.mark.docker, pytest.mark.long]

# Versions that are not the latest, so that a pin that is not heeded shows.
PINNED = {"claude-code": "2.1.328", "codex": "0.166.0", "gemini": "0.60.0"}
TOKEN = "npm_0Sesame'$HOME\"`id`"


@dataclass(frozen=True)
class Builder:
    """Builds on the prepared image. Results are named kiln-test/NAME."""

    engine: Engine
    packer: Packer
    prepared_image: str

    def build(self, name: str, **variables: str) -> subprocess.CompletedProcess[str]:
        defaults = {
            "kiln_base_image": self.prepared_image,
            "kiln_container_reference": f"kiln-test/{name}:latest",
            "kiln_container_network": container_network(self.engine.host),
            "kiln_ca_bundle": ca_bundle(),
        }
        return self.packer.build("docker.agent", defaults | variables)


@pytest.fixture(scope="module")
def builder(engine: Engine, docker_packer: Packer, prepared_image: str) -> Builder:
    return Builder(engine, docker_packer, prepared_image)


@pytest.fixture(scope="module", params=PINNED)
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def image(builder: Builder, provider: str) -> str:
    """The image of each agent that the npm registry has."""
    version = PINNED[provider]
    built = builder.build(provider, provider=provider, agent_version=version, extra_packages="jq, less")
    assert built.returncode == 0, built.stdout
    return f"kiln-test/{provider}:latest"


class TestAgents:
    def test_it_answers_its_version_to_the_user_without_privileges(
        self, engine: Engine, image: str, provider: str
    ) -> None:
        """`docker run IMAGE AGENT --version` works as it is, with the version that was pinned."""
        answer = engine.docker("run", "--rm", image, AGENT_COMMANDS[provider], "--version")
        assert PINNED[provider] in answer.split()

    def test_its_user_is_not_root(self, engine: Engine, image: str) -> None:
        """The image's default user is the agent's, in its home."""
        assert engine.run(image, "id -un; pwd; sudo -n true 2>/dev/null || echo no sudo").split("\n") == [
            "agent",
            "/home/agent",
            "no sudo",
        ]

    def test_the_extra_packages_are_installed(self, engine: Engine, image: str) -> None:
        """extra_packages are there."""
        assert engine.run(image, "command -v jq less") == "/usr/bin/jq\n/usr/bin/less"

    def test_nothing_that_only_the_build_needed_is_left(self, engine: Engine, image: str) -> None:
        """No scripts, CA bundle, caches, package lists or npm of the distribution."""
        folders = "/tmp /var/tmp /var/lib/apt/lists /root/.npm /usr/share/nodejs"
        script = f"for f in {folders}; do [ ! -d $f ] || find $f -mindepth 1; done"
        assert engine.run(image, script, "--user=root") == ""

    def test_it_trusts_nobody_but_who_debian_trusts(self, engine: Engine, image: str) -> None:
        """The build's CA bundle is for the build."""
        script = "grep --count BEGIN /etc/ssl/certs/ca-certificates.crt; ls /usr/share/ca-certificates/mozilla | wc -l"
        trusted, debians = engine.run(image, script).split()
        assert trusted == debians


@pytest.fixture(scope="module")
def registry() -> Iterator[NpmRegistry]:
    with npm_registry(TOKEN, "9.9.9") as registry:
        yield registry


@pytest.fixture(scope="module")
def private_build(builder: Builder, registry: NpmRegistry) -> subprocess.CompletedProcess[str]:
    """A build that needs the token. It uses the host's network, because the registry listens on the loopback address."""
    settings = {"npm_registry": registry.url, "npm_token": TOKEN, "kiln_container_network": "host"}
    built = builder.build("private", provider="codex", **settings)
    assert built.returncode == 0, built.stdout
    return built


@pytest.mark.usefixtures("private_build")
class TestPrivateRegistry:
    IMAGE = "kiln-test/private:latest"

    def test_the_agent_comes_from_it(self, engine: Engine) -> None:
        """npm_registry and npm_token are used."""
        assert engine.docker("run", "--rm", self.IMAGE, "codex", "--version") == "codex 9.9.9"

    def test_the_token_is_not_printed(self, private_build: subprocess.CompletedProcess[str]) -> None:
        """Packer's output has no secret in it."""
        assert "Sesame" not in private_build.stdout

    def test_the_token_is_in_no_file_of_the_image(self, engine: Engine) -> None:
        """Nothing that npm or Packer wrote with it is left."""
        script = "echo planted-Sesame > /planted; grep -rl Sesame / --exclude-dir=proc --exclude-dir=sys"
        assert engine.run(self.IMAGE, script, "--user=root") == "/planted"

    def test_the_token_is_not_in_the_image_history(self, engine: Engine) -> None:
        """Neither the history nor the configuration has it."""
        told = engine.docker("history", "--no-trunc", self.IMAGE) + engine.docker("image", "inspect", self.IMAGE)
        assert ("agent-provider" in told, "Sesame" in told) == (True, False)

    def test_the_token_is_nowhere_on_the_host(self, builder: Builder) -> None:
        """Of all that Packer wrote, only the variable file that it was given has the token."""
        builder.packer.write_variables({"npm_token": TOKEN})
        files = [path for path in builder.packer.folder.rglob("*") if path.is_file()]
        assert [path.name for path in files if b"Sesame" in path.read_bytes()] == ["test.pkrvars.json"]

    def test_a_wrong_token_fails_in_one_line(self, builder: Builder, registry: NpmRegistry) -> None:
        """The line names the package and the registry."""
        failed = builder.build(
            "refused", provider="codex", npm_registry=registry.url, npm_token="expired", kiln_container_network="host"
        )
        line = f"error: npm could not install @openai/codex@latest from {registry.url}"
        assert (failed.returncode, line in failed.stdout) == (1, True), failed.stdout


class TestCursor:
    INSTALLER = """
        # https://downloads.cursor.com/lab/2026.01.01-abcdef0/linux/x64/agent-cli-package.tar.gz
        mkdir -p ~/.local/bin
        printf '#!/bin/sh\\necho 2026.01.01-abcdef0\\n' >~/.local/bin/cursor-agent
        chmod +x ~/.local/bin/cursor-agent
    """

    def test_a_vendor_out_of_reach_is_named_in_one_line(self, builder: Builder, engine: Engine) -> None:
        """The build fails with the installer's address and the reason."""
        # A proxy that does not exist, so that this fails where the vendor can be reached as well.
        engine.docker("image", "rm", "--force", "kiln-test/unreachable:latest")
        container = engine.docker(
            "run", "--detach", builder.prepared_image, "bash", "-c", "echo proxy=http://127.0.0.1:1 >/root/.curlrc"
        )
        engine.docker("wait", container)
        engine.docker("commit", container, "kiln-test/unreachable:latest")
        engine.docker("rm", container)
        failed = builder.build("cursor", provider="cursor", kiln_base_image="kiln-test/unreachable:latest")
        line = "error: cursor cannot be installed: https://cursor.com/install cannot be fetched: curl: (7) "
        assert (failed.returncode, line in failed.stdout) == (1, True), failed.stdout

    @pytest.mark.parametrize(
        ("version", "installed"), [("latest", "2026.01.01-abcdef0"), ("2025.12.01-1234567", "2025.12.01-1234567")]
    )
    def test_the_installer_serves_the_version_that_is_asked_for(
        self, engine: Engine, prepared_image: str, version: str, installed: str
    ) -> None:
        """A pinned version takes the place of the installer's own. The vendor's server is stood in for by a file."""
        script = f"""
            set -e
            cat >/vendor <<'INSTALLER'{self.INSTALLER}
INSTALLER
            export KILN_PROVIDER=cursor KILN_AGENT_VERSION={version} KILN_CURSOR_INSTALLER=file:///vendor
            bash {UPLOAD_FOLDER}/agents/cursor.sh && bash {UPLOAD_FOLDER}/verify.sh
        """
        output = engine.run(prepared_image, script, f"--volume={SCRIPTS}:{UPLOAD_FOLDER}:ro")
        assert output.endswith(f"cursor-agent answers --version as user agent: {installed}")
