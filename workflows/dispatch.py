"""The catalog is an outbox: what it orders and Temporal does not know yet is brought to Temporal, again and again."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from temporalio.client import Client

from activities.errands import carry_out
from kiln.errors import KilnError, UnavailableError
from kiln.models import BuildStatus, HouseTerms
from kiln.ports import BuildBrief, Ledger, MachineLedger, Registry
from kiln.ports.pods import PodLedger
from workflows.start import (
    cancel_build,
    start_build,
    start_deletion,
    start_house_keeping,
    start_operation,
    start_pod,
)

INTERVAL = timedelta(seconds=1)
# The API starts a build itself right after its commit; the dispatcher waits until it has had the time for it.
API_PATIENCE = timedelta(seconds=2)

log = logging.getLogger("kiln.dispatch")


class Dispatcher:
    """Runs in every worker that serves the control queue; several at once do no harm."""

    def __init__(  # noqa: PLR0913  whose orders it brings
        self,
        ledger: Ledger,
        client: Client,
        house: HouseTerms,
        registry: Registry | None = None,
        *,
        machines: MachineLedger | None = None,
        pods: PodLedger | None = None,
    ) -> None:
        self._ledger = ledger
        self._machines = machines
        self._pods = pods
        self._client = client
        self._house = house
        self._registry = registry

    async def run(self) -> None:
        """Goes round until it is cancelled. A part that does not answer is asked again."""
        while True:
            try:
                await self.round()
            except UnavailableError as error:
                log.warning("dispatch: %s (%s); trying again", error, error.__cause__)
            except Exception:
                log.exception("dispatch failed; trying again")
            await asyncio.sleep(INTERVAL.total_seconds())

    async def round(self) -> None:
        """One look at everything that the catalog orders."""
        await start_house_keeping(self._client, self._house)
        for brief in await asyncio.to_thread(self._ledger.open_builds, API_PATIENCE):
            await self._bring(brief)
        for image in await asyncio.to_thread(self._ledger.stuck_deletions, API_PATIENCE):
            await start_deletion(self._client, image)
        if self._machines is not None:
            await self._bring_operations(self._machines)
        if self._pods is not None:
            await self._bring_pods(self._pods)
        if self._registry is not None:
            await asyncio.to_thread(run_errands, self._ledger, self._registry)

    async def _bring_operations(self, machines: MachineLedger) -> None:
        for brief in await asyncio.to_thread(machines.open_operations, API_PATIENCE):
            if brief.run_id is None:
                await start_operation(self._client, brief.ref)

    async def _bring_pods(self, pods: PodLedger) -> None:
        for brief in await asyncio.to_thread(pods.open_pods, API_PATIENCE, unclaimed=True):
            await start_pod(self._client, brief.ref)

    async def _bring(self, brief: BuildBrief) -> None:
        if brief.run_id is None and brief.status is BuildStatus.QUEUED:
            await start_build(self._client, brief.ref)
        if brief.cancel_requested and _age(brief) > API_PATIENCE:
            await cancel_build(self._client, brief.ref.build_id)


def run_errands(ledger: Ledger, registry: Registry) -> None:
    """What the catalog told the registry to do, and the API had no time for or died before.

    One that fails by itself does not hold up the others. Raises UnavailableError if the registry is away.
    """
    for errand in ledger.errands(API_PATIENCE):
        try:
            if carry_out(registry, ledger, errand):
                ledger.errand_done(errand.id)
        except KilnError as error:
            registry.ping()
            log.warning("the registry's errand %s: %s; trying again", errand.id, error)


def _age(brief: BuildBrief) -> timedelta:
    return datetime.now(UTC) - brief.created_at
