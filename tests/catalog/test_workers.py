"""Which workers are alive, as the catalog knows it."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import update

from kiln.catalog import workers
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Worker
from kiln.catalog.workers import FORGET_AFTER, PRESENCE_LIMIT, Presence

PACKER = Presence("worker-1", "packer", ("kiln.packer",), 4)
SECOND = timedelta(seconds=1)


def note(catalog: Catalog, presence: Presence = PACKER) -> None:
    with catalog.transaction() as tx:
        workers.note(tx, presence)


def make_silent(catalog: Catalog, worker_id: str, since: timedelta) -> None:
    with catalog.transaction() as tx:
        tx.execute(update(Worker).where(Worker.id == worker_id).values(seen_at=datetime.now(UTC) - since))


def living(catalog: Catalog) -> dict[str, int]:
    """The slots of each living worker."""
    with catalog.read() as session:
        return {worker.id: worker.slots for worker in workers.living(session)}


def serves(catalog: Catalog, queue: str) -> bool:
    with catalog.read() as session:
        return workers.serves(session, queue)


def test_a_worker_that_notes_itself_lives(catalog: Catalog) -> None:
    """A worker's note says how many builds it takes."""
    note(catalog)
    assert living(catalog) == {"worker-1": 4}


def test_a_worker_notes_itself_again_and_again(catalog: Catalog) -> None:
    """The latest note counts, and makes no second worker."""
    note(catalog)
    note(catalog, Presence("worker-1", "packer", ("kiln.packer",), 2))
    assert living(catalog) == {"worker-1": 2}


def test_a_silent_worker_is_dead(catalog: Catalog) -> None:
    """Who misses three notes is not counted."""
    note(catalog)
    make_silent(catalog, "worker-1", PRESENCE_LIMIT + SECOND)
    assert living(catalog) == {}


def test_a_slow_worker_lives(catalog: Catalog) -> None:
    """Who is merely late is still counted."""
    note(catalog)
    make_silent(catalog, "worker-1", PRESENCE_LIMIT - 3 * SECOND)
    assert living(catalog) == {"worker-1": 4}


def test_an_orderly_end_takes_a_worker_off_the_list(catalog: Catalog) -> None:
    """A worker that stops says so."""
    note(catalog)
    with catalog.transaction() as tx:
        workers.leave(tx, "worker-1")
    assert living(catalog) == {}


def test_long_dead_workers_are_forgotten(catalog: Catalog) -> None:
    """Rows of workers that died an hour ago go with the next one's note."""
    note(catalog)
    make_silent(catalog, "worker-1", FORGET_AFTER + SECOND)
    note(catalog, Presence("worker-2", "control", ("kiln.control",), 0))
    with catalog.read() as session:
        assert [row.id for row in session.query(Worker)] == ["worker-2"]


def test_a_queue_is_served_by_its_own_workers(catalog: Catalog) -> None:
    """A living worker serves the queues that it names, and no others."""
    note(catalog)
    assert (serves(catalog, "kiln.packer"), serves(catalog, "kiln.control")) == (True, False)


def test_a_dead_worker_serves_nothing(catalog: Catalog) -> None:
    """A queue whose only worker fell silent is not served."""
    note(catalog)
    make_silent(catalog, "worker-1", PRESENCE_LIMIT + SECOND)
    assert not serves(catalog, "kiln.packer")
