"""How often one caller is served by container-images: counted in the process, or by Redis for several of them."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import redis

from api.limits import container_limits
from kiln.settings import SettingsError
from support.api_server import RunningApi, settings_for
from support.containers import IMAGES, Owner
from support.dev_temporal import DevTemporal
from support.ports import free_ports

RATES = {f"container_{name}_rate": "2/minute" for name in ("build", "list", "delete", "patch")}
START_SECONDS = 10.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> Iterator[RunningApi]:
    with RunningApi(settings_for(tmp_path_factory.mktemp("limited"), temporal.port, **RATES)) as api:
        yield api


def calls(owner: Owner) -> dict[str, httpx.Request]:
    """One request of each kind that has a limit."""
    return {
        "build": owner.http.build_request("POST", f"{IMAGES}/build", json={"image_name": "App"}),
        "list": owner.http.build_request("GET", f"{IMAGES}?limit=1"),
        "delete": owner.http.build_request("DELETE", f"{IMAGES}/a/b"),
        "patch": owner.http.build_request("PATCH", IMAGES, json={"updates": []}),
    }


@pytest.mark.parametrize("kind", ["build", "list", "delete", "patch"])
def test_past_a_limit_a_caller_waits(server: RunningApi, kind: str) -> None:
    """429 with when it is served again; another key is not held up."""
    owner, other = Owner(server), Owner(server)
    request = calls(owner)[kind]
    served = [owner.http.send(request).status_code for _ in range(2)]
    refused = owner.http.send(request)
    assert 429 not in served
    assert (refused.status_code, list(refused.json())) == (429, ["detail"])
    limits = {name: refused.headers[f"X-RateLimit-{name}"] for name in ("Limit", "Remaining", "Reset")}
    assert limits == {"Limit": "2", "Remaining": "0", "Reset": refused.headers["Retry-After"]}
    assert 50 < int(limits["Reset"]) <= 60
    assert other.http.send(calls(other)[kind]).status_code != 429
    owner.close()
    other.close()


def test_machine_images_and_unread_bodies_do_not_count(server: RunningApi) -> None:
    """The limit is container-images' own: counted once it is clear whose a request is."""
    owner = Owner(server)
    for _ in range(3):
        assert owner.submit().status_code == 202
        assert owner.http.get(IMAGES).status_code == 200
        assert owner.http.post(f"{IMAGES}/build", content=b"{").status_code == 422
    assert owner.post(image_name="App").status_code == 422
    owner.close()


@contextmanager
def running_redis(folder: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A Redis that keeps nothing on disk, and its process."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    port = free_ports(1)[0]
    argv = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        _until_it_answers(port)
        yield f"redis://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def _until_it_answers(port: int) -> None:
    end = time.monotonic() + START_SECONDS
    with redis.Redis(port=port) as client:
        while True:
            try:
                client.ping()
            except redis.ConnectionError:
                assert time.monotonic() < end, "Redis does not start"
                time.sleep(0.02)
            else:
                return


def test_processes_count_together_through_redis(tmp_path: Path, temporal: DevTemporal) -> None:
    """What one has served counts with the other; once Redis is gone, each serves on and counts for itself."""
    with running_redis(tmp_path) as (url, process):
        settings = settings_for(tmp_path / "home", temporal.port, **RATES, rate_storage=url)
        with RunningApi(settings) as one, RunningApi(settings) as two:
            owner = Owner(one)
            key = {"Authorization": f"Bearer {owner.key}"}
            servers = (one, two, one, two)
            assert [api.http.get(f"{IMAGES}?limit=1", headers=key).status_code for api in servers] == [
                200,
                200,
                429,
                429,
            ]
            process.kill()
            process.wait()
            alone = [two.http.get(f"{IMAGES}?limit=1", headers=key).status_code for _ in range(3)]
            assert alone == [200, 200, 429]
            owner.close()


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"container_build_rate": "often"}, "KILN_CONTAINER_BUILD_RATE"),
        ({"container_patch_rate": "1 per"}, "KILN_CONTAINER_PATCH_RATE"),
        ({"rate_storage": "mars://host"}, "KILN_RATE_STORAGE"),
        ({"rate_storage": "redis"}, "KILN_RATE_STORAGE"),
    ],
)
def test_a_limit_that_cannot_be_read_names_its_setting(tmp_path: Path, changes: dict[str, str], setting: str) -> None:
    """One line, before anything is served."""
    with pytest.raises(SettingsError, match=f"^{setting}: "):
        container_limits(settings_for(tmp_path, 1, **changes))


def test_an_empty_rate_is_no_limit(tmp_path: Path) -> None:
    """For whoever limits elsewhere."""
    limit = container_limits(settings_for(tmp_path, 1, container_build_rate="")).build
    for _ in range(1000):
        limit.check("127.0.0.1", "a-key")
