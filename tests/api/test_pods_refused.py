"""What `POST /pods` refuses: each with its status and code, and with the field's name in the message."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.limits import pod_limit
from api.pods import BODY_BYTES
from kiln.catalog import runners
from kiln.models import MAX_PROMPT_BYTES
from kiln.settings import Settings, SettingsError
from support.api_server import RunningApi, settings_for
from support.dev_temporal import DevTemporal
from support.pod_rows import create_runner, go_away
from support.pod_tenants import PodTenant, pod_refusal
from support.ports import free_ports
from support.tenants import on_both_databases, row_counts

INVALID = (400, "VALIDATION_FAILED")
UNKNOWN = (404, "RESOURCE_NOT_FOUND")
KIB = 1024
# A field that is wrong in itself, and what is sent.
WRONG = [
    ("runner_id", {"runner_id": None}),
    ("runner_id", {"runner_id": ""}),
    ("runner_id", {"runner_id": " \t"}),
    ("runner_id", {"runner_id": 7}),
    ("runner_id", {"runner_id": "a\0"}),
    ("agent_type_id", {"agent_type_id": "copilot"}),
    ("agent_type_id", {"agent_type_id": 1}),
    ("agent_type_id", {"agent_type_id": "copilot", "custom_agent_command": "sh"}),
    ("initial_prompt", {"initial_prompt": " \n"}),
    ("initial_prompt", {"initial_prompt": "é" * (MAX_PROMPT_BYTES // 2) + "x"}),
    ("initial_prompt", {"initial_prompt": "a\0"}),
    ("repository_id", {"repository_id": "1"}),
    ("repository_id", {"repository_id": True}),
    ("repository_id", {"repository_id": 1.0}),
    ("repository_id", {"sandbox_type": "worktree"}),
    *[
        ("branch", {"repository_id": 1, "branch": name})
        for name in ("", "-x", "a..b", "a b", "x.lock", "/a", "a/", "@")
    ],
    *[
        ("branch", {"repository_id": 1, "branch": name})
        for name in ("a~1", "a\nb", ".a", "a/.b", "a@{1}", "HEAD", "a.")
    ],
    ("branch", {"repository_id": 1, "branch": "x" * 256}),
    ("ticket_slug", {"ticket_slug": 5}),
    ("channel_id", {"channel_id": False}),
    ("channel_id", {"channel_id": 2**63}),
    ("sandbox_type", {"sandbox_type": "vm"}),
    ("image", {"sandbox_type": "container"}),
    ("image", {"image": "app:v1", "sandbox_type": "tempdir"}),
    ("image", {"image": "app:v1", "repository_id": 1}),
    ("image", {"image": ["app"]}),
    ("environment_variables", {"environment_variables": []}),
    ("environment_variables", {"environment_variables": {"1A": "x"}}),
    ("environment_variables", {"environment_variables": {"A=B": "x"}}),
    ("environment_variables", {"environment_variables": {"": "x"}}),
    ("environment_variables", {"environment_variables": {"A" * 256: "x"}}),
    ("environment_variables", {"environment_variables": {"KILN_POD": "x"}}),
    ("environment_variables.A", {"environment_variables": {"A": 1}}),
    ("environment_variables.A", {"environment_variables": {"A": None}}),
    ("environment_variables.A", {"environment_variables": {"A": "x" * (100 * KIB + 1)}}),
    ("environment_variables", {"environment_variables": {f"A{n}": "x" * 100 * KIB for n in range(6)}}),
    ("environment_variables", {"environment_variables": {f"A{n}": "" for n in range(1001)}}),
    ("custom_agent_command", {"custom_agent_command": " "}),
    ("custom_agent_command", {"custom_agent_command": "a\0"}),
    ("custom_agent_args", {"custom_agent_args": ["-x"]}),
    ("custom_agent_args", {"custom_agent_command": "sh", "custom_agent_args": "-x"}),
    ("custom_agent_args.0", {"custom_agent_command": "sh", "custom_agent_args": [1]}),
    ("custom_agent_args", {"custom_agent_command": "sh", "custom_agent_args": ["x"] * 1001}),
    ("custom_mcp_config", {"custom_mcp_config": "{}"}),
    ("custom_mcp_config", {"custom_mcp_config": {"a": "x" * 64 * KIB}}),
    ("auto_close", {"auto_close": 1}),
    ("auto_close_delay_seconds", {"auto_close_delay_seconds": -1}),
    ("auto_close_delay_seconds", {"auto_close_delay_seconds": 31_536_001}),
    ("pod_timeout_minutes", {"pod_timeout_minutes": 0}),
    ("pod_timeout_minutes", {"pod_timeout_minutes": 525_601}),
    ("pod_timeout_minutes", {"pod_timeout_minutes": True}),
    ("max_turns", {"max_turns": 0}),
    ("max_turns", {"max_turns": "3"}),
    ("limits.memory_mb", {"limits": {"memory_mb": 0}}),
    ("limits.cpus", {"limits": {"cpus": 2}}),
    ("limits", {"limits": 5}),
]


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[PodTenant]:
    tenant = PodTenant(api)
    yield tenant
    tenant.close()


@pytest.mark.parametrize(("field", "sent"), WRONG)
def test_a_wrong_field_is_named(tenant: PodTenant, field: str, sent: dict[str, Any]) -> None:
    """400 before anything is looked up: the runner need not even exist."""
    status, code, message = pod_refusal(tenant.post(body={"runner_id": "nobody", **sent}))
    assert (status, code) == INVALID
    assert message.startswith((f"{field}:", f"{field}.")), message


@pytest.mark.parametrize(
    ("name", "value"),
    [("/etc/s3cret", "x"), ("s3cret-value", 5), ("s3cret\0", "x"), ("s3cret\n", "\0"), ("9s3cret", "x")],
)
def test_what_is_no_variables_name_is_not_repeated(tenant: PodTenant, name: str, value: object) -> None:
    """Whoever mixes up name and value has sent a secret; the sentence says what a name is."""
    answer = tenant.post(body={"runner_id": "nobody", "environment_variables": {"A": "x", name: value}})
    assert pod_refusal(answer)[:2] == INVALID
    assert "s3cret" not in answer.text
    assert answer.json()["error"].startswith("environment_variables: a name ")


@pytest.mark.parametrize(
    ("field", "sent"),
    [
        ("runner_id", {"runner_id": ""}),
        ("branch", {"branch": ""}),
        ("branch", {"branch": "x" * 256}),
        ("ticket_slug", {"ticket_slug": "x" * 256}),
        ("image", {"image": ""}),
        ("image", {"image": "x" * 1025}),
        ("custom_agent_command", {"custom_agent_command": "x" * 4097}),
        ("environment_variables.A", {"environment_variables": {"A": "x" * (100 * KIB + 1)}}),
    ],
)
def test_a_text_of_a_wrong_length_is_called_a_text(tenant: PodTenant, field: str, sent: dict[str, Any]) -> None:
    """The sentence is about characters or bytes, not about items."""
    message = pod_refusal(tenant.post(body={"runner_id": "nobody", **sent}))[2]
    assert message.startswith(f"{field}: ")
    assert "item" not in message


@pytest.mark.parametrize("path", ["/pods", "/pods/pod-000000000000/prompt"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"a": NaN}', rb'{"a": "\ud800"}', b"\xff", b"[" * 99_999]
)
def test_a_body_that_is_no_json_object_is_a_400(tenant: PodTenant, path: str, body: bytes) -> None:
    """It names the body."""
    status, code, message = pod_refusal(tenant.http.post(tenant.base + path, content=body))
    assert (status, code) == INVALID
    assert message.startswith("body: ")


def test_a_body_of_another_kind_or_length_is_refused(tenant: PodTenant) -> None:
    """In the shape of pods as well."""
    text = tenant.http.post(f"{tenant.base}/pods", content=b"{}", headers={"Content-Type": "text/plain"})
    assert pod_refusal(text)[:2] == INVALID
    assert "Content-Type" in text.text
    long = tenant.http.post(f"{tenant.base}/pods", content=b" " * (BODY_BYTES + 1))
    assert pod_refusal(long)[:2] == (413, "PAYLOAD_TOO_LARGE")


@on_both_databases
def test_an_unknown_runner_is_a_404(tenant: PodTenant, api: RunningApi) -> None:
    """So is another organization's, and one whose token was disabled."""
    other = PodTenant(api)
    disabled = tenant.runner()
    with tenant.catalog.transaction() as tx:
        runners.disable(tx, disabled.runner_id)
    for runner_id in ("nobody", "x" * 5000, other.runner().runner_id, disabled.runner_id):
        assert pod_refusal(tenant.post(body={"runner_id": runner_id}))[:2] == UNKNOWN
    other.close()


def test_a_runner_that_is_away_is_a_503(tenant: PodTenant) -> None:
    """Whether it has gone or never came; the caller is told to come again."""
    gone = tenant.runner()
    go_away(tenant.catalog, gone.runner_id)
    new = create_runner(tenant.catalog, tenant.organization_id)[0]
    for runner_id in (gone.runner_id, new.id):
        answer = tenant.post(body={"runner_id": runner_id})
        assert pod_refusal(answer)[:2] == (503, "NO_AVAILABLE_RUNNER")
        assert int(answer.headers["Retry-After"]) > 0


@on_both_databases
def test_a_runner_does_only_what_it_can(tenant: PodTenant) -> None:
    """Agents, limits and commands that it has not, or does not allow; and nothing is written."""
    body = {"runner_id": tenant.runner(allows_custom_commands=False).runner_id}
    before = row_counts(tenant.catalog)
    status, code, message = pod_refusal(tenant.post(body={**body, "agent_type_id": "aider"}))
    assert (status, code) == INVALID
    assert message.startswith("agent_type_id: ")
    refused = pod_refusal(tenant.post(body={**body, "limits": {"memory_mb": 64, "disk_mb": 64}}))
    assert refused[:2] == INVALID
    assert refused[2].startswith("limits.disk_mb: ")
    answer = tenant.post(body={**body, "custom_agent_command": "sh"})
    assert pod_refusal(answer)[:2] == (403, "CUSTOM_COMMAND_NOT_ALLOWED")
    assert row_counts(tenant.catalog) == before


def test_an_agent_that_the_runner_lacks_goes_with_a_command_of_its_own(tenant: PodTenant) -> None:
    """The type is then only kept and shown."""
    pod = tenant.created(tenant.runner(), agent_type_id="aider", custom_agent_command="/usr/bin/env")
    assert pod["agent_type_id"] == "aider"


@on_both_databases
def test_an_unknown_repository_is_a_404(tenant: PodTenant, api: RunningApi) -> None:
    """So is another organization's, and a number beyond any; nothing is written."""
    other = PodTenant(api)
    body = {"runner_id": tenant.runner().runner_id}
    for number in (other.repository(), 0, -1, 2**31, 10**30):
        refused = pod_refusal(tenant.post(body={**body, "repository_id": number}))
        assert refused[:2] == UNKNOWN
        assert refused[2].startswith("repository_id: ")
    assert tenant.get("/pods")["total"] == 0
    other.close()


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("limit=", "limit"),
        ("limit=5.0", "limit"),
        ("limit=1_0", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("offset=-1", "offset"),
        ("offset=1.5", "offset"),
        ("offset=9223372036854775808", "offset"),
        ("status=%00", "status"),
    ],
)
def test_a_wrong_query_is_named(tenant: PodTenant, query: str, named: str) -> None:
    """It is refused, never clamped."""
    status, code, message = pod_refusal(tenant.http.get(f"{tenant.base}/pods?{query}"))
    assert (status, code) == INVALID
    assert message.startswith(f"{named}: ")


def test_a_key_may_create_only_so_many(tmp_path: Path, temporal: DevTemporal) -> None:
    """With KILN_POD_RATE set: 429 that says how long to wait; what is refused for its form does not count."""
    with RunningApi(settings_for(tmp_path, temporal.port, pod_rate="1/minute")) as api:
        tenant = PodTenant(api)
        runner = tenant.runner()
        assert pod_refusal(tenant.post())[:2] == INVALID
        tenant.created(runner)
        answer = tenant.post(body={"runner_id": runner.runner_id})
        assert pod_refusal(answer)[:2] == (429, "RATE_LIMITED")
        assert 0 < int(answer.headers["Retry-After"]) <= 60
        tenant.close()


def test_a_rate_that_cannot_be_read_is_named() -> None:
    """By its setting."""
    with pytest.raises(SettingsError, match="KILN_POD_RATE: "):
        pod_limit(Settings(pod_rate="often"))


def test_pods_do_without_temporal(tmp_path: Path) -> None:
    """Created and terminated in the catalog all the same, within the second that Temporal is given."""
    with RunningApi(settings_for(tmp_path, free_ports(1)[0])) as api:
        tenant = PodTenant(api)
        runner = tenant.runner()
        began = time.monotonic()
        key = tenant.created(runner)["key"]
        assert tenant.post(f"/pods/{key}/terminate").status_code == 200
        assert time.monotonic() - began < 5
        assert tenant.get(f"/pods/{key}")["pod"]["status"] == "terminated"
        tenant.close()
