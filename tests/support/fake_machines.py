"""EC2's instances in memory, behind `kiln.ports.MachineCloud`. They can be slow, hidden, dying, doubled or protected."""

# ruff: noqa: ARG002  a port's parameters that a fake has no use for

import itertools
import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from kiln.adapters.ec2 import CloudUnavailableError
from kiln.adapters.ec2_errors import CloudRefusedError
from kiln.errors import ConflictError, KilnError, NotFoundError, RefusedError
from kiln.naming import INSTALLATION_TAG, LAUNCH_TAG, MACHINE_TAG
from kiln.ports import Instance, Launch
from support.fakes import FakeCloud
from support.rows import REGION, ami

BASE_AMI = "ami-000000000000000ba"
NEXT_STATES = {"pending": "running", "stopping": "stopped", "shutting-down": "terminated"}
OVER = ("shutting-down", "terminated")
SLOWEST = timedelta(seconds=10)

_numbers = itertools.count(1)


class FakeMachines:
    """The instances of the account whose AMIs `cloud` has. A state that passes is seen once, then it has passed.

    `settles` False keeps passing states as they are; `image_state` is what a new AMI is; `dies` is EC2's reason for
    ending every new instance at once; `hides` is how many looks a new instance is not shown to; `forgets_tokens` has a
    repeated launch launch once more, as moto does.
    """

    simulated = True

    def __init__(self, cloud: FakeCloud) -> None:
        self._cloud = cloud
        self._lock = threading.RLock()
        self._instances: dict[str, Instance] = {}
        self._tokens: dict[str, str] = {}
        self._hidden: Counter[str] = Counter()
        self._faults: defaultdict[str, list[KilnError]] = defaultdict(list)
        self._lost_replies: dict[str, KilnError] = {}
        self._slow_replies: dict[str, threading.Event] = {}
        self._protected: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.launches: list[Launch] = []
        self.forced: list[bool] = []
        self.settles = True
        self.image_state = "available"
        self.dies = ""
        self.hides = 0
        self.forgets_tokens = False

    # What a test does to it

    def fail(self, call: str, error: KilnError | None = None, times: int = 1) -> None:
        """The next so many calls of that name do nothing and raise; without an error, EC2 does not answer."""
        self._faults[call] += [error or CloudUnavailableError(f"{call}: EC2 does not answer")] * times

    def lose_reply(self, call: str, error: KilnError | None = None) -> None:
        """The next call of that name does its work, and nobody hears of it."""
        self._lost_replies[call] = error or CloudUnavailableError(f"{call}: the reply was lost")

    def slow_reply(self, call: str) -> threading.Event:
        """The next call of that name does its work, and answers once the event is set."""
        answers = self._slow_replies[call] = threading.Event()
        return answers

    def hide(self, instance_id: str, looks: int) -> None:
        """So many looks do not show the instance."""
        self._hidden[instance_id] = looks

    def protect(self, instance_id: str) -> None:
        """EC2 refuses to terminate the instance."""
        self._protected.add(instance_id)

    def put(self, instance: Instance) -> str:
        """Something that somebody launched."""
        self._instances[instance.instance_id] = instance
        return instance.instance_id

    def change(self, instance_id: str, **changes: object) -> None:
        self._instances[instance_id] = replace(self._instances[instance_id], **changes)  # type: ignore[arg-type]

    def forget(self, instance_id: str) -> None:
        """EC2 shows a terminated instance for an hour, and then no more."""
        del self._instances[instance_id]

    def show(self) -> None:
        """Nothing is hidden any more."""
        self._hidden.clear()

    def state(self, instance_id: str) -> str:
        return self._instances[instance_id].state

    @property
    def alive(self) -> set[str]:
        """The instances that cost money."""
        return {each.instance_id for each in self._instances.values() if each.state != "terminated"}

    # kiln.ports.MachineCloud

    def account(self, region: str) -> str:
        self._answer("account")
        self._reply("account")
        return self._cloud.account(region)

    def instances(self, region: str, instance_ids: Collection[str]) -> dict[str, Instance]:
        self._answer("instances")
        with self._lock:
            return {each.instance_id: each for each in self._seen() if each.instance_id in instance_ids}

    def instances_of_machine(self, region: str, installation: str, machine_id: int) -> list[Instance]:
        self._answer("instances_of_machine")
        launched = self._launched(installation)
        return [each for each in launched if each.tags[MACHINE_TAG] == str(machine_id)]

    def launched_instances(self, region: str, installation: str) -> list[Instance]:
        self._answer("launched_instances")
        return self._launched(installation)

    def disk_gib(self, region: str, instance_id: str) -> int:
        self._answer("disk_gib")
        return 8

    def base_image(self, region: str, owner: str, name: str) -> str | None:
        self._answer("base_image")
        return BASE_AMI

    def launch(self, region: str, launch: Launch) -> str:
        self._answer("launch")
        with self._lock:
            made = None if self.forgets_tokens else self._tokens.get(launch.client_token)
            made = made or self._launch(launch)
        self._reply("launch")
        return made

    def start_instance(self, region: str, instance_id: str) -> None:
        self._answer("start_instance")
        instance = self._living(instance_id)
        if instance.state == "stopping":
            raise CloudUnavailableError(f"{instance_id} is stopping")
        if instance.state == "stopped":
            self.change(instance_id, state="pending")
        self._reply("start_instance")

    def stop_instance(self, region: str, instance_id: str, *, force: bool) -> None:
        self._answer("stop_instance")
        self.forced.append(force)
        if self._living(instance_id).state != "stopped":
            self.change(instance_id, state="stopping")
        self._reply("stop_instance")

    def terminate_instance(self, region: str, instance_id: str) -> bool:
        self._answer("terminate_instance")
        with self._lock:
            instance = self._instances.get(instance_id)
            if instance is None or instance.state == "terminated":
                return True
            if instance_id in self._protected:
                raise CloudRefusedError(f"{instance_id} may not be terminated", code="OperationNotPermitted")
            passed = self.settles and instance.state == "shutting-down"
            self.change(instance_id, state="terminated" if passed else "shutting-down")
            return False

    def create_image(self, region: str, instance_id: str, name: str, tags: Mapping[str, str]) -> str:
        self._answer("create_image")
        self._living(instance_id)
        if name in self._cloud.image_names:
            raise ConflictError(f"an AMI is named {name} already")
        image_id = self._cloud.put_image(ami(name=name, state=self.image_state, tags=dict(tags)))
        self._reply("create_image")
        return image_id

    def tag(self, region: str, resource_ids: Collection[str], tags: Mapping[str, str]) -> None:
        self._cloud.tag(region, resource_ids, tags)

    def _answer(self, call: str) -> None:
        with self._lock:
            self.calls[call] += 1
            if self._faults[call]:
                raise self._faults[call].pop(0)

    def _reply(self, call: str) -> None:
        slow = self._slow_replies.pop(call, None)
        assert slow is None or slow.wait(SLOWEST.total_seconds()), f"{call}: nobody had it answer"
        error = self._lost_replies.pop(call, None)
        if error is not None:
            raise error

    def _launch(self, launch: Launch) -> str:
        instance = Instance(
            instance_id=f"i-a{next(_numbers):016x}",
            region=REGION,
            state="terminated" if self.dies else "pending",
            instance_type=launch.instance_type,
            image_id=launch.image_id,
            launched_at=datetime.now(UTC),
            tags=launch.tags,
            placement=launch.placement,
            state_reason=self.dies,
        )
        self.launches.append(launch)
        self._hidden[instance.instance_id] = self.hides
        self._tokens[launch.client_token] = instance.instance_id
        return self.put(instance)

    def _living(self, instance_id: str) -> Instance:
        if instance_id not in self._instances:
            raise NotFoundError(f"EC2 shows no instance {instance_id}")
        instance = self._instances[instance_id]
        if instance.state in OVER:
            raise RefusedError(f"instance {instance_id} is {instance.state}")
        return instance

    def _launched(self, installation: str) -> list[Instance]:
        with self._lock:
            ours = [each for each in self._seen() if each.tags.get(INSTALLATION_TAG) == installation]
        launched = [each for each in ours if LAUNCH_TAG in each.tags and each.state != "terminated"]
        return sorted(launched, key=lambda each: (each.launched_at, each.instance_id))

    def _seen(self) -> list[Instance]:
        """One look at everything."""
        shown = [each for each in self._instances.values() if not self._hidden[each.instance_id]]
        self._hidden -= Counter(list(self._hidden))
        if self.settles:
            for each in shown:
                self.change(each.instance_id, state=NEXT_STATES.get(each.state, each.state))
        return shown
