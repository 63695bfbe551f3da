"""The clock of a time-skipping server goes on in steps, and stands at the end of each block."""

import asyncio
import sys
from collections.abc import AsyncIterator, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from temporalio.api.testservice.v1 import LockTimeSkippingRequest, SleepRequest, UnlockTimeSkippingRequest
from temporalio.testing import WorkflowEnvironment

from support.time_skipping import STEP, TimeSkipping

YEARS = timedelta(days=3650)
REAL_SECONDS = 10


@pytest_asyncio.fixture
async def environment() -> AsyncIterator[WorkflowEnvironment]:
    program = str(Path(sys.executable).with_name("temporal-test-server"))
    async with await WorkflowEnvironment.start_time_skipping(test_server_existing_path=program) as environment:
        yield environment


@pytest_asyncio.fixture
async def skipping(environment: WorkflowEnvironment) -> AsyncIterator[TimeSkipping]:
    skipping = TimeSkipping(environment.client.test_service)
    yield skipping
    skipping.close()


def sleeps(environment: WorkflowEnvironment, length: timedelta) -> Coroutine[Any, Any, object]:
    """Waits for the server's clock, as a timer of a workflow does."""
    duration = Duration()
    duration.FromTimedelta(length)
    return environment.client.test_service.sleep(SleepRequest(duration=duration))


async def test_what_is_years_away_stays_away(environment: WorkflowEnvironment, skipping: TimeSkipping) -> None:
    """However little else there is to wait for, the clock is at most some steps further."""
    far = asyncio.create_task(sleeps(environment, YEARS))
    await asyncio.sleep(0.2)
    began = await environment.get_current_time()
    async with asyncio.timeout(REAL_SECONDS), skipping.on():
        await sleeps(environment, STEP * 5)
    assert STEP * 5 <= await environment.get_current_time() - began < STEP * 60
    far.cancel()


async def test_it_stands_at_once_and_goes_on_later(environment: WorkflowEnvironment, skipping: TimeSkipping) -> None:
    """A step that something kept from its end is not skipped once its block is over, but in the next one."""
    server = environment.client.test_service
    await server.lock_time_skipping(LockTimeSkippingRequest())  # an activity runs
    async with skipping.on():
        await asyncio.sleep(0.2)
    ended = await environment.get_current_time()
    await server.unlock_time_skipping(UnlockTimeSkippingRequest())
    await asyncio.sleep(0.2)
    assert await environment.get_current_time() - ended < STEP / 2
    async with asyncio.timeout(REAL_SECONDS), skipping.on():
        await sleeps(environment, STEP * 5)
