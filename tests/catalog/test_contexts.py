"""Build contexts: uploaded, started once, and no more once the build is over."""

from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from kiln.catalog import attempts, contexts
from kiln.catalog.builds import shown_status
from kiln.catalog.contexts import ContextRow
from kiln.catalog.session import Catalog
from kiln.errors import ContextMissingError
from kiln.models import BuildEnd, BuildStatus, ErrorCode, Failure
from kiln.ports import ContextFacts, Held
from support.container_rows import add_cloud_build, add_container, context_facts
from support.parallel import in_parallel
from support.rows import LEASE, add_build, build_row, request_cancel

HOUR = timedelta(hours=1)


@pytest.fixture
def build(catalog: Catalog, organization: str) -> str:
    """A build that waits for its context for another hour."""
    return waiting(catalog, organization)


def waiting(catalog: Catalog, organization: str, patience: timedelta = HOUR) -> str:
    return add_container(catalog, organization, upload_until=datetime.now(UTC) + patience)


def upload(catalog: Catalog, build: str, facts: ContextFacts | None = None) -> bool:
    with catalog.transaction() as tx:
        return contexts.note_uploaded(tx, build, facts or context_facts())


def start(catalog: Catalog, build: str, facts: ContextFacts | None = None) -> bool:
    with catalog.transaction() as tx:
        return contexts.start(tx, build, facts)


def close(catalog: Catalog, build: str) -> None:
    with catalog.transaction() as tx:
        attempts.finish(tx, build, BuildEnd(status=BuildStatus.FAILED))


def known(catalog: Catalog, build: str) -> ContextRow:
    with catalog.read() as session:
        row = contexts.of(session, build)
    assert row is not None
    return row


def test_a_build_waits_for_its_context(catalog: Catalog, organization: str, build: str) -> None:
    """Before the upload nothing has come, and the build is open."""
    row = known(catalog, build)
    assert (row.organization_id, row.dockerfile, row.status) == (organization, "Dockerfile", "awaiting_context")
    assert (row.uploaded, row.started, row.open) == (False, False, True)
    assert row.upload_until is not None
    assert row.upload_until > datetime.now(UTC)


def test_a_context_that_came_with_the_build_is_there(catalog: Catalog, organization: str) -> None:
    """A cloud build's archive was stored before its row: it is queued at once."""
    row = known(catalog, add_cloud_build(catalog, organization))
    assert (row.uploaded, row.started, row.upload_until, row.status) == (True, True, None, "queued")


def test_other_builds_have_none(catalog: Catalog, organization: str) -> None:
    """An AMI is built from no context."""
    with catalog.read() as session:
        assert contexts.of(session, add_build(catalog, organization)) is None
        assert contexts.of(session, "no-such-build") is None


def test_an_upload_replaces_the_one_before(catalog: Catalog, build: str) -> None:
    """Until the start, the last archive counts."""
    assert upload(catalog, build, context_facts("a" * 64))
    assert upload(catalog, build, context_facts("b" * 64))
    assert build_row(catalog, build).context_sha256 == "b" * 64


def test_a_start_queues_the_build(catalog: Catalog, build: str) -> None:
    """With its context noted, the build waits for its builder."""
    upload(catalog, build)
    assert start(catalog, build)
    row = build_row(catalog, build)
    assert (row.status, row.context_sha256, row.context_bytes) == ("queued", "a" * 64, 512)


def test_a_second_start_changes_nothing(catalog: Catalog, build: str) -> None:
    """A build begins once; repeating the start is harmless, also while it is being built."""
    upload(catalog, build)
    start(catalog, build)
    with catalog.transaction() as tx:
        attempts.begin(tx, build, "worker", LEASE)
        attempts.tool_started(tx, build, 1, HOUR)
    before = build_row(catalog, build)
    assert start(catalog, build, context_facts("b" * 64))
    after = build_row(catalog, build)
    assert (after.status, after.context_started_at) == ("building", before.context_started_at)
    assert after.context_sha256 == "a" * 64


def test_many_starts_at_once_are_one(catalog: Catalog, build: str) -> None:
    """All are told that the build has begun."""
    upload(catalog, build)
    assert in_parallel([partial(start, catalog, build)] * 4) == [True] * 4


def test_an_upload_after_the_start_is_refused(catalog: Catalog, build: str) -> None:
    """What the build begins with is what it was started with."""
    upload(catalog, build)
    start(catalog, build)
    assert not upload(catalog, build, context_facts("b" * 64))
    assert build_row(catalog, build).context_sha256 == "a" * 64


def test_a_start_without_an_archive_is_refused(catalog: Catalog, build: str) -> None:
    """The build goes on waiting."""
    assert not start(catalog, build)
    assert build_row(catalog, build).status == "awaiting_context"


def test_an_archive_that_came_past_kiln_is_taken(catalog: Catalog, organization: str) -> None:
    """Its facts come with the start; that it was uploaded in time is what the URL's expiry ensures."""
    build = waiting(catalog, organization, -HOUR)
    assert start(catalog, build, context_facts())
    assert build_row(catalog, build).context_sha256 == "a" * 64


@pytest.mark.parametrize("end", [close, request_cancel])
def test_a_build_that_is_over_takes_nothing(catalog: Catalog, build: str, end) -> None:
    """Neither an upload nor a start changes a build that has ended, started before or not."""
    upload(catalog, build)
    end(catalog, build)
    before = build_row(catalog, build)
    assert not upload(catalog, build)
    assert not start(catalog, build)
    after = build_row(catalog, build)
    assert (after.status, after.context_uploaded_at) == (before.status, before.context_uploaded_at)


def test_a_build_that_is_being_cancelled_does_not_start(catalog: Catalog, build: str) -> None:
    """A run has the build, and has not yet closed it."""
    upload(catalog, build)
    with catalog.transaction() as tx:
        attempts.claim(tx, build, "run-1")
    request_cancel(catalog, build)
    assert shown_status(build_row(catalog, build)) is BuildStatus.CANCELLING
    assert not start(catalog, build)


def test_a_cancel_before_dispatch_ends_it_at_once(catalog: Catalog, build: str) -> None:
    """No run has the build: its row is closed."""
    request_cancel(catalog, build)
    assert build_row(catalog, build).status == "cancelled"


def test_an_unfit_archive_fails_the_build(catalog: Catalog, build: str) -> None:
    """Its reason is recorded; a build that has begun is past it."""
    failure = Failure(code=ErrorCode.CONTEXT_INVALID, message="is no tar archive")
    with catalog.transaction() as tx:
        assert contexts.reject(tx, build, failure)
    row = build_row(catalog, build)
    assert (row.status, row.error_code, row.error_message) == ("failed", "context_invalid", "is no tar archive")
    with catalog.transaction() as tx:
        assert not contexts.reject(tx, build, failure)


def test_a_run_claims_a_build_that_waits(catalog: Catalog, build: str) -> None:
    """The workflow is there before the context; what it builds with is not, so that no attempt begins."""
    with catalog.transaction() as tx:
        assert attempts.claim(tx, build, "run-1") is not None
    with pytest.raises(ContextMissingError), catalog.transaction() as tx:
        attempts.begin(tx, build, "worker", LEASE)
    upload(catalog, build)
    start(catalog, build)
    with catalog.transaction() as tx:
        assert not isinstance(attempts.begin(tx, build, "worker", LEASE), Held)


def test_contexts_of_closed_and_unknown_builds_can_go(catalog: Catalog, organization: str, build: str) -> None:
    """An open build's context is kept, however many are asked about."""
    closed = waiting(catalog, organization)
    close(catalog, closed)
    unknown = {f"unknown-{number}" for number in range(1200)}
    with catalog.read() as session:
        assert contexts.over(session, [build, closed, *unknown]) == {closed, *unknown}
        assert contexts.over(session, []) == set()
