"""The software catalogue: the one that Kiln comes with is sound, and a wrong one is refused with the entry's name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from kiln.adapters.software import SoftwareCatalogue
from kiln.errors import KilnError

PACKER_FOLDER = Path(__file__).resolve().parents[2] / "packer"
OWN = PACKER_FOLDER / "software.yaml"

AMI = {"owner": "099720109477", "name": "debian-*"}
GOOD: dict[str, Any] = {
    "base_images": [
        {
            "id": number,
            "name": f"Debian {number}",
            "size": 8,
            "released": released,
            "root_device_name": "/dev/xvda",
            "ssh_username": "admin",
            "ami": AMI,
            "simulated_ami": AMI | {"name": "amzn2-*"},
        }
        for number, released in ((13, "2025-08-09"), (12, "2023-06-10"))
    ],
    "software": [
        {"id": 2, "name": "Docker", "size": 0.3, "script": "docker", "bases": [12, 13]},
        {"id": 1, "name": "Blender", "size": 1, "script": "blender", "bases": [13]},
    ],
}

PUBLISHED = {
    1: "blender",
    2: "claude-code",
    3: "codex",
    4: "gemini",
    5: "cursor",
    6: "docker",
    7: "node",
    8: "python",
    9: "go",
    10: "rust",
    11: "code-server",
    12: "desktop",
    13: "git-tools",
    14: "postgresql",
    15: "chromium",
    16: "chrome",
    17: "ffmpeg",
    18: "jupyter",
}


def written(folder: Path, content: object) -> Path:
    """The file of a catalogue, with both scripts beside it."""
    scripts = folder / "scripts" / "software"
    scripts.mkdir(parents=True)
    for name in ("docker", "blender"):
        (scripts / f"{name}.sh").touch()
    path = folder / "software.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


class TestOwn:
    """`packer/software.yaml`."""

    CATALOGUE = SoftwareCatalogue.load(OWN)

    def test_ids_are_those_that_were_published(self) -> None:
        """An id is permanent: an entry may be added at the end, none may change its id."""
        scripts = {program.id: program.script for program in self.CATALOGUE.programs}
        assert scripts.items() >= PUBLISHED.items()
        assert [(base.id, base.name) for base in self.CATALOGUE.base_images][:3] == [
            (1, "Ubuntu 24.04"),
            (2, "Ubuntu 22.04"),
            (3, "Debian 12"),
        ]

    def test_every_script_is_offered(self) -> None:
        """A script without an entry could never run."""
        scripts = {path.stem for path in (PACKER_FOLDER / "scripts" / "software").iterdir()}
        assert {program.script for program in self.CATALOGUE.programs} == scripts

    def test_the_newest_base_has_nearly_everything(self) -> None:
        """Who names no base image gets the newest, on which most of the list must install."""
        newest = self.CATALOGUE.newest_base
        assert newest.name == "Ubuntu 24.04"
        assert [program.name for program in self.CATALOGUE.programs if newest.id not in program.bases] == ["Chromium"]


class TestSound:
    def test_entries_come_by_id(self, tmp_path: Path) -> None:
        """Whatever their order in the file."""
        catalogue = SoftwareCatalogue.load(written(tmp_path, GOOD))
        assert [program.name for program in catalogue.programs] == ["Blender", "Docker"]
        assert [base.id for base in catalogue.base_images] == [12, 13]

    def test_an_entry_is_found_by_its_id(self, tmp_path: Path) -> None:
        """None stands for one that does not exist."""
        catalogue = SoftwareCatalogue.load(written(tmp_path, GOOD))
        docker, base = catalogue.program(2), catalogue.base_image(13)
        assert docker is not None and (docker.name, docker.size, docker.bases) == ("Docker", 0.3, frozenset({12, 13}))
        assert base is not None and (base.released, base.simulated_ami_name) == ("2025-08-09", "amzn2-*")
        assert (catalogue.program(3), catalogue.base_image(1)) == (None, None)

    def test_the_newest_base_is_the_one_released_last(self, tmp_path: Path) -> None:
        """Not the one with the highest id, nor the last of the file."""
        content = copy.deepcopy(GOOD)
        content["base_images"][1]["released"] = "2026-01-01"
        assert SoftwareCatalogue.load(written(tmp_path, content)).newest_base.id == 12


class TestWrong:
    @pytest.mark.parametrize(
        ("section", "field", "value", "problem"),
        [
            ("software", "id", 1, "software 'Docker': another one has its id"),
            ("software", "id", "2", "software 'Docker': id: Input should be a valid integer"),
            ("software", "id", 0, "software 'Docker': id: Input should be greater than 0"),
            ("software", "name", "Blender", "software 'Blender': another one has its name"),
            ("software", "name", "", "software 1: name: String should have at least 1 character"),
            ("software", "name", "a\nb", "software 'a\\nb': name: String should match pattern"),
            ("software", "size", 0, "software 'Docker': size: Input should be greater than 0"),
            ("software", "size", float("inf"), "software 'Docker': size: Input should be a finite number"),
            ("software", "size", "0.3", "software 'Docker': size: Input should be a valid number"),
            ("software", "script", "../base", "software 'Docker': script: String should match pattern"),
            ("software", "script", "emacs", "software 'Docker': script: there is no scripts/software/emacs.sh"),
            ("software", "bases", [], "software 'Docker': bases: Frozenset should have at least 1 item"),
            ("software", "bases", [12, 7], "software 'Docker': bases: there is no base image 7"),
            ("software", "colour", "red", "software 'Docker': colour: Extra inputs are not permitted"),
            ("base_images", "id", 12, "base image 'Debian 13': another one has its id"),
            ("base_images", "name", "Debian 12", "base image 'Debian 12': another one has its name"),
            ("base_images", "size", -8, "base image 'Debian 13': size: Input should be greater than 0"),
            ("base_images", "released", "soon", "base image 'Debian 13': released: Input should be a valid date"),
            (
                "base_images",
                "ami",
                {"owner": "me", "name": "x"},
                "base image 'Debian 13': ami.owner: String should match",
            ),
            ("base_images", "simulated_ami", None, "base image 'Debian 13': simulated_ami: Input should be a valid"),
        ],
    )
    def test_a_wrong_entry_is_named_in_one_line(
        self, tmp_path: Path, section: str, field: str, value: object, problem: str
    ) -> None:
        """The line has the file, the entry, its field and what is wrong with it."""
        content = copy.deepcopy(GOOD)
        content[section][0][field] = value
        with pytest.raises(KilnError) as refused:
            SoftwareCatalogue.load(written(tmp_path, content))
        assert str(refused.value).startswith(f"software.yaml: {problem}")
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("software: [", "cannot be read: while parsing a flow node"),
            ("", "the file: Input should be a valid dictionary"),
            ("software: 7\nbase_images: []", "base_images: Tuple should have at least 1 item"),
            (GOOD | {"plans": []}, "plans: Extra inputs are not permitted"),
            ({"software": GOOD["software"]}, "base_images: Field required"),
            (GOOD | {"software": ["docker"]}, "software 1: Input should be a valid dictionary"),
        ],
    )
    def test_a_file_of_another_shape_is_refused_in_one_line(
        self, tmp_path: Path, content: object, problem: str
    ) -> None:
        """The line has the file and what is wrong with it."""
        with pytest.raises(KilnError) as refused:
            SoftwareCatalogue.load(written(tmp_path, content))
        assert str(refused.value).startswith(f"software.yaml: {problem}")
        assert "\n" not in str(refused.value)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        """The line says that there is none."""
        with pytest.raises(KilnError, match=r"^software\.yaml: cannot be read: .*No such file"):
            SoftwareCatalogue.load(tmp_path / "software.yaml")
