"""Steps of machines' operations that run on when nobody waits for them any more, and an EC2 that does not know yet what it
did: a machine keeps what it has, and gets no more than that."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.activity import ActivityCancellationDetails
from temporalio.client import Client
from temporalio.testing import ActivityEnvironment

from activities.machines import MachineActivities
from activities.snapshot import SnapshotActivities
from kiln.errors import (
    BuildTimedOutError,
    ConflictError,
    ImageNotFoundError,
    NotFoundError,
    OperationOverError,
    UnavailableError,
)
from kiln.models import OperationFailure
from kiln.naming import LAUNCH_TAG, machine_tags
from kiln.ports import Marks
from support.harness import copied_catalog
from support.machine_harness import MachineHarness
from support.rows import REGION

# How long this EC2 may hide what it has.
SETTLE = timedelta(seconds=5)


@pytest_asyncio.fixture
async def kiln(migrated_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MachineHarness]:
    """A Kiln without Temporal, whose steps a test takes by itself."""
    for module in ("machines", "snapshot"):
        monkeypatch.setattr(f"activities.{module}.POLL", timedelta(milliseconds=20))
    client = await Client.connect("127.0.0.1:1", lazy=True)
    harness = MachineHarness(client, copied_catalog(migrated_file, tmp_path), tmp_path, skips_time=False)
    yield harness
    harness.close()


def steps(kiln: MachineHarness, **changes: Any) -> MachineActivities:
    return MachineActivities(replace(kiln._machine_parts(), **changes))


def try_of(step: Any, argument: object) -> Coroutine[Any, Any, Any]:
    """One try of a step, as a worker makes it."""
    result: Coroutine[Any, Any, Any] = ActivityEnvironment().run(step, argument)
    return result


class TestALateTry:
    async def test_the_first_launch_that_is_noted_counts(self, kiln: MachineHarness) -> None:
        """Of two tries that both launched, one is heard of when the other's instance is awaited already: it changes
        nothing, and its instance goes."""
        kiln.machines.forgets_tokens, kiln.machines.hides = True, 1
        rebuild = kiln.order_rebuild()
        answers = kiln.machines.slow_reply("launch")
        late = asyncio.create_task(try_of(steps(kiln).launch, rebuild))
        await kiln.asked("launch")
        launched = await try_of(steps(kiln).launch, rebuild)
        answers.set()
        said_late = await late
        await try_of(steps(kiln).adopt, launched)
        await try_of(steps(kiln).end_retired, rebuild)
        row = kiln.machine_row(rebuild.machine_id)
        assert (len(kiln.machines.launches), said_late) == (2, launched)
        assert (row.instance_id, row.operation_error) == (launched.instance_id, None)
        assert kiln.machines.alive == {launched.instance_id}

    async def test_a_launch_for_an_operation_that_is_over_goes(self, kiln: MachineHarness) -> None:
        """What a try launched while its operation was abandoned is to go at once, not at the next sweep."""
        rebuild = kiln.order_rebuild()
        own = kiln.instance_of(rebuild.machine_id)
        answers = kiln.machines.slow_reply("launch")
        late = asyncio.create_task(try_of(steps(kiln).launch, rebuild))
        await kiln.asked("launch")
        await try_of(steps(kiln).abandon, OperationFailure(operation=rebuild, message="it was cancelled"))
        answers.set()
        with pytest.raises(OperationOverError):
            await late
        assert kiln.retired() == kiln.machines.alive - {own}

    async def test_a_stop_that_is_over_stops_nothing(self, kiln: MachineHarness) -> None:
        """A try of a stop that comes to itself when another one has ended it, and the machine was started again, leaves
        the machine running."""
        stop = kiln.order_stop(machine := kiln.machine("running"))
        answers = kiln.machines.slow_reply("account")
        late = asyncio.create_task(try_of(steps(kiln).power, stop))
        await kiln.asked("account")
        await try_of(steps(kiln).power, stop)
        await try_of(steps(kiln).power, kiln.order_start(machine))
        answers.set()
        with pytest.raises(OperationOverError):
            await late
        assert (kiln.machines.state(kiln.instance_of(machine)), len(kiln.machines.forced)) == ("running", 1)


class TestACancelInMidCall:
    async def test_what_was_being_launched_is_known(self, kiln: MachineHarness) -> None:
        """A launch that is cancelled on its way to EC2 ends when EC2 has answered: what it launched goes."""
        kiln.machines.hides = 1000
        rebuild = kiln.order_rebuild()
        old = kiln.instance_of(rebuild.machine_id)
        await self.cancelled(kiln, steps(kiln).launch, rebuild, "launch")
        (new,) = kiln.machines.alive - {old}
        await try_of(steps(kiln).abandon, OperationFailure(operation=rebuild, message="it was cancelled"))
        assert kiln.retired() == {new}

    @pytest.mark.parametrize(("call", "switched"), [("start_instance", "pending"), ("stop_instance", "stopping")])
    async def test_nothing_is_switched_after_the_end(self, kiln: MachineHarness, call: str, switched: str) -> None:
        """A start or a stop that is cancelled on its way to EC2 ends when EC2 has answered: none comes later."""
        power = (
            kiln.order_start(kiln.machine()) if call == "start_instance" else kiln.order_stop(kiln.machine("running"))
        )
        await self.cancelled(kiln, steps(kiln).power, power, call)
        asked = dict(kiln.machines.calls)
        await asyncio.sleep(0.1)
        assert kiln.machines.calls == asked
        assert kiln.machines.state(kiln.instance_of(power.machine_id)) == switched

    async def cancelled(self, kiln: MachineHarness, step: Any, argument: object, call: str) -> None:
        """One try that is cancelled while EC2 is at work; fails if it ends before EC2 answers."""
        answers, environment = kiln.machines.slow_reply(call), ActivityEnvironment()
        running = asyncio.ensure_future(environment.run(step, argument))
        await kiln.asked(call)
        environment.cancel(ActivityCancellationDetails(cancel_requested=True))
        await asyncio.wait({running}, timeout=0.3)
        assert not running.done()
        answers.set()
        with pytest.raises(asyncio.CancelledError):
            await running

    async def test_an_image_that_is_being_asked_for_is_known(self, kiln: MachineHarness) -> None:
        """A snapshot that is cancelled on its way to EC2 ends when EC2 has answered: the cleanup finds what it made."""
        build = kiln.order_image(kiln.machine())
        parts = replace(kiln._snapshot_parts("worker-1"), client=None)
        await self.cancelled(kiln, SnapshotActivities(parts).build, kiln.ref(build), "create_image")
        marks = Marks(kiln.ledger.installation, build)
        assert len(kiln.cloud.images_of_build(REGION, marks)) == 1


class TestAnEc2ThatDoesNotKnowYet:
    @pytest.mark.parametrize("state", ["running", "stopped"])
    async def test_an_instance_is_not_gone_at_the_first_look(self, kiln: MachineHarness, state: str) -> None:
        """A machine's instance that EC2 does not show for a moment is not taken for terminated."""
        machine = kiln.machine(state)
        power = kiln.order_stop(machine) if state == "running" else kiln.order_start(machine)
        kiln.machines.hide(kiln.instance_of(machine), looks=2)
        await try_of(steps(kiln, settle=SETTLE).power, power)
        wanted = "off" if state == "running" else "ready"
        assert (kiln.status_of(machine), kiln.machine_row(machine).operation_error) == (wanted, None)

    async def test_an_instance_that_is_denied_is_asked_again(self, kiln: MachineHarness) -> None:
        """Where EC2 denies an instance and shows it again, the next try starts it."""
        start = kiln.order_start(machine := kiln.machine())
        kiln.machines.fail("start_instance", NotFoundError("EC2 shows no such instance"))
        with pytest.raises(UnavailableError):
            await try_of(steps(kiln, settle=SETTLE).power, start)
        await try_of(steps(kiln, settle=SETTLE).power, start)
        assert (kiln.status_of(machine), kiln.machine_row(machine).operation_error) == ("ready", None)

    async def test_a_start_that_came_to_nothing_says_so(
        self, kiln: MachineHarness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """EC2 shows an instance as stopped for a moment after its start; one that it stops again is told."""
        monkeypatch.setattr("activities.machines.POWER_PATIENCE", timedelta(milliseconds=100))
        start = kiln.order_start(machine := kiln.machine())
        answers = kiln.machines.slow_reply("start_instance")
        starting = asyncio.create_task(try_of(steps(kiln).power, start))
        await kiln.asked("start_instance")
        kiln.machines.change(kiln.instance_of(machine), state="stopped")
        answers.set()
        await starting
        assert kiln.status_of(machine) == "off"
        assert kiln.machine_row(machine).operation_error == "EC2 did not start its instance, or stopped it again"

    async def test_a_fresh_image_is_launched_from(self, kiln: MachineHarness) -> None:
        """An AMI that became available just now, and that EC2 does not know everywhere, fails no machine."""
        rebuild = kiln.order_rebuild()
        kiln.machines.fail("launch", ImageNotFoundError("EC2 has no such AMI"), times=2)
        launched = await try_of(steps(kiln, settle=SETTLE).launch, rebuild)
        assert {launched.instance_id} < kiln.machines.alive

    async def test_a_launch_that_differs_from_the_first_finds_it(self, kiln: MachineHarness) -> None:
        """Where EC2 refuses a token that came with another launch, that launch is the operation's: it shows, later."""
        rebuild = kiln.order_rebuild()
        kiln.machines.lose_reply("launch", ConflictError("IdempotentParameterMismatch"))
        kiln.machines.hides = 2
        launched = await try_of(steps(kiln, settle=SETTLE).launch, rebuild)
        assert len(kiln.machines.launches) == 1
        assert kiln.machine_row(rebuild.machine_id).next_instance_id == launched.instance_id

    async def test_what_ec2_shows_again_lives(self, kiln: MachineHarness) -> None:
        """An instance that was taken for terminated because EC2 did not show it, and that it shows again, is the
        machine's as before; one that stays away stays terminated."""
        machine, gone = kiln.machine("running"), kiln.machine("running")
        kiln.machines.forget(kiln.instance_of(gone))
        kiln.machines.hide(kiln.instance_of(machine), looks=2)
        ActivityEnvironment().run(kiln.machine_house().observe)
        assert kiln.machine_row(machine).ec2_state == "terminated"
        ActivityEnvironment().run(kiln.machine_house().observe)
        assert [kiln.status_of(each) for each in (machine, gone)] == ["ready", "off"]

    async def test_a_disk_that_was_stopped_just_now(self, kiln: MachineHarness) -> None:
        """A machine that EC2 shows as stopping a moment after it was stopped has its image made."""
        build = kiln.order_image(machine := kiln.machine())
        kiln.machines.change(kiln.instance_of(machine), state="stopping")
        parts = replace(kiln._snapshot_parts("worker-1"), settle=SETTLE, client=None)
        made = await try_of(SnapshotActivities(parts).build, kiln.ref(build))
        assert {made.image_id} == kiln.cloud.image_ids


async def test_an_own_instance_is_no_launch_of_the_operations(kiln: MachineHarness) -> None:
    """An instance that Kiln launched once, and that was taken in as another machine, is not that machine's next one."""
    machine = kiln.machine()
    own = kiln.instance_of(machine)
    kiln.machines.change(own, tags={**machine_tags(kiln.ledger.installation, machine), LAUNCH_TAG: "1"})
    kiln.assign(machine)
    launched = await try_of(steps(kiln).launch, rebuild := kiln.order_start(machine))
    assert (rebuild.number, launched.instance_id == own) == (1, False)


async def test_no_image_is_begun_out_of_time(kiln: MachineHarness) -> None:
    """A build that takes its machine's image up when its time is over asks EC2 for none."""
    kiln.limit = timedelta(0)
    build = kiln.order_image(kiln.machine())
    parts = replace(kiln._snapshot_parts("worker-1"), client=None)
    with pytest.raises(BuildTimedOutError):
        await try_of(SnapshotActivities(parts).build, kiln.ref(build))
    assert kiln.machines.calls["create_image"] == 0
