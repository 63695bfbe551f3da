"""/healthz, /readyz, /metrics and /docs; and what the API answers when a part of it does not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kiln.catalog import workers
from kiln.catalog.workers import Presence
from support.api_server import RunningApi, settings_for
from support.dev_temporal import DevTemporal
from support.rows import fresh_database
from support.tenants import Tenant, error, shared_error

BUILD_ID = "550e8400-e29b-41d4-a716-446655440000"
NO_CATALOG = "the catalog does not answer (KILN_CATALOG_URL): OperationalError"
# These servers have no registry, which keeps them from nothing but container images.
NO_REGISTRY = "KILN_REGISTRY_TOKEN_KEY: the key cannot be read: No such file or directory"
ALL_WELL = {"catalog": "ok", "temporal": "ok", "object_store": "ok", "logs": "ok", "containers": NO_REGISTRY}


@contextmanager
def serving(home: Path, temporal: DevTemporal, **settings: object) -> Iterator[RunningApi]:
    with RunningApi(settings_for(home, temporal.port, **settings)) as api:
        yield api


@contextmanager
def without_catalog(home: Path, temporal: DevTemporal, postgres_url: str) -> Iterator[tuple[RunningApi, Tenant]]:
    """An API whose catalog is there at its start, and gone afterwards."""
    with fresh_database(postgres_url) as url:
        api = RunningApi(settings_for(home, temporal.port, catalog_url=url))
        api.__enter__()
        tenant = Tenant(api)
        api.catalog.close()
    try:
        yield api, tenant
    finally:
        tenant.close()
        api.__exit__(None, None, None)


def samples(text: str, name: str) -> dict[tuple[str, ...], float]:
    """A metric's values by the values of its labels, which are sorted by their names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def test_the_process_is_alive(api: RunningApi) -> None:
    """A probe asks nothing else."""
    answer = api.http.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_every_part_is_ready(api: RunningApi) -> None:
    """Each by its name, and what EC2 is."""
    answer = api.http.get("/readyz")
    body = answer.json()
    assert body["parts"].pop("containers") != "ok"  # this server has no registry, which the others do without
    parts = {"catalog": "ok", "temporal": "ok", "object_store": "ok", "logs": "ok"}
    assert (answer.status_code, body) == (200, {"status": "ready", "ec2": "simulated", "parts": parts})
    assert "Retry-After" not in answer.headers


def test_containers_that_are_off_say_why(tmp_path: Path, temporal: DevTemporal) -> None:
    """The server is ready for everything else."""
    with RunningApi(settings_for(tmp_path, temporal.port, containers_off="no engine answers")) as api:
        answer = api.http.get("/readyz")
    parts = {**ALL_WELL, "containers": "off: no engine answers"}
    assert (answer.status_code, answer.json()["parts"]) == (200, parts)


def test_a_missing_object_store_is_named(tmp_path: Path, temporal: DevTemporal) -> None:
    """The others are well."""
    with serving(tmp_path, temporal) as api:
        (tmp_path / "objects").touch()
        answer = api.http.get("/readyz")
    parts = {**ALL_WELL, "object_store": "the object store cannot be written: File exists"}
    assert (answer.status_code, answer.json()["parts"]) == (503, parts)


def test_a_missing_log_store_is_named(tmp_path: Path, temporal: DevTemporal, postgres_url: str) -> None:
    """The others are well."""
    with fresh_database(postgres_url) as url:
        api = RunningApi(settings_for(tmp_path, temporal.port, logs_url=url))
        api.__enter__()
    try:
        answer = api.http.get("/readyz")
    finally:
        api.__exit__(None, None, None)
    parts = answer.json()["parts"]
    assert answer.status_code == 503
    assert {name for name, state in parts.items() if state != "ok"} == {"logs", "containers"}


def test_a_missing_catalog_is_named(tmp_path: Path, temporal: DevTemporal, postgres_url: str) -> None:
    """The others are well, and the process is alive."""
    with without_catalog(tmp_path, temporal, postgres_url) as (api, _):
        answer, alive = api.http.get("/readyz"), api.http.get("/healthz")
    body = {"status": "unavailable", "ec2": "simulated", "parts": {**ALL_WELL, "catalog": NO_CATALOG}}
    assert (answer.status_code, answer.json(), answer.headers["Retry-After"]) == (503, body, "5")
    assert alive.status_code == 200


def test_without_the_catalog_every_call_is_a_503(tmp_path: Path, temporal: DevTemporal, postgres_url: str) -> None:
    """In the contract's shape, with a time after which to try again, and without a word of the database."""
    calls = [
        ("GET", "/api/v1/images"),
        ("GET", f"/api/v1/images/builds/{BUILD_ID}"),
        ("GET", f"/api/v1/images/builds/{BUILD_ID}/logs"),
        ("POST", f"/api/v1/images/builds/{BUILD_ID}/cancel"),
        ("DELETE", "/api/v1/images/ami-0abcdef1234567890"),
        ("GET", "/api/v1/builds"),
        ("GET", f"/api/v1/builds/{BUILD_ID}"),
        ("GET", f"/api/v1/builds/{BUILD_ID}/logs"),
        ("POST", f"/api/v1/builds/{BUILD_ID}/cancel"),
        ("GET", "/metrics"),
    ]
    with without_catalog(tmp_path, temporal, postgres_url) as (_, tenant):
        for method, path in calls:
            answer = tenant.http.request(method, path)
            assert (answer.status_code, answer.json()) == (503, error("unavailable", NO_CATALOG)), path
            assert answer.headers["Retry-After"] == "5"
        answer = tenant.submit()
        assert (answer.status_code, answer.json()) == (503, shared_error("unavailable", NO_CATALOG))
        assert answer.headers["Retry-After"] == "5"


def test_metrics_count_builds_and_slots(tmp_path: Path, temporal: DevTemporal) -> None:
    """Builds by kind and status, and slots by living worker, as Prometheus reads them."""
    with serving(tmp_path, temporal) as api:
        tenant = Tenant(api)
        tenant.queued()
        tenant.queued()
        tenant.failed("no")
        with api.catalog.transaction() as tx:
            workers.note(tx, Presence("worker-1", "packer", ("kiln.packer",), slots=4))
        answer = api.http.get("/metrics")
        tenant.close()
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert samples(answer.text, "kiln_builds") == {("machine", "queued"): 2, ("machine", "failed"): 1}
    assert samples(answer.text, "kiln_worker_slots") == {("packer", "worker-1"): 4}


def test_the_documents(api: RunningApi) -> None:
    """A page for people, over the document for programs."""
    page, document = api.http.get("/docs"), api.http.get("/openapi.json")
    assert (page.status_code, document.status_code) == (200, 200)
    assert page.headers["Content-Type"].startswith("text/html")
    assert "/openapi.json" in page.text
    assert document.json()["openapi"].startswith("3.1")


def test_a_fault_of_kilns_own_is_a_500_that_shows_nothing(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stack trace, no path, no SQL: one sentence."""

    def fail(*_arguments: object) -> None:
        raise RuntimeError("SELECT secret FROM /etc/passwd")

    monkeypatch.setattr("api.machine_images.understand", fail)
    answer = tenant.submit()
    message = "the server failed; the failure is in its log"
    assert (answer.status_code, answer.json()) == (500, error("internal", message))


def test_a_rate_limit_is_each_keys_own(tmp_path: Path, temporal: DevTemporal) -> None:
    """Where one is set: past it a 429 that says how long to wait, for this key and for builds alone."""
    with serving(tmp_path, temporal, machine_build_rate="2/minute") as api:
        tenant, other = Tenant(api), Tenant(api)
        assert [tenant.submit().status_code for _ in range(2)] == [202, 202]
        answer = tenant.submit()
        message = "at most 2 requests in 1 minute are served"
        assert (answer.status_code, answer.json()) == (429, error("rate_limited", message))
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert tenant.http.get("/api/v1/images").status_code == 200
        assert other.submit().status_code == 202
        tenant.close()
        other.close()
