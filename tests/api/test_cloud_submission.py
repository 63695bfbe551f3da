"""cloud-builds: what `POST /v5/builds` takes on."""

import gzip
import hashlib
import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kiln.catalog import agents, tags
from kiln.catalog.tables import Tag
from kiln.models import BuildRef
from kiln.naming import build_workflow_id, context_key
from kiln.registry_tokens import RegistryTokens, make_key_file
from support.api_server import RunningApi, settings_for
from support.archives import context_archive, file, tar
from support.cloud import ARCHIVE, FORM_HEADERS, Account, Kept, fields, form, published_client
from support.dev_temporal import DevTemporal
from support.oci_images import Pusher, image, index
from support.parallel import in_parallel
from support.registry import running_registry
from support.tenants import on_both_databases

SECOND = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
NATIVE = {"x86_64": "linux/amd64", "aarch64": "linux/arm64", "arm64": "linux/arm64"}
SOURCE = {
    "source_commit": "0" * 40,
    "source_ref": "main",
    "source_repo": "git.test/acme/agents",
    "source_subpath": "agents/scout",
    "working_tree_hash": "f" * 64,
}


@pytest.fixture
def account(api: RunningApi) -> Iterator[Account]:
    account = Account(api)
    yield account
    account.close()


def stored(api: RunningApi, build_id: str) -> Path:
    return api.settings.home_dir / "objects" / context_key(build_id)


@on_both_databases
def test_the_published_client_submits_a_build(account: Account) -> None:
    """Its create call answers with the build, whose every field is the contract's."""
    with published_client(account) as client:
        made = client.build.with_raw_response.create(
            image_name="agents/scout",
            image_tag="v1",
            agent_name="scout",
            context_archive=("context.tar.gz", ARCHIVE),
            build_args=json.dumps({"VERSION": "1"}),
            platform="linux/arm64",
            source_dirty=True,
            **SOURCE,
        )
    build = made.json()
    row = account.row(build["id"])
    assert SECOND.fullmatch(build["created_at"])
    assert build == {
        "id": row.id,
        "object": "agentex_cloud_build",
        "account_id": account.organization_id,
        "agent_name": "scout",
        "agent_id": row.agent_id,
        "build_status": "queued",
        "cloud_provider_build_id": build_workflow_id(row.id),
        "created_at": build["created_at"],
        "created_by": {"id": row.created_by, "type": "user", "object": "identity"},
        "image_name": "agents/scout",
        "image_tag": "v1",
        "image_url": None,
        "build_start_time": None,
        "build_end_time": None,
        "source_dirty": True,
        **SOURCE,
    }


def test_the_row_and_the_object_are_the_order(account: Account) -> None:
    """The row says what is to be built, the object is the archive as it came, and the tag knows its newest build."""
    build = account.submitted(build_args='{"VERSION": "1", "NPM_TOKEN": "s3cr3t"}', source_dirty="false")
    row = account.row(build["id"])
    assert stored(account.api, row.id).read_bytes() == ARCHIVE
    assert (row.kind, row.api, row.status, row.repository, row.tag) == (
        "container",
        "cloud-builds",
        "queued",
        f"{account.slug}/app",
        "latest",
    )
    assert (row.context_sha256, row.context_bytes) == (hashlib.sha256(ARCHIVE).hexdigest(), len(ARCHIVE))
    assert (row.spec["build_args"], row.spec["secret_names"]) == ({"VERSION": "1"}, ["NPM_TOKEN"])
    assert account.api.parts.sealer.open(row.secrets) == {"NPM_TOKEN": "s3cr3t"}
    assert b"s3cr3t" not in (row.secrets or b"")
    with account.catalog.read() as session:
        found = tags.find(session, account.slug, "app", "latest")
    assert found is not None
    assert (found.build.id, found.tag.visibility) == (row.id, "PRIVATE")


def test_the_workflow_is_started(account: Account, temporal: DevTemporal) -> None:
    """Temporal has the build, with its kind and platform, and has not to wait for a context."""
    build = account.submitted(platform="linux/arm/v7")
    history = temporal.run(temporal.client.get_workflow_handle(build["cloud_provider_build_id"]).fetch_history())
    started = history.events[0].workflow_execution_started_event_attributes
    ref = temporal.client.data_converter.payload_converter.from_payload(started.input.payloads[0], BuildRef)
    assert (ref.build_id, ref.kind, ref.platform, ref.awaits_context) == (
        build["id"],
        "container",
        "linux/arm/v7",
        False,
    )


def test_the_platform_is_the_builders_own(account: Account) -> None:
    """Without a platform it is this host's."""
    assert account.row(account.submitted()["id"]).platform == NATIVE[platform.machine()]


def test_the_file_may_come_first(account: Account) -> None:
    """A form whose texts follow its file is served all the same."""
    answer = account.post_parts([("context_archive", ARCHIVE), *fields().items()])
    assert answer.status_code == 200
    assert stored(account.api, answer.json()["id"]).read_bytes() == ARCHIVE


def test_a_body_without_a_length(account: Account) -> None:
    """Pieces of a few bytes, their number unknown, are put together again."""
    whole = form([*fields().items(), ("context_archive", ARCHIVE)])
    pieces = (whole[at : at + 7] for at in range(0, len(whole), 7))
    answer = account.cloud.post("/v5/builds", content=pieces, headers=FORM_HEADERS)
    assert answer.status_code == 200
    assert stored(account.api, answer.json()["id"]).read_bytes() == ARCHIVE


def test_an_archive_that_looks_like_a_form(account: Account) -> None:
    """Boundaries that are none, and line ends of every kind, are the archive's own."""
    content = b"\r\n--a-boundarx\r\n--a-bound\r\r\n\r\n--a-b" * 5000
    archive = gzip.compress(tar(file("Dockerfile", b"FROM scratch\n"), file("odd", content)), compresslevel=0)
    build = account.submitted(archive=archive)
    assert stored(account.api, build["id"]).read_bytes() == archive


@pytest.mark.parametrize("header", ["organization_id", "slug"])
def test_the_account_by_id_or_slug(account: Account, header: str) -> None:
    """Whichever form the header has, answers show the id."""
    account.cloud.headers["x-selected-account-id"] = getattr(account, header)
    assert account.submitted()["account_id"] == account.organization_id


def test_an_agent_is_made_once(account: Account) -> None:
    """A name finds the agent that an earlier build made, and so does its id."""
    first = account.submitted(agent_name="scout")
    again = account.submitted(agent_name="scout")
    by_id = account.submitted(agent_name=None, agent_id=first["agent_id"])
    other = account.submitted(agent_name="ranger")
    assert first["agent_id"] == again["agent_id"] == by_id["agent_id"] != other["agent_id"]
    assert by_id["agent_name"] == "scout"


@on_both_databases
def test_builds_of_a_new_agent_at_the_same_moment(account: Account) -> None:
    """All are taken on, for one agent and one tag."""
    builds = in_parallel([account.submitted] * 4)
    assert not [build for build in builds if isinstance(build, Exception)]
    with account.catalog.read() as session:
        assert [
            (agent.total_builds, agent.agent_name) for agent in agents.undeployed(session, account.organization_id)
        ] == [(4, "scout")]
        assert session.query(Tag).where(Tag.organization_id == account.organization_id).count() == 1


@on_both_databases
def test_a_retried_post_answers_with_the_first_build(account: Account) -> None:
    """The client says that it sends it again: one build, one object."""
    first = account.submitted()
    kept = Kept(account.api)
    assert account.submitted(retry=1)["id"] == first["id"]
    assert account.submitted(retry=2)["id"] == first["id"]
    assert Kept(account.api) == kept


def test_what_is_no_retry(account: Account) -> None:
    """A first try, another archive, or another tag is a build of its own."""
    first = account.submitted()
    others = [
        account.submitted(),
        account.submitted(retry=1, archive=context_archive({"other": b"1"})),
        account.submitted(retry=1, image_tag="v2"),
    ]
    assert len({first["id"], *(build["id"] for build in others)}) == 4


@pytest.fixture(scope="module")
def registries(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> Iterator[tuple[RunningApi, str]]:
    """An API with a registry of its own, and the host of somebody else's that it may read."""
    key_file = tmp_path_factory.mktemp("key") / "token.pem"
    make_key_file(key_file)
    with (
        running_registry(tmp_path_factory.mktemp("own"), key_file, "http://127.0.0.1:9/registry/token") as own,
        running_registry(tmp_path_factory.mktemp("public")) as public,
        RunningApi(
            settings_for(
                tmp_path_factory.mktemp("api"),
                temporal.port,
                registry=own,
                registry_token_key=key_file,
                transfer_registries=(public,),
                platforms=("linux/arm64",),
            )
        ) as api,
    ):
        yield api, public


@pytest.fixture
def registrant(registries: tuple[RunningApi, str]) -> Iterator[Account]:
    account = Account(registries[0])
    yield account
    account.close()


def test_a_public_image_is_registered(registrant: Account, registries: tuple[RunningApi, str]) -> None:
    """It is a success at once, by its digest, without a workflow; a retry answers with the same build."""
    made = index(image("amd64"), image("arm", "linux/arm64"))
    pusher = Pusher(registries[1])
    pusher.push("library/tool", made, "1.0")
    pusher.close()
    with published_client(registrant) as client:
        url = f"{registries[1]}/library/tool:1.0"
        raw = client.build.with_raw_response.create(image_name="app", agent_name="scout", image_url=url)
    build = raw.json()
    assert (build["build_status"], build["image_url"]) == ("success", f"{registries[1]}/library/tool@{made.digest}")
    assert SECOND.fullmatch(build["build_end_time"])
    assert registrant.row(build["id"]).kind == "registration"
    assert registrant.submitted(archive=None, retry=1, image_url=url)["id"] == build["id"]


def test_an_own_image_is_registered(registrant: Account) -> None:
    """What is in the account's own namespace of Kiln's registry needs no other registry."""
    settings = registrant.api.settings
    pusher = Pusher(settings.registry_host, RegistryTokens(settings.registry_key_file))
    made = pusher.push(f"{registrant.slug}/base", image("base"), "v1")
    pusher.push("somebody-else/base", image("theirs"), "v1")
    pusher.close()
    build = registrant.submitted(archive=None, image_url=f"{settings.registry_host}/{registrant.slug}/base:v1")
    assert build["image_url"] == f"{settings.registry_host}/{registrant.slug}/base@{made.digest}"
    kept = Kept(registrant.api)
    for place in (f"{registrant.slug}/base:v2", "somebody-else/base:v1"):
        refused = registrant.post(archive=None, image_url=f"{settings.registry_host}/{place}")
        assert refused.status_code == 422
        assert refused.json()["detail"].startswith("image_url: there is no image ")
    assert Kept(registrant.api) == kept


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("{public}/library/none:1", "none"),
        ("10.0.0.1/app:1", "IP address"),
        ("registry.evil.test/app:1", "registry.evil.test"),
        ("https://docker.io/library/busybox", "scheme"),
        ("App:latest:2", "name"),
    ],
)
def test_an_image_that_cannot_be_registered(
    registrant: Account, registries: tuple[RunningApi, str], url: str, problem: str
) -> None:
    """Missing, of a registry that is not allowed, or no reference at all: a 422 that names `image_url`."""
    kept = Kept(registrant.api)
    answer = registrant.post(archive=None, image_url=url.format(public=registries[1]))
    assert answer.status_code == 422, answer.text
    assert re.match(f"image_url: .*{re.escape(problem)}", answer.json()["detail"])
    assert Kept(registrant.api) == kept


def test_the_platform_of_the_settings(registrant: Account) -> None:
    """The first platform that the operator names is the builder's own."""
    assert registrant.row(registrant.submitted()["id"]).platform == "linux/arm64"
