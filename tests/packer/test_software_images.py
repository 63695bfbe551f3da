"""The scripts of the software catalogue, run for real: each in a container image that Packer makes, where it proves that
what it installed answers; then most are used.

Not among them: cursor and chrome, which only their vendors' sites serve. They are shown to fail in one line without.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from cli.docker_engine import container_network
from kiln.adapters.software import SoftwareCatalogue
from packer.tools import PACKER_FOLDER, SCRIPTS, UPLOAD_FOLDER, WORKSTATION, Engine, Packer, ca_bundle

pytestmark = [pytest.mark.docker, pytest.mark.long, pytest.mark.timeout(900)]

BUILD_TIMEOUT_SECONDS = 600
VENDORS = {"cursor": "https://cursor.com/install", "chrome": "https://dl.google.com/linux/direct/"}
# By what else they bring, so that each image is made once.
GROUPED = (
    ("git-tools", "docker", "python", "go", "postgresql", "ffmpeg", "jupyter"),
    ("desktop", "rust", "chromium", "blender"),
    ("claude-code", "codex", "gemini", "node", "code-server"),
)
CATALOGUE = SoftwareCatalogue.load(PACKER_FOLDER / "software.yaml")
SERVED = tuple(program.script for program in CATALOGUE.programs if program.script not in VENDORS)
# An entry that is new needs no line here: it is tried with the others that have none.
UNGROUPED = tuple(name for name in SERVED if not any(name in group for group in GROUPED))
GROUPS = (*GROUPED, *filter(None, [UNGROUPED]))
# What a user without privileges does with each, and what that prints in the end.
USES = {
    "blender": (
        "blender --background --python-expr 'import bpy; print(len(bpy.data.objects), \"objects\")'",
        "3 objects",
    ),
    "chromium": ("chromium --headless --no-sandbox --dump-dom 'data:text/html,<p>kiln'", "<p>kiln</p>"),
    "claude-code": ("claude --version", "Claude Code"),
    "code-server": (
        (
            "code-server --auth none --bind-addr 127.0.0.1:8080 >/dev/null 2>&1 & "
            "curl --silent --fail --retry 60 --retry-connrefused --retry-delay 1 http://127.0.0.1:8080/healthz"
        ),
        '"status":',
    ),
    "codex": ("codex --version", "codex-cli"),
    "desktop": (
        (
            "/usr/lib/xorg/Xorg :10 -config xrdp/xorg.conf -nolisten tcp -logfile ~/log >/dev/null 2>&1 & "
            "until [ -S /tmp/.X11-unix/X10 ]; do sleep 0.1; done; "
            "DISPLAY=:10 dbus-launch --exit-with-session startxfce4 >/dev/null 2>&1 & "
            "for program in xfwm4 xfce4-panel xfdesktop; do "
            "until grep -qsx $program /proc/[0-9]*/comm; do sleep 0.1; done; done; echo the desktop runs"
        ),
        "the desktop runs",
    ),
    "docker": ("docker-compose --version && docker --version", "Docker version"),
    "ffmpeg": (
        "ffmpeg -f lavfi -i testsrc=duration=1 a.mp4 2>/dev/null; ffprobe -v error -show_streams a.mp4",
        "width=320",
    ),
    "gemini": ("gemini --version", "."),
    "git-tools": ("git init -q . && git lfs track '*.bin' && cat .gitattributes && gh --version", "filter=lfs"),
    "go": ("printf 'package main\\nfunc main() { println(6*7) }' >a.go && go run a.go 2>&1", "42"),
    "jupyter": ("jupyter kernelspec list", "python3"),
    "node": ("node --eval 'console.log(6*7)' && npm --version", "42"),
    "postgresql": ("/usr/lib/postgresql/*/bin/initdb -D data >/dev/null && psql --version", "psql (PostgreSQL)"),
    "python": ("python3 -m venv here && here/bin/pip --version && pipx --version", "/home/agent/here/lib"),
    "rust": ("echo 'fn main() { println!(\"{}\", 6*7) }' >a.rs && rustc a.rs && ./a && cargo --version", "42"),
}


@dataclass(frozen=True)
class Images:
    """An image a group of software, made when it is first asked for."""

    engine: Engine
    packer: Packer
    base: str
    made: dict[tuple[str, ...], str] = field(default_factory=dict)

    def with_software(self, name: str) -> str:
        group = next(group for group in GROUPS if name in group)
        if group not in self.made:
            image = f"kiln-test/workstation-{len(self.made)}:latest"
            built = self.build(group, kiln_container_reference=image)
            assert built.returncode == 0, built.stdout
            self.made[group] = image
        return self.made[group]

    def build(self, software: tuple[str, ...], **variables: str) -> subprocess.CompletedProcess[str]:
        defaults = {
            "software": ",".join(software),
            "kiln_base_image": self.base,
            "kiln_container_reference": "kiln-test/workstation:latest",
            "kiln_container_network": container_network(self.engine.host),
            "kiln_ca_bundle": ca_bundle(),
        }
        return self.packer.build("docker.workstation", defaults | variables)


@pytest.fixture(scope="module")
def images(engine: Engine, docker_packer: Packer, prepared_image: str) -> Iterator[Images]:
    packer = replace(docker_packer, template=WORKSTATION, timeout_seconds=BUILD_TIMEOUT_SECONDS)
    images = Images(engine, packer, prepared_image)
    yield images
    if images.made:
        engine.docker("image", "rm", "--force", *images.made.values())


# By group, so that each image is made once and used at once.
@pytest.mark.parametrize("software", [name for group in GROUPS for name in group])
def test_it_can_be_used_by_who_is_not_root(images: Images, engine: Engine, software: str) -> None:
    """Each is installed and proves itself; it does some real work for the image's own user where a use is known."""
    command, printed = USES.get(software, ("id --user --name", "agent"))
    assert printed in engine.docker(
        "run", "--rm", images.with_software(software), "timeout", "90", "bash", "-c", command
    )


@pytest.mark.parametrize("software", [group[0] for group in GROUPS])
def test_nothing_that_only_the_build_needed_is_left(images: Images, engine: Engine, software: str) -> None:
    """No scripts, CA bundle, caches, package lists, nor the homes that the proofs ran in."""
    script = "for f in /tmp /var/tmp /var/lib/apt/lists /root/.npm; do [ ! -d $f ] || find $f -mindepth 1 -type f; done"
    assert engine.run(images.with_software(software), script, "--user=root") == ""


def test_it_may_be_installed_again(images: Images, engine: Engine) -> None:
    """On a machine that has it already, nothing is wrong and everything is proved once more."""
    (group, *_) = GROUPS
    script = f"cp -r /scripts {UPLOAD_FOLDER} && KILN_SOFTWARE={','.join(group)} bash {UPLOAD_FOLDER}/workstation.sh"
    network = f"--network={container_network(engine.host)}"
    image = images.with_software(group[0])
    again = engine.run(image, script, "--user=root", f"--volume={SCRIPTS}:/scripts:ro", network)
    tried = [line.removeprefix("==> software: ") for line in again.splitlines() if line.startswith("==> software: ")]
    assert (tried, again.splitlines()[-1]) == (list(group), "==> cleaning up")


@pytest.fixture(scope="module")
def unreachable(engine: Engine, prepared_image: str) -> str:
    """The base image with a proxy that does not exist, so that vendors are out of reach wherever this runs."""
    image = "kiln-test/no-vendors:latest"
    container = engine.docker(
        "run", "--detach", prepared_image, "bash", "-c", "echo proxy=http://127.0.0.1:1 >/root/.curlrc"
    )
    engine.docker("wait", container)
    engine.docker("commit", container, image)
    engine.docker("rm", container)
    return image


@pytest.mark.parametrize("software", VENDORS)
def test_a_vendor_out_of_reach_ends_the_build_in_one_line(images: Images, unreachable: str, software: str) -> None:
    """The line has the software, the address and the reason; what comes after it in the list is not tried."""
    failed = images.build((software, "node"), kiln_base_image=unreachable)
    errors = re.findall(r"docker\.workstation: (error: .+)", failed.stdout)
    assert (failed.returncode, len(errors), "software: node" in failed.stdout) == (1, 1, False), failed.stdout
    assert errors[0].startswith(f"error: {software} cannot be installed: {VENDORS[software]}")


def test_all_software_is_tried() -> None:
    """Every entry is run here, or is a vendor's own and shown to fail without; what is named here is in the catalogue."""
    tried = [name for group in GROUPS for name in group]
    assert sorted([*tried, *VENDORS]) == sorted(program.script for program in CATALOGUE.programs)
    assert USES.keys() <= set(tried)
