"""Builds that wait for their context: what ends the wait, and contexts that nobody waits for."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest

from kiln.catalog import contexts
from kiln.models import BuildEnd, BuildStatus, ErrorCode, Failure, HouseTerms
from kiln.naming import context_key
from kiln.ports import ContextFacts
from support.archives import archive
from support.container_harness import ContainerHarness
from support.histories import SECRET
from support.rows import make_older, request_cancel, rewrite
from workflows.build_image import STATUS_ATTRIBUTE
from workflows.dispatch import API_PATIENCE, Dispatcher

HOUR = timedelta(hours=1)
# Nothing cached: every task replays the history.
CACHES = pytest.mark.parametrize("cached", [100, 0], ids=["cached", "evicted"])


@pytest.fixture
def kiln(container_kiln: ContainerHarness) -> ContainerHarness:
    return container_kiln


async def waiting(kiln: ContainerHarness) -> str:
    """A build whose workflow has looked for its context once, and waits."""
    build = await kiln.awaits_context(secret=SECRET)
    await kiln.until(lambda: has_asked(kiln, 1))
    return build


async def has_asked(kiln: ContainerHarness, times: int) -> bool:
    return kiln.finished["accept-context"] >= times


async def has_rested(kiln: ContainerHarness, build: str, times: int) -> bool:
    """Whether so many looks found nothing, and were followed by a pause."""
    events = (await kiln.handle(build).fetch_history()).events
    return sum(event.HasField("timer_started_event_attributes") for event in events) >= times


def note_uploaded(kiln: ContainerHarness, build: str) -> ContextFacts:
    """What the API writes at the end of an upload."""
    facts = kiln.receive(build)
    with kiln.catalog.transaction() as tx:
        contexts.note_uploaded(tx, build, facts)
    return facts


def let_its_time_pass(kiln: ContainerHarness, build: str) -> None:
    """The build's patience of an hour is over."""
    then = datetime.now(UTC) - timedelta(seconds=1)
    rewrite(kiln.catalog, build, upload_until=then, created_at=then - HOUR)


class TestSignal:
    @CACHES
    async def test_with_the_object_the_build_begins(self, kiln: ContainerHarness, cached: int) -> None:
        """Whoever put the archive there and says so has it built, by what the check found."""
        async with kiln.control(cached_workflows=cached), kiln.builder():
            build = await waiting(kiln)
            facts = kiln.receive(build)
            await kiln.announce(build)
            end = await kiln.end(build)
        row = kiln.row(build)
        assert (end.status, row.context_sha256, row.context_bytes) == ("succeeded", facts.sha256, facts.size_bytes)
        assert (kiln.pulled(), kiln.leftovers(build)) == (kiln.tagged(), [])
        assert kiln.tagged() == kiln.tools.runs[0].image.digest

    async def test_without_the_object_it_is_ignored(self, kiln: ContainerHarness) -> None:
        """A signal alone starts nothing; the next one, with the object, does."""
        async with kiln.workers():
            build = await waiting(kiln)
            await kiln.announce(build)
            await kiln.until(lambda: has_rested(kiln, build, 2))
            assert (kiln.row(build).status, kiln.tools.started) == ("awaiting_context", [])
            kiln.receive(build)
            await kiln.announce(build)
            assert (await kiln.end(build)).status is BuildStatus.SUCCEEDED

    async def test_before_the_first_look_it_counts(self, kiln: ContainerHarness) -> None:
        """A signal that comes before any worker is there is not lost."""
        build = await kiln.awaits_context()
        kiln.receive(build)
        await kiln.announce(build)
        async with kiln.workers():
            assert (await kiln.end(build)).status is BuildStatus.SUCCEEDED
        assert kiln.finished["accept-context"] == 1

    async def test_an_unfit_archive_fails_the_build(self, kiln: ContainerHarness) -> None:
        """An archive without the Dockerfile is said to be so, and deleted."""
        async with kiln.workers():
            build = await waiting(kiln)
            kiln.put(build, archive({"README": b"nothing to build"}))
            await kiln.announce(build)
            error = await kiln.failure(build)
        assert (error.type, kiln.row(build).error_code) == ("context_invalid", "context_invalid")
        assert "Dockerfile" in (kiln.row(build).error_message or "")
        assert (kiln.tools.started, kiln.leftovers(build), kiln.tagged()) == ([], [], None)


class TestCatalog:
    async def test_a_start_without_a_signal_is_found(self, kiln: ContainerHarness) -> None:
        """Temporal was away when the API wrote that the build may begin: the workflow looks by itself."""
        async with kiln.workers():
            build = await waiting(kiln)
            note_uploaded(kiln, build)
            assert kiln.start_in_the_catalog(build)
            assert (await kiln.end(build)).status is BuildStatus.SUCCEEDED
        assert kiln.tools.started == [1]

    async def test_an_upload_alone_starts_nothing(self, kiln: ContainerHarness) -> None:
        """An archive that came through Kiln waits for its start, however often the workflow looks."""
        async with kiln.workers():
            build = await waiting(kiln)
            note_uploaded(kiln, build)
            async with kiln.skipping():
                await kiln.until(lambda: has_asked(kiln, 4))
            assert (kiln.row(build).status, kiln.tools.started) == ("awaiting_context", [])

    async def test_a_rejected_context_ends_the_wait(self, kiln: ContainerHarness) -> None:
        """Where the API found the archive unfit and closed the build, the workflow ends as the row says."""
        async with kiln.workers():
            build = await waiting(kiln)
            with kiln.catalog.transaction() as tx:
                contexts.reject(tx, build, Failure(code=ErrorCode.CONTEXT_INVALID, message="no Dockerfile"))
            error = await kiln.failure(build)
        assert (error.type, error.message, kiln.row(build).status) == ("context_invalid", "no Dockerfile", "failed")

    async def test_it_is_shown_as_waiting(self, kiln: ContainerHarness) -> None:
        """Query and search attribute say what the build waits for."""
        async with kiln.workers():
            build = await waiting(kiln)
            status = await kiln.status(build)
            found = (await kiln.handle(build).describe()).typed_search_attributes
        assert status.progress is not None
        assert (status.status, status.progress.phase) == ("awaiting_context", "awaiting_context")
        assert found[STATUS_ATTRIBUTE] == "awaiting_context"


class TestPatience:
    async def test_its_end_fails_the_build(self, kiln: ContainerHarness) -> None:
        """A context that does not come in its time is named as what is missing, with that time."""
        async with kiln.workers():
            build = await waiting(kiln)
            let_its_time_pass(kiln, build)
            error = await kiln.failure(build)
        row = kiln.row(build)
        assert (row.status, row.error_code, row.secrets) == ("failed", "context_missing", None)
        assert row.error_message == error.message == "the build context was not uploaded within 3600 seconds"
        assert (kiln.tools.started, kiln.leftovers(build), kiln.tagged()) == ([], [], None)

    async def test_it_is_waited_out(self, kiln: ContainerHarness) -> None:
        """The wait ends when the patience does, and not with the next look after it."""
        async with kiln.control():
            build = await kiln.awaits_context(timedelta(seconds=0.6))
            await kiln.until(lambda: is_closed(kiln, build))
        row = kiln.row(build)
        assert row.error_message == "the build context was not uploaded within 1 seconds"
        assert row.completed_at - row.upload_until < timedelta(seconds=3)

    async def test_a_late_announcement_still_counts(self, kiln: ContainerHarness) -> None:
        """An archive that is there when the workflow looks is built, though its time was over."""
        async with kiln.workers():
            build = await waiting(kiln)
            kiln.receive(build)
            let_its_time_pass(kiln, build)
            await kiln.announce(build)
            assert (await kiln.end(build)).status is BuildStatus.SUCCEEDED

    async def test_a_later_upload_changes_nothing(self, kiln: ContainerHarness) -> None:
        """A build that failed without its context stays so, and what comes then is swept."""
        async with kiln.workers():
            build = await waiting(kiln)
            let_its_time_pass(kiln, build)
            await kiln.failure(build)
            note_uploaded(kiln, build)
            assert not kiln.start_in_the_catalog(build)
            kiln.age(build)
            await kiln.keep_house()
        assert (kiln.row(build).error_code, kiln.row(build).context_sha256) == ("context_missing", None)
        assert kiln.kept_contexts == set()


async def is_closed(kiln: ContainerHarness, build: str) -> bool:
    return kiln.row(build).completed_at is not None


class TestCancel:
    @CACHES
    async def test_it_is_at_once_and_leaves_nothing(self, kiln: ContainerHarness, cached: int) -> None:
        """No builder is needed for it; an archive that came already goes."""
        async with kiln.control(cached_workflows=cached):
            build = await waiting(kiln)
            note_uploaded(kiln, build)
            await kiln.handle(build).cancel()
            await kiln.until(lambda: is_closed(kiln, build))
            await kiln.is_cancelled(build)
        assert (kiln.row(build).status, kiln.row(build).secrets) == ("cancelled", None)
        assert (kiln.leftovers(build), kiln.tagged()) == ([], None)

    async def test_one_in_the_row_alone_is_brought(self, kiln: ContainerHarness) -> None:
        """A cancel that came while Temporal was away ends the wait, whatever was uploaded meanwhile."""
        async with kiln.control():
            build = await waiting(kiln)
            note_uploaded(kiln, build)
            request_cancel(kiln.catalog, build)
            assert not kiln.start_in_the_catalog(build)
            make_older(kiln.catalog, build, API_PATIENCE + timedelta(seconds=1))
            await Dispatcher(kiln.ledger, kiln.client, HouseTerms(pause_seconds=3600, round=1), kiln.registry).round()
            await kiln.until(lambda: is_closed(kiln, build))
        assert (kiln.row(build).status, kiln.leftovers(build)) == ("cancelled", [])

    async def test_a_signal_that_comes_with_it_changes_nothing(self, kiln: ContainerHarness) -> None:
        """Cancelled is cancelled, though the archive is announced in the same moment."""
        build = await kiln.awaits_context()
        async with kiln.activities():
            async with kiln.workflows(cached=0):
                await kiln.until(lambda: has_asked(kiln, 1))
            kiln.receive(build)
            await kiln.announce(build)
            await kiln.handle(build).cancel()
            async with kiln.workflows(cached=0), kiln.builder():
                await kiln.until(lambda: is_closed(kiln, build))
        assert (kiln.row(build).status, kiln.tools.started, kiln.leftovers(build)) == ("cancelled", [], [])


class TestSweep:
    def old_context(self, kiln: ContainerHarness, build: str) -> str:
        kiln.receive(build)
        kiln.age(build)
        return build

    def closed(self, kiln: ContainerHarness, status: BuildStatus) -> str:
        build = kiln.order()
        kiln.ledger.finish(build, BuildEnd(status=status))
        return build

    async def test_what_nobody_needs_goes(self, kiln: ContainerHarness) -> None:
        """Old contexts of closed builds and of builds that were never written down go; those of open builds stay."""
        for build in (self.closed(kiln, BuildStatus.FAILED), self.closed(kiln, BuildStatus.SUCCEEDED)):
            self.old_context(kiln, build)
        self.old_context(kiln, str(uuid.uuid4()))
        still_open = self.old_context(kiln, kiln.order())
        async with kiln.control():
            await kiln.keep_house()
        assert kiln.kept_contexts == {still_open}

    async def test_a_fresh_one_stays(self, kiln: ContainerHarness) -> None:
        """An upload is there before its build's row: what came only now is nobody's business yet."""
        kiln.receive(build := str(uuid.uuid4()))
        async with kiln.control():
            await kiln.keep_house()
        assert kiln.kept_contexts == {build}

    async def test_an_upload_that_never_ended_goes(self, kiln: ContainerHarness) -> None:
        """What a killed server left half written is removed, and one that is still coming in is not."""
        old, fresh = str(uuid.uuid4()), str(uuid.uuid4())
        uploads = [kiln.contexts.receive(context_key(build), "Dockerfile") for build in (old, fresh)]
        kiln.age(old)
        async with kiln.control():
            await kiln.keep_house()
        assert [path.name.startswith(fresh) for path in (kiln.objects / "contexts").iterdir()] == [True]
        for upload in uploads:
            upload.abort()
