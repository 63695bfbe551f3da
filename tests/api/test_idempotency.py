"""Idempotency-Key on POST /api/v1/images/build: a repeated order is the same order."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import httpx
from sqlalchemy import func, select, update

from kiln.catalog.tables import Build, IdempotencyKey
from support.parallel import Pending, in_parallel
from support.tenants import Tenant, error, on_both_databases, row_counts

PATH = "/api/v1/images/build"
KEY = "9f8b3c6e-1"
REUSED = error("idempotency_key_reused", "Idempotency-Key: the key came before with another body")

pytestmark = on_both_databases


def order(tenant: Tenant, key: str = KEY, body: bytes = b'{"provider": "codex"}') -> httpx.Response:
    return tenant.http.post(PATH, content=body, headers={"Idempotency-Key": key})


def builds_of(tenant: Tenant) -> int:
    with tenant.catalog.read() as session:
        query = select(func.count()).where(Build.organization_id == tenant.organization_id)
        return session.execute(query).scalar_one()


def test_a_repeated_order_is_answered_as_the_first(tenant: Tenant) -> None:
    """Same status, same body, and still one build."""
    first, second = order(tenant), order(tenant)
    assert (second.status_code, second.content) == (first.status_code, first.content) == (202, first.content)
    assert builds_of(tenant) == 1


def test_a_repeated_order_is_answered_as_the_first_after_the_builds_end(tenant: Tenant) -> None:
    """The answer is the one that was given, not the build's state of today."""
    first = order(tenant)
    tenant.http.post(f"/api/v1/images/builds/{first.json()['build_id']}/cancel")
    second = order(tenant)
    assert (second.status_code, second.content) == (202, first.content)


def test_another_body_under_the_same_key_is_a_409(tenant: Tenant) -> None:
    """A key stands for one order."""
    order(tenant)
    before = row_counts(tenant.catalog)
    answer = order(tenant, body=b'{"provider": "cursor"}')
    assert (answer.status_code, answer.json()) == (409, REUSED)
    assert row_counts(tenant.catalog) == before


def test_other_keys_are_other_orders(tenant: Tenant) -> None:
    """Without a key, or under another one, the same body is another build."""
    answers = [order(tenant), order(tenant, key="another"), tenant.submit(), tenant.submit()]
    assert len({answer.json()["build_id"] for answer in answers}) == 4


def test_a_key_is_its_organizations_own(tenant: Tenant, neighbour: Tenant) -> None:
    """Two organizations may choose the same key."""
    first, second = order(tenant), order(neighbour, body=b'{"provider": "cursor"}')
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["build_id"] != second.json()["build_id"]


def test_a_key_is_shared_by_all_of_an_organizations_api_keys(tenant: Tenant) -> None:
    """A client that changes its API key between two tries repeats itself all the same."""
    first = order(tenant)
    headers = {"Authorization": f"Bearer {tenant.new_key('builds:write')}", "Idempotency-Key": KEY}
    second = tenant.http.post(PATH, content=b'{"provider": "codex"}', headers=headers)
    assert second.json() == first.json()


def test_a_refused_order_does_not_use_its_key_up(tenant: Tenant) -> None:
    """Whoever corrects the body may keep the key."""
    assert order(tenant, body=b'{"provider": "copilot"}').status_code == 422
    assert order(tenant).status_code == 202


def test_a_key_is_free_again_after_a_day(tenant: Tenant) -> None:
    """An answer is kept for 24 hours."""
    first = order(tenant)
    _make_older(tenant, timedelta(hours=23, minutes=59))
    assert order(tenant).json() == first.json()
    _make_older(tenant, timedelta(minutes=2))
    second = order(tenant, body=b'{"provider": "cursor"}')
    assert second.status_code == 202
    assert second.json()["build_id"] != first.json()["build_id"]


def _make_older(tenant: Tenant, by: timedelta) -> None:
    own = IdempotencyKey.organization_id == tenant.organization_id
    with tenant.catalog.transaction() as tx:
        known = tx.execute(select(IdempotencyKey.created_at).where(own)).scalar_one()
        tx.execute(update(IdempotencyKey).where(own).values(created_at=known - by))


def test_orders_at_the_same_moment_are_one_build(tenant: Tenant) -> None:
    """Whichever comes first is carried out, and all get its answer."""
    for round_number in range(3):
        key = f"round-{round_number}"
        calls: list[Callable[[], httpx.Response]] = [lambda key=key: order(tenant, key)] * 6  # type: ignore[misc]
        answers = in_parallel(calls)
        assert {(answer.status_code, answer.content) for answer in answers} == {(202, answers[0].content)}
        assert builds_of(tenant) == round_number + 1


def test_different_orders_at_the_same_moment_are_one_build(tenant: Tenant) -> None:
    """One body wins the key, and every other one is told."""
    bodies = [f'{{"provider": "codex", "tags": {{"n": "{n}"}}}}'.encode() for n in range(6)]
    answers = in_parallel([lambda body=body: order(tenant, body=body) for body in bodies])  # type: ignore[misc]
    assert sorted(answer.status_code for answer in answers) == [202] + [409] * 5
    assert builds_of(tenant) == 1


def test_a_second_order_waits_for_the_first(tenant: Tenant) -> None:
    """While the first is being written, the second has no answer; then it has the first one's."""
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with tenant.catalog.transaction() as tx:
            tx.add(_answer(tenant))
            tx.flush()
            begun.set()
            go_on.wait(10)

    first = Pending(hold)
    assert begun.wait(10)
    second = Pending(lambda: order(tenant))
    try:
        assert second.is_waiting(0.3)
    finally:
        go_on.set()
    first.result()
    assert second.result().json() == {"the": "first one's"}


def _answer(tenant: Tenant) -> IdempotencyKey:
    return IdempotencyKey(
        organization_id=tenant.organization_id,
        key=KEY,
        body_digest=tenant.api.parts.sealer.digest(b'{"provider": "codex"}'),
        build_id="",
        status_code=202,
        response={"the": "first one's"},
        created_at=datetime.now(UTC),
    )
