"""The scripts on their own: what they refuse, in which words. Nothing here changes this machine."""

import os
import subprocess
from pathlib import Path

import pytest

from packer.tools import SCRIPTS

SCRIPT_FILES = sorted(path.relative_to(SCRIPTS) for path in SCRIPTS.rglob("*.sh"))


def bash(script: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"set -euo pipefail; cd {SCRIPTS}; {script}"]
    environment = {"PATH": os.environ["PATH"], "KILN_PROVIDER": "codex"} | settings
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPT_FILES, ids=str)
def test_a_script_is_correct_bash(script: str) -> None:
    """Every script parses."""
    assert bash(f"bash -n {script}").stderr == ""


@pytest.mark.parametrize("script", [path for path in SCRIPT_FILES if path.name != "lib.sh"], ids=str)
def test_a_script_ends_at_the_first_failure(script: str) -> None:
    """A step that failed is never built upon."""
    assert "set -euo pipefail" in (SCRIPTS / script).read_text()


class TestSettings:
    @pytest.mark.parametrize(
        ("setting", "value", "line"),
        [
            ("PROVIDER", "copilot", "unknown provider 'copilot'; known are claude-code, codex, cursor, gemini"),
            ("PROVIDER", "../base", "unknown provider '../base'; known are claude-code, codex, cursor, gemini"),
            ("PROVIDER", "", "unknown provider ''; known are claude-code, codex, cursor, gemini"),
            ("AGENT_VERSION", "1;reboot", "not a version: '1;reboot'"),
            ("AGENT_USER", "root", "the agent must not run as root"),
            ("AGENT_USER", "a b", "not a user name: 'a b'"),
            ("EXTRA_PACKAGES", "jq;reboot", "not a Debian package name: 'jq;reboot'"),
            ("EXTRA_PACKAGES", "jq -y", "not a Debian package name: '-y'"),
            ("EXTRA_PACKAGES", "jq,sudo-", "not a Debian package name: 'sudo-'"),
            ("EXTRA_PACKAGES", "*", "not a Debian package name: '*'"),
            ("EXTRA_PACKAGES", "jq\nJQ", "not a Debian package name: 'JQ'"),
            ("EXTRA_PACKAGES", "jq=1.6", "not a Debian package name: 'jq=1.6'"),
        ],
    )
    def test_a_bad_setting_is_refused_in_one_line(self, setting: str, value: str, line: str) -> None:
        """The scripts trust no template to have checked for them."""
        refused = bash("source lib.sh; check_settings", **{f"KILN_{setting}": value})
        assert (refused.returncode, refused.stderr) == (1, f"error: {line}\n")

    def test_package_names_are_split_at_spaces_and_commas(self) -> None:
        """Each name is an argument of its own."""
        split = bash("source lib.sh; extra_packages", KILN_EXTRA_PACKAGES="jq, g++,libstdc++6  python3.11")
        assert split.stdout.split("\n") == ["jq", "g++", "libstdc++6", "python3.11", ""]


class TestWorkstation:
    @pytest.mark.parametrize(
        ("setting", "value", "line"),
        [
            ("SOFTWARE", "docker,emacs", "unknown software 'emacs'"),
            ("SOFTWARE", "../base", "unknown software '../base'"),
            ("SOFTWARE", "docker;reboot", "unknown software 'docker;reboot'"),
            ("SOFTWARE", "--version", "unknown software '--version'"),
            ("AGENT_USER", "root", "the agent must not run as root"),
        ],
    )
    def test_a_bad_setting_is_refused_in_one_line_before_anything_is_done(
        self, setting: str, value: str, line: str
    ) -> None:
        """The first thing that the script does is to look at all names."""
        refused = bash("bash workstation.sh", **{f"KILN_{setting}": value})
        assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", f"error: {line}\n")

    def test_software_keeps_its_order(self) -> None:
        """What is installed first can be built upon."""
        assert bash("source lib.sh; software", KILN_SOFTWARE="rust,docker, go").stdout.split() == [
            "rust",
            "docker",
            "go",
        ]

    @pytest.mark.parametrize(
        ("script", "setting", "subject"),
        [("cursor", "CURSOR_INSTALLER", "cursor"), ("chrome", "CHROME_PACKAGE", "chrome")],
    )
    def test_a_vendor_out_of_reach_is_named_in_one_line(
        self, script: str, setting: str, subject: str, tmp_path: Path
    ) -> None:
        """What only a vendor's own site serves fails with its address and the reason."""
        # Port 1 of the loopback address, where nobody listens.
        url = "http://127.0.0.1:1/vendor"
        settings = {f"KILN_{setting}": url, "KILN_AGENT_USER": "nobody", "TMPDIR": str(tmp_path)}
        failed = bash(f"bash software/{script}.sh", **settings)
        (line,) = failed.stderr.splitlines()
        assert (failed.returncode, line.partition(" curl: (7) ")[0]) == (
            1,
            f"error: {subject} cannot be installed: {url} cannot be fetched:",
        )


class TestProof:
    """`prove` runs as the agent's user, who is root here: the check of that is another's."""

    PROVE = 'source lib.sh; as_agent_user() { shift; "$@"; }; prove'

    def test_it_says_the_line_with_the_version(self, tmp_path: Path) -> None:
        """Notes and times that a program prints before are passed over."""
        program = "echo 2026-01-01T10:00:00.123Z note; echo thing v1.2.3; echo more"
        said = bash(f"{self.PROVE} sh -c '{program}'", KILN_AGENT_USER="root", TMPDIR=str(tmp_path))
        assert said.stdout.endswith(" answers as user root: thing v1.2.3\n")

    @pytest.mark.parametrize(
        ("program", "reason"),
        [("echo broken; exit 3", "fails as user root: broken"), ("echo ok", "names no version: ok")],
    )
    def test_a_program_that_does_not_answer_ends_the_build(self, program: str, reason: str) -> None:
        """The line has the command and its last words."""
        failed = bash(f"{self.PROVE} sh -c '{program}'; echo went on", KILN_AGENT_USER="root")
        assert (failed.returncode, failed.stdout, failed.stderr) == (1, "", f"error: sh -c {program} {reason}\n")


class TestCursor:
    def test_an_installer_out_of_reach_is_named_in_one_line(self) -> None:
        """The line has the address and the reason."""
        # Port 1 of the loopback address, where nobody listens.
        failed = bash(
            "bash agents/cursor.sh",
            KILN_PROVIDER="cursor",
            KILN_AGENT_USER="nobody",
            KILN_CURSOR_INSTALLER="http://127.0.0.1:1/install",
        )
        assert failed.returncode == 1
        assert failed.stderr.startswith(
            "error: cursor cannot be installed: http://127.0.0.1:1/install cannot be fetched: curl: (7) "
        )
