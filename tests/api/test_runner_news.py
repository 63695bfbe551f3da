"""What runners wait for: told at once, and those who wait stand in nobody's way."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from api import runner_calls
from kiln.adapters.runner_api import HttpRunnerApi
from kiln.errors import UnavailableError
from kiln.models import PodRef
from kiln.ports.pods import Instructions, News
from support.api_server import RunningApi, settings_for
from support.dev_temporal import DevTemporal
from support.pod_rows import prompt, prompts_of, terminate
from support.runner_calls import INCARNATION, RunnerCaller

SHIM = "shim-1"
# More than the server has threads for requests.
MANY = 60
PROMPT_SECONDS = 3.0


@pytest.fixture
async def runner(api: RunningApi) -> AsyncIterator[RunnerCaller]:
    """A runner whose process has registered."""
    runner = RunnerCaller(api)
    await runner.register()
    yield runner
    await runner.aclose()


@pytest.fixture
async def pod(runner: RunnerCaller) -> PodRef:
    """A pod whose agent runs."""
    ref = runner.add_pod(initial_prompt="hello")
    await runner.calls.begin(ref.key, SHIM)
    await runner.calls.started(ref.key, SHIM)
    return ref


@contextmanager
def statements_of(engine: Engine) -> Iterator[list[str]]:
    """What is asked of a database while the block lasts."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield statements
    event.remove(engine, "before_cursor_execute", note)


async def test_a_prompt_is_told_as_soon_as_it_comes(runner: RunnerCaller, pod: PodRef) -> None:
    """Who waits hears of it within a moment, and with the next call says that it has been taken."""
    waiting = asyncio.create_task(runner.calls.news({pod.key: 1}))
    _, pending = await asyncio.wait({waiting}, timeout=0.2)
    assert pending
    prompt(runner.catalog, pod, "and on")
    assert await asyncio.wait_for(waiting, PROMPT_SECONDS) == News(prompts={pod.key: [(2, "and on")]})
    assert [row.taken_at is None for row in prompts_of(runner.catalog, pod)] == [False, True]
    terminate(runner.catalog, pod)
    assert await runner.calls.news({pod.key: 2}) == News(end=frozenset({pod.key}))


async def test_an_order_to_end_is_told_as_soon_as_it_comes(runner: RunnerCaller, pod: PodRef) -> None:
    """A termination reaches the runner that waits within a moment."""
    waiting = asyncio.create_task(runner.calls.news({pod.key: 1}))
    _, pending = await asyncio.wait({waiting}, timeout=0.2)
    assert pending
    terminate(runner.catalog, pod)
    assert await asyncio.wait_for(waiting, PROMPT_SECONDS) == News(end=frozenset({pod.key}))


async def test_no_news_is_an_answer(runner: RunnerCaller, pod: PodRef, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the answer is that there are none."""
    monkeypatch.setattr(runner_calls, "NEWS_SECONDS", 0.1)
    assert await asyncio.wait_for(runner.calls.news({pod.key: 1}), PROMPT_SECONDS) == News()


async def test_nobody_looks_for_one_who_has_left(
    runner: RunnerCaller, pod: PodRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a runner has left, its question costs nothing more."""
    monkeypatch.setattr(runner_calls, "LOOK_SECONDS", 0.1)
    waiting = asyncio.create_task(runner.calls.news({pod.key: 1}))
    with statements_of(runner.api.parts.catalog.engine) as statements:
        await _until(lambda: _looks(statements) >= 3)
        waiting.cancel()
        before = _looks(statements)
        await asyncio.sleep(0.8)
        assert _looks(statements) - before <= 2


async def test_those_who_wait_hold_nobody_up(tmp_path: Path, temporal: DevTemporal) -> None:
    """However many wait, others are answered; and when the server stops, all of them are let go at once."""
    with RunningApi(settings_for(tmp_path, temporal.port)) as api:
        runner = RunnerCaller(api)
        await runner.register()
        processes = [runner.process(INCARNATION) for _ in range(MANY // 4)]
        waiting = [asyncio.create_task(_outcome(each)) for each in processes for _ in range(4)]
        with statements_of(api.parts.catalog.engine) as statements:
            await _until(lambda: _looks(statements) >= MANY)
        began = time.monotonic()
        assert await runner.calls.beat([]) == Instructions()
        assert time.monotonic() - began < 2
        api.stop()
        outcomes = await asyncio.wait_for(asyncio.gather(*waiting), 10)
        for each in (*processes, runner):
            await each.aclose()
    assert set(outcomes) == {"no news"}
    assert api.stopped_in < 2


def _looks(statements: list[str]) -> int:
    return sum("FROM runners" in each for each in statements)


async def _outcome(process: HttpRunnerApi) -> str:
    try:
        return "no news" if await process.news({}) == News() else "news"
    except UnavailableError:
        return "cut off"


async def _until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
