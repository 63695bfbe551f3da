"""The README's container sections, run as they stand: both published clients, every curl line, and Docker's own client."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.container_rig import ContainerRig, container_rig
from support.oci_images import Pusher, image, index
from support.readme import blocks, check_answer, printed_by, section
from support.registry import running_registry

SECTIONS = ("cloud-builds", "container-images", "Pulling images", "Errors")
BLOCKS = blocks(*SECTIONS)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that stands in for the public ones; the port of it."""
    with running_registry(tmp_path_factory.mktemp("foreign")) as host:
        pusher = Pusher(host)
        for name, tag in (("pause", "3.9"), ("prometheus/busybox", "latest")):
            pusher.push(name, index(image(name), image(f"{name} for arm", "linux/arm64")), tag)
        pusher.close()
        yield host.rpartition(":")[2]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, foreign: str) -> Iterator[ContainerRig]:
    allowed = f"127.0.0.1:{foreign},localhost:{foreign}"
    with container_rig(tmp_path_factory.mktemp("kiln"), KILN_TRANSFER_REGISTRIES=allowed) as rig:
        yield rig


@pytest.fixture(scope="module")
def answers(rig: ContainerRig, foreign: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each block printed, with the hosts that the README has."""
    places = {
        "127.0.0.1:5000": rig.registry,
        "127.0.0.1:8000": rig.stack.api_url.removeprefix("http://"),
        "registry.k8s.io": f"127.0.0.1:{foreign}",
        "quay.io": f"localhost:{foreign}",
    }
    folder = tmp_path_factory.mktemp("reader")
    return printed_by(BLOCKS, folder, places, _environment(rig, folder))


def _environment(rig: ContainerRig, folder: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "KILN_URL": rig.stack.api_url,
        "KILN_API_KEY": rig.admin.key,
        "AUTH": f"Authorization: Bearer {rig.admin.key}",
        "JSON": "Content-Type: application/json",
        "DOCKER_HOST": rig.stack.containers.hosts[0],
        "DOCKER_CONFIG": str(folder / "docker"),
    }


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=lambda number: f"{BLOCKS[number].language}-{number}")
def test_a_block_answers_as_the_readme_says(answers: list[str], number: int) -> None:
    """It has the documented fields, with their values where these do not change from run to run; else no error."""
    check_answer(BLOCKS[number], answers[number])


def test_the_sections_hold_what_is_to_be_run() -> None:
    """Both clients' snippets and the curl lines are found, each section's."""
    languages = [block.language for block in BLOCKS]
    assert languages.count("python") == 2
    assert languages.count("sh") >= 20
    for title in SECTIONS:
        assert "```sh" in section(title), title
