"""Names that Kiln gives to what it makes. Workflow ids, queues and tag keys are permanent: other services know them."""

import re
from collections.abc import Mapping
from typing import Final

BUILD_WORKFLOW_ID_PREFIX: Final = "build-"
CONTROL_QUEUE: Final = "kiln.control"
PACKER_QUEUE: Final = "kiln.packer"
TRANSFER_QUEUE: Final = "kiln.transfer"
MACHINES_QUEUE: Final = "kiln.machines"
PLATFORMS: Final = ("linux/amd64", "linux/arm64", "linux/arm/v7")
STAGING_OWNER: Final = "kiln-staging"
KEEP_HOUSE_WORKFLOW_ID: Final = "keep-house"

INSTALLATION_TAG: Final = "kiln:installation"
BUILD_TAG: Final = "kiln:build-id"
ATTEMPT_TAG: Final = "kiln:attempt"
MACHINE_TAG: Final = "kiln:machine-id"
LAUNCH_TAG: Final = "kiln:machine-launch"
NAME_TAG: Final = "Name"
RESERVED_TAG_PREFIXES: Final = ("kiln:", "aws:")

DEFAULT_TEMPLATE: Final = "builtin://default-ec2"
# The template of images made from a list of software: Kiln's own use, and no request's to name.
WORKSTATION_TEMPLATE: Final = "kiln://workstation"
# Template variables that Kiln sets and nobody else: names, tags and places that the cleanup relies on.
RESERVED_VARIABLE_PREFIX: Final = "kiln_"

_RESOURCE_NAME: Final = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-(\d+)$")
_AMI_NAME_LIMIT: Final = 128


def build_workflow_id(build_id: str) -> str:
    """`build-{id}`: the id under which other services signal and query a build."""
    return f"{BUILD_WORKFLOW_ID_PREFIX}{build_id}"


def delete_workflow_id(image_id: str) -> str:
    """The id of the workflow that deletes an image, by the catalog's id of that image."""
    return f"delete-{image_id}"


def operation_workflow_id(machine_id: int, number: int) -> str:
    """The id of the workflow that carries out a machine's operation of this number."""
    return f"machine-{machine_id}-{number}"


def launch_token(installation: str, machine_id: int | str, number: int | str) -> str:
    """EC2's ClientToken of an operation's RunInstances, at most 64 characters: repeated, it launches nothing more."""
    return f"{installation}-{machine_id}-{number}"


def machine_tags(installation: str, machine_id: int) -> dict[str, str]:
    """The tags of a machine's instance. Without `LAUNCH_TAG` it is one that Kiln took in and did not launch."""
    return {INSTALLATION_TAG: installation, MACHINE_TAG: str(machine_id)}


def users_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """An instance's tags, less Kiln's, AWS's, and its name, which is the machine's."""
    return {key: value for key, value in tags.items() if key != NAME_TAG and not key.startswith(RESERVED_TAG_PREFIXES)}


def runner_queue(runner_id: str) -> str:
    """Where a runner listens for its own pods."""
    return f"kiln.runner.{runner_id}"


def pod_workflow_id(key: str) -> str:
    """A pod's key, `pod-…`, is its workflow's id too: under it other services signal and query the pod."""
    return key


def container_queue(platform: str) -> str:
    """`kiln.container.linux-arm-v7` for `linux/arm/v7`."""
    return f"kiln.container.{platform.replace('/', '-')}"


def staging_repository(build_id: str) -> str:
    """Where a build's attempts push: nobody pulls from it, and no user's tag stands in it."""
    return f"{STAGING_OWNER}/{build_id}"


def staging_tag(attempt: int) -> str:
    """An attempt's own tag in its build's staging repository."""
    return f"attempt-{attempt}"


def context_key(build_id: str) -> str:
    """The object that holds a build's context."""
    return f"contexts/{build_id}"


def build_of_context(key: str) -> str:
    """The build whose context an object is."""
    return key.rpartition("/")[2]


def resource_suffix(build_id: str, attempt: int) -> str:
    """The end of the name of every resource that an attempt makes; cleanup finds untagged ones by it."""
    return f"{build_id}-{attempt}"


def image_name(prefix: str, provider: str, build_id: str, attempt: int) -> str:
    """An AMI's name, at most 128 characters (EC2 `CreateImage`), unique by build and attempt."""
    suffix = resource_suffix(build_id, attempt)
    return f"{f'{prefix}-{provider}'[: _AMI_NAME_LIMIT - len(suffix) - 1]}-{suffix}"


def key_pair_name(build_id: str, attempt: int) -> str:
    """The temporary key pair of an attempt."""
    return f"kiln-{resource_suffix(build_id, attempt)}"


def security_group_name(build_id: str, attempt: int) -> str:
    """The temporary security group of an attempt; must not begin with `sg-` (EC2 `CreateSecurityGroup`)."""
    return f"kiln-{resource_suffix(build_id, attempt)}"


def resource_tags(installation: str, build_id: str, attempt: int) -> dict[str, str]:
    """The tags that every resource of an attempt carries."""
    return {INSTALLATION_TAG: installation, BUILD_TAG: build_id, ATTEMPT_TAG: str(attempt)}


def build_of_name(name: str) -> tuple[str, int] | None:
    """The build id and attempt that a resource's name ends in, or None if it is not Kiln's."""
    match = _RESOURCE_NAME.search(name)
    return (match[1], int(match[2])) if match else None
