"""cloud-builds: lists, single builds, logs and cancels."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import delete

from kiln.adapters.log_database import chunks
from kiln.catalog import attempts
from kiln.catalog.tables import Agent
from kiln.models import BuildEnd, BuildStatus, ErrorCode, Failure, SourceNotes
from support.api_server import RunningApi
from support.cloud import Account, published_client
from support.container_rows import add_cloud_build, add_container, begin, publish, target
from support.tenants import on_both_databases

UNKNOWN = "550e8400-e29b-41d4-a716-446655440000"


@pytest.fixture
def account(api: RunningApi) -> Iterator[Account]:
    account = Account(api)
    yield account
    account.close()


def added(account: Account, agent: str = "scout", **more: Any) -> str:
    """The id of a build that waits; Temporal does not know it."""
    to = target("app", "v1", owner=account.slug)
    return add_cloud_build(account.catalog, account.organization_id, agent, to=to, **more)


def ended(account: Account, status: BuildStatus, code: ErrorCode | None = None) -> str:
    """The id of a build that began and ended so."""
    build_id = added(account)
    begin(account.catalog, build_id)
    error = Failure(code=code, message="why") if code else None
    with account.catalog.transaction() as tx:
        attempts.finish(tx, build_id, BuildEnd(status=status, error=error))
    return build_id


def ids(answer: Any) -> list[str]:
    return [build["id"] for build in answer.json()["items"]]


@on_both_databases
def test_every_page_of_the_published_client(account: Account) -> None:
    """It walks through all builds, newest first, none twice; one that arrives meanwhile moves nothing."""
    made = [added(account) for _ in range(7)][::-1]
    with published_client(account) as client:
        pages = iter(client.build.list(limit=3))
        seen = [next(pages).id for _ in range(4)]
        added(account)
        seen += [build.id for build in pages]
    assert seen == made


def test_a_page(account: Account) -> None:
    """It has exactly these fields; `total` counts over the filters, not the page."""
    made = [added(account) for _ in range(3)]
    page = account.get(limit=2).json()
    assert list(page) == ["object", "items", "has_more", "total", "limit"]
    assert (page["object"], page["has_more"], page["total"], page["limit"]) == ("list", True, 3, 2)
    assert ids(account.get(ending_before=made[0], limit=1)) == [made[1]]
    assert ids(account.get(starting_after=made[2], limit=1)) == [made[1]]
    assert ids(account.get(sort_order="asc")) == made


def test_filters(account: Account) -> None:
    """By agent, commit and content; no build is an empty page."""
    notes = SourceNotes(source_commit="c1", working_tree_hash="h1")
    one, other = added(account, "scout", source=notes), added(account, "ranger")
    assert ids(account.get(agent_name="ranger")) == [other]
    assert ids(account.get(source_commit="c1")) == ids(account.get(working_tree_hash="h1")) == [one]
    assert account.get(agent_name="nobody").json()["total"] == 0


@pytest.mark.parametrize("sort_by", ["agent_name", "build_status", "build_end_time"])
def test_other_orders(account: Account, sort_by: str) -> None:
    """Every order is walked through page by page, both ways round."""
    expected = {added(account, "b"), added(account, "a"), ended(account, BuildStatus.FAILED, ErrorCode.TOOL_FAILED)}
    walked: dict[str, list[str]] = {}
    for order in ("asc", "desc"):
        walked[order] = ids(account.get(sort_by=sort_by, sort_order=order, limit=1))
        while account.get(sort_by=sort_by, sort_order=order, limit=1, starting_after=walked[order][-1]).json()["items"]:
            walked[order] += ids(
                account.get(sort_by=sort_by, sort_order=order, limit=1, starting_after=walked[order][-1])
            )
    assert walked["asc"] == walked["desc"][::-1]
    assert set(walked["asc"]) == expected


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 10001}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"sort_by": "image_name"}, "sort_by"),
        ({"sort_order": "up"}, "sort_order"),
        ({"starting_after": UNKNOWN}, "starting_after"),
        ({"ending_before": "no-uuid"}, "ending_before"),
        ({"starting_after": "\0"}, "starting_after"),
        ({"starting_after": UNKNOWN, "ending_before": UNKNOWN}, "ending_before"),
        ({"agent_name": "\0"}, "agent_name"),
    ],
)
def test_a_bad_query(account: Account, query: dict[str, Any], name: str) -> None:
    """A number out of its range, an unknown word or cursor: a 422 that names the parameter."""
    answer = account.get(**query)
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"].startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("status", "code", "word"),
    [
        (BuildStatus.FAILED, ErrorCode.TOOL_FAILED, "failed"),
        (BuildStatus.FAILED, ErrorCode.INTERNAL, "error"),
        (BuildStatus.FAILED, ErrorCode.WORKFLOW_TERMINATED, "error"),
        (BuildStatus.TIMED_OUT, ErrorCode.TIMED_OUT, "timed_out"),
        (BuildStatus.CANCELLED, None, "cancelled"),
    ],
)
def test_how_a_build_ended(account: Account, status: BuildStatus, code: ErrorCode | None, word: str) -> None:
    """In the contract's words; a fault of Kiln's own is an `error`."""
    build = account.shown(ended(account, status, code))
    assert build["build_status"] == word
    assert build["build_start_time"] is not None
    assert build["build_end_time"] is not None
    assert build["image_url"] is None


def test_a_built_image(account: Account) -> None:
    """`running` while its tool runs, then `success` with the image by its digest."""
    build_id = added(account)
    with published_client(account) as client:
        assert client.build.retrieve(build_id).build_status == "queued"
        image = publish(account.catalog, build_id, target("app", "v1", owner=account.slug))
        found = client.build.retrieve(build_id)
    assert (found.build_status, found.image_url) == ("success", image.reference)
    assert image.reference.endswith(f"/{account.slug}/app@{image.digest}")


def test_other_peoples_builds(account: Account) -> None:
    """Another account's build, and one of another API, are unknown ids."""
    other = Account(account.api)
    foreign = [added(other), add_container(account.catalog, account.organization_id)]
    other.close()
    for build_id in foreign:
        answers = [account.get(f"/{build_id}"), account.get(f"/{build_id}/logs"), account.cancel(build_id)]
        assert [answer.status_code for answer in answers] == [404, 404, 404]
        assert [answer.json()["detail"] for answer in answers] == ["no build of this account has this id"] * 3
        assert account.get(starting_after=build_id).status_code == 422
    assert account.get().json()["total"] == 0


def test_agents_that_were_never_deployed(account: Account) -> None:
    """Each with its newest build and how many there are, the newest first."""
    added(account, "scout")
    ranger, scout = added(account, "ranger"), added(account, "scout")
    deployed = added(account, "deployed")
    with account.catalog.transaction() as tx:
        row = tx.get_one(Agent, account.row(deployed).agent_id)
        row.deployed_at = row.created_at
    with published_client(account) as client:
        found = client.build.list_undeployed()
    assert [(agent.agent_name, agent.latest_build.id, agent.total_builds) for agent in found] == [
        ("scout", scout, 2),
        ("ranger", ranger, 1),
    ]
    assert account.get("/undeployed").json()[0]["latest_build"] == account.shown(scout)


def test_a_cancel_answers_with_the_build_before_it(account: Account) -> None:
    """202 and what it was at the call; `cancelling` shows on later reads, and repeating it changes nothing."""
    build_id = added(account)
    begin(account.catalog, build_id)
    answer = account.cancel(build_id)
    assert (answer.status_code, answer.json()["build_status"]) == (202, "running")
    assert account.shown(build_id)["build_status"] == "cancelling"
    again = account.cancel(build_id)
    assert (again.status_code, again.json()["build_status"]) == (202, "cancelling")


def test_a_cancel_of_the_published_client(account: Account) -> None:
    """A build that no worker has begun is over at once; one that has ended stays as it is."""
    build_id, done = added(account), ended(account, BuildStatus.FAILED, ErrorCode.TOOL_FAILED)
    with published_client(account) as client:
        assert client.build.cancel(build_id).build_status == "queued"
        assert client.build.cancel(done).build_status == "failed"
    assert [account.shown(one)["build_status"] for one in (build_id, done)] == ["cancelled", "failed"]


def test_the_log_of_a_build_that_has_ended(account: Account) -> None:
    """Nothing but lines, as the client that knows no other event needs it, and then the connection's end."""
    build_id = ended(account, BuildStatus.CANCELLED)
    account.write_log(build_id, "#1 load build definition", 'caf\u00e9 "quoted"\r')
    account.write_log(build_id, "cleaning up", stream="kiln", status="cancelled")
    answer = account.cloud.get(f"/v5/builds/{build_id}/logs", headers={"Accept": "application/json"})
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.text == (
        'data: {"line": "#1 load build definition"}\n\n'
        'data: {"line": "caf\\u00e9 \\"quoted\\"\\r"}\n\n'
        'data: {"line": "[kiln] cleaning up"}\n\n'
    )


def test_a_live_log_of_the_published_client(account: Account) -> None:
    """The lines so far, those that come, and the end with the build's."""
    build_id = added(account)
    begin(account.catalog, build_id)
    account.write_log(build_id, "first")
    with published_client(account) as client:
        lines = (chunk.line for chunk in client.build.logs(build_id))
        assert next(lines) == "first"
        account.write_log(build_id, "second", status="succeeded")
        assert list(lines) == ["second"]


def test_lost_lines_are_a_line(account: Account) -> None:
    """A gap says which lines are missing, and why."""
    build_id = ended(account, BuildStatus.CANCELLED)
    for text in ("one", "two", "three"):
        account.write_log(build_id, text)
    account.write_log(build_id, status="cancelled")
    with account.api.logs._database.writing() as connection:
        connection.execute(delete(chunks).where(chunks.c.build_id == build_id, chunks.c.first_line == 2))
    lost = [line for line in account.get(f"/{build_id}/logs").text.split("\n\n") if "lost" in line]
    assert len(lost) == 1
    assert lost[0].startswith('data: {"line": "[kiln] lines 2 to 2 were lost: ')
