"""The AMI that an earlier attempt got EC2 to make, whatever became of the attempt: making it again would double it."""

import asyncio
from collections.abc import Callable

from activities.attempt import POLL, is_past
from kiln.naming import BUILD_TAG
from kiln.ports import Ami, Cloud, Marks, Order


def marks_of(order: Order, installation: str) -> Marks:
    """How to recognise what the order's build made."""
    return Marks(installation, order.build_id, order.known_ids)


async def finished_image(cloud: Cloud, order: Order, marks: Marks, waits: Callable[[], None]) -> Ami | None:
    """The build's AMI once it is available; None if there is none, and none is coming. `waits` is told of each wait."""
    while True:
        amis = await asyncio.to_thread(cloud.images_of_build, order.region, marks)
        available = [ami for ami in amis if ami.state == "available"]
        if available:
            return available[-1]  # the oldest: what came after it was doubled
        if not any(ami.state == "pending" for ami in amis) or is_past(order.deadline_at):
            return None
        waits()
        await asyncio.sleep(POLL.total_seconds())


async def mark(cloud: Cloud, order: Order, ami: Ami, tags: dict[str, str]) -> None:
    """Puts the build's tags on an AMI that a lost attempt left without them, and on its snapshots."""
    if ami.tags.get(BUILD_TAG) != order.build_id:
        await asyncio.to_thread(cloud.tag, order.region, [ami.image_id, *ami.snapshot_ids], tags)
