"""POST /api/v1/images/build: what is taken on, and how it is answered, written and started."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kiln.models import BuildRef
from kiln.naming import build_workflow_id
from support.api_server import RunningApi, settings_for
from support.dev_temporal import DevTemporal
from support.tenants import Tenant

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def spec_of(tenant: Tenant, body: dict[str, Any]) -> dict[str, Any]:
    """What the catalog says that a build was asked for."""
    answer = tenant.submit(body)
    assert answer.status_code == 202, answer.text
    return tenant.row(answer.json()["build_id"]).spec


def test_the_provider_alone_is_enough(tenant: Tenant) -> None:
    """The answer is the queued build, marked as simulated; every other field takes the configured default."""
    answer = tenant.submit({"provider": "claude-code"})
    body = answer.json()
    assert answer.status_code == 202
    assert answer.headers["Content-Type"] == "application/json"
    build_id, created_at = body.pop("build_id"), body.pop("created_at")
    assert UUID.fullmatch(build_id)
    assert TIME.fullmatch(created_at)
    assert abs(datetime.fromisoformat(created_at) - datetime.now(UTC)) < timedelta(seconds=5)
    assert body == {
        "status": "queued",
        "provider": "claude-code",
        "region": "us-east-1",
        "image_id": None,
        "simulated": True,
    }


@pytest.mark.parametrize("provider", ["claude-code", "codex", "gemini", "cursor"])
def test_every_provider_is_built(tenant: Tenant, provider: str) -> None:
    """The four agents of the contract."""
    answer = tenant.submit({"provider": provider})
    assert (answer.status_code, answer.json()["provider"]) == (202, provider)


def test_the_row_is_the_order(tenant: Tenant) -> None:
    """The build's row holds all that was asked, and who asked."""
    body = {
        "provider": "gemini",
        "region": "eu-central-1",
        "instance_type": "m7i-flex.large",
        "template_source": "builtin://default-ec2",
        "variables": {"extra_packages": "ripgrep", "volume_size_gb": "20"},
        "tags": {"team": "platform", "cost center": ""},
    }
    answer = tenant.submit(body)
    assert answer.json()["region"] == "eu-central-1"
    row = tenant.row(answer.json()["build_id"])
    assert (row.organization_id, row.kind, row.api, row.status) == (
        tenant.organization_id,
        "machine",
        "machine-images",
        "queued",
    )
    assert row.spec == {
        "kind": "machine",
        "provider": "gemini",
        "region": "eu-central-1",
        "instance_type": "m7i-flex.large",
        "template": "builtin://default-ec2",
        "variables": {"extra_packages": "ripgrep", "volume_size_gb": "20"},
        "secret_names": [],
        "tags": {"team": "platform", "cost center": ""},
    }


def test_the_defaults_are_the_servers(tenant: Tenant) -> None:
    """Region, instance type and template come from the settings."""
    spec = spec_of(tenant, {"provider": "codex"})
    chosen = (spec["region"], spec["instance_type"], spec["template"])
    assert chosen == ("us-east-1", "t3.medium", "builtin://default-ec2")


def test_null_counts_as_absent(tenant: Tenant) -> None:
    """A field that is null takes its default, also where the field is another contract's."""
    names = ("agent_provider", "region", "instance_type", "template_source", "template", "variables", "tags")
    nulls = dict.fromkeys((*names, "image_name", "source_image", "sourceImage"))
    assert spec_of(tenant, {"provider": "codex", **nulls}) == spec_of(tenant, {"provider": "codex"})


def test_agent_provider_is_another_spelling(tenant: Tenant) -> None:
    """`agent_provider` serves alone, and beside a `provider` that agrees."""
    assert spec_of(tenant, {"agent_provider": "codex"})["provider"] == "codex"
    assert spec_of(tenant, {"agent_provider": "codex", "provider": "codex"})["provider"] == "codex"


def test_the_object_form_of_a_template(tenant: Tenant) -> None:
    """`template` with type and name is `builtin://NAME`."""
    spec = spec_of(tenant, {"provider": "codex", "template": {"type": "builtin", "name": "default-ec2"}})
    assert spec["template"] == "builtin://default-ec2"


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("region", "eu-central-1", "region"),
        ("instance_type", "c7g.large", "instance_type"),
        ("provider", "cursor", "provider"),
    ],
)
def test_a_variable_counts_as_the_field(tenant: Tenant, name: str, value: str, field: str) -> None:
    """A variable that a field also sets stands for it, alone or in agreement."""
    rest = {} if name == "provider" else {"provider": "codex"}
    assert spec_of(tenant, {**rest, "variables": {name: value}})[field] == value
    assert spec_of(tenant, {**rest, field: value, "variables": {name: value}})[field] == value


def test_a_secret_variable_is_kept_apart(tenant: Tenant) -> None:
    """A variable that the template calls sensitive is in the row as ciphertext only; its name stays readable."""
    answer = tenant.submit({"provider": "codex", "variables": {"npm_token": "s3cr3t-value", "agent_user": "dev"}})
    row = tenant.row(answer.json()["build_id"])
    assert row.spec["variables"] == {"agent_user": "dev"}
    assert row.spec["secret_names"] == ["npm_token"]
    assert row.secrets is not None
    assert b"s3cr3t-value" not in row.secrets
    assert tenant.api.parts.sealer.open(row.secrets) == {"npm_token": "s3cr3t-value"}


@pytest.mark.parametrize(
    "media_type", ["application/json", "Application/JSON; charset=utf-8", "application/merge+json"]
)
def test_media_types_of_json(tenant: Tenant, media_type: str) -> None:
    """JSON by any of its names is read."""
    headers = {"Content-Type": media_type}
    answer = tenant.http.post("/api/v1/images/build", content=b'{"provider": "codex"}', headers=headers)
    assert answer.status_code == 202


def test_a_body_without_a_media_type_is_json(tenant: Tenant) -> None:
    """A client that does not say what it sends sends JSON."""
    assert tenant.http.post("/api/v1/images/build", content=b'{"provider": "codex"}').status_code == 202


def test_a_chunked_body_is_read(tenant: Tenant) -> None:
    """A body without a declared length is read as well."""
    pieces = iter([b'{"prov', b'ider": ', b'"codex"}'])
    assert tenant.http.post("/api/v1/images/build", content=pieces).status_code == 202


def test_the_workflow_is_started(tenant: Tenant, temporal: DevTemporal) -> None:
    """Temporal has a `build-image` workflow under the build's id, whose input names the build and nothing secret."""
    body = {"provider": "codex", "variables": {"npm_token": "s3cr3t-value"}}
    build_id = tenant.submit(body).json()["build_id"]
    handle = temporal.client.get_workflow_handle(build_workflow_id(build_id))
    history = temporal.run(handle.fetch_history())
    started = history.events[0].workflow_execution_started_event_attributes
    assert started.workflow_type.name == "build-image"
    ref = temporal.client.data_converter.payload_converter.from_payload(started.input.payloads[0], BuildRef)
    assert (ref.build_id, ref.organization_id) == (build_id, tenant.organization_id)
    assert "s3cr3t-value" not in history.to_json()


def test_region_and_instance_type_of_the_settings(
    tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal
) -> None:
    """What the operator configures is what a request leaves out."""
    home = tmp_path_factory.mktemp("frankfurt")
    settings = settings_for(home, temporal.port, regions=("eu-central-1", "us-east-1"), instance_type="c7g.large")
    with RunningApi(settings) as api:
        tenant = Tenant(api)
        spec = spec_of(tenant, {"provider": "codex"})
        assert (spec["region"], spec["instance_type"]) == ("eu-central-1", "c7g.large")
        tenant.close()


def test_builds_on_aws_are_not_called_simulated(
    tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal
) -> None:
    """Against real EC2 no answer speaks of simulation."""
    with RunningApi(settings_for(tmp_path_factory.mktemp("aws"), temporal.port, ec2="aws")) as api:
        tenant = Tenant(api)
        build_id = tenant.succeeded(simulated=False)
        bodies = [
            tenant.submit().json(),
            tenant.http.get(f"/api/v1/images/builds/{build_id}").json(),
            tenant.http.get("/api/v1/images").json()["images"][0],
            tenant.http.get(f"/api/v1/builds/{build_id}").json(),
        ]
        assert ["simulated" in body for body in bodies] == [False] * 4
        assert bodies[3]["image"]["simulated"] is False
        tenant.close()


def test_an_operators_template(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> None:
    """`operator://NAME` is a template of KILN_TEMPLATE_DIR, with variables of its own."""
    home, folder = tmp_path_factory.mktemp("vendored"), tmp_path_factory.mktemp("templates")
    names = ("kiln_image_name", "kiln_key_pair_name", "kiln_security_group_id", "kiln_tags", "flavour")
    (folder / "mine.pkr.hcl").write_text("".join(f'variable "{name}" {{}}\n' for name in names))
    with RunningApi(settings_for(home, temporal.port, template_dir=folder)) as api:
        tenant = Tenant(api)
        body = {"provider": "codex", "template_source": "operator://mine", "variables": {"flavour": "sour"}}
        assert spec_of(tenant, body)["template"] == "operator://mine"
        body["variables"] = {"extra_packages": "ripgrep"}
        message = "variables.extra_packages: the template does not declare it; it declares flavour"
        assert tenant.submit(body).json()["error"]["message"] == message
        tenant.close()
