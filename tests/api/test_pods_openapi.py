"""The OpenAPI document of pods: what the server does is what it says."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from sqlalchemy import update

from kiln.catalog.pod_tables import Runner
from support.api_server import RunningApi
from support.pod_rows import create_runner, pod_row, register
from support.pod_tenants import PodTenant

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
SCHEMATHESIS_SECONDS = 120
BODIES = [
    ({"runner_id": "local", "repository_id": None}, True),
    ({"runner_id": "local", "environment_variables": {"A": "b"}, "colour": "red"}, True),
    ({"runner_id": "local", "limits": {"memory_mb": 64}, "max_turns": 1, "custom_agent_command": "sh"}, True),
    ({}, False),
    ({"runner_id": ""}, False),
    ({"runner_id": "local", "initial_prompt": " "}, False),
    ({"runner_id": "local", "environment_variables": {"1": "b"}}, False),
    ({"runner_id": "local", "environment_variables": {"KILN_POD": "b"}}, False),
    ({"runner_id": "local", "environment_variables": {"A": 1}}, False),
    ({"runner_id": "local", "pod_timeout_minutes": 0}, False),
    ({"runner_id": "local", "agent_type_id": "copilot"}, False),
    ({"runner_id": "local", "limits": {"memory_mb": 0}}, False),
]


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[PodTenant]:
    """With a runner `local` that stays."""
    tenant = PodTenant(api)
    row, _ = create_runner(tenant.catalog, tenant.organization_id, "local")
    register(tenant.catalog, row.id)
    with tenant.catalog.transaction() as tx:
        tx.execute(update(Runner).where(Runner.id == row.id).values(seen_at=datetime.now(UTC) + timedelta(hours=1)))
    yield tenant
    tenant.close()


def body_schema(tenant: PodTenant) -> tuple[Draft202012Validator, list[Any]]:
    """The schema of a new pod, and its examples."""
    components = tenant.http.get("/openapi.json").json()["components"]
    reference = {"$ref": "#/components/schemas/CreatePod"}
    return Draft202012Validator({**reference, "components": components}), components["schemas"]["CreatePod"]["examples"]


@pytest.mark.parametrize(("body", "fits"), BODIES)
def test_the_server_takes_what_the_schema_does(tenant: PodTenant, body: dict[str, Any], fits: bool) -> None:
    """The document and the server are of one mind."""
    schema, _ = body_schema(tenant)
    assert (schema.is_valid(body), tenant.post(body=body).status_code) == (fits, 201 if fits else 400)


def test_the_bodys_examples_are_served(tenant: PodTenant) -> None:
    """Each is valid by its schema, and accepted."""
    schema, examples = body_schema(tenant)
    assert [schema.is_valid(example) for example in examples] == [True] * len(examples)
    assert {tenant.post(body=example).status_code for example in examples} == {201}


@pytest.mark.slow
def test_schemathesis_finds_nothing(tenant: PodTenant, tmp_path: Path) -> None:
    """Generated requests, sound and unsound ones, get no 5xx and no answer unknown to the schema."""
    ended = tenant.post(body={"runner_id": "local"}).json()["pod"]["key"]
    tenant.post(f"/pods/{ended}/terminate")
    tenant.api.logs.end(pod_row(tenant.catalog, ended).id, "terminated")
    (tmp_path / "schemathesis.toml").write_text(f'[parameters]\n"path.org" = "{tenant.slug}"\n"path.key" = "{ended}"\n')
    argv = [str(Path(sys.executable).with_name("st")), "--config-file", "schemathesis.toml", "run"]
    argv += [f"{tenant.api.url}/openapi.json", "--include-path-regex=^/api/v1/ext/", f"--checks={CHECKS}"]
    argv += ["--phases=examples,coverage,fuzzing", "--seed=1", "--max-examples=5", "--request-timeout=10"]
    argv += ["--no-color", "--warnings=off", "--header", f"X-API-Key: {tenant.key}"]
    run = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=SCHEMATHESIS_SECONDS, check=False)
    assert run.returncode == 0, run.stdout
    assert "No issues found" in run.stdout
    assert tenant.get("/pods")["total"] > 1
