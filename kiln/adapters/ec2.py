"""EC2 by boto3: the `Cloud` and the `MachineCloud` of `kiln.ports`, on AWS or on a simulated EC2.

ec2.py            the port's methods, and whose errors they raise
ec2_clients.py    boto3's clients, credentials, time-outs and retries
ec2_errors.py     what EC2's error codes mean
ec2_reading.py    complete listings
ec2_ownership.py  which of what is listed a build made
ec2_removal.py    single removals
ec2_cleanup.py    one pass over what a build left
ec2_networks.py   temporary security groups
ec2_machines.py   the instances of machines
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from kiln.adapters.ec2_cleanup import Leftovers
from kiln.adapters.ec2_clients import Ec2Clients
from kiln.adapters.ec2_errors import CloudRefusedError, CloudUnavailableError, translated
from kiln.adapters.ec2_machines import Ec2Machines
from kiln.adapters.ec2_networks import SecurityGroups
from kiln.adapters.ec2_ownership import BuildFinder
from kiln.adapters.ec2_reading import Ec2Reader
from kiln.adapters.ec2_removal import Ec2Remover
from kiln.naming import INSTALLATION_TAG
from kiln.ports import Ami, ImageDeletion, Instance, Launch, Marks, Resource, SecurityGroupRequest

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ec2.type_defs import TagTypeDef

__all__ = ["CloudRefusedError", "CloudUnavailableError", "Ec2Cloud"]

CALL_TIMEOUT: Final = timedelta(seconds=10)
CALL_ATTEMPTS: Final = 4
# Credentials are rotated, and now and then replaced by another account's: whose they are is asked again after a while.
ACCOUNT_LIFETIME: Final = timedelta(minutes=1)


@dataclass(frozen=True)
class _Region:
    """EC2 in one region, for the length of one call of the port."""

    name: str
    ec2: EC2Client
    reader: Ec2Reader
    remover: Ec2Remover
    machines: Ec2Machines


class Ec2Cloud:
    """EC2 in any region. Threads may share it. Every method but `close` may block, and raise these.

    CloudUnavailableError  EC2 did not answer, throttled or failed inside; the same call may succeed later
    CloudRefusedError      no or wrong credentials, no permission, a wrong parameter
    ImageNotFoundError     EC2 has no AMI of this id, where that is not the answer itself
    NotFoundError          the same of another resource
    RefusedError           an instance's state forbids what it is asked

    With `simulated`, EC2 and STS are at `endpoint_url`, and no credentials or settings of the environment are used.
    Without, boto3's usual chain of credentials decides, and `endpoint_url` has to be None. `call_timeout` bounds one
    attempt, and `attempts` their number: a call to a dead endpoint ends after attempts x call_timeout, and some
    seconds of backing off.

    Raises ValueError if `simulated` and `endpoint_url` contradict each other.
    """

    def __init__(
        self,
        *,
        simulated: bool,
        endpoint_url: str | None,
        call_timeout: timedelta = CALL_TIMEOUT,
        attempts: int = CALL_ATTEMPTS,
    ) -> None:
        if simulated != bool(endpoint_url):
            raise ValueError("a simulated EC2 needs an endpoint URL, and AWS takes none")
        self.simulated = simulated
        self._accounts: dict[str, tuple[str, float]] = {}
        self._clients = Ec2Clients(endpoint_url=endpoint_url, call_timeout=call_timeout, attempts=attempts)

    def warm_up(self, region: str) -> None:
        """Makes the clients of a region, and asks EC2 for nothing much: the first real call is then a quick one."""
        self.account(region)
        with self._in(region) as there:
            there.reader.images("name", ["kiln-"])

    def close(self) -> None:
        """Closes the kept connections. A later call opens new ones."""
        self._clients.close()

    def account(self, region: str) -> str:
        """The account's id that the credentials belong to (STS `GetCallerIdentity`)."""
        with translated(region):
            return self._account_of(region)

    def make_security_group(self, region: str, request: SecurityGroupRequest) -> str:
        """The id of the security group of this name; made, tagged and opened to `ssh_cidr` if it is not there yet."""
        with self._in(region) as there:
            return SecurityGroups(there.ec2, region).make(request)

    def image(self, region: str, image_id: str) -> Ami | None:
        """The account's own AMI of this id, in any state; None if EC2 says that there is none."""
        with self._in(region) as there:
            images = there.reader.images("image-id", [image_id])
        return images[0].ami if images else None

    def images_of_build(self, region: str, marks: Marks) -> list[Ami]:
        """Every AMI of a build (by tag, by name, by known id, by the instance it was made of), newest first, in any
        state."""
        with self._in(region) as there:
            finder = BuildFinder(there.reader, marks)
            return [image.ami for image in finder.images(finder.instances())]

    def own_images(self, region: str, image_ids: Collection[str]) -> dict[str, Ami]:
        """Those of the given AMIs that EC2 has, by id; not those that it shows as deregistered. Complete, or it
        raises."""
        with self._in(region) as there:
            images = there.reader.images("image-id", image_ids)
        return {image.id: image.ami for image in images if not image.is_gone}

    def tag(self, region: str, resource_ids: Collection[str], tags: Mapping[str, str]) -> None:
        """Puts tags on resources (EC2 `CreateTags`). Raises NotFoundError too while EC2 does not know a fresh one."""
        if not resource_ids or not tags:
            return
        with self._in(region) as there:
            pairs: list[TagTypeDef] = [{"Key": key, "Value": value} for key, value in tags.items()]
            there.ec2.create_tags(Resources=sorted(resource_ids), Tags=pairs)

    def end_instances(self, region: str, marks: Marks) -> list[Resource]:
        """Terminates a build's instances; returns those that are not terminated yet, each with its state, or with
        EC2's code if it refuses."""
        with self._in(region) as there:
            instances = BuildFinder(there.reader, marks).instances()
            return _of_build(marks, there.remover.end(instances.found))

    def remove_leftovers(self, region: str, marks: Marks, spare: Collection[str]) -> list[Resource]:
        """One pass over everything a build made, less the AMIs in `spare` and their snapshots. Returns what is still
        there, each with its state, or with EC2's code of what stands against its removal. What EC2 does not show yet
        is not in the answer: one empty answer right after a build's end is no proof."""
        with self._in(region) as there:
            finder = BuildFinder(there.reader, marks)
            leftovers = Leftovers(finder, there.reader, there.remover, spare)
            return _of_build(marks, leftovers.remove())

    def delete_image(self, region: str, image_id: str, snapshot_ids: Collection[str]) -> ImageDeletion:
        """One pass of deregistering an AMI and then deleting every snapshot behind it: those given, those that EC2
        shows in the AMI, and those that it says it made for the AMI. A pending AMI is left alone, as remaining.
        Repeating it is harmless."""
        with self._in(region) as there:
            return there.remover.delete_image(image_id, snapshot_ids)

    def tagged_resources(self, region: str, installation: str) -> list[Resource]:
        """Everything that carries this installation's tag, less what EC2 shows after its end."""
        with self._in(region) as there:
            reader = there.reader
            listings = (
                reader.instances,
                reader.images,
                reader.snapshots,
                reader.volumes,
                reader.key_pairs,
                reader.security_groups,
            )
            found = [each for listing in listings for each in listing(f"tag:{INSTALLATION_TAG}", [installation])]
        # EC2 takes * and ? in a filter's value for wildcards.
        own = [each for each in found if each.tags.get(INSTALLATION_TAG) == installation]
        return [each.resource for each in own if not each.is_gone]

    def remove(self, resource: Resource) -> bool:
        """Removes one thing as `tagged_resources` named it, an AMI with its snapshots. True when it is gone, False
        if it has to wait, or if it is a snapshot that an AMI needs."""
        with self._in(resource.region) as there:
            return there.remover.remove(resource)

    def instances(self, region: str, instance_ids: Collection[str]) -> dict[str, Instance]:
        """Those of the given instances that EC2 shows, terminated ones too, by id. Complete, or it raises."""
        with self._in(region) as there:
            found = there.reader.instances("instance-id", instance_ids)
        return {each.id: each.instance for each in found}

    def instances_of_machine(self, region: str, installation: str, machine_id: int) -> list[Instance]:
        """The instances that this installation launched for a machine (they carry `kiln:machine-launch`), less
        terminated ones, oldest first."""
        with self._in(region) as there:
            return there.machines.launched_for(installation, machine_id)

    def launched_instances(self, region: str, installation: str) -> list[Instance]:
        """All that this installation launched for machines, less terminated ones, oldest first."""
        with self._in(region) as there:
            return there.machines.launched(installation)

    def disk_gib(self, region: str, instance_id: str) -> int:
        """The size of an instance's root volume in GiB; 0 if EC2 shows none."""
        with self._in(region) as there:
            return there.machines.disk_gib(instance_id)

    def base_image(self, region: str, owner: str, name: str) -> str | None:
        """The newest available AMI of an owner (an account, `amazon` or `self`) whose name matches (`*` for any), with
        an EBS root and hardware virtualization; None if there is none."""
        with self._in(region) as there:
            return there.machines.base_image(owner, name)

    def launch(self, region: str, launch: Launch) -> str:
        """The new instance's id (EC2 `RunInstances`). All its disks go with it. Of more than 50 tags EC2 gets Kiln's,
        the name and the first others by name; AWS's own (`aws:…`) are left out.

        Raises CapacityError, ImageNotFoundError, ConflictError for a client token that came with another launch. One
        whose instance is terminated is a CloudRefusedError, and so is a placement that is no more.
        """
        with self._in(region) as there:
            return there.machines.launch(launch)

    def start_instance(self, region: str, instance_id: str) -> None:
        """Starts a stopped instance; a running one is left alone (EC2 `StartInstances`).

        Raises CapacityError, NotFoundError, RefusedError if it is terminated, CloudUnavailableError while it stops.
        """
        with self._in(region) as there:
            there.machines.start(instance_id)

    def stop_instance(self, region: str, instance_id: str, *, force: bool) -> None:
        """Stops an instance; a stopped one is left alone (EC2 `StopInstances`).

        Raises NotFoundError, RefusedError if it is terminated, CloudUnavailableError if EC2 refuses while it starts.
        """
        with self._in(region) as there:
            there.machines.stop(instance_id, force=force)

    def terminate_instance(self, region: str, instance_id: str) -> bool:
        """Asks for an instance's end; True once EC2 shows it as terminated, or does not know it. What EC2 has only just
        launched it may not know everywhere: then True is no proof. A protected instance is a CloudRefusedError."""
        with self._in(region) as there:
            return there.machines.terminate(instance_id)

    def create_image(self, region: str, instance_id: str, name: str, tags: Mapping[str, str]) -> str:
        """The id of the AMI that EC2 begins to make of an instance's disks, without a reboot (EC2 `CreateImage`). On
        AWS its snapshots are tagged as well.

        Raises NotFoundError, RefusedError if the instance is terminated, ConflictError if an AMI has the name already.
        """
        with self._in(region) as there:
            return there.machines.create_image(instance_id, name, tags)

    def _account_of(self, region: str) -> str:
        known = self._accounts.get(region)
        if known is None or known[1] < time.monotonic():
            account = self._clients.sts(region).get_caller_identity()["Account"]
            known = (account, time.monotonic() + ACCOUNT_LIFETIME.total_seconds())
            self._accounts[region] = known
        return known[0]

    @contextmanager
    def _in(self, region: str) -> Iterator[_Region]:
        with translated(region):
            ec2 = self._clients.ec2(region)
            reader = Ec2Reader(ec2, region, partial(self._account_of, region))
            remover = Ec2Remover(ec2, reader, simulated=self.simulated)
            machines = Ec2Machines(ec2, reader, simulated=self.simulated)
            yield _Region(region, ec2, reader, remover, machines)


def _of_build(marks: Marks, resources: list[Resource]) -> list[Resource]:
    return [replace(resource, build_id=marks.build_id) for resource in resources]
