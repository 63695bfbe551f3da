"""Logs whose lines come with numbers: kept once, in order, whoever sends them how often."""

import random
from collections.abc import Sequence
from functools import partial

import pytest

from kiln.adapters.logs import Gap, Head, LogStore
from kiln.ports import LogLine
from support.logs import entries, numbers, read_all, texts
from support.parallel import in_parallel

POD = "pod-1"
MISSING = "these lines are missing from the log store"


def words(first: int, last: int) -> list[str]:
    return [f"line {number}" for number in range(first, last + 1)]


def keep(store: LogStore, first: int, last: int) -> int:
    """Sends lines that say their own numbers."""
    return store.keep(POD, first, entries(last - first + 1, first=first))


def test_lines_come_back_as_they_were_sent(store: LogStore):
    """A kept line has its number, time, stream and text; a log's first lines make it."""
    sent = entries(3)
    assert store.keep(POD, 1, sent) == 3
    assert read_all(store, POD) == [LogLine(number, *entry) for number, entry in enumerate(sent, 1)]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ([(1, 3), (1, 3)], 3),
        ([(1, 3), (2, 3)], 3),
        ([(1, 3), (3, 5), (1, 6)], 6),
        ([(1, 2500), (2000, 4200)], 4200),
        ([(1, 3), (4, 3)], 3),
    ],
)
def test_what_is_there_is_not_added_again(store: LogStore, sent: Sequence[tuple[int, int]], kept: int):
    """Lines that come again, or in part, are there once; each call returns the last number that it was given."""
    assert [keep(store, *each) for each in sent] == [last for _, last in sent]
    assert texts(read_all(store, POD)) == words(1, kept)


def test_what_never_came_is_a_gap(store: LogStore):
    """Lines between the last one and the first that comes next are told of as missing, and do not come in later."""
    keep(store, 3, 4)
    keep(store, 8, 9)
    assert keep(store, 5, 7) == 7
    found = read_all(store, POD)
    assert [item for item in found if isinstance(item, Gap)] == [Gap(1, 2, MISSING), Gap(5, 7, MISSING)]
    assert numbers(found) == list(range(1, 10))


def test_an_ended_log_takes_nothing_and_wants_nothing(store: LogStore):
    """Whoever sends to a log that has ended is told that all of it need not be sent again."""
    keep(store, 1, 2)
    store.end(POD, "terminated")
    store.end("pod-2", "failed")
    assert (keep(store, 1, 9), store.keep("pod-2", 1, entries(2))) == (9, 2)
    assert store.heads([POD, "pod-2"]) == {POD: Head(2, "terminated"), "pod-2": Head(0, "failed")}


def test_two_senders_at_once(store: LogStore):
    """Two that send the same log in pieces of their own, as often as they like, make it once."""

    def send(seed: int) -> int:
        rng, sent = random.Random(seed), 0
        while sent < 300:
            first = max(1, sent - rng.randint(0, 20))
            sent = keep(store, first, min(first + rng.randint(1, 40), 300))
        return sent

    assert in_parallel([partial(send, seed) for seed in range(4)]) == [300] * 4
    assert texts(read_all(store, POD)) == words(1, 300)
    assert store.heads([POD]) == {POD: Head(300, None)}
