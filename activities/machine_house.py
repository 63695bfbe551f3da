"""House-keeping for machines: what EC2 says of them, operations that lost their workflow, instances that nobody has."""

import asyncio
import time
from collections import defaultdict
from datetime import UTC, datetime, timedelta

from temporalio import activity
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from activities.machines import TERMINATED, end_instance
from kiln.errors import KilnError, LeftoversError
from kiln.models import LostOperations
from kiln.naming import LAUNCH_TAG, MACHINE_TAG, operation_workflow_id
from kiln.ports import Instance, LivingMachine, MachineCloud, MachineLedger, OperationBrief, Retired

DESCRIBE_TIMEOUT = timedelta(seconds=5)
# An operation has this long to get from its row to its workflow before anybody asks where it is.
START_PATIENCE = timedelta(seconds=5)
# The operation that retired an instance sees to its end itself, if it can.
RETIRED_PATIENCE = timedelta(seconds=30)


class MachineHouse:
    """Each is a pass that the next round repeats. Unknown means keep. `settle` is how long EC2 may hide what it has."""

    def __init__(  # noqa: PLR0913  what it looks after
        self,
        *,
        ledger: MachineLedger,
        cloud: MachineCloud,
        client: Client,
        regions: tuple[str, ...],
        settle: timedelta,
        grace: timedelta,
    ) -> None:
        self._ledger = ledger
        self._cloud = cloud
        self._client = client
        self._regions = regions
        self._settle = settle
        self._grace = grace

    @activity.defn(name="observe-machines")
    def observe(self) -> None:
        """Writes what EC2 says of every machine's instance. Only a complete answer for the right account counts."""
        by_place: dict[tuple[str, str], list[LivingMachine]] = defaultdict(list)
        for machine in self._ledger.living_machines():
            if machine.simulated is self._cloud.simulated:
                by_place[machine.region, machine.account].append(machine)
        for (region, account), machines in by_place.items():
            activity.heartbeat()
            if self._cloud.account(region) == account:
                self._observe_in(region, machines)

    def _observe_in(self, region: str, machines: list[LivingMachine]) -> None:
        asked_at = datetime.now(UTC)
        shown = self._cloud.instances(region, [machine.instance_id for machine in machines])
        believed = [machine for machine in machines if machine.state != TERMINATED]
        missing = [machine for machine in believed if machine.instance_id not in shown]
        if missing:
            self._wait_until_settled()
            shown |= self._cloud.instances(region, [machine.instance_id for machine in missing])
        for machine in machines:
            instance = shown.get(machine.instance_id)
            state = instance.state if instance else TERMINATED
            if state != machine.state:
                self._ledger.observed(machine, state, asked_at)

    def _wait_until_settled(self) -> None:
        until = time.monotonic() + self._settle.total_seconds()
        while time.monotonic() < until:
            activity.heartbeat()
            time.sleep(1)

    @activity.defn(name="find-lost-operations")
    async def find_lost_operations(self) -> LostOperations:
        """Gives operations whose workflow was terminated, or failed without ending them, back to the dispatcher."""
        released = 0
        for brief in await asyncio.to_thread(self._ledger.open_operations, START_PATIENCE):
            activity.heartbeat()
            if brief.run_id is not None and not await self._has_open_run(brief):
                released += await asyncio.to_thread(self._ledger.release_operation, brief.ref, brief.run_id)
        return LostOperations(released=released)

    async def _has_open_run(self, brief: OperationBrief) -> bool:
        handle = self._client.get_workflow_handle(operation_workflow_id(brief.ref.machine_id, brief.ref.number))
        try:
            description = await handle.describe(rpc_timeout=DESCRIBE_TIMEOUT)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            return False
        return description.status is WorkflowExecutionStatus.RUNNING

    @activity.defn(name="end-retired-instances")
    def end_retired(self) -> None:
        """Terminates retired instances whose operation did not come to it; one that cannot go holds up no other."""
        for retired in self._ledger.retired(RETIRED_PATIENCE):
            activity.heartbeat()
            try:
                end_instance(self._ledger, self._cloud, retired)
            except LeftoversError as error:
                activity.logger.warning("%s", error)
            except KilnError as error:
                if error.retryable:
                    raise
                activity.logger.warning("%s cannot be terminated: %s", retired.instance_id, error)

    @activity.defn(name="sweep-machines")
    def sweep(self) -> None:
        """Retires instances that Kiln launched for a machine which has another one, or none, and is at rest."""
        for region in self._regions:
            account = self._cloud.account(region)
            for instance in self._cloud.launched_instances(region, self._ledger.installation):
                activity.heartbeat()
                machine_id = _machine_of(instance)
                if machine_id is not None and self._is_nobodys(instance, machine_id, account):
                    self._ledger.retire([Retired(machine_id, instance.instance_id, region, account)])

    def _is_nobodys(self, instance: Instance, machine_id: int, account: str) -> bool:
        if datetime.now(UTC) - instance.launched_at < self._grace:
            return False
        holdings = self._ledger.holdings(machine_id)
        if holdings is None or holdings.operation_open or holdings.account != account:
            return False
        return instance.instance_id not in holdings.instance_ids


def _machine_of(instance: Instance) -> int | None:
    number = instance.tags.get(MACHINE_TAG, "")
    return int(number) if number.isdigit() and instance.tags.get(LAUNCH_TAG, "").isdigit() else None
