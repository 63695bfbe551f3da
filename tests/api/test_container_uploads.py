"""The upload of a build's context over HTTP, to a signed URL, and the build's start."""

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from support.api_server import RunningApi, settings_for
from support.archives import archive, packed
from support.cloud import Kept
from support.containers import ARCHIVE, BUILD, UNKNOWN_ID, Owner, refusal
from support.dev_temporal import DevTemporal
from support.rows import rewrite
from support.tenants import on_both_databases


@on_both_databases
def test_an_uploaded_build_starts_once(owner: Owner) -> None:
    """409 before the upload, 200 after it and again; then no upload replaces it."""
    order = owner.ordered()
    build_id, url = order["build_id"], order["upload_url"]
    assert refusal(owner.start(build_id)) == (409, "the build context has not been uploaded yet")
    uploaded = owner.put(url)
    assert (uploaded.status_code, uploaded.json()["sizeBytes"]) == (200, len(ARCHIVE))
    first, second = owner.start(build_id), owner.start(build_id)
    assert (first.status_code, first.json()["status"]) == (200, "PENDING")
    assert (second.status_code, second.json()) == (200, first.json())
    assert refusal(owner.put(url)) == (409, "the build has begun with the context that it has")
    row = owner.row(build_id)
    assert (row.context_sha256, row.status) == (uploaded.json()["sha256"], "queued")


def test_an_upload_before_the_start_replaces_the_one_before(owner: Owner) -> None:
    """One that is refused replaces nothing."""
    order = owner.ordered()
    owner.put(order["upload_url"])
    other = archive({"Dockerfile": b"FROM scratch\n", "other": b"2"})
    latest = owner.put(order["upload_url"], other).json()["sha256"]
    assert refusal(owner.put(order["upload_url"], b"no archive"))[0] == 422
    kept = Path(owner.api.settings.home_dir) / "objects" / "contexts" / order["build_id"]
    assert (kept.read_bytes(), owner.row(order["build_id"]).context_sha256) == (other, latest)


def test_an_upload_that_ends_after_the_start_changes_nothing(owner: Owner) -> None:
    """The build is made from the context that was there when it was started."""
    order = owner.ordered()
    first = owner.put(order["upload_url"]).json()["sha256"]

    def late() -> Iterator[bytes]:
        other = archive({"Dockerfile": b"FROM scratch\n", "other": b"2"})
        yield other[:20]
        assert owner.start(order["build_id"]).status_code == 200
        yield other[20:]

    assert refusal(owner.put(order["upload_url"], late()))[0] == 409
    kept = Path(owner.api.settings.home_dir) / "objects" / "contexts" / order["build_id"]
    assert (kept.read_bytes(), owner.row(order["build_id"]).context_sha256) == (ARCHIVE, first)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"no archive", "gzip"),
        (packed(b"no tar" * 200), "tar"),
        (archive({"other": b""}), "Dockerfile"),
        (archive({"Dockerfile": b"", "../out": b""}), "../out"),
        (ARCHIVE[:-20], ""),
    ],
)
def test_what_cannot_be_built_from_is_not_kept(owner: Owner, content: bytes, says: str) -> None:
    """422 with the rule that it breaks; the build goes on waiting."""
    order = owner.ordered()
    before = Kept(owner.api)
    status, message = refusal(owner.put(order["upload_url"], content))
    assert (status, Kept(owner.api)) == (422, before)
    assert says in message
    assert owner.status(order["build_id"])["status"] == "UPLOADING"


@pytest.fixture(scope="module")
def small_api(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> Iterator[RunningApi]:
    """A server with a public URL, that takes small contexts, for 1 second."""
    home = tmp_path_factory.mktemp("small")
    changes = {"max_context_bytes": 4096, "upload_seconds": 1, "public_url": "https://kiln.test/"}
    with RunningApi(settings_for(home, temporal.port, **changes)) as api:
        yield api


def at(api: RunningApi, url: str) -> str:
    """The same path and query at the server's own address."""
    place = urlsplit(url)
    return f"{api.url}{place.path}?{place.query}"


def test_an_upload_past_the_limit_is_refused_at_once(small_api: RunningApi) -> None:
    """413 before the whole is read, with its length announced or without; nothing is kept."""
    owner = Owner(small_api)
    order = owner.ordered()
    assert order["upload_url"].startswith("https://kiln.test/api/v1/images/uploads/")
    before = Kept(small_api)
    url = at(small_api, order["upload_url"])
    announced = owner.put(url, b"x" * 5000)
    # Incompressible, so that it is its length that is refused.
    streamed = owner.put(url, iter([archive({"Dockerfile": b"", "blob": bytes(small_noise(9000))})]))
    assert [refusal(answer)[0] for answer in (announced, streamed)] == [413, 413]
    assert Kept(small_api) == before
    owner.close()


def small_noise(length: int) -> Iterator[int]:
    state = 1
    for _ in range(length):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        yield state >> 16 & 0xFF


def test_an_expired_url_takes_nothing(small_api: RunningApi) -> None:
    """403 once its time is over."""
    owner = Owner(small_api)
    url = at(small_api, owner.ordered()["upload_url"])
    time.sleep(max(0.0, int(parse_qs(urlsplit(url).query)["expires"][0]) - time.time()))
    assert refusal(owner.put(url)) == (403, "the upload URL has expired, or is not as it was given out")
    owner.close()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"signature=.", "signature=x"),
        (r"expires=\d", "expires=9"),
        (r"&signature=.*", ""),
        (r"expires=\d+", "expires="),
        (r"uploads/[^?]+", f"uploads/{UNKNOWN_ID}"),
        (r"uploads/[^?]+", "uploads/%00"),
        (r"signature=.*", "signature=%C3%A9"),
    ],
)
def test_an_altered_url_takes_nothing(owner: Owner, old: str, new: str) -> None:
    """403, whatever was altered."""
    order = owner.ordered()
    altered = re.sub(old, new, order["upload_url"])
    assert altered != order["upload_url"]
    assert refusal(owner.put(altered))[0] == 403
    assert not owner.row(order["build_id"]).context_uploaded_at


def test_a_cancelled_build_takes_no_context(owner: Owner) -> None:
    """The cancel reads CANCELLED at once, since nothing had begun; upload and start are 409."""
    order = owner.ordered()
    cancelled = owner.http.post(f"{BUILD}/{order['build_id']}/cancel")
    again = owner.http.post(f"{BUILD}/{order['build_id']}/cancel")
    assert (cancelled.status_code, again.status_code) == (202, 202)
    assert owner.status(order["build_id"])["id"] == again.json()["id"]
    assert refusal(owner.put(order["upload_url"]))[0] == 409
    assert refusal(owner.start(order["build_id"]))[0] == 409


@pytest.mark.parametrize("body", [{}, [], {"context_uploaded": False}, {"context_uploaded": "true"}, {"x": 1}, None])
def test_a_start_that_says_nothing_is_a_422(owner: Owner, body: Any) -> None:
    """`context_uploaded` must be true."""
    order = owner.ordered()
    owner.put(order["upload_url"])
    answer = owner.http.post(f"{BUILD}/{order['build_id']}/start", json=body)
    assert refusal(answer)[0] == 422
    assert owner.status(order["build_id"])["status"] == "UPLOADING"


def test_an_order_of_an_ended_upload_time_says_so_at_the_start(owner: Owner) -> None:
    """A build that nobody uploaded to in time is not started."""
    order = owner.ordered()
    rewrite(owner.catalog, order["build_id"], upload_until=datetime.now(UTC) - timedelta(seconds=1))
    assert refusal(owner.start(order["build_id"]))[0] == 409
