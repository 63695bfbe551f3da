"""One pod on its runner: its sandbox, its only shim, its log, its end.

One process at a time does this, and the next one can repeat each step: Kiln gives a pod to one shim for ever, named by the
nonce in the pod's directory, and a host starts a pod's shim once.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, TypeVar

from activities.pod_log import LogShipping
from activities.pod_tasks import beside, persist, race
from kiln.errors import NotFoundError, OperationFailedError, OperationOverError
from kiln.models import PodResult
from kiln.ports.pods import PodOrder, RunnerApi, Shim, ShimOrder, Shims
from kiln.ports.sandboxes import Journal, PodPlaces, Sandboxes

# A shim that was too busy to answer is asked again.
TERMINATE_SECONDS = 5.0
SHORTEST_LEASE_SECONDS = 1.0
TERMINATED = "terminated"
MADE_ANEW = "the runner was restarted before the agent was started: its sandbox is made anew"

log = logging.getLogger("kiln.runner")
T = TypeVar("T")


class Gate:
    """Lets no new agent in unless fewer than `places` are there."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._inside: set[str] = set()
        self._left = asyncio.Event()

    async def enter(self, key: str) -> None:
        while key not in self._inside and len(self._inside) >= self._places:
            self._left.clear()
            await self._left.wait()
        self._inside.add(key)

    def occupy(self, key: str) -> None:
        """An agent is there already, however many others are."""
        self._inside.add(key)

    def leave(self, key: str) -> None:
        self._inside.discard(key)
        self._left.set()


class Lease:
    """How long agents may go on without word of Kiln: `seconds` from when it was last asked, and then answered."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._asked_at = time.monotonic()

    def renew(self, asked_at: float) -> None:
        """Kiln answered what it was asked at this monotonic time."""
        self._asked_at = max(self._asked_at, asked_at)

    def left(self, asked_at: float = 0) -> float:
        """What is left of it, in seconds; for a pod that Kiln was asked about at `asked_at`, if that is later."""
        return self._seconds - (time.monotonic() - max(self._asked_at, asked_at))


@dataclass(frozen=True, kw_only=True)
class PodParts:
    """What runs of pods work with."""

    api: RunnerApi
    shims: Shims
    sandboxes: Sandboxes
    places: PodPlaces
    gate: Gate
    lease: Lease


class PodRun:
    """A pod in this process, from the gate to its end. `shim` is there as long as the agent may live, and `phase` is for
    operators. `changed` is called when there is another shim to look after, or one less."""

    def __init__(self, parts: PodParts, key: str, changed: Callable[[], None]) -> None:
        self.key = key
        self.shim: Shim | None = None
        self.phase = "waiting for a place"
        self._parts = parts
        self._changed = changed
        self._ending = asyncio.Event()
        self._begun_at = 0.0
        self._begins = 0

    def terminate(self) -> None:
        """Has the run end soon, and the agent before it."""
        self._ending.set()
        self._changed()

    @property
    def is_ending(self) -> bool:
        return self._ending.is_set()

    async def run(self) -> PodResult:
        """How the agent ended, once Kiln was told and has the whole log. Raises RefusedError."""
        shim = self._parts.shims.find(self.key)
        if shim is None:
            try:
                shim = await self._start()
            except OperationOverError as error:
                return await self._drop(PodResult(error=str(error)))
            except OperationFailedError as error:
                return await self._fail(str(error))
        return await self._follow(shim)

    async def _start(self) -> Shim:
        """Raises OperationOverError if the pod is not to be run, OperationFailedError if it cannot be, or may not be any
        more."""
        await self._unless_ending(self._parts.gate.enter(self.key))
        order = await self._unless_ending(self._begin())
        self.phase = "preparing the sandbox"
        async with beside(self._shipping.follow()):
            shim_order = await self._unless_ending(self._prepare(order))
        return await self._launch(shim_order, order.spec.timeout_minutes)

    async def _begin(self) -> PodOrder:
        nonce = await asyncio.to_thread(self._parts.places.nonce, self.key)

        async def ask() -> PodOrder:
            self._begun_at = time.monotonic()
            self._begins += 1
            return await self._parts.api.begin(self.key, nonce)

        try:
            return await persist(ask)
        except NotFoundError as error:
            raise OperationOverError(str(error)) from error

    async def _prepare(self, order: PodOrder) -> ShimOrder:
        limit = _seconds(order.spec.timeout_minutes)
        try:
            async with asyncio.timeout(limit) as patience:
                # Those of this process may have been answered in vain.
                if order.attempt > self._begins:
                    await self._journal.say(MADE_ANEW)
                return await self._parts.sandboxes.prepare(order, self._journal.say)
        except OSError as error:
            if patience.expired():
                raise OperationFailedError(f"pod timed out after {order.spec.timeout_minutes} minutes") from None
            log.exception("%s: its sandbox cannot be made", self.key)
            raise OperationFailedError(
                f"the sandbox cannot be made: {error.strerror or type(error).__name__}"
            ) from error

    async def _launch(self, order: ShimOrder, timeout_minutes: int | None) -> Shim:
        """Never cut short: a start that nobody waits for would still have an agent run. The pod's time counts from here,
        by this host's clock alone."""
        order = replace(
            order,
            shim=self._parts.places.nonce(self.key),
            limit_seconds=_seconds(timeout_minutes),
            lease_seconds=max(self._parts.lease.left(self._begun_at), SHORTEST_LEASE_SECONDS),
        )
        try:
            return await self._parts.shims.start(self.key, order)
        except OSError as error:
            if shim := self._parts.shims.find(self.key):
                return shim
            raise OperationFailedError(f"cannot start the agent: {error.strerror or type(error).__name__}") from error

    async def _follow(self, shim: Shim) -> PodResult:
        self._set_shim(shim, "the agent runs")
        self._parts.gate.occupy(self.key)
        async with beside(self._shipping.follow()):
            async with beside(self._announce(), self._heed(shim)):
                result = await shim.wait()
            await self._stop()
            self._set_shim(None, "the agent has ended")
            self._parts.gate.leave(self.key)
            await self._conclude()
        await self._shipping.drain()
        await self._tell(result)
        self._note_done(result)
        return result

    async def _announce(self) -> None:
        """Says that the agent runs, and hears if it must not."""
        nonce = self._parts.places.nonce(self.key)
        try:
            await persist(lambda: self._parts.api.started(self.key, nonce))
        except (OperationOverError, NotFoundError) as error:
            log.info("%s: %s", self.key, error)
            self.terminate()

    async def _heed(self, shim: Shim) -> None:
        """Ends the agent when that is asked for."""
        await self._ending.wait()
        self.phase = "ending the agent"
        while True:
            await asyncio.gather(self._stop(), shim.terminate())
            await asyncio.sleep(TERMINATE_SECONDS)

    async def _stop(self) -> None:
        try:
            await self._parts.sandboxes.stop(self.key)
        except Exception:
            log.exception("%s: what of the agent runs outside of its shim may run on", self.key)

    async def _conclude(self) -> None:
        try:
            await self._parts.sandboxes.conclude(self.key, self._journal.say)
        except Exception:
            log.exception("%s: its sandbox is left as it is", self.key)

    async def _fail(self, problem: str) -> PodResult:
        """No agent ran here, and none will."""
        result = PodResult(error=problem, ended_at=datetime.now(UTC))
        if self._begun_at:
            if not self.is_ending:
                with contextlib.suppress(OSError):
                    await self._journal.say(problem)
            await self._shipping.drain()
            await self._tell(result)
        return await self._drop(result)

    async def _drop(self, result: PodResult) -> PodResult:
        """Nothing that an agent made can be lost. What resists is tried again when Kiln says that the pod is over."""
        if self.key in self._parts.places.keys():  # noqa: SIM118  no dictionary
            try:
                await self._parts.sandboxes.remove(self.key)
            except OSError:
                log.exception("%s: its directory cannot be removed", self.key)
        return result

    async def _tell(self, result: PodResult) -> None:
        nonce = self._parts.places.nonce(self.key)
        try:
            await persist(lambda: self._parts.api.ended(self.key, nonce, result))
        except (OperationOverError, NotFoundError) as error:
            log.info("%s: %s", self.key, error)

    def _note_done(self, result: PodResult) -> None:
        try:
            self._parts.places.note_done(self.key, result)
        except OSError:
            log.exception("%s: another process will tell its end once more", self.key)

    async def _unless_ending(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises OperationFailedError if the run is to end: the work is over then, too."""
        done = await race(work, self._ending)
        if self.is_ending:
            raise OperationFailedError(TERMINATED)
        return done  # type: ignore[return-value]  # None only if the work says so

    def _set_shim(self, shim: Shim | None, phase: str) -> None:
        self.shim, self.phase = shim, phase
        self._changed()

    @cached_property
    def _journal(self) -> Journal:
        return self._parts.places.journal(self.key)

    @cached_property
    def _shipping(self) -> LogShipping:
        return LogShipping(self._parts.api, self.key, self._journal)


def _seconds(minutes: int | None) -> float | None:
    return None if minutes is None else minutes * 60.0
