"""The OpenAPI document: complete, and what the server does is what it says."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from sqlalchemy import select

from api import machine_images, progress, runner_calls
from api.openapi import REGISTRIES
from kiln.catalog import builds
from kiln.catalog.tables import Build
from support.api_server import RunningApi, settings_for
from support.containers import kilns_registry
from support.dev_temporal import DevTemporal
from support.organization import OrganizationTenant
from support.pod_rows import create_runner
from support.runner_calls import CALLS
from support.signing import ORGANIZATION_API
from support.tenants import Tenant

REGIONS = ("us-east-1", "eu-central-1")
UNLIMITED = {f"container_{name}_rate": "" for name in ("build", "list", "delete", "patch")}
ANSWER_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
OPTIONS = ("--seed=1", "--max-examples=20", "--request-timeout=10", "--no-color", "--warnings=off")
# An answer may have null for an id, which Schemathesis would put into a path as a text, and call that valid. Its stateful
# phase uses what answers say, too.
SCHEMATHESIS_CONFIG = "[phases.fuzzing.extra-data-sources]\nresponses = false\n"
SCHEMATHESIS_SECONDS = 150
DEFAULT_TEMPLATE = {"type": "builtin", "name": "default-ec2"}
KEYED = {401, 403, 500, 503}
PODS = "/api/v1/ext/orgs/{org}"
OPERATIONS = {
    ("post", "/api/v1/images/build"): KEYED | {201, 202, 409, 413, 415, 422, 429},
    ("get", "/api/v1/images"): KEYED | {200, 422, 429},
    ("patch", "/api/v1/images"): KEYED | {200, 413, 415, 422, 429},
    ("get", "/api/v1/images/build/{build_id}"): KEYED | {200, 404, 422},
    ("post", "/api/v1/images/build/{build_id}/start"): KEYED | {200, 404, 409, 413, 415, 422},
    ("post", "/api/v1/images/build/{build_id}/cancel"): KEYED | {202, 404, 422},
    ("put", "/api/v1/images/uploads/{build_id}"): {200, 403, 404, 409, 413, 422, 500, 503},
    ("delete", "/api/v1/images/{image_name}/{image_tag}"): KEYED | {200, 404, 409, 422, 429},
    ("get", "/api/v1/images/builds/{build_id}"): KEYED | {200, 404, 422},
    ("post", "/api/v1/images/builds/{build_id}/cancel"): KEYED | {202, 404, 422},
    ("get", "/api/v1/images/builds/{build_id}/logs"): KEYED | {200, 404, 422},
    ("delete", "/api/v1/images/{image_id}"): KEYED | {202, 204, 404, 409, 422},
    ("get", "/v5/builds"): KEYED | {200, 422},
    ("post", "/v5/builds"): KEYED | {200, 404, 413, 422},
    ("get", "/v5/builds/undeployed"): KEYED | {200, 422},
    ("get", "/v5/builds/{build_id}"): KEYED | {200, 404, 422},
    ("post", "/v5/builds/{build_id}/cancel"): KEYED | {202, 404, 422},
    ("get", "/v5/builds/{build_id}/logs"): KEYED | {200, 404, 422},
    ("get", f"{ORGANIZATION_API}/images"): KEYED | {200, 400},
    ("post", f"{ORGANIZATION_API}/images"): KEYED | {200, 400, 404, 409, 413},
    ("post", f"{ORGANIZATION_API}/images/install"): KEYED | {200, 400, 404, 409, 413},
    ("get", f"{ORGANIZATION_API}/images/{{image_id}}"): KEYED | {200, 404},
    ("delete", f"{ORGANIZATION_API}/images/{{image_id}}"): KEYED | {200, 400, 404},
    ("post", f"{ORGANIZATION_API}/images/{{image_id}}/assign"): KEYED | {200, 400, 404, 413},
    ("get", f"{ORGANIZATION_API}/software"): KEYED | {200},
    ("get", f"{ORGANIZATION_API}/machines"): KEYED | {200, 400},
    ("post", f"{ORGANIZATION_API}/machines"): KEYED | {200, 400, 404, 409, 413},
    ("get", f"{ORGANIZATION_API}/machines/{{machine_id}}"): KEYED | {200, 404},
    ("post", f"{ORGANIZATION_API}/machines/{{machine_id}}/start"): KEYED | {200, 400, 404, 413},
    ("post", f"{ORGANIZATION_API}/machines/{{machine_id}}/stop"): KEYED | {200, 400, 404, 413},
    ("get", f"{PODS}/pods"): KEYED | {200, 400, 404},
    ("post", f"{PODS}/pods"): KEYED | {201, 400, 404, 413, 429},
    ("get", f"{PODS}/pods/{{key}}"): KEYED | {200, 404},
    ("post", f"{PODS}/pods/{{key}}/prompt"): KEYED | {200, 400, 404, 413},
    ("post", f"{PODS}/pods/{{key}}/terminate"): KEYED | {200, 400, 404},
    ("get", f"{PODS}/pods/{{key}}/logs"): KEYED | {200, 400, 404},
    ("get", f"{PODS}/runners"): KEYED | {200, 404},
    ("get", f"{PODS}/runners/{{runner_id}}"): KEYED | {200, 404},
    ("post", f"{CALLS}/register"): KEYED | {200, 400, 413},
    ("post", f"{CALLS}/beat"): KEYED | {200, 400, 413},
    ("post", f"{CALLS}/news"): KEYED | {200, 400, 413},
    ("post", f"{CALLS}/pods/{{key}}/begin"): KEYED | {200, 400, 404, 409, 413},
    ("post", f"{CALLS}/pods/{{key}}/started"): KEYED | {204, 400, 404, 409, 413},
    ("post", f"{CALLS}/pods/{{key}}/ended"): KEYED | {204, 400, 404, 409, 413},
    ("post", f"{CALLS}/pods/{{key}}/log"): KEYED | {200, 400, 404, 413},
    ("get", "/registry/token"): {200, 401, 422, 500, 503},
    ("post", "/registry/token"): {200, 401, 413, 422, 500, 503},
    ("get", "/api/v1/builds"): KEYED | {200, 422},
    ("get", "/api/v1/builds/{build_id}"): KEYED | {200, 404, 422},
    ("post", "/api/v1/builds/{build_id}/cancel"): KEYED | {202, 404, 422},
    ("get", "/api/v1/builds/{build_id}/logs"): KEYED | {200, 404, 422},
    ("get", "/healthz"): {200},
    ("get", "/readyz"): {200, 503},
    ("get", "/metrics"): {200, 500, 503},
}
TAGS = (
    ["machine-images"],
    ["container-images"],
    ["cloud-builds"],
    ["organization-images"],
    ["pods"],
    ["runners"],
    ["registry"],
    ["kiln"],
    ["operations"],
)
SECURITY = {
    "api": [{"HTTPBearer": []}, {"APIKeyHeader": []}],
    "v5": [{"APIKeyHeader": []}],
    "organization-management": [{"HMAC": []}],
    "registry": [{"HTTPBasic": []}],
    CALLS: [{"RunnerToken": []}],
}
# A signed URL is itself the right to use it.
UPLOADS = "/api/v1/images/uploads/{build_id}"
EACH = pytest.mark.parametrize(("method", "path"), OPERATIONS)


@pytest.fixture(scope="module")
def sqlite_api(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> Iterator[RunningApi]:
    """A server whose operator allows the public registries himself: their names are not looked up."""
    settings = settings_for(
        tmp_path_factory.mktemp("api"), temporal.port, regions=REGIONS, transfer_registries=REGISTRIES
    )
    with RunningApi(settings) as api:
        yield api


@pytest.fixture(scope="module")
def document(sqlite_api: RunningApi) -> dict[str, Any]:
    found: dict[str, Any] = sqlite_api.http.get("/openapi.json").json()
    return found


def body_schema(document: dict[str, Any], name: str = "MachineBuildRequest") -> Draft202012Validator:
    reference = {"$ref": f"#/components/schemas/{name}"}
    return Draft202012Validator({**reference, "components": document["components"]})


def test_every_operation_is_documented(document: dict[str, Any]) -> None:
    """All of the contracts' and the probes, and no other."""
    found = {(method, path) for path, item in document["paths"].items() for method in item}
    assert found == set(OPERATIONS)


@EACH
def test_an_operation_says_what_it_does(document: dict[str, Any], method: str, path: str) -> None:
    """A summary, a contract that it belongs to, and a key where it needs one."""
    operation = document["paths"][path][method]
    assert operation["summary"]
    assert operation["tags"] in TAGS
    owner = "" if path == UPLOADS else CALLS if path.startswith(CALLS) else path.split("/")[1]
    assert operation.get("security") == SECURITY.get(owner)


@EACH
def test_an_operation_knows_its_answers(document: dict[str, Any], method: str, path: str) -> None:
    """Every status that it may answer; each error with its body's model and an example of it."""
    operation = document["paths"][path][method]
    assert {int(status) for status in operation["responses"]} == OPERATIONS[method, path]
    for status, answer in operation["responses"].items():
        if int(status) >= 400 and path.startswith(("/api/", ORGANIZATION_API)):
            content = answer["content"]["application/json"]
            schema = Draft202012Validator({**content["schema"], "components": document["components"]})
            assert schema.is_valid(content["example"])
            assert not schema.is_valid({})
        if status in ("429", "503"):
            assert "Retry-After" in answer["headers"]


def test_every_parameter_is_described(document: dict[str, Any]) -> None:
    """In words, for whoever reads the page."""
    undescribed = [
        (path, parameter["name"])
        for path, item in document["paths"].items()
        for operation in item.values()
        for parameter in operation.get("parameters", [])
        if not parameter.get("description")
    ]
    assert undescribed == []


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    """Every schema that is referred to is there."""
    names = {piece.split('"')[0] for piece in json.dumps(document).split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])


def test_the_bodys_examples_are_served(document: dict[str, Any], tenant: Tenant) -> None:
    """Each is valid by its schema, and accepted."""
    examples = document["components"]["schemas"]["MachineBuildRequest"]["examples"]
    schema = body_schema(document)
    assert [schema.is_valid(example) for example in examples] == [True] * len(examples)
    assert {tenant.submit(example).status_code for example in examples} == {202}
    for model in ("ContainerBuildRequest", "AgentImageRequest"):
        examples = document["components"]["schemas"][model]["examples"]
        schema = body_schema(document, model)
        assert [schema.is_valid(example) for example in examples] == [True] * len(examples)
        assert {tenant.submit(example).status_code for example in examples} == {201}


@pytest.mark.parametrize(
    "body",
    [
        {"provider": "codex"},
        {"agent_provider": "codex", "provider": None, "region": None, "variables": None, "tags": None},
        {"provider": "codex", "agent_provider": "codex", "template": DEFAULT_TEMPLATE},
        {"provider": "codex", "variables": {"extra_packages": "ripgrep"}, "tags": {"kilnish": ""}},
    ],
)
def test_the_server_takes_what_the_schema_does(document: dict[str, Any], tenant: Tenant, body: dict[str, Any]) -> None:
    """The document and the server are of one mind."""
    answer = tenant.http.post("/api/v1/images/build", json=body)
    assert (body_schema(document).is_valid(body), answer.status_code) == (True, 202)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"provider": None},
        {"provider": "copilot"},
        {"provider": "codex", "agent_provider": "cursor"},
        {"provider": "codex", "region": "mars-1"},
        {"provider": "codex", "instance_type": "huge"},
        {"provider": "codex", "template_source": "https://example.com"},
        {"provider": "codex", "template_source": "builtin://default-ec2", "template": DEFAULT_TEMPLATE},
        {"provider": "codex", "template": {"type": "builtin", "name": "other"}},
        {"provider": "codex", "variables": {"colour": "red"}},
        {"provider": "codex", "variables": {"extra_packages": "\0"}},
        {"provider": "codex", "tags": {"AWS:x": ""}},
        {"provider": "codex", "tags": {"team": "x" * 257}},
        {"provider": "codex", "colour": "red"},
    ],
)
def test_the_server_refuses_what_the_schema_does(
    document: dict[str, Any], tenant: Tenant, body: dict[str, Any]
) -> None:
    """The document and the server are of one mind."""
    answer = tenant.http.post("/api/v1/images/build", json=body)
    assert (body_schema(document).is_valid(body), answer.status_code) == (False, 422)


CONTAINER_BODIES = [
    ({"image_name": "tools/app", "image_tag": "v1"}, True),
    ({"image_name": "app", "image_tag": "v1", "dockerfile_path": ".__prime_dockerfile__", "colour": "red"}, True),
    ({"image_name": "app", "image_tag": "v1", "visibility": "PUBLIC", "ownerScope": "platform"}, True),
    ({"image_name": "app", "image_tag": "v1", "source_image": None, "sourceImage": None, "team_id": None}, True),
    ({"source_image": "busybox"}, True),
    ({"sourceImage": "docker.io/library/busybox:1", "image_name": "b", "image_tag": "c"}, True),
    ({"source_image": "busybox, 10.0.0.7/app"}, True),
    ({"image_name": "app"}, False),
    ({"image_name": "App", "image_tag": "v1"}, False),
    ({"image_name": "platform/app", "image_tag": "v1"}, False),
    ({"image_name": "app", "image_tag": ".v1"}, False),
    ({"image_name": "app", "image_tag": "v1", "dockerfile_path": "a/../b"}, False),
    ({"image_name": "app", "image_tag": "v1", "dockerfile_path": "/b"}, False),
    ({"image_name": "app", "image_tag": "v1", "platform": "linux/arm/v7"}, False),
    ({"image_name": "app", "image_tag": "v1", "owner_scope": "platform"}, False),
    ({"image_name": "app", "image_tag": "v1", "owner_scope": "platform", "visibility": "PRIVATE"}, False),
    ({"source_image": ""}, False),
    ({"source_image": "10.0.0.7/app"}, False),
    ({"source_image": "example.com/app"}, False),
    ({"source_image": "busybox,alpine", "image_name": "c"}, False),
]


@pytest.mark.parametrize(("body", "fits"), CONTAINER_BODIES)
def test_the_server_takes_the_containers_that_the_schema_does(
    document: dict[str, Any], tenant: Tenant, body: dict[str, Any], fits: bool
) -> None:
    """The document and the server are of one mind; no such body is a machine's as well."""
    answer = tenant.http.post("/api/v1/images/build", json=body)
    assert (body_schema(document, "ContainerBuildRequest").is_valid(body), answer.status_code) == (
        fits,
        201 if fits else 422,
    )
    assert not body_schema(document).is_valid(body)


AGENT_BODIES = [
    ({}, True),
    ({"agent_provider": "codex", "provider": None, "base_image": None, "agent_version": None}, True),
    ({"agent_version": "1.2.3", "extra_packages": " jq, g++", "npm_registry": "http://npm.test/"}, True),
    ({"base_image": "quay.io/acme/base:1", "colour": "red", "dockerfile_path": "b"}, True),
    ({"provider": "copilot"}, False),
    ({"agent_provider": "cursor"}, False),
    ({"image_tag": None}, False),
    ({"source_image": "busybox"}, False),
    ({"agent_version": "1;2"}, False),
    ({"extra_packages": "sudo-"}, False),
    ({"npm_registry": "npm.test"}, False),
    ({"base_image": "10.0.0.7/app"}, False),
]


@pytest.mark.parametrize(("changes", "fits"), AGENT_BODIES)
def test_the_server_takes_the_agents_that_the_schema_does(
    document: dict[str, Any], tenant: Tenant, changes: dict[str, Any], fits: bool
) -> None:
    """The document and the server are of one mind; no such body is another's as well."""
    body = {"image_name": "agent", "image_tag": "v1", "provider": "codex", **changes}
    answer = tenant.http.post("/api/v1/images/build", json=body)
    assert (body_schema(document, "AgentImageRequest").is_valid(body), answer.status_code) == (
        fits,
        201 if fits else 422,
    )
    assert not body_schema(document).is_valid(body)
    assert not body_schema(document, "ContainerBuildRequest").is_valid(body)


@contextmanager
def ending_builds(api: RunningApi) -> Iterator[None]:
    """Ends every build soon after its submission: an endless log would hold the run up."""
    over = threading.Event()

    def end_them() -> None:
        while not over.wait(0.05):
            with api.catalog.transaction() as tx:
                open_builds = list(tx.scalars(select(Build.id).where(Build.status == "queued")))
                for build_id in open_builds:
                    builds.request_cancel(tx, build_id)
            for build_id in open_builds:
                api.logs.end(build_id, "cancelled")

    thread = threading.Thread(target=end_them)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.long
def test_schemathesis_finds_nothing(tmp_path: Path, temporal: DevTemporal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated requests, sound and unsound ones and sequences of them, get no 5xx and no answer unknown to the schema."""
    monkeypatch.setattr(machine_images, "DELETE_PATIENCE", timedelta(seconds=0.2))
    monkeypatch.setattr(progress, "PATIENCE", timedelta(seconds=0.2))
    monkeypatch.setattr(runner_calls, "NEWS_SECONDS", 0.1)
    with kilns_registry(tmp_path) as registry:
        place = {"registry": registry.host, "registry_token_key": registry.key_file}
        changes = {"regions": REGIONS, "transfer_registries": REGISTRIES, **UNLIMITED, **place}
        settings = settings_for(tmp_path / "home", temporal.port, **changes)
        with RunningApi(settings) as api:
            tenant = OrganizationTenant(api)
            tenant.write_log(tenant.succeeded(), "one", "two", status="succeeded")
            with ending_builds(api):
                elsewhere = f"--exclude-path-regex=^(/v5|{ORGANIZATION_API}|{CALLS}|/api/v1/ext)/"
                _schemathesis(api.url, tenant, tmp_path, elsewhere, "Authorization: Bearer {key}")
                # Which parts and cursors go together is more than the document can say.
                answers = (f"--checks={ANSWER_CHECKS}", "--phases=coverage,fuzzing")
                cloud = ("--include-path-regex=^/v5/", *answers)
                _schemathesis(api.url, tenant, tmp_path, *cloud, "x-api-key: {key}", "x-selected-account-id: {account}")
                # Nor which machines are off.
                _schemathesis(api.url, tenant, tmp_path, f"--include-path-regex=^{ORGANIZATION_API}/", *answers)
                _, token = create_runner(api.catalog, tenant.organization_id)
                runners = (f"--include-path-regex=^{CALLS}/", f"--checks={ANSWER_CHECKS}", "--phases=coverage")
                _schemathesis(api.url, tenant, tmp_path, *runners, f"Authorization: Bearer {token}")
            assert tenant.get("/machines")["count"] > 0
            tenant.close()


def _schemathesis(url: str, tenant: OrganizationTenant, folder: Path, *options: str) -> None:
    """Options that are no options are headers; without any, requests are signed."""
    argv = [str(Path(sys.executable).with_name("st")), "run", f"{url}/openapi.json", *OPTIONS]
    headers = [option.format(key=tenant.key, account=tenant.organization_id) for option in options if option[0] != "-"]
    argv += [option for option in options if option[0] == "-"]
    for header in headers:
        argv += ["--header", header]
    (folder / "schemathesis.toml").write_text(SCHEMATHESIS_CONFIG)
    environment = os.environ if headers else {**os.environ, **_signing(tenant)}
    run = subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=SCHEMATHESIS_SECONDS, check=False
    )
    assert run.returncode == 0, run.stdout
    assert "No issues found" in run.stdout


def _signing(tenant: OrganizationTenant) -> dict[str, str]:
    """The environment in which schemathesis signs what it sends."""
    return {
        "SCHEMATHESIS_HOOKS": "support.signing_hooks",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "KEY": tenant.signed.key,
        "SECRET": tenant.signed.secret,
    }
