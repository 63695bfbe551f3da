"""cloud-builds: what `POST /v5/builds` refuses, and that nothing of it is kept."""

import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from api import uploads
from api.multipart import AROUND_FILE_BYTES, TEXT_LIMIT_BYTES
from support.api_server import RunningApi, settings_for
from support.archives import archive, context_archive, file, packed, repeated, symlink, tar
from support.cloud import (
    ARCHIVE,
    BOUNDARY,
    FORM_HEADERS,
    Account,
    Kept,
    Part,
    answer_of,
    connection,
    fields,
    form,
    part,
    until_kept,
)
from support.dev_temporal import DevTemporal
from support.tenants import Tenant

LIMIT_BYTES = 1_500_000
UNPACKED_BYTES = 1_000_000
UNKNOWN = "550e8400-e29b-41d4-a716-446655440000"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> Iterator[RunningApi]:
    """An API that takes small archives only."""
    limits = {"max_context_bytes": LIMIT_BYTES, "max_unpacked_bytes": UNPACKED_BYTES}
    with RunningApi(settings_for(tmp_path_factory.mktemp("small"), temporal.port, **limits)) as api:
        yield api


@pytest.fixture
def account(small: RunningApi) -> Iterator[Account]:
    account = Account(small)
    yield account
    account.close()


@pytest.fixture
def kept(account: Account) -> Kept:
    return Kept(account.api)


def refused(answer: httpx.Response, status: int = 422) -> str:
    """The one sentence of a refusal."""
    assert answer.status_code == status, answer.text
    (detail,) = answer.json().values()
    assert list(answer.json()) == ["detail"]
    assert isinstance(detail, str)
    return detail


@pytest.mark.parametrize(
    ("changes", "part_name"),
    [
        ({"image_name": None}, "image_name"),
        ({"image_name": ""}, "image_name"),
        ({"image_name": "App"}, "image_name"),
        ({"image_name": "a//b"}, "image_name"),
        ({"image_name": "a" * 256}, "image_name"),
        ({"image_name": "app\0"}, "image_name"),
        ({"image_name": "platform/app"}, "image_name"),
        ({"image_tag": ""}, "image_tag"),
        ({"image_tag": ".v1"}, "image_tag"),
        ({"image_tag": "v" * 129}, "image_tag"),
        ({"agent_name": None}, "agent_name"),
        ({"agent_name": " "}, "agent_name"),
        ({"agent_name": "a" * 256}, "agent_name"),
        ({"agent_name": "a\nb"}, "agent_name"),
        ({"agent_id": UNKNOWN}, "agent_id"),
        ({"image_url": "docker.io/library/busybox"}, "image_url"),
        ({"platform": "linux/riscv64"}, "platform"),
        ({"platform": ""}, "platform"),
        ({"source_commit": "c" * 65}, "source_commit"),
        ({"working_tree_hash": "h" * 65}, "working_tree_hash"),
        ({"source_ref": "r" * 256}, "source_ref"),
        ({"source_repo": "r\0"}, "source_repo"),
        ({"source_dirty": "yes"}, "source_dirty"),
        ({"build_args": ""}, "build_args"),
        ({"build_args": "{"}, "build_args"),
        ({"build_args": "[]"}, "build_args"),
        ({"build_args": '{"A": 1}'}, "build_args.A"),
        ({"build_args": '{"A": null}'}, "build_args.A"),
        ({"build_args": '{"1A": "x"}'}, "build_args.1A"),
        ({"build_args": '{"A-B": "x"}'}, "build_args.A-B"),
        ({"build_args": '{"BUILDKIT_SYNTAX": "evil/frontend"}'}, "build_args.BUILDKIT_SYNTAX"),
        ({"build_args": '{"A": "\\u0000"}'}, "build_args.A"),
        ({"build_args": '{"A": "\\ud800"}'}, "build_args"),
        ({"build_args": json.dumps({"A": "x" * 17_000})}, "build_args.A"),
        ({"build_args": json.dumps({f"A{number}": "" for number in range(201)})}, "build_args"),
        ({"source_subpath": "x" * (TEXT_LIMIT_BYTES + 1)}, "source_subpath"),
        ({"colour": "red"}, "colour"),
        ({"context": "x"}, "context"),
    ],
)
def test_a_bad_text(account: Account, kept: Kept, changes: dict[str, str | None], part_name: str) -> None:
    """The refusal names the part, and nothing is kept."""
    assert refused(account.post(**changes)).startswith(f"{part_name}: ")
    assert Kept(account.api) == kept


def test_names_that_are_owners(account: Account, kept: Kept) -> None:
    """A name does not begin with one of the account's own namespaces."""
    for owner in (account.slug, f"team-{account.organization_id}"):
        detail = refused(account.post(image_name=f"{owner}/app"))
        assert detail.startswith("image_name: may not begin with ")
    assert Kept(account.api) == kept


@pytest.mark.parametrize("extra", [{"build_args": "{}"}, {"platform": "linux/amd64"}])
def test_a_finished_image_is_not_built(account: Account, kept: Kept, extra: dict[str, str]) -> None:
    """`image_url` goes without `build_args` and `platform`."""
    detail = refused(account.post(archive=None, image_url="docker.io/library/busybox", **extra))
    assert detail.startswith(f"{next(iter(extra))}: ")
    assert Kept(account.api) == kept


def test_neither_archive_nor_image(account: Account, kept: Kept) -> None:
    """One of the two must be there."""
    assert refused(account.post(archive=None)) == "context_archive: either it or image_url must be sent"
    assert Kept(account.api) == kept


def test_an_unknown_agent(account: Account, kept: Kept) -> None:
    """An id of nobody's, of another account's, and what is no id at all are the same 404."""
    other = Account(account.api)
    theirs = other.submitted()["agent_id"]
    other.close()
    kept = Kept(account.api)
    for agent_id in (UNKNOWN, theirs, "x", "\0"):
        detail = refused(account.post(agent_name=None, agent_id=agent_id), 404)
        assert detail == "agent_id: no agent of this account has this id"
    assert Kept(account.api) == kept


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the archive is empty"),
        (b"no gzip at all", "not a gzip"),
        (packed(b"no tar at all" * 100), "not a tar"),
        (ARCHIVE[:-30], "ends in the middle"),
        (ARCHIVE + b"more", "other data"),
        (archive({"readme": b"x"}), "Dockerfile"),
        (archive({"app/Dockerfile": b"FROM scratch\n"}), "Dockerfile"),
        (context_archive({"../out": b"x"}), "../out"),
        (context_archive({"/etc/passwd": b"x"}), "/etc/passwd"),
        (archive({"Dockerfile": b"FROM scratch\n"}, symlink("out", "../../etc/passwd")), "out"),
        (
            repeated(tar(file("Dockerfile", b"FROM scratch\n"))[:-1024], bytes(100_000), 11),
            "1000000 bytes when unpacked",
        ),
    ],
)
def test_a_bad_archive(account: Account, kept: Kept, content: bytes, problem: str) -> None:
    """The refusal says what is wrong with it, and nothing is kept."""
    detail = refused(account.post(content))
    assert detail.startswith("context_archive: ")
    assert problem in detail
    assert Kept(account.api) == kept


@pytest.mark.parametrize(
    ("parts", "part_name"),
    [
        ([*fields().items(), ("context_archive", ARCHIVE), ("platform", "x")], "platform"),
        ([("context_archive", ARCHIVE), ("image_name", "app")], "agent_name"),
        ([*fields().items(), ("context_archive", ARCHIVE), ("image_url", "docker.io/a/b")], "image_url"),
        ([*fields().items(), ("context_archive", ARCHIVE), ("context_archive", ARCHIVE)], "context_archive"),
        ([*fields().items(), ("image_name", "app"), ("context_archive", ARCHIVE)], "image_name"),
    ],
)
def test_a_file_is_dropped_when_a_later_part_is_bad(
    account: Account, kept: Kept, parts: Sequence[Part], part_name: str
) -> None:
    """What came before the mistake is not kept either."""
    assert refused(account.post_parts(parts)).startswith(f"{part_name}: ")
    assert Kept(account.api) == kept


@pytest.mark.parametrize(
    ("body", "media_type", "field"),
    [
        (b"{}", "application/json", "Content-Type"),
        (form([*fields().items(), ("context_archive", ARCHIVE)]), "multipart/form-data", "Content-Type"),
        (b"", f"multipart/form-data; boundary={'b' * 71}", "Content-Type"),
        (b"", FORM_HEADERS["Content-Type"], "body"),
        (b"preamble that is none", FORM_HEADERS["Content-Type"], "body"),
        (part("image_name", "app"), FORM_HEADERS["Content-Type"], "image_name"),
        (part("context_archive", ARCHIVE), FORM_HEADERS["Content-Type"], "context_archive"),
        (f"--{BOUNDARY}\r\n\r\nnameless\r\n--{BOUNDARY}--\r\n".encode(), FORM_HEADERS["Content-Type"], "body"),
        (f"--{BOUNDARY}\r\nno header\r\n\r\nx\r\n".encode(), FORM_HEADERS["Content-Type"], "body"),
        (form([("image_name", b"\xff")]), FORM_HEADERS["Content-Type"], "image_name"),
        (f"--{BOUNDARY}--\r\n".encode(), FORM_HEADERS["Content-Type"], "image_name"),
    ],
)
def test_a_broken_form(account: Account, kept: Kept, body: bytes, media_type: str, field: str) -> None:
    """A body that is no form, or ends before its time: a 422 that says where."""
    answer = account.cloud.post("/v5/builds", content=body, headers={"Content-Type": media_type})
    assert refused(answer).startswith(f"{field}: ")
    assert Kept(account.api) == kept


@pytest.mark.parametrize("declared", [True, False])
def test_an_archive_past_the_limit(account: Account, kept: Kept, declared: bool) -> None:
    """A 413, which a client that goes on sending gets to read; then the connection is closed."""
    body = form([*fields().items(), ("context_archive", ARCHIVE + bytes(8_000_000))])
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    answer = account.cloud.post("/v5/builds", content=body if declared else pieces, headers=FORM_HEADERS)
    refused(answer, 413)
    assert answer.headers["Connection"] == "close"
    until_kept(account.api, kept)


def test_a_length_past_the_limit(account: Account) -> None:
    """What is announced as too long is refused before any of it is sent."""
    with connection(account.api) as opened:
        opened.sendall(account.head(LIMIT_BYTES + AROUND_FILE_BYTES + 1))
        status, headers, _ = answer_of(opened)
    assert (status, headers["connection"]) == (413, "close")


def begin_of(archive: bytes, **changes: str) -> bytes:
    """A form up to somewhere in its file."""
    return form(list(fields(**changes).items()))[: -len(f"--{BOUNDARY}--\r\n")] + part("context_archive", archive)


@pytest.mark.parametrize(
    ("archive", "status"),
    [(ARCHIVE + bytes(LIMIT_BYTES), 413), (b"no gzip at all" + bytes(uploads.BATCH_BYTES), 422)],
)
def test_the_answer_comes_in_the_middle_of_the_archive(
    account: Account, kept: Kept, archive: bytes, status: int
) -> None:
    """As soon as it is known to be past the limit or none, however long the caller waits before the rest."""
    begin = begin_of(archive)
    with connection(account.api) as opened:
        opened.sendall(account.head(None) + f"{len(begin):x}\r\n".encode() + begin + b"\r\n")
        assert answer_of(opened)[0] == status
    until_kept(account.api, kept)


def test_texts_are_checked_before_the_file_is_read(account: Account) -> None:
    """With the file last, a bad text is refused though no byte of the file was sent."""
    begin = begin_of(b"", image_name="App")
    with connection(account.api) as opened:
        opened.sendall(account.head(len(begin) + 50_000) + begin)
        status, _, body = answer_of(opened)
    assert status == 422
    assert json.loads(body)["detail"].startswith("image_name: must be")


def test_a_caller_who_leaves_in_the_middle(account: Account, kept: Kept) -> None:
    """An upload that breaks off leaves nothing, whole batches of it that were stored included."""
    stored = context_archive({"noise": bytes(range(256)) * 300})
    begin = begin_of(stored[:-100])
    with connection(account.api) as opened:
        opened.sendall(account.head(len(begin) + 10_000) + begin)
        until_begun(account.api)
    until_kept(account.api, kept)


def until_begun(api: RunningApi) -> None:
    """Returns once an upload is on its way into the object store."""
    deadline = time.monotonic() + 10
    while not list((api.settings.home_dir / "objects").rglob("*.part")):
        assert time.monotonic() < deadline, "the upload does not begin"
        time.sleep(0.01)


def test_a_caller_who_falls_silent(account: Account, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection on which nothing comes any more does not hold its upload for ever."""
    monkeypatch.setattr(uploads, "IDLE_SECONDS", 0.1)
    begin = begin_of(ARCHIVE[:100])
    with connection(account.api) as opened:
        opened.sendall(account.head(len(begin) + 10_000) + begin)
        assert answer_of(opened)[0] == 422
    until_kept(account.api, kept)


def test_a_server_that_stops(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> None:
    """An upload that is on its way when the server stops leaves nothing."""
    with RunningApi(settings_for(tmp_path_factory.mktemp("stop"), temporal.port)) as api:
        account = Account(api)
        kept, begin = Kept(api), begin_of(ARCHIVE[:100])
        with connection(api) as opened:
            opened.sendall(account.head(len(begin) + 10_000) + begin)
            until_begun(api)
            api.stop()
            until_kept(api, kept)
        account.close()


def test_no_workflow_for_what_is_refused(account: Account, temporal: DevTemporal) -> None:
    """Temporal hears of the build that was taken on, and of nothing else."""
    before = temporal.workflow_ids()
    account.post(b"no gzip")
    account.post(platform="x")
    wanted = {account.submitted()["cloud_provider_build_id"]}
    deadline = time.monotonic() + 10
    while not (found := temporal.workflow_ids() - before) >= wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    assert found == wanted


def test_key_then_account_then_scope(account: Account) -> None:
    """401 for the key whatever the account, 403 for the account whatever the scope, 403 for the scope."""
    other = Tenant(account.api)
    reader, past = account.new_key("builds:read"), datetime.now(UTC) - timedelta(hours=1)
    own, expired = account.organization_id, account.new_key("admin", expires_at=past)
    calls = [
        ("", own, 401),
        ("amk_nobody", "nobody", 401),
        (expired, own, 401),
        (account.new_key("pods:read"), other.organization_id, 403),
        (reader, "", 403),
        (reader, own, 403),
    ]
    for key, named, status in calls:
        headers = {"x-api-key": key, "x-selected-account-id": named, **FORM_HEADERS}
        answer = httpx.post(f"{account.api.url}/v5/builds", headers=headers, content=form([]), verify=False)
        detail = refused(answer, status)
        if status == 401:
            assert answer.headers["WWW-Authenticate"] == "APIKey"
        else:
            assert detail.startswith("x-selected-account-id: " if named != own else "the API key lacks the scope")
    other.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v5/nothing", 404),
        ("GET", "/v5/builds/", 404),
        ("PUT", "/v5/builds", 405),
        ("DELETE", f"/v5/builds/{UNKNOWN}", 405),
        ("GET", f"/v5/builds/{UNKNOWN}/cancel", 405),
        ("GET", f"/v5/builds/{UNKNOWN}", 404),
        ("GET", "/v5/builds/no-uuid", 404),
        ("GET", "/v5/builds/%00", 404),
        ("GET", f"/v5/builds/{UNKNOWN}/logs", 404),
        ("POST", f"/v5/builds/{UNKNOWN}/cancel", 404),
    ],
)
def test_errors_are_one_sentence(account: Account, method: str, path: str, status: int) -> None:
    """Also where the routing itself refuses."""
    refused(account.cloud.request(method, path), status)


def test_where_container_builds_are_off(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> None:
    """An archive is refused with the reason, before any of it is stored."""
    with RunningApi(settings_for(tmp_path_factory.mktemp("off"), temporal.port, containers=False)) as api:
        account = Account(api)
        kept = Kept(api)
        assert refused(account.post(), 503).startswith("container builds are off: ")
        assert Kept(api) == kept
        account.close()
