"""Fakes behind Kiln's ports: an EC2 in memory, and a Packer that plays a script. Both can be told to misbehave."""

# ruff: noqa: ARG002  a port's parameters that a fake has no use for

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from kiln.adapters.ec2 import CloudUnavailableError
from kiln.adapters.guard import ExitReason
from kiln.adapters.process import Exit
from kiln.adapters.tool_output import Line
from kiln.naming import BUILD_TAG, INSTALLATION_TAG, build_of_name, image_name, resource_tags, security_group_name
from kiln.ports import Ami, ImageDeletion, Marks, Order, PackerJob, Resource, SecurityGroupRequest
from kiln.redact import Redactor
from support.rows import ACCOUNT, REGION, ami, new_ami_id

SOON = timedelta(seconds=30)


class FakeCloud:
    """EC2 in one account. `fail` makes calls go unanswered, `cling` makes cleanups leave everything where it is."""

    simulated = True

    def __init__(self, installation: str) -> None:
        self.installation = installation
        self.account_id = ACCOUNT
        self.calls: Counter[str] = Counter()
        self.tagged: dict[str, Mapping[str, str]] = {}
        self._lock = threading.Lock()
        self._amis: dict[str, Ami] = {}
        self._others: dict[str, Resource] = {}
        self._faults: Counter[str] = Counter()
        self._clinging = 0

    # What a test does to it

    def fail(self, call: str, times: int) -> None:
        """The next so many calls of that name get no answer."""
        self._faults[call] = times

    def cling(self, passes: int) -> None:
        """The next so many passes of a cleanup find everything, and remove nothing."""
        self._clinging = passes

    def add_image(self, build_id: str, attempt: int, state: str = "available", *, tagged: bool = True) -> str:
        """An AMI as Packer makes it for an attempt."""
        tags = resource_tags(self.installation, build_id, attempt) if tagged else {}
        name = f"{image_name('kiln', 'codex', build_id, attempt)}"
        return self.put_image(ami(new_ami_id(), name=name, state=state, tags=tags))

    def put_image(self, made: Ami) -> str:
        """An AMI that somebody made."""
        self._amis[made.image_id] = made
        return made.image_id

    def change_image(self, image_id: str, **changes: object) -> None:
        self._amis[image_id] = replace(self._amis[image_id], **changes)  # type: ignore[arg-type]

    def drop_image(self, image_id: str) -> None:
        """Somebody deregisters the AMI behind Kiln's back."""
        del self._amis[image_id]

    def add(self, kind: str, resource_id: str, build_id: str) -> None:
        """Something that carries a build's tag."""
        self._others[resource_id] = Resource(kind, resource_id, REGION, build_id)

    @property
    def image_ids(self) -> set[str]:
        return set(self._amis)

    @property
    def image_names(self) -> set[str]:
        return {each.name for each in self._amis.values()}

    @property
    def resource_ids(self) -> set[str]:
        """Everything but AMIs."""
        return set(self._others)

    def _answer(self, call: str) -> None:
        with self._lock:
            self.calls[call] += 1
            if self._faults[call] > 0:
                self._faults[call] -= 1
                raise CloudUnavailableError(f"{call}: EC2 does not answer")

    # kiln.ports.Cloud

    def account(self, region: str) -> str:
        self._answer("account")
        return self.account_id

    def make_security_group(self, region: str, request: SecurityGroupRequest) -> str:
        self._answer("make_security_group")
        group_id = f"sg-{request.name}"
        self.add("security-group", group_id, request.tags[BUILD_TAG])
        return group_id

    def image(self, region: str, image_id: str) -> Ami | None:
        self._answer("image")
        return self._amis.get(image_id)

    def images_of_build(self, region: str, marks: Marks) -> list[Ami]:
        self._answer("images_of_build")
        found = [each for each in self._amis.values() if self._is_of(each, marks)]
        return sorted(found, key=lambda each: each.created_at, reverse=True)

    def own_images(self, region: str, image_ids: Collection[str]) -> dict[str, Ami]:
        self._answer("own_images")
        return {image_id: self._amis[image_id] for image_id in image_ids if image_id in self._amis}

    def tag(self, region: str, resource_ids: Collection[str], tags: Mapping[str, str]) -> None:
        self._answer("tag")
        self.tagged.update(dict.fromkeys(resource_ids, tags))
        for image_id in self.image_ids & set(resource_ids):
            self.change_image(image_id, tags={**self._amis[image_id].tags, **tags})

    def end_instances(self, region: str, marks: Marks) -> list[Resource]:
        self._answer("end_instances")
        for each in self._of_build(marks):
            if each.kind == "instance":
                del self._others[each.resource_id]
        return []

    def remove_leftovers(self, region: str, marks: Marks, spare: Collection[str]) -> list[Resource]:
        self._answer("remove_leftovers")
        doomed = [each for each in self._amis.values() if self._is_of(each, marks) and each.image_id not in spare]
        left = [Resource("image", each.image_id, region, marks.build_id) for each in doomed] + self._of_build(marks)
        if self._clinging > 0:
            self._clinging -= 1
            return left
        for each in left:
            self._forget(each.resource_id)
        return []

    def delete_image(self, region: str, image_id: str, snapshot_ids: Collection[str]) -> ImageDeletion:
        self._answer("delete_image")
        if self._clinging > 0:
            self._clinging -= 1
            return ImageDeletion(remaining=(image_id, *snapshot_ids))
        self._forget(image_id)
        return ImageDeletion()

    def tagged_resources(self, region: str, installation: str) -> list[Resource]:
        self._answer("tagged_resources")
        images = [
            Resource("image", each.image_id, region, each.tags[BUILD_TAG])
            for each in self._amis.values()
            if each.tags.get(INSTALLATION_TAG) == installation
        ]
        return images + list(self._others.values())

    def remove(self, resource: Resource) -> bool:
        self._answer("remove")
        self._forget(resource.resource_id)
        return True

    def _is_of(self, each: Ami, marks: Marks) -> bool:
        named = build_of_name(each.name)
        return each.tags.get(BUILD_TAG) == marks.build_id or (named is not None and named[0] == marks.build_id)

    def _of_build(self, marks: Marks) -> list[Resource]:
        return [each for each in self._others.values() if each.build_id == marks.build_id]

    def _forget(self, resource_id: str) -> None:
        self._amis.pop(resource_id, None)
        self._others.pop(resource_id, None)


class FakePackerKit:
    """Runs that a `FakeToolbox` understands."""

    def __init__(self, installation: str) -> None:
        self._installation = installation

    def prepare(self, order: Order, security_group_id: str) -> PackerJob:
        env = {
            "build_id": order.build_id,
            "attempt": str(order.attempt),
            "secret": next(iter(order.secrets.values()), ""),
        }
        return PackerJob(argv=("packer", "build", "template.pkr.hcl"), env=env, cwd=Path())

    def discard(self, job: PackerJob) -> None:
        """There is no directory."""

    def security_group(self, order: Order) -> SecurityGroupRequest:
        tags = resource_tags(self._installation, order.build_id, order.attempt)
        return SecurityGroupRequest(security_group_name(order.build_id, order.attempt), tags)


class PackerRun:
    """What a script sees and does: it prints, makes things in EC2, and may wait for SIGINT."""

    def __init__(self, cloud: FakeCloud, env: Mapping[str, str], redactor: Redactor) -> None:
        self.cloud = cloud
        self.build_id = env["build_id"]
        self.attempt = int(env["attempt"])
        self.secret = env["secret"]
        self.interrupted = asyncio.Event()
        self.ended = False
        self.lines: asyncio.Queue[Line | None] = asyncio.Queue()
        self._redactor = redactor

    def prints(self, *fields: str) -> None:
        """One line as `-machine-readable` has it."""
        text = ",".join(part.replace(",", "%!(PACKER_COMMA)").replace("\n", "\\n") for part in fields)
        now = datetime.now(UTC)
        self.lines.put_nowait(Line("stdout", self._redactor.text(f"{int(now.timestamp())},{text}"), now))

    def says(self, text: str) -> None:
        self.prints("", "ui", "say", text)

    def complains(self, text: str) -> None:
        self.prints("", "ui", "error", text)

    def makes_image(self, state: str = "available") -> str:
        image_id = self.cloud.add_image(self.build_id, self.attempt, state)
        self.says(f"AMI: {image_id}")
        return image_id

    def reports(self, image_id: str) -> None:
        self.prints("amazon-ebs.agent", "artifact", "0", "id", f"{REGION}:{image_id}")


Script = Callable[[PackerRun], Awaitable[int]]


async def bakes(run: PackerRun) -> int:
    """A run that makes an AMI."""
    run.says("==> amazon-ebs.agent: Launching a source AWS instance...")
    run.reports(run.makes_image())
    return 0


async def hangs(run: PackerRun) -> int:
    """A run that launches an instance and goes on until it is interrupted; then it takes the instance away."""
    run.cloud.add("instance", f"i-{run.build_id}-{run.attempt}", run.build_id)
    run.says("==> amazon-ebs.agent: Provisioning...")
    await run.interrupted.wait()
    run.complains("Build 'amazon-ebs.agent' was cancelled.")
    return 1


def fails(message: str, code: int = 1) -> Script:
    """A run that ends in an error."""

    async def script(run: PackerRun) -> int:
        run.says("==> amazon-ebs.agent: Provisioning...")
        run.complains(message)
        return code

    return script


class FakeTool:
    """A run of a script. Its guard is this object: without renewal the script ends with its lease."""

    def __init__(self, run: PackerRun, script: Script, lease: timedelta) -> None:
        self._run = run
        self._task = asyncio.create_task(self._play(script))
        self._reason = ExitReason.EXITED
        self._guard = self._killed_after(lease.total_seconds())

    async def _play(self, script: Script) -> int:
        try:
            return await script(self._run)
        finally:
            self._run.ended = True
            self._run.lines.put_nowait(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._guard.cancel()
        self._kill()
        await asyncio.wait({self._task})

    async def renew(self, seconds: float) -> None:
        self._guard.cancel()
        self._guard = self._killed_after(seconds)

    async def stop(self, grace: timedelta) -> Exit:
        self._run.interrupted.set()
        await asyncio.wait({self._task}, timeout=grace.total_seconds())
        self._kill()
        return await self.wait()

    async def wait(self) -> Exit:
        await asyncio.wait({self._task})
        if self._task.cancelled():
            return Exit(None, 9, self._reason)
        return Exit(self._task.result(), None, ExitReason.EXITED)

    async def lines(self) -> AsyncIterator[Line]:
        while (line := await self._run.lines.get()) is not None:
            yield line

    def _killed_after(self, seconds: float) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, self._lease_is_over)

    def _lease_is_over(self) -> None:
        self._reason = ExitReason.LEASE_ENDED
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):
            self._task.cancel()


class FakeToolbox:
    """Packers that play scripts: the one of the attempt's number, or else `script`."""

    def __init__(self, cloud: FakeCloud) -> None:
        self._cloud = cloud
        self.script: Script = bakes
        self.scripts: dict[int, Script] = {}
        self.started: list[int] = []
        self.runs: dict[int, PackerRun] = {}

    async def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        redactor: Redactor,
        lease: timedelta,
        *,
        stdin: Path | None = None,
    ) -> FakeTool:
        run = PackerRun(self._cloud, env, redactor)
        self.started.append(run.attempt)
        self.runs[run.attempt] = run
        return FakeTool(run, self.scripts.get(run.attempt, self.script), lease)
