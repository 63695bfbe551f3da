"""Keeps a runner's pods, whether or not Temporal knows of them at the moment: a task a pod, one that vouches for them to
Kiln, one that waits for its news.

The activity `run-pod` only waits for a pod's task. So a new process has the logs, prompts and ends of the agents that an
earlier one left as soon as it runs, however long Temporal takes to notice.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from activities.pod_run import PodParts, PodRun
from activities.pod_tasks import Pauses, race
from kiln.errors import KilnError, OperationOverError, RefusedError, WorkerStoppingError
from kiln.models import PodRef, PodResult
from kiln.ports.pods import News

# A prompt that the agent does not read now is offered again, and not at once.
REFUSED_PROMPT_SECONDS = 1.0
BUSY_SECONDS = 1.0
# Of pods whose directory is gone: those that have one keep their results there.
MOST_RESULTS = 1000

log = logging.getLogger("kiln.runner")


@dataclass(frozen=True)
class Kept:
    """A pod's run and the task that it is."""

    run: PodRun
    task: asyncio.Task[PodResult]


class PodKeeper:
    """The pods of this host. `serve` must run for anything to happen."""

    def __init__(self, parts: PodParts, beat_seconds: float) -> None:
        self._parts = parts
        self._beat_seconds = beat_seconds
        self._group: asyncio.TaskGroup | None = None
        self._kept: dict[str, Kept] = {}
        self._removals: dict[str, asyncio.Task[None]] = {}
        self._results: dict[str, PodResult] = {}
        self._changed = asyncio.Event()
        self._to_be_removed = asyncio.Event()
        self._is_heard = True

    async def serve(self) -> None:
        """Takes up what earlier processes left, and keeps it until this is cancelled: then all agents are left alive.
        Raises RefusedError once Kiln has another process for this runner, or none."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._adopt()
                group.create_task(self._vouch())
                group.create_task(self._hear())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._group = None

    async def run(self, ref: PodRef, *, ending: bool = False) -> PodResult:
        """How the pod ended, which is run for it if need be; with `ending`, it is ended at once. Raises WorkerStoppingError
        if this process does not see the end. A cancel of the call leaves the pod as it is."""
        while removal := self._removals.get(ref.key):
            await asyncio.wait({removal})
        result = self._results.get(ref.key) or self._parts.places.done(ref.key)
        if result is not None:
            return result
        kept = self._kept.get(ref.key) or self._take_up(ref.key)
        if ending:
            kept.run.terminate()
        await asyncio.wait({kept.task})
        if kept.task.cancelled() or kept.task.exception() is not None:
            raise WorkerStoppingError("the runner's process lets go of its pods")
        return kept.task.result()

    def terminate(self, key: str) -> None:
        """Has the pod's agent end, if it is to be run here."""
        if kept := self._kept.get(key):
            kept.run.terminate()

    def phase(self, key: str) -> str:
        """What is being done for the pod, for operators."""
        kept = self._kept.get(key)
        return kept.run.phase if kept else ""

    def _adopt(self) -> None:
        """Pods without a shim wait for their activity: whether they are still to be run, Kiln knows."""
        for key in sorted(self._parts.places.keys()):
            shim = self._parts.shims.find(key)
            if shim is not None and self._parts.places.done(key) is None:
                if shim.is_alive():
                    # Before any other pod asks for a place.
                    self._parts.gate.occupy(key)
                self._take_up(key)

    def _take_up(self, key: str) -> Kept:
        if self._group is None:
            raise WorkerStoppingError("the runner's process keeps no pods")
        run = PodRun(self._parts, key, self._changed.set)
        kept = Kept(run, self._group.create_task(self._see_through(run)))
        self._kept[key] = kept
        return kept

    async def _see_through(self, run: PodRun) -> PodResult:
        pauses = Pauses()
        try:
            while True:
                try:
                    result = await run.run()
                    break
                except RefusedError:
                    raise
                except Exception:
                    log.exception("%s: trying again", run.key)
                await pauses.wait()
            self._keep_result(run.key, result)
            return result
        finally:
            self._parts.gate.leave(run.key)
            del self._kept[run.key]
            self._changed.set()
            if run.is_ending:
                self._to_be_removed.set()

    def _keep_result(self, key: str, result: PodResult) -> None:
        self._results[key] = result
        if len(self._results) > MOST_RESULTS:
            del self._results[next(iter(self._results))]

    async def _vouch(self) -> None:
        while True:
            asked_at = time.monotonic()
            try:
                await self._beat(asked_at)
                self._is_heard = True
            except RefusedError:
                raise
            except KilnError as error:
                if self._is_heard:
                    log.warning("%s; trying again until it does", error)
                self._is_heard = False
            await self._pause(asked_at + self._beat_seconds)

    async def _pause(self, until: float) -> None:
        """Until then, or until there is something to hear of sooner: what is to go of a pod that was ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0, until - time.monotonic())):
                await self._to_be_removed.wait()
        self._to_be_removed.clear()

    async def _beat(self, asked_at: float) -> None:
        there = self._parts.places.keys()
        told = await self._parts.api.beat(sorted(there))
        self._parts.lease.renew(asked_at)
        await self._renew_leases(told.end)
        for key in told.end:
            self.terminate(key)
        never_started = {key for key in told.end & there if self._parts.shims.find(key) is None}
        self._remove(told.remove | never_started)

    async def _renew_leases(self, spared: frozenset[str]) -> None:
        shims = [kept.run.shim for key, kept in self._kept.items() if key not in spared]
        left = self._parts.lease.left()
        await asyncio.gather(*(shim.renew(left) for shim in shims if shim is not None))

    def _remove(self, keys: Iterable[str]) -> None:
        """Those whose run is not over come again with the next beat."""
        for key in keys:
            if key not in self._kept and key not in self._removals and self._group is not None:
                self._removals[key] = self._group.create_task(self._removal(key))

    async def _removal(self, key: str) -> None:
        try:
            await self._parts.sandboxes.remove(key)
        except Exception:
            log.exception("%s: its sandbox cannot be removed", key)
        finally:
            del self._removals[key]

    async def _hear(self) -> None:
        pauses = Pauses()
        while True:
            self._changed.clear()
            after = await self._prompted()
            if not after:
                await self._agents_may_listen()
                continue
            try:
                # Asked anew, once there are others to ask about.
                news = await race(self._parts.api.news(after), self._changed)
            except RefusedError:
                raise
            except KilnError:
                await pauses.wait()
                continue
            pauses = Pauses()
            await self._heed(news or News())

    async def _agents_may_listen(self) -> None:
        """A shim that was too busy to answer is asked again without anything having changed."""
        busy = any(kept.run.shim for kept in self._kept.values())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BUSY_SECONDS if busy else None):
                await self._changed.wait()

    async def _prompted(self) -> dict[str, int]:
        """The number of the last prompt that each living agent has had."""
        runs = [kept.run for kept in self._kept.values() if not kept.run.is_ending]
        numbers = await asyncio.gather(*(_prompted(run) for run in runs))
        return {run.key: number for run, number in zip(runs, numbers, strict=True) if number is not None}

    async def _heed(self, news: News) -> None:
        for key in news.end:
            self.terminate(key)
        taken = await asyncio.gather(*(self._prompt(key, prompts) for key, prompts in news.prompts.items()))
        if not all(taken):
            await asyncio.sleep(REFUSED_PROMPT_SECONDS)

    async def _prompt(self, key: str, prompts: Sequence[tuple[int, str]]) -> bool:
        """Whether the agent has them all. What it is given twice, with its number, it takes once."""
        shim = self._kept[key].run.shim if key in self._kept else None
        try:
            for number, text in prompts if shim is not None else ():
                await shim.prompt(text, number)  # type: ignore[union-attr]
        except OperationOverError as error:
            log.info("%s: %s", key, error)
            return False
        return True


async def _prompted(run: PodRun) -> int | None:
    """None for a run whose agent is not there, or not any more."""
    with contextlib.suppress(OperationOverError):
        return None if run.shim is None else await run.shim.prompted()
    return None
