"""The template as Packer reads it: what it accepts, and what it refuses before anything is made."""

from typing import Any

import hcl2
import pytest

from packer.tools import AGENT_COMMANDS, PACKER_FOLDER, SOURCES, TEMPLATE, Packer


def variables_of_template() -> dict[str, dict[str, Any]]:
    blocks = hcl2.loads(TEMPLATE.read_text())["variable"]
    return {name.strip('"'): block for each in blocks for name, block in each.items()}


class TestAccepted:
    @pytest.mark.parametrize("source", SOURCES)
    @pytest.mark.parametrize("provider", AGENT_COMMANDS)
    def test_it_is_valid_with_nothing_but_a_provider(self, packer: Packer, provider: str, source: str) -> None:
        """Only the provider is required."""
        validated = packer.validate(source, {"provider": provider})
        assert validated.returncode == 0, validated.stdout

    @pytest.mark.parametrize("communicator", ["ssh", "ssm", "none"])
    def test_it_is_valid_with_each_communicator(self, packer: Packer, communicator: str) -> None:
        """An instance is reached by SSH, through Session Manager, or not at all."""
        variables: dict[str, object] = {
            "provider": "codex",
            "communicator": communicator,
            "kiln_iam_instance_profile": "session-manager",
        }
        validated = packer.validate("amazon-ebs.agent", variables)
        assert validated.returncode == 0, validated.stdout

    @pytest.mark.parametrize("packages", ["", "jq", "jq tree", "jq,g++, libstdc++6", " python3.11 "])
    def test_package_names_are_accepted(self, packer: Packer, packages: str) -> None:
        """Packages are separated by spaces or commas."""
        validated = packer.validate("docker.agent", {"provider": "codex", "extra_packages": packages})
        assert validated.returncode == 0, validated.stdout


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("provider", "copilot"),
            ("provider", "../base"),
            ("agent_version", ""),
            ("agent_version", "1.0; reboot"),
            ("agent_version", "git+https://example.test/agent"),
            ("agent_user", "root"),
            ("agent_user", "Agent"),
            ("agent_user", "a b"),
            ("volume_size_gb", "big"),
            ("volume_size_gb", "0"),
            ("encrypt_volume", "perhaps"),
            ("ami_name_prefix", "a{b"),
            ("communicator", "winrm"),
            ("npm_registry", "file:///etc/passwd"),
            ("extra_packages", "jq; reboot"),
            ("extra_packages", "$(reboot)"),
            ("extra_packages", "--allow-unauthenticated"),
            ("extra_packages", "sudo-"),
            ("extra_packages", "jq\nreboot"),
            ("extra_packages", "./evil.deb"),
        ],
    )
    def test_a_bad_value_is_refused_by_the_name_of_its_variable(self, packer: Packer, name: str, value: str) -> None:
        """A value that could do harm never reaches a script."""
        validated = packer.validate("docker.agent", {"provider": "codex", name: value})
        assert (validated.returncode, f"The {name} must be" in validated.stdout) == (1, True), validated.stdout

    def test_a_build_without_a_provider_is_refused(self, packer: Packer) -> None:
        """There is no default agent."""
        validated = packer.validate("docker.agent", {})
        assert 'Unset variable "provider"' in validated.stdout


class TestDeclarations:
    @pytest.mark.parametrize("name", variables_of_template())
    def test_a_variable_says_what_it_is_for(self, name: str) -> None:
        """Every variable has a description."""
        assert variables_of_template()[name].get("description", "").strip('"')

    def test_the_token_is_the_only_sensitive_variable(self) -> None:
        """Kiln masks the values of sensitive variables in every log."""
        sensitive = [name for name, block in variables_of_template().items() if block.get("sensitive")]
        assert sensitive == ["npm_token"]

    def test_a_current_packer_is_told_its_plugins(self) -> None:
        """The builders that the template uses are plugins since Packer 1.7."""
        blocks = hcl2.loads((PACKER_FOLDER / "plugins.pkr.hcl").read_text())["packer"]
        plugins = blocks[0]["required_plugins"][0]
        assert {"amazon", "docker"} <= plugins.keys()
