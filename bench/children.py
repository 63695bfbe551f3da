"""Processes of the bench's own that carry out orders: one JSON object a line each way over standard input and output.

A child ends when its standard input does, and so with the bench, however that ends.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Self

import uvloop

from bench.figures import MeasurementError
from kiln.settings import PROJECT_ROOT

ORDER_SECONDS = 60.0
STOP_SECONDS = 10.0

Order = Mapping[str, Any]
Answer = dict[str, Any]


class Child:
    """A driver's process, as a context manager that ends it. `setup` is what the driver is made with."""

    def __init__(self, driver: str, setup: Order) -> None:
        self._driver = driver
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"bench.drivers.{driver}"],
            cwd=PROJECT_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # the terminal's Ctrl-C is the bench's to answer
        )
        self.send(setup)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def ask(self, do: str, **values: object) -> Answer:
        """An order's answer. Raises MeasurementError if the driver fails."""
        self.order(do, **values)
        return self.answer()

    def order(self, do: str, **values: object) -> None:
        """Gives an order whose answer is fetched later."""
        self.send({"do": do, **values})

    def send(self, message: Order) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return dict(json.loads(line))

    def _ended(self) -> MeasurementError:
        return MeasurementError(f"the driver {self._driver} ended; what it said is above")


def serve(make: Callable[[Order], Coroutine[Any, Any, object]]) -> None:
    """A driver's main: makes it, and has its methods carry out the orders of their names."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(make))


async def _serve(make: Callable[[Order], Coroutine[Any, Any, object]]) -> None:
    driver = await make(json.loads(sys.stdin.readline()))
    # In a thread: what the driver listens on is served between two orders as well.
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        async with asyncio.timeout(ORDER_SECONDS):
            answer = await getattr(driver, order.pop("do"))(**order)
        print(json.dumps(answer), flush=True)
