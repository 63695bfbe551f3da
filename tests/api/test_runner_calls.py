"""What runners ask and report, over HTTP: an order's way, ends, logs, and who is heard at all."""

import json
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from kiln.adapters.runner_api import HttpRunnerApi
from kiln.catalog import pods, repositories, runners
from kiln.catalog.pod_work import RUNNER_DISABLED
from kiln.catalog.tables import Organization
from kiln.errors import (
    KilnError,
    NotFoundError,
    OperationFailedError,
    OperationOverError,
    RefusedError,
    UnavailableError,
)
from kiln.models import PodRef, PodResult, PodSpec, SandboxType
from kiln.ports import Gap
from kiln.ports.pods import GitSource, Instructions, KnownToKiln, News, PodSecrets, SpooledLine
from support.api_server import RunningApi
from support.logs import read_all, texts
from support.pod_rows import pod_row, prompt, report, runner_of, terminate
from support.ports import free_ports
from support.rows import dump
from support.runner_calls import CALLS, INCARNATION, RunnerCaller
from support.tenants import on_both_databases

SHIM = "shim-1"
HUSH = "hush-4711"
NOON = datetime(2026, 3, 25, 12, 0, 0, 123456, tzinfo=UTC)
IN_POD = ("begin", "started", "ended", "log")
ALL = ("register", "beat", "news", *(f"pods/pod-k3v9m2x7q1zt/{call}" for call in IN_POD))


@pytest.fixture
async def runner(api: RunningApi) -> AsyncIterator[RunnerCaller]:
    """A runner whose process has registered."""
    runner = RunnerCaller(api)
    await runner.register()
    yield runner
    await runner.aclose()


@pytest.fixture
def secretive(runner: RunnerCaller) -> PodRef:
    """A pod with something to hide."""
    secrets = pods.seal_secrets(runner.api.parts.sealer, PodSecrets({"TOKEN": HUSH}, (HUSH,), {"servers": {"x": HUSH}}))
    return runner.add_pod(secrets=secrets, initial_prompt="hello", spec=PodSpec(environment_names=("TOKEN",)))


def spooled(first: int, last: int, text: str = "line") -> list[SpooledLine]:
    return [
        SpooledLine(number, NOON + timedelta(seconds=number), "stdout", f"{text} {number}")
        for number in range(first, last + 1)
    ]


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error in the shape of pods."""
    body = answer.json()
    assert set(body) == {"error", "code"}, answer.text
    assert isinstance(body["error"], str)
    return answer.status_code, body["code"]


class TestLife:
    @on_both_databases
    async def test_an_agent_from_its_order_to_its_end(self, runner: RunnerCaller, secretive: PodRef) -> None:
        """A pod is begun with all that was asked for, runs, is prompted, logs, ends, and is no longer the runner's."""
        calls, key = runner.calls, secretive.key
        order = await calls.begin(key, SHIM)
        assert (order.pod_id, order.key, order.attempt, list(order.prompts)) == (secretive.pod_id, key, 1, ["hello"])
        assert (order.environment, order.custom_args) == ({"TOKEN": HUSH}, (HUSH,))
        assert order.mcp_config == {"servers": {"x": HUSH}}
        await calls.started(key, SHIM)
        prompt(runner.catalog, secretive, "and on")
        assert await calls.news({key: 1}) == News(prompts={key: [(2, "and on")]})
        assert await calls.beat([key]) == Instructions()
        assert await calls.log(key, spooled(1, 3)) == 3
        await calls.ended(key, SHIM, PodResult(exit_code=3, ended_at=datetime.now(UTC)))
        assert pod_row(runner.catalog, key).error == "the agent exited with code 3"
        assert await calls.beat([key]) == Instructions(end=frozenset({key}))
        assert await calls.news({key: 2}) == News(end=frozenset({key}))

    async def test_a_runner_learns_who_it_is(self, runner: RunnerCaller) -> None:
        """Its registration tells it its name and the terms of its pods; what it says of its host is shown."""
        known = await runner.calls.register(report(INCARNATION, max_concurrent_pods=7, limits=["disk_mb"]))
        with runner.catalog.read() as session:
            slug = session.get_one(Organization, runner.organization_id).slug
        assert known == KnownToKiln(runner.row.id, runner.row.name, slug, lease_seconds=300, beat_seconds=5)
        shown = runner_of(runner.catalog, runner.organization_id, runner.row.id)
        assert (shown.status, shown.runner.max_concurrent_pods, shown.runner.limits) == ("online", 7, ["disk_mb"])
        assert shown.runner.host_info == {"name": "host-1", "os": "linux"}

    async def test_what_cannot_be_begun(self, runner: RunnerCaller) -> None:
        """An ended pod, another shim's and another runner's are told apart from one whose repository is no more."""
        over, begun, broken = runner.add_pod(), runner.add_pod(), runner.add_pod(spec=PodSpec(repository_id=2**31 - 1))
        terminate(runner.catalog, over)
        await runner.calls.begin(begun.key, SHIM)
        for ref in (over, begun):
            with pytest.raises(OperationOverError):
                await runner.calls.begin(ref.key, "shim-2")
        with pytest.raises(OperationFailedError, match=r"^repository 2147483647 is no more$"):
            await runner.calls.begin(broken.key, SHIM)
        for key in ("pod-k3v9m2x7q1zt", "pod-\N{SNOWMAN}", "a/b", "pod\0"):
            with pytest.raises(NotFoundError):
                await runner.calls.begin(key, SHIM)

    async def test_a_sandbox_goes_with_its_pod(self, runner: RunnerCaller) -> None:
        """A terminated pod's is to go, and what is not this runner's at all is to end; however many there are."""
        ref = runner.add_pod()
        await runner.calls.begin(ref.key, SHIM)
        terminate(runner.catalog, ref)
        others = [f"pod-{number:012}" for number in range(2500)]
        told = await runner.calls.beat([*others, ref.key])
        assert told == Instructions(frozenset([*others, ref.key]), frozenset({ref.key}))


class TestSecrets:
    async def test_an_order_is_nobody_elses(
        self, runner: RunnerCaller, secretive: PodRef, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An order is not to be kept by anything between; it stands in no log, no row, and no text about it."""
        caplog.set_level(logging.DEBUG)
        answer = runner.post(f"pods/{secretive.key}/begin", shim=SHIM)
        assert json.loads(answer.content)["environment"] == {"TOKEN": HUSH}
        assert answer.headers["Cache-Control"] == "no-store"
        order = await runner.calls.begin(secretive.key, SHIM)
        with runner.catalog.read() as session:
            kept = dump(session)
        assert secretive.pod_id in kept
        assert secretive.key in caplog.text
        assert HUSH not in f"{order!r} {kept} {caplog.text}"

    async def test_a_repositorys_credential_comes_with_the_order(self, runner: RunnerCaller) -> None:
        """A worktree's order says where from, and with what."""
        with runner.catalog.transaction() as tx:
            owner = tx.get_one(Organization, runner.organization_id)
            sealed = runner.api.parts.sealer.seal_text(HUSH)
            row = repositories.add(tx, owner, "tool", "https://host/x", "main", sealed)
        spec = PodSpec(repository_id=row.id, sandbox_type=SandboxType.WORKTREE)
        order = await runner.calls.begin(runner.add_pod(spec=spec).key, SHIM)
        assert order.git == GitSource(row.id, "https://host/x", "main", HUSH)

    @pytest.mark.parametrize("fields", [{"shim": 1}, {"shim": SHIM, "result": {"error": [HUSH]}}])
    async def test_a_refusal_does_not_quote(self, runner: RunnerCaller, fields: dict[str, Any]) -> None:
        """What is wrong with a body is named, and not repeated."""
        answer = runner.post("pods/pod-k3v9m2x7q1zt/ended", **fields)
        assert refusal(answer) == (400, "VALIDATION_FAILED")
        assert HUSH not in answer.text


class TestLog:
    async def test_lines_arrive_once(self, runner: RunnerCaller) -> None:
        """Lines keep number, time, stream and text, also when their sender has to send them again."""
        ref = runner.add_pod()
        sent = [SpooledLine(1, NOON, "stdout", "ü\x1b[0m\0"), SpooledLine(2, NOON, "kiln", "half a \ud800 pair")]
        assert [await runner.calls.log(ref.key, sent) for _ in range(2)] == [2, 2]
        assert await runner.calls.log(ref.key, [sent[1], *spooled(3, 4)]) == 4
        found = runner.api.logs.read(ref.pod_id, 0, 10)
        assert found[0] == (1, NOON, "stdout", "ü\x1b[0m\0")
        assert found[1] == (2, NOON, "kiln", "half a ? pair")
        assert texts(found)[2:] == ["line 3", "line 4"]

    async def test_many_lines_take_several_calls(self, runner: RunnerCaller) -> None:
        """More than one call may carry is sent in several, by count and by length."""
        ref = runner.add_pod()
        many, long = spooled(1, 2500), spooled(2501, 2580, "x" * 32 * 1024)
        assert await runner.calls.log(ref.key, [*many, *long]) == 2580
        assert texts(read_all(runner.api.logs, ref.pod_id)) == [line.text for line in [*many, *long]]

    async def test_an_ended_log_wants_nothing(self, runner: RunnerCaller) -> None:
        """What was lost on the way is a gap, and what comes after a log's end need not be sent again."""
        ref = runner.add_pod()
        assert await runner.calls.log(ref.key, spooled(3, 4)) == 4
        runner.api.logs.end(ref.pod_id, "terminated")
        assert await runner.calls.log(ref.key, spooled(5, 9)) == 9
        found = read_all(runner.api.logs, ref.pod_id)
        assert isinstance(found[0], Gap)
        assert texts(found) == ["line 3", "line 4"]

    @pytest.mark.parametrize(
        "lines",
        [
            [],
            [[1, 0, "stderr", "x"]],
            [[0, 0, "stdout", "x"]],
            [[1, -1, "stdout", "x"]],
            [[1, 2**60, "stdout", "x"]],
            [[1, 0, "stdout"]],
            [[1, 0, "stdout", "x"], [3, 0, "stdout", "x"]],
            [["1", 0, "stdout", "x"]],
        ],
    )
    def test_other_lines_are_refused(self, runner: RunnerCaller, lines: list[Any]) -> None:
        """Numbers that do not follow each other, other streams and times that no line can have."""
        ref = runner.add_pod()
        assert refusal(runner.post(f"pods/{ref.key}/log", lines=lines)) == (400, "VALIDATION_FAILED")
        assert runner.api.logs.heads([ref.pod_id]) == {}


class TestWhoIsHeard:
    @pytest.mark.parametrize(
        ("header", "code"),
        [
            (None, "AUTH_REQUIRED"),
            ("", "AUTH_REQUIRED"),
            ("Bearer", "AUTH_REQUIRED"),
            ("Bearer amk_1234", "AUTH_REQUIRED"),
            ("Basic krt_1234", "AUTH_REQUIRED"),
            ("Bearer krt_1234", "INVALID_TOKEN"),
            ("Bearer krt_\u00e9", "INVALID_TOKEN"),
        ],
    )
    def test_a_token_is_needed(self, api: RunningApi, header: str | None, code: str) -> None:
        """Every call wants a runner's token, before anything else is looked at."""
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for call in ALL:
            answer = api.http.post(f"{CALLS}/{call}", headers=headers)
            assert refusal(answer) == (401, code)
            assert answer.headers["WWW-Authenticate"] == "Bearer"

    async def test_a_disabled_one_is_refused(self, runner: RunnerCaller) -> None:
        """Once its token is disabled, a runner's process is heard no more, and its waiting pods fail."""
        ref = runner.add_pod()
        with runner.catalog.transaction() as tx:
            runners.disable(tx, runner.row.id)
        assert refusal(runner.post("beat", pods=[])) == (401, "INVALID_TOKEN")
        with pytest.raises(RefusedError):
            await runner.calls.begin(ref.key, SHIM)
        assert runner.api.parts.pods.lapse_pods() == [ref]
        assert pod_row(runner.catalog, ref.key).error == RUNNER_DISABLED

    async def test_an_earlier_process_is_refused(self, runner: RunnerCaller) -> None:
        """Whatever it says: another one has registered in its place."""
        ref = runner.add_pod()
        later = runner.process("process-2")
        await later.register(report("process-2"))
        earlier = runner.calls
        for call in (
            earlier.beat([]),
            earlier.news({}),
            earlier.begin(ref.key, SHIM),
            earlier.started(ref.key, SHIM),
            earlier.ended(ref.key, SHIM, PodResult(exit_code=0)),
            earlier.log(ref.key, spooled(1, 1)),
        ):
            with pytest.raises(RefusedError):
                await call
        assert refusal(runner.post("beat", pods=[])) == (403, "SUPERSEDED")
        assert (await later.begin(ref.key, SHIM)).key == ref.key
        await later.aclose()

    async def test_other_runners_pods_are_unknown(self, api: RunningApi, runner: RunnerCaller) -> None:
        """A runner cannot begin, end or write what is another's, and is to end it."""
        ref = runner.add_pod()
        stranger = RunnerCaller(api)
        await stranger.register()
        for call in (
            stranger.calls.begin(ref.key, SHIM),
            stranger.calls.started(ref.key, SHIM),
            stranger.calls.ended(ref.key, SHIM, PodResult(exit_code=0)),
            stranger.calls.log(ref.key, spooled(1, 1)),
        ):
            with pytest.raises(NotFoundError):
                await call
        assert (await stranger.calls.beat([ref.key])).end == {ref.key}
        assert pod_row(runner.catalog, ref.key).status == "creating"
        await stranger.aclose()


class TestBodies:
    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null", b'{"incarnation": "x"}', b'{"pods": []}'])
    @pytest.mark.parametrize("call", ["beat", "news", "pods/pod-k3v9m2x7q1zt/log"])
    def test_what_is_no_body_is_refused(self, runner: RunnerCaller, call: str, body: bytes) -> None:
        """A 400, whatever is wrong."""
        answer = runner.http.post(f"{CALLS}/{call}", content=body)
        assert refusal(answer) == (400, "VALIDATION_FAILED")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("incarnation", "x" * 37),
            ("incarnation", "x\0"),
            ("name", "\0"),
            ("max_concurrent_pods", 0),
            ("max_concurrent_pods", "4"),
            ("available_agents", ["x" * 256]),
            ("host_info", {"os": 1}),
            ("host_info", {"\0": "x"}),
        ],
    )
    def test_a_strange_registration_is_refused(self, runner: RunnerCaller, field: str, value: object) -> None:
        """The answer names the field, and the runner's process stays as it was."""
        body = {"incarnation": "process-2", "name": "host", "max_concurrent_pods": 1, field: value}
        answer = runner.http.post(f"{CALLS}/register", json=body)
        assert refusal(answer) == (400, "VALIDATION_FAILED")
        assert answer.json()["error"].startswith(field)
        assert runner.post("beat", pods=[]).status_code == 200

    def test_a_long_body_is_refused(self, runner: RunnerCaller) -> None:
        """More than 1 MiB is not read."""
        answer = runner.http.post(f"{CALLS}/beat", content=b" " * (1024 * 1024 + 1))
        assert refusal(answer) == (413, "PAYLOAD_TOO_LARGE")

    async def test_an_end_is_told_whatever_is_in_it(self, runner: RunnerCaller) -> None:
        """A long error, or one with characters that no database keeps, ends a pod as well."""
        ref = runner.add_pod()
        await runner.calls.begin(ref.key, SHIM)
        await runner.calls.ended(ref.key, SHIM, PodResult(error="\0" + "x" * 5000))
        assert pod_row(runner.catalog, ref.key).error == "\N{REPLACEMENT CHARACTER}" + "x" * 3999


class TestAway:
    async def test_nobody_answers(self) -> None:
        """An API that cannot be reached is away; the error names the setting, and nothing that was to be sent."""
        calls = HttpRunnerApi(f"http://127.0.0.1:{free_ports(1)[0]}", "krt_1", INCARNATION)
        with pytest.raises(UnavailableError, match="KILN_API_URL") as error:
            await calls.log("pod-1", spooled(1, 1, HUSH))
        assert HUSH not in str(error.value)
        await calls.aclose()

    async def test_something_else_answers(self, runner: RunnerCaller) -> None:
        """A refusal that is not in the API's own words is none: something between may be out of order."""
        calls = HttpRunnerApi(f"{runner.api.url}/elsewhere", runner.token, INCARNATION)
        with pytest.raises(UnavailableError, match="404"):
            await calls.beat([])
        await calls.aclose()

    async def test_a_malformed_call_is_not_repeated_for_ever(self, runner: RunnerCaller) -> None:
        """What the API does not understand is an error of its own kind."""
        with pytest.raises(KilnError, match="available_agents") as error:
            await runner.calls.register(report(INCARNATION, available_agents=["\0"]))
        assert not isinstance(error.value, UnavailableError)

    async def test_no_proxy_stands_between_a_host_and_itself(
        self, runner: RunnerCaller, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the environment says of proxies does not hold for this host."""
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_ports(1)[0]}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        calls = runner.process(INCARNATION)
        assert await calls.beat([]) == Instructions()
        await calls.aclose()
