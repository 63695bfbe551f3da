"""Blocking calls of a worker: those that EC2 keeps waiting hold up no others."""

import asyncio
import threading

from worker import make_room
from worker_roles import MACHINE_SLOTS

PATIENCE_SECONDS = 10


def test_an_ec2_that_does_not_answer_holds_up_nothing_else() -> None:
    """With every slot for machines waiting for EC2, another blocking call begins at once."""

    async def call_while_all_wait() -> str:
        make_room(asyncio.get_running_loop())
        answers = threading.Event()
        waiting = [asyncio.create_task(asyncio.to_thread(answers.wait, PATIENCE_SECONDS)) for _ in range(MACHINE_SLOTS)]
        await asyncio.sleep(0)  # now all of them have begun
        try:
            async with asyncio.timeout(PATIENCE_SECONDS / 2):
                return await asyncio.to_thread(lambda: "a lease is renewed")
        finally:
            answers.set()
            await asyncio.gather(*waiting)

    assert asyncio.run(call_while_all_wait()) == "a lease is renewed"
