"""The template of images with a list of software: as Packer reads it, as Kiln fills it in, and on simulated EC2."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hcl2
import pytest

from kiln.adapters.packer import VARIABLE_FILE, PackerPlace, PackerRuns
from kiln.adapters.software import SoftwareCatalogue
from kiln.adapters.templates import Templates
from kiln.errors import InvalidRequestError
from kiln.models import MachineBuildSpec
from kiln.naming import WORKSTATION_TEMPLATE
from kiln.ports import BaseImage, Order
from packer.tools import PACKER_FOLDER, TEMPLATE, WORKSTATION, Packer
from support.moto import Account, MotoServer

SOURCES = ("amazon-ebs.workstation", "docker.workstation")
CATALOGUE = SoftwareCatalogue.load(PACKER_FOLDER / "software.yaml")
EVERYTHING = ",".join(program.script for program in CATALOGUE.programs)
BUILD_ID = "0b6e5c1e-0000-4000-8000-000000000001"


@pytest.fixture
def workstation(packer: Packer) -> Packer:
    return replace(packer, template=WORKSTATION)


def variables_of(template: Path) -> dict[str, dict[str, Any]]:
    blocks = hcl2.loads(template.read_text())["variable"]
    return {name.strip('"'): block for each in blocks for name, block in each.items()}


class TestTemplate:
    @pytest.mark.parametrize("source", SOURCES)
    @pytest.mark.parametrize("software", ["", "blender", EVERYTHING])
    def test_it_is_valid_with_any_software(self, workstation: Packer, source: str, software: str) -> None:
        """Nothing is required: a base image alone is an image as well."""
        validated = workstation.validate(source, {"software": software})
        assert validated.returncode == 0, validated.stdout

    @pytest.mark.parametrize("communicator", ["ssh", "ssm", "none"])
    def test_it_is_valid_with_each_communicator(self, workstation: Packer, communicator: str) -> None:
        """An instance is reached by SSH, through Session Manager, or not at all."""
        variables = {"communicator": communicator, "kiln_iam_instance_profile": "session-manager"}
        validated = workstation.validate("amazon-ebs.workstation", variables)
        assert validated.returncode == 0, validated.stdout

    @pytest.mark.parametrize("software", ["Docker", "docker;reboot", "../base", "docker,,go", "docker,", "-v", "a\nb"])
    def test_a_bad_list_is_refused_by_the_name_of_its_variable(self, workstation: Packer, software: str) -> None:
        """A value that could do harm never reaches a script."""
        validated = workstation.validate("docker.workstation", {"software": software})
        assert (validated.returncode, "The software must be" in validated.stdout) == (1, True), validated.stdout

    def test_what_it_shares_with_the_agents_template_is_the_same(self) -> None:
        """A variable of both is checked alike, and has the same default but where the image's kind decides it."""
        mine, agents = variables_of(WORKSTATION), variables_of(TEMPLATE)
        # Of the two, only agents become container images of Kiln's registry.
        assert agents.keys() - mine.keys() == {"provider", "agent_version", "kiln_container_name"}
        assert mine.keys() - agents.keys() == {"software"}
        unlike = {
            name
            for name in mine.keys() & agents.keys()
            for part in ("default", "type", "sensitive", "validation")
            if mine[name].get(part) != agents[name].get(part)
        }
        assert unlike == {"ami_name_prefix", "source_ami_name"}


@pytest.fixture
def runs(tmp_path: Path) -> PackerRuns:
    place = PackerPlace("packer", tmp_path, "test", None, "kiln", ca_bundle="/etc/ca.pem")
    return PackerRuns(place, Templates(PACKER_FOLDER, None))


def order(**variables: str) -> Order:
    spec = MachineBuildSpec(
        provider="workstation",
        region="eu-central-1",
        instance_type="t3.large",
        template=WORKSTATION_TEMPLATE,
        variables=variables,
    )
    return Order(BUILD_ID, 2, spec, {})


class TestRun:
    def test_a_build_runs_kilns_own_template(self, runs: PackerRuns) -> None:
        """Its AMI alone is built, by the file that nobody can name."""
        argv = runs.prepare(order(software="go"), "sg-1").argv
        assert ("-only=amazon-ebs.workstation" in argv, argv[-1]) == (True, str(WORKSTATION))

    def test_the_variables_of_the_order_reach_packer(self, runs: PackerRuns) -> None:
        """Each is declared by the template; what only agents have is left out."""
        variables = {
            "software": "blender,docker",
            "source_ami_owner": "136693071363",
            "source_ami_name": "debian-12-amd64-*",
            "root_device_name": "/dev/xvda",
            "ssh_username": "admin",
            "volume_size_gb": "11",
        }
        job = runs.prepare(order(**variables), "sg-1")
        written = json.loads((job.cwd / VARIABLE_FILE).read_text())
        assert written == variables | {
            "region": "eu-central-1",
            "instance_type": "t3.large",
            "communicator": "ssh",
            "kiln_image_name": f"kiln-workstation-{BUILD_ID}-2",
            "kiln_key_pair_name": f"kiln-{BUILD_ID}-2",
            "kiln_security_group_id": "sg-1",
            "kiln_tags": {"kiln:installation": "test", "kiln:build-id": BUILD_ID, "kiln:attempt": "2"},
            "kiln_ec2_endpoint": "",
            "kiln_subnet_id": "",
            "kiln_iam_instance_profile": "",
            "kiln_ca_bundle": "/etc/ca.pem",
        }

    def test_a_request_cannot_name_the_template(self) -> None:
        """It is refused in the words of any other source that is not served."""
        templates = Templates(PACKER_FOLDER, None)
        with pytest.raises(
            InvalidRequestError, match="template_source: only builtin://NAME and operator://NAME"
        ) as own:
            templates.find(WORKSTATION_TEMPLATE)
        with pytest.raises(InvalidRequestError) as others:
            templates.find("git://example.test/template")
        assert (own.value.field, own.value.problem) == (others.value.field, others.value.problem)


class TestBuild:
    @pytest.mark.parametrize("base", CATALOGUE.base_images, ids=lambda base: base.name)
    def test_each_base_image_has_a_stand_in_to_build_on(
        self, workstation: Packer, base: BaseImage, moto: MotoServer, account: Account
    ) -> None:
        """On simulated EC2, nothing is installed; what is left is one AMI with its snapshot, named and tagged."""
        before = account.snapshot_of_account()
        owner, name = base.lookup(simulated=True)
        variables = {
            "software": EVERYTHING,
            "communicator": "none",
            "source_ami_owner": owner,
            "source_ami_name": name,
            "root_device_name": base.root_device_name,
            "ssh_username": base.ssh_username,
            "volume_size_gb": "11",
            "kiln_image_name": f"workstation-{base.id}",
            "kiln_ec2_endpoint": moto.url,
            "kiln_tags": {"kiln:installation": "test"},
        }
        built = workstation.build("amazon-ebs.workstation", variables)
        assert built.returncode == 0, built.stdout
        left = account.left_since(before)
        (image,) = account.ec2.describe_images(ImageIds=list(left.images))["Images"]
        assert (len(left.snapshots), left.instances, left.security_groups) == (1, frozenset(), frozenset())
        assert image["Name"] == f"workstation-{base.id}"
        assert {"Key": "kiln:installation", "Value": "test"} in image["Tags"]

    def test_every_stand_in_is_an_ami_of_its_own(self) -> None:
        """Images of two base images can be told apart on simulated EC2 too."""
        assert len({base.lookup(simulated=True) for base in CATALOGUE.base_images}) == len(CATALOGUE.base_images)
