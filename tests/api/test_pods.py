"""Pods over HTTP: created, listed, prompted, terminated."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from temporalio.client import Client

from kiln.catalog.pods import open_secrets
from kiln.models import PodResult, PodSpec
from kiln.naming import pod_workflow_id
from support.api_server import RunningApi
from support.dev_temporal import DevTemporal
from support.pod_rows import go_away, pod_row, prompts_of
from support.pod_tenants import PodTenant, pod_refusal
from support.tenants import on_both_databases

P = [
    "key",
    "status",
    "agent_type_id",
    "runner_id",
    "initial_prompt",
    "repository_id",
    "branch",
    "ticket_slug",
    "channel_id",
    "sandbox_type",
    "auto_close",
    "auto_close_delay_seconds",
    "pod_timeout_minutes",
    "max_turns",
    "exit_code",
    "error",
    "created_at",
    "started_at",
    "finished_at",
    "updated_at",
]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
SECRET = "s3cret-value-of-a-variable"


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[PodTenant]:
    tenant = PodTenant(api)
    yield tenant
    tenant.close()


@on_both_databases
def test_a_pod_is_created(tenant: PodTenant) -> None:
    """201 with exactly P's keys, `creating`; what was not asked for is null."""
    runner = tenant.runner()
    pod = tenant.created(runner, initial_prompt="Fix the login bug")
    assert list(pod) == P
    assert re.fullmatch(r"pod-[a-z0-9]{12}", pod["key"])
    assert all(TIME.fullmatch(pod[name]) for name in ("created_at", "updated_at"))
    known = {
        name: value for name, value in pod.items() if value is not None and name not in ("created_at", "updated_at")
    }
    assert known == {
        "key": pod["key"],
        "status": "creating",
        "agent_type_id": "claude-code",
        "runner_id": runner.runner_id,
        "initial_prompt": "Fix the login bug",
        "sandbox_type": "tempdir",
        "auto_close": False,
    }
    assert tenant.get(f"/pods/{pod['key']}") == {"pod": pod}


def test_what_was_asked_for_is_kept_and_shown(tenant: PodTenant) -> None:
    """Every field of P; unknown fields are ignored, null ones are not there."""
    repository = tenant.repository()
    asked = {
        "agent_type_id": "codex",
        "initial_prompt": "go",
        "repository_id": repository,
        "branch": "feature/auth",
        "ticket_slug": "AM-42",
        "channel_id": 5,
        "sandbox_type": "worktree",
        "auto_close": True,
        "auto_close_delay_seconds": 30,
        "pod_timeout_minutes": 60,
        "max_turns": 100,
    }
    runner = tenant.runner(available_agents=["codex"])
    pod = tenant.created(runner, **asked, colour="red", limits={"memory_mb": 512}, image=None)
    assert {name: pod[name] for name in asked} == asked
    spec = PodSpec.model_validate(pod_row(tenant.catalog, pod["key"]).spec)
    assert (spec.limits.memory_mb, spec.timeout_minutes) == (512, 60)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ({}, None),
        ({"auto_close": True}, None),
        ({"auto_close": True, "auto_close_delay_seconds": 0}, 0),
        ({"auto_close_delay_seconds": 0}, 0),
    ],
)
def test_a_delay_is_shown_as_it_was_sent(tenant: PodTenant, asked: dict[str, Any], shown: int | None) -> None:
    """One of no seconds is not an absent one."""
    assert tenant.created(tenant.runner(), **asked)["auto_close_delay_seconds"] == shown


def test_a_branch_of_no_repository_is_only_kept(tenant: PodTenant) -> None:
    """The contract wants no repository for it: it is shown, as the ticket is."""
    pod = tenant.created(tenant.runner(), branch="feature/auth")
    assert (pod["branch"], pod["repository_id"], pod["sandbox_type"]) == ("feature/auth", None, "tempdir")


def test_the_sandbox_follows_from_what_is_named(tenant: PodTenant) -> None:
    """A worktree of the repository that is named, else an empty directory."""
    runner = tenant.runner()
    assert tenant.created(runner, repository_id=tenant.repository())["sandbox_type"] == "worktree"
    assert tenant.created(runner)["sandbox_type"] == "tempdir"


def test_a_runner_is_found_by_its_name(tenant: PodTenant) -> None:
    """P names its id."""
    runner = tenant.runner()
    name = tenant.get(f"/runners/{runner.runner_id}")["runner"]["name"]
    answer = tenant.post(body={"runner_id": name})
    assert (answer.status_code, answer.json()["pod"]["runner_id"]) == (201, runner.runner_id)


def test_a_full_runners_pod_waits(tenant: PodTenant) -> None:
    """It is accepted all the same."""
    runner = tenant.runner(max_concurrent_pods=1)
    assert [tenant.created(runner)["status"] for _ in range(2)] == ["creating", "creating"]


async def test_a_pods_workflow_is_started_under_its_key(tenant: PodTenant, temporal: DevTemporal) -> None:
    """As soon as its row is committed; a termination cancels it."""
    pod = tenant.created(tenant.runner())
    client = await Client.connect(f"127.0.0.1:{temporal.port}")
    handle = client.get_workflow_handle(pod_workflow_id(pod["key"]))
    assert (await handle.describe()).workflow_type == "run-pod"
    tenant.post(f"/pods/{pod['key']}/terminate")
    events = [event.event_type async for event in handle.fetch_history_events()]
    assert len(events) >= 3
    assert (await handle.fetch_history()).events[-1].HasField("workflow_execution_cancel_requested_event_attributes")


def test_a_repeated_post_makes_one_pod(tenant: PodTenant) -> None:
    """Under one idempotency key; with another body, the key is refused."""
    body = {"runner_id": tenant.runner().runner_id}
    first, second = (tenant.post(body=body, Idempotency_Key="once") for _ in range(2))
    assert (first.status_code, second.status_code, first.json()) == (201, 201, second.json())
    assert tenant.get("/pods")["total"] == 1
    other = tenant.post(body={**body, "max_turns": 3}, Idempotency_Key="once")
    assert pod_refusal(other)[:2] == (400, "VALIDATION_FAILED")


@on_both_databases
def test_secrets_are_sealed_and_never_shown(tenant: PodTenant, caplog: pytest.LogCaptureFixture) -> None:
    """Values of variables, arguments and the MCP configuration are in no answer, no log and no row in clear."""
    asked = {
        "environment_variables": {"TOKEN": SECRET},
        "custom_agent_command": "sh",
        "custom_agent_args": ["-c", SECRET],
        "custom_mcp_config": {"servers": {"a": SECRET}},
    }
    pod = tenant.created(tenant.runner(), **asked)
    row = pod_row(tenant.catalog, pod["key"])
    kept = open_secrets(tenant.api.parts.sealer, row.secrets)
    assert (dict(kept.environment), list(kept.custom_args), kept.mcp_config) == (
        asked["environment_variables"],
        asked["custom_agent_args"],
        asked["custom_mcp_config"],
    )
    shown = json.dumps([pod, tenant.get("/pods"), row.spec]) + caplog.text + str(row.secrets)
    assert SECRET not in shown
    assert "TOKEN" not in json.dumps(pod)


@pytest.mark.parametrize(
    "fields",
    [
        {"environment_variables": {"A": SECRET + "\0"}},
        {"environment_variables": {"A": SECRET, "B": 1}},
        {"environment_variables": SECRET},
        {"environment_variables": {"A": SECRET * 5000}},
        {"environment_variables": {"A": SECRET}, "max_turns": 0},
        {"environment_variables": {"A": SECRET}, "agent_type_id": "aider"},
        {"custom_mcp_config": [SECRET]},
        {"custom_agent_command": "sh", "custom_agent_args": SECRET},
    ],
)
def test_a_refusal_does_not_show_secrets_either(
    tenant: PodTenant, caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    """Neither in its message nor in the log."""
    answer = tenant.post(body={"runner_id": tenant.runner().runner_id, **fields})
    assert pod_refusal(answer)[:2] == (400, "VALIDATION_FAILED")
    assert SECRET not in answer.text + caplog.text


@on_both_databases
def test_pods_are_listed_newest_first(tenant: PodTenant) -> None:
    """A page of them with what it is a page of; `total` counts all that match."""
    runner = tenant.runner()
    keys = [tenant.pod(runner).key for _ in range(3)]
    page = tenant.get("/pods", limit=2, offset=1)
    assert [pod["key"] for pod in page["pods"]] == [keys[1], keys[0]]
    assert (page["total"], page["limit"], page["offset"]) == (3, 2, 1)
    whole = tenant.get("/pods")
    assert (len(whole["pods"]), whole["limit"], whole["offset"]) == (3, 20, 0)


def test_pods_are_listed_by_status(tenant: PodTenant) -> None:
    """One status or several; an unknown one matches nothing, and none at all is no filter."""
    runner = tenant.runner()
    waiting, ended = tenant.pod(runner), tenant.pod(runner)
    tenant.post(f"/pods/{ended.key}/terminate")

    def keys(status: str) -> list[str]:
        return [pod["key"] for pod in tenant.get("/pods", status=status)["pods"]]

    assert keys("creating") == [waiting.key]
    assert keys("terminated, creating") == [ended.key, waiting.key]
    assert keys("asleep") == []
    assert keys("") == [ended.key, waiting.key]


def test_a_pod_whose_runner_vanishes_is_orphaned(tenant: PodTenant) -> None:
    """It reads so at once, everywhere, and can be terminated."""
    runner = tenant.runner()
    ref = tenant.pod(runner)
    tenant.start(runner, ref)
    go_away(tenant.catalog, runner.runner_id)
    assert tenant.get(f"/pods/{ref.key}")["pod"]["status"] == "orphaned"
    assert tenant.get("/pods", status="orphaned")["total"] == 1
    assert pod_refusal(tenant.post(f"/pods/{ref.key}/prompt", {"prompt": "hello"}))[:2] == (503, "SERVICE_UNAVAILABLE")
    assert tenant.post(f"/pods/{ref.key}/terminate").status_code == 200


def test_an_ended_pod_shows_how(tenant: PodTenant) -> None:
    """Exit code, error and the times of its life."""
    runner = tenant.runner()
    ref = tenant.pod(runner)
    tenant.start(runner, ref)
    tenant.finish(ref, PodResult(exit_code=3))
    pod = tenant.get(f"/pods/{ref.key}")["pod"]
    assert (pod["status"], pod["exit_code"], pod["error"]) == ("failed", 3, "the agent exited with code 3")
    assert TIME.fullmatch(pod["started_at"])
    assert TIME.fullmatch(pod["finished_at"])


@on_both_databases
def test_a_prompt_is_kept_for_the_agent(tenant: PodTenant) -> None:
    """A pod that is being created gets it after its first one, at its start."""
    runner = tenant.runner()
    ref = tenant.pod(runner, initial_prompt="one")
    answer = tenant.post(f"/pods/{ref.key}/prompt", {"prompt": "two\nlines é"})
    assert (answer.status_code, answer.json()) == (200, {"message": "Prompt sent"})
    tenant.start(runner, ref)
    assert tenant.post(f"/pods/{ref.key}/prompt", {"prompt": "three"}).status_code == 200
    assert [prompt.text for prompt in prompts_of(tenant.catalog, ref)] == ["one", "two\nlines é", "three"]


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": " \n"}, {"prompt": 5}, {"prompt": "a\0"}])
def test_a_prompt_that_is_none_is_refused(tenant: PodTenant, body: dict[str, Any]) -> None:
    """400 that names the field."""
    ref = tenant.pod(tenant.runner())
    status, code, message = pod_refusal(tenant.post(f"/pods/{ref.key}/prompt", body))
    assert (status, code) == (400, "VALIDATION_FAILED")
    assert message.startswith("prompt: ")
    assert prompts_of(tenant.catalog, ref) == []


@on_both_databases
def test_a_pod_is_terminated_once(tenant: PodTenant) -> None:
    """At once, and a second time refused; it is prompted no more."""
    ref = tenant.pod(tenant.runner())
    answer = tenant.post(f"/pods/{ref.key}/terminate")
    assert (answer.status_code, answer.json()) == (200, {"message": "Pod terminated"})
    assert tenant.get(f"/pods/{ref.key}")["pod"]["status"] == "terminated"
    again = tenant.post(f"/pods/{ref.key}/terminate")
    assert pod_refusal(again) == (400, "VALIDATION_FAILED", "Pod already terminated")
    late = tenant.post(f"/pods/{ref.key}/prompt", {"prompt": "hello"})
    assert pod_refusal(late) == (400, "VALIDATION_FAILED", "prompt: the pod has ended")


@pytest.mark.parametrize("call", ["", "/prompt", "/terminate", "/logs"])
@on_both_databases
def test_what_is_not_the_organizations_own_is_a_404(tenant: PodTenant, api: RunningApi, call: str) -> None:
    """Another's key, an unknown one and a malformed one answer alike."""
    other = PodTenant(api)
    keys = [other.pod(other.runner()).key, "pod-000000000000", "pod-X", "%00"]
    method, body = ("POST", {"prompt": "hello"}) if call in ("/prompt", "/terminate") else ("GET", None)
    answers = [tenant.http.request(method, f"{tenant.base}/pods/{key}{call}", json=body) for key in keys]
    assert {pod_refusal(answer)[:2] for answer in answers} == {(404, "RESOURCE_NOT_FOUND")}
    assert other.get("/pods", status="creating")["total"] == 1
    assert prompts_of(tenant.catalog, other.pod(other.runner())) == []
    other.close()
