"""Turns an order into a Packer run: command line, environment, and a variable file that nobody else can read."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kiln.adapters.runs import (
    NETWORK_ENVIRONMENT,
    base_environment,
    inherited,
    new_run_dir,
    sweep_work_dir,
    write_private,
)
from kiln.adapters.templates import Template, Templates
from kiln.naming import image_name, key_pair_name, resource_tags, security_group_name
from kiln.ports import Order, PackerJob, SecurityGroupRequest

__all__ = ["PackerPlace", "PackerRuns", "sweep_work_dir"]

VARIABLE_FILE = "kiln.pkrvars.json"
# What a Packer on AWS needs of the worker's environment; everything else stays behind.
AWS_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CA_BUNDLE",
)
SIMULATED_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_POLL_DELAY_SECONDS": "1",
}


@dataclass(frozen=True)
class PackerPlace:
    """Where and how Packer runs here: settings, fixed at the worker's start."""

    program: str
    work_dir: Path
    installation: str
    ec2_url: str | None
    name_prefix: str
    subnet_id: str = ""
    iam_instance_profile: str = ""
    communicator: str = "ssh"
    ssh_cidr: str = "0.0.0.0/0"
    ca_bundle: str = ""

    @property
    def simulated(self) -> bool:
        return self.ec2_url is not None


class PackerRuns:
    """`kiln.ports.PackerKit` for the templates of this worker."""

    def __init__(self, place: PackerPlace, templates: Templates) -> None:
        self._place = place
        self._templates = templates

    def security_group(self, order: Order) -> SecurityGroupRequest:
        """SSH reaches the build's instance only where Packer logs in over it."""
        communicator = order.machine.variables.get("communicator", self._place.communicator)
        logs_in = not self._place.simulated and communicator == "ssh"
        return SecurityGroupRequest(
            name=security_group_name(order.build_id, order.attempt),
            tags=self._tags(order),
            subnet_id=self._place.subnet_id,
            ssh_cidr=self._place.ssh_cidr if logs_in else "",
        )

    def prepare(self, order: Order, security_group_id: str) -> PackerJob:
        """Writes the variable file and returns the run. Raises InvalidRequestError if the template is no more."""
        template = self._templates.of_build(order.machine.template)
        folder = new_run_dir(self._place.work_dir, "packer")
        try:
            self._write_variables(folder / VARIABLE_FILE, order, template, security_group_id)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return PackerJob(argv=self._argv(folder, template), env=self._environment(folder), cwd=folder)

    def discard(self, job: PackerJob) -> None:
        shutil.rmtree(job.cwd, ignore_errors=True)

    def _argv(self, folder: Path, template: Template) -> tuple[str, ...]:
        only = (f"-only={template.only}",) if template.only else ()
        variables = f"-var-file={folder / VARIABLE_FILE}"
        return (self._place.program, "build", "-machine-readable", *only, variables, str(template.path))

    def _write_variables(self, path: Path, order: Order, template: Template, security_group_id: str) -> None:
        spec = order.machine
        values: dict[str, object] = {
            "provider": spec.provider,
            "region": spec.region,
            "instance_type": spec.instance_type,
            "communicator": self._place.communicator,
            **spec.variables,
            **order.secrets,
            "kiln_image_name": self._image_name(order),
            "kiln_key_pair_name": key_pair_name(order.build_id, order.attempt),
            "kiln_security_group_id": security_group_id,
            "kiln_tags": self._tags(order),
            "kiln_ec2_endpoint": self._place.ec2_url or "",
            "kiln_subnet_id": self._place.subnet_id,
            "kiln_iam_instance_profile": self._place.iam_instance_profile,
            "kiln_ca_bundle": self._place.ca_bundle,
        }
        if self._place.simulated:
            values["communicator"] = "none"  # there is no machine to log in to
        kept = {name: value for name, value in values.items() if name in template.declared}
        write_private(path, json.dumps(kept))

    def _image_name(self, order: Order) -> str:
        prefix = order.machine.variables.get("ami_name_prefix") or self._place.name_prefix
        return image_name(prefix, order.machine.provider, order.build_id, order.attempt)

    def _tags(self, order: Order) -> dict[str, str]:
        return {**order.machine.tags, **resource_tags(self._place.installation, order.build_id, order.attempt)}

    def _environment(self, folder: Path) -> Mapping[str, str]:
        base = packer_environment(folder)
        if self._place.simulated:
            return {**base, **SIMULATED_ENVIRONMENT}
        return {**base, **_aws_files(), **inherited(*AWS_ENVIRONMENT, *NETWORK_ENVIRONMENT)}


def packer_environment(folder: Path) -> dict[str, str]:
    """What every Packer has; it writes below `folder`, and takes its plugins from where the operator has them."""
    return {
        **base_environment(folder),
        "PACKER_CACHE_DIR": str(folder / "cache"),
        "PACKER_CONFIG_DIR": os.environ.get("PACKER_CONFIG_DIR", str(Path.home() / ".config" / "packer")),
        "CHECKPOINT_DISABLE": "1",
    }


def _aws_files() -> dict[str, str]:
    """The operator's AWS files, named outright because the run's HOME is its own directory."""
    home = Path.home() / ".aws"
    return {"AWS_CONFIG_FILE": str(home / "config"), "AWS_SHARED_CREDENTIALS_FILE": str(home / "credentials")}
