"""POST /api/v1/images/build: what is refused, how the refusal reads, and that nothing of it stays."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kiln.naming import build_workflow_id
from support.dev_temporal import DevTemporal
from support.processes import eventually
from support.tenants import Tenant, error, row_counts, shared_error

PATH = "/api/v1/images/build"
LIMIT = 1024 * 1024
NOT_JSON = shared_error("invalid_request", "body: not valid JSON")
NOT_UNICODE = shared_error("invalid_request", "body: not valid Unicode")
NO_OBJECT = shared_error("invalid_request", "body: must be a JSON object")
TOO_LARGE = shared_error("payload_too_large", f"body: at most {LIMIT} bytes are read")
PROVIDERS = "Input should be 'claude-code', 'codex', 'gemini' or 'cursor'"
STRING = "Input should be a valid string"
REGIONS = "this server builds in us-east-1, eu-central-1 only"
RESERVED = "names that begin with kiln: or aws: are reserved"
VENDOR = (
    "only builtin://NAME and operator://NAME are served, because a template runs code on the worker; "
    "the operator can vendor another one by putting it into KILN_TEMPLATE_DIR, as operator://NAME"
)
INSTANCE_TYPE = "must be an EC2 instance type, such as t3.medium"


@pytest.fixture(autouse=True)
def _nothing_stays(tenant: Tenant) -> Iterator[None]:
    """Whatever is refused leaves no row in any table."""
    before = row_counts(tenant.catalog)
    yield
    assert row_counts(tenant.catalog) == before


def refused(tenant: Tenant, body: Any) -> tuple[int, Any]:
    answer = tenant.http.post(PATH, json=body)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", NOT_JSON),
        (b"{", NOT_JSON),
        (b"provider=codex", NOT_JSON),
        (b'{"provider": "codex"} x', NOT_JSON),
        (b"{'provider': 'codex'}", NOT_JSON),
        (b'{"provider": NaN}', NOT_JSON),
        (b'{"provider": -Infinity}', NOT_JSON),
        (b'{"provider": ' + b"9" * 5000 + b"}", NOT_JSON),
        (b"[" * 100_000, NOT_JSON),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, NOT_JSON),
        (b"\xef\xbb\xbf{}", NOT_JSON),
        (b'{"provider": "cod\xffex"}', NOT_UNICODE),
        ('{"provider": "codex"}'.encode("utf-16"), NOT_UNICODE),
        (b'{"provider": "codex", "region": "\\ud800"}', NOT_UNICODE),
        (b'{"\\udfff": 1}', NOT_UNICODE),
        (b'{"provider": "codex", "region": "\xed\xa0\x80"}', NOT_UNICODE),
        (b"null", NO_OBJECT),
        (b"[]", NO_OBJECT),
        (b'"codex"', NO_OBJECT),
        (b"7", NO_OBJECT),
    ],
)
def test_what_is_no_json_object_is_a_422_in_both_shapes(tenant: Tenant, raw: bytes, expected: object) -> None:
    """Whose the body would be cannot be known, so its refusal carries both contracts' errors."""
    answer = tenant.http.post(PATH, content=raw, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (422, expected)


@pytest.mark.parametrize(
    "media_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "json", "", "x" * 3000],
)
def test_another_media_type_is_a_415_in_both_shapes(tenant: Tenant, media_type: str) -> None:
    """Only JSON is read."""
    answer = tenant.http.post(PATH, content=b'{"provider": "codex"}', headers={"Content-Type": media_type})
    shown = media_type.split(";", maxsplit=1)[0][:100]
    message = f"Content-Type: must be application/json, not {shown}"
    assert (answer.status_code, answer.json()) == (415, shared_error("unsupported_media_type", message))


def test_ten_declared_megabytes_are_a_413_in_both_shapes(tenant: Tenant) -> None:
    """A body that says that it is too long is refused, and the connection serves the next request."""
    body = json.dumps({"provider": "codex", "tags": {"a": "x" * 10_000_000}})
    answer = tenant.http.post(PATH, content=body)
    assert (answer.status_code, answer.json()) == (413, TOO_LARGE)
    assert tenant.http.get("/api/v1/images").status_code == 200


def test_ten_chunked_megabytes_are_a_413_in_both_shapes(tenant: Tenant) -> None:
    """A body that does not say how long it is is refused once it is too long."""
    answer = tenant.http.post(PATH, content=(b" " * 100_000 for _ in range(100)))
    assert (answer.status_code, answer.json()) == (413, TOO_LARGE)


def test_ten_megabytes_without_a_key_are_a_401(tenant: Tenant) -> None:
    """Who calls is asked before what is sent, and the connection serves the next request."""
    body = json.dumps({"provider": "codex", "tags": {"a": "x" * 10_000_000}})
    answer = tenant.api.http.post(PATH, content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
    assert tenant.api.http.get("/healthz").status_code == 200


def test_a_body_of_the_limit_is_read(tenant: Tenant) -> None:
    """The limit itself is allowed: it is the content that is refused here."""
    body = b'{"provider": "nobody"}'
    answer = tenant.http.post(PATH, content=body + b" " * (LIMIT - len(body)))
    assert (answer.status_code, answer.json()) == (422, error("invalid_request", f"provider: {PROVIDERS}"))


@pytest.mark.parametrize(
    ("name", "field"), [("image_name", "image_name"), ("source_image", "source_image"), ("sourceImage", "source_image")]
)
def test_a_container_images_body_is_refused_in_that_apis_shape(tenant: Tenant, name: str, field: str) -> None:
    """Container-images wins when both match."""
    status, body = refused(tenant, {"provider": "codex", name: "", "image_tag": "v1"})
    assert (status, list(body), body["detail"].partition(":")[0]) == (422, ["detail"], field)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "provider: Field required"),
        ({"provider": None}, "provider: Field required"),
        ({"region": "us-east-1"}, "provider: Field required"),
        ({"provider": "copilot"}, f"provider: {PROVIDERS}"),
        ({"provider": "Codex"}, f"provider: {PROVIDERS}"),
        ({"provider": ""}, f"provider: {PROVIDERS}"),
        ({"provider": 7}, f"provider: {PROVIDERS}"),
        ({"provider": ["codex"]}, f"provider: {PROVIDERS}"),
        ({"agent_provider": "copilot"}, f"agent_provider: {PROVIDERS}"),
        (
            {"provider": "codex", "agent_provider": "cursor"},
            "agent_provider: is another spelling of provider, and must agree with it",
        ),
        ({"provider": "codex", "colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"provider": "codex", "colour\0": "red"}, "colour\0: Extra inputs are not permitted"),
        ({"provider": "codex", "c" * 5000: "red"}, f"{'c' * 100}: Extra inputs are not permitted"),
        ({"provider": "codex", "body": 1}, "body: Extra inputs are not permitted"),
        ({"provider": "codex", "region": 7}, f"region: {STRING}"),
        ({"provider": "codex", "region": {}}, f"region: {STRING}"),
        ({"provider": "codex", "region": "mars-1"}, f"region: {REGIONS}"),
        ({"provider": "codex", "region": ""}, f"region: {REGIONS}"),
        ({"provider": "codex", "region": "us-east-1\0"}, f"region: {REGIONS}"),
        ({"provider": "codex", "instance_type": True}, f"instance_type: {STRING}"),
        ({"provider": "codex", "instance_type": ""}, f"instance_type: {INSTANCE_TYPE}"),
        ({"provider": "codex", "instance_type": "huge"}, f"instance_type: {INSTANCE_TYPE}"),
        ({"provider": "codex", "instance_type": "t3.medium\n"}, f"instance_type: {INSTANCE_TYPE}"),
    ],
)
def test_a_field_that_cannot_be_served_is_a_422_that_names_it(tenant: Tenant, body: object, message: str) -> None:
    """The message begins with the field as the caller wrote it."""
    assert refused(tenant, body) == (422, error("invalid_request", message))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template_source": "git::https://example.com/t.git"}, f"template_source: {VENDOR}"),
        ({"template_source": "https://example.com/t.pkr.hcl"}, f"template_source: {VENDOR}"),
        ({"template_source": "/etc/passwd"}, f"template_source: {VENDOR}"),
        ({"template_source": "../agent.pkr.hcl"}, f"template_source: {VENDOR}"),
        ({"template_source": ""}, f"template_source: {VENDOR}"),
        ({"template_source": "builtin://../x"}, "template_source: '../x' is not the name of a template"),
        ({"template_source": "builtin://"}, "template_source: '' is not the name of a template"),
        (
            {"template_source": "builtin://other"},
            "template_source: there is no builtin template 'other'; there is builtin://default-ec2",
        ),
        (
            {"template_source": "operator://mine"},
            "template_source: this server has no operator templates (KILN_TEMPLATE_DIR)",
        ),
        ({"template_source": 1}, f"template_source: {STRING}"),
        ({"template": {"type": "git", "name": "x"}}, "template.type: Input should be 'builtin'"),
        ({"template": {"type": "builtin"}}, "template.name: Field required"),
        ({"template": {"name": "default-ec2"}}, "template.type: Field required"),
        ({"template": {"type": "builtin", "name": 1}}, f"template.name: {STRING}"),
        (
            {"template": {"type": "builtin", "name": "other"}},
            "template.name: there is no builtin template 'other'; there is builtin://default-ec2",
        ),
        ({"template": {"type": "builtin", "name": "a/b"}}, "template.name: 'a/b' is not the name of a template"),
        (
            {"template": {"type": "builtin", "name": "default-ec2", "ref": "main"}},
            "template.ref: Extra inputs are not permitted",
        ),
        (
            {"template": {"type": "builtin", "name": "default-ec2"}, "template_source": "builtin://default-ec2"},
            "template: template and template_source are two forms of one field; send one",
        ),
    ],
)
def test_a_template_that_is_not_served_is_a_422_that_names_it(
    tenant: Tenant, fields: dict[str, Any], message: str
) -> None:
    """A template runs code on the worker, so the refusal also says what the operator can do."""
    assert refused(tenant, {"provider": "codex", **fields}) == (422, error("invalid_request", message))


@pytest.mark.parametrize("template", ["builtin", ["builtin"], 1])
def test_a_template_of_another_type_is_a_422_that_names_it(tenant: Tenant, template: object) -> None:
    """Only the object form is a `template`."""
    status, body = refused(tenant, {"provider": "codex", "template": template})
    assert (status, body["error"]["message"].split(":")[0]) == (422, "template")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"region": "eu-central-1"}, "variables.region: disagrees with the field region"),
        ({"instance_type": "c7g.large"}, "variables.instance_type: disagrees with the field instance_type"),
        ({"provider": "cursor"}, "variables.provider: disagrees with the field provider"),
        ({"provider": ""}, "variables.provider: disagrees with the field provider"),
        ({"region": 1}, f"variables.region: {STRING}"),
        ({"extra_packages": ["ripgrep"]}, f"variables.extra_packages: {STRING}"),
        ({"extra_packages": None}, f"variables.extra_packages: {STRING}"),
        ({"path": 1}, f"variables.path: {STRING}"),
        ({"extra_packages": "rip\0grep"}, "variables.extra_packages: holds control characters"),
        ({"extra_packages": "\x1b[2J"}, "variables.extra_packages: holds control characters"),
        (
            {"extra_packages": "x" * 20_000},
            "variables.extra_packages: String should have at most 16384 characters",
        ),
        ("extra_packages=ripgrep", "variables: Input should be a valid dictionary"),
        ([], "variables: Input should be a valid dictionary"),
    ],
)
def test_variables_that_cannot_be_served_are_a_422(tenant: Tenant, variables: object, message: str) -> None:
    """The message names the variable."""
    body = {"provider": "codex", "region": "us-east-1", "instance_type": "t3.medium", "variables": variables}
    assert refused(tenant, body) == (422, error("invalid_request", message))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"region": "mars-1"}, f"variables.region: {REGIONS}"),
        ({"region": ""}, f"variables.region: {REGIONS}"),
        ({"instance_type": "huge"}, f"variables.instance_type: {INSTANCE_TYPE}"),
        ({"instance_type": ""}, f"variables.instance_type: {INSTANCE_TYPE}"),
    ],
)
def test_a_variable_that_counts_as_a_field_is_checked_as_the_field(
    tenant: Tenant, variables: dict[str, str], message: str
) -> None:
    """The message names the variable, since that is what the caller wrote."""
    assert refused(tenant, {"provider": "codex", "variables": variables}) == (422, error("invalid_request", message))


def test_a_provider_that_only_a_variable_names_is_checked(tenant: Tenant) -> None:
    """`variables.provider` alone counts as the provider."""
    message = "variables.provider: must be one of claude-code, codex, gemini, cursor"
    assert refused(tenant, {"variables": {"provider": "copilot"}}) == (422, error("invalid_request", message))


def test_an_undeclared_variable_is_a_422_that_lists_the_declared_ones(tenant: Tenant) -> None:
    """The caller learns every name that the template knows, less those that Kiln sets itself."""
    status, body = refused(tenant, {"provider": "codex", "variables": {"colour": "red"}})
    place, _, problem = body["error"]["message"].partition(": ")
    opening, _, names = problem.partition("it declares ")
    assert (status, place, opening) == (422, "variables.colour", "the template does not declare it; ")
    assert {"agent_version", "extra_packages", "instance_type", "provider", "region"} <= set(names.split(", "))
    assert "kiln_" not in names


@pytest.mark.parametrize("name", ["kiln_tags", "kiln_image_name", "kiln_anything"])
def test_kilns_own_variables_are_not_the_callers(tenant: Tenant, name: str) -> None:
    """What the cleanup relies on cannot be set from outside."""
    status, body = refused(tenant, {"provider": "codex", "variables": {name: "x"}})
    assert (status, body["error"]["message"].split(":")[0]) == (422, f"variables.{name}")


def test_too_many_variables_are_a_422(tenant: Tenant) -> None:
    """A request has a hundred variables at most."""
    status, body = refused(tenant, {"provider": "codex", "variables": {f"v{n}": "" for n in range(101)}})
    assert (status, body["error"]["message"].split(":")[0]) == (422, "variables")


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"kiln:build-id": "x"}, f"tags.kiln:build-id: {RESERVED}"),
        ({"KILN:x": "x"}, f"tags.KILN:x: {RESERVED}"),
        ({"aws:name": "x"}, f"tags.aws:name: {RESERVED}"),
        ({"Aws:": "x"}, f"tags.Aws:: {RESERVED}"),
        ({"": "x"}, "tags.: a tag's name has 1 to 128 characters"),
        ({"k" * 129: "x"}, f"tags.{'k' * 128}: a tag's name has 1 to 128 characters"),
        ({"k\0": "x"}, "tags.k\0: a tag's name has 1 to 128 characters"),
        ({"team": "x" * 257}, "tags.team: a tag's value has at most 256 characters"),
        ({"team": "\0"}, "tags.team: a tag's value has at most 256 characters"),
        ({"team": 1}, f"tags.team: {STRING}"),
        ({"query": None}, f"tags.query: {STRING}"),
        (["team"], "tags: Input should be a valid dictionary"),
    ],
)
def test_tags_that_cannot_be_set_are_a_422(tenant: Tenant, tags: object, message: str) -> None:
    """EC2's own rules, and names that are Kiln's or AWS's."""
    assert refused(tenant, {"provider": "codex", "tags": tags}) == (422, error("invalid_request", message))


def test_too_many_tags_are_a_422(tenant: Tenant) -> None:
    """EC2 takes fifty tags a resource, some of which Kiln and Packer need."""
    status, body = refused(tenant, {"provider": "codex", "tags": {f"t{n}": "" for n in range(41)}})
    assert (status, body["error"]["message"].split(":")[0]) == (422, "tags")


@pytest.mark.parametrize("key", ["", "k" * 256, "\xe9", "tab\tbed"])
def test_an_idempotency_key_that_cannot_be_kept_is_a_422(tenant: Tenant, key: str) -> None:
    """It is 1 to 255 printable ASCII characters."""
    headers = {"Idempotency-Key": key.encode("latin-1")}
    answer = tenant.http.post(PATH, json={"provider": "codex"}, headers=headers)
    message = "Idempotency-Key: must be 1 to 255 printable ASCII characters"
    assert (answer.status_code, answer.json()) == (422, error("invalid_request", message))


def test_refusals_start_no_workflow(tenant: Tenant, temporal: DevTemporal) -> None:
    """After every kind of refusal, the next accepted build's workflow is the only new one."""
    before = temporal.workflow_ids()
    for body in ({}, {"provider": "copilot"}, {"provider": "codex", "region": "mars-1"}, [], {"image_name": "app"}):
        assert refused(tenant, body)[0] == 422
    assert tenant.http.post(PATH, json={"provider": "codex"}, headers={"Authorization": "Bearer no"}).status_code == 401
    # Temporal lists a workflow a moment after its start: once it lists this one, it would list those too.
    accepted = _start_directly(tenant, temporal)
    assert eventually(lambda: accepted in temporal.workflow_ids())
    assert temporal.workflow_ids() - before == {accepted}


def _start_directly(tenant: Tenant, temporal: DevTemporal) -> str:
    workflow_id = build_workflow_id(tenant.organization_id)
    temporal.run(temporal.client.start_workflow("nothing", id=workflow_id, task_queue="nobody"))
    return workflow_id
