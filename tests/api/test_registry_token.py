"""Who may pull and push: the token endpoint by itself, and as a real registry sends clients to it."""

import base64
import json
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography import x509

from kiln.adapters.registry import KilnRegistry
from kiln.catalog import attempts
from kiln.catalog.tables import Organization
from kiln.models import BuildEnd, BuildStatus, OwnerType, Target, Visibility
from kiln.naming import staging_repository
from kiln.ports.pods import ImageSource
from kiln.registry_tokens import BUILD_USER, ISSUER, POD_USER, SERVICE, make_key_file
from support.api_server import RunningApi
from support.container_rows import HOST, add_container, begin, public, published, target
from support.containers import Owner
from support.oci_images import Pusher, image
from support.pod_rows import terminate
from support.registry import running_registry
from support.rows import rewrite
from support.runner_calls import RunnerCaller
from support.tenants import Tenant

PATH = "/registry/token"
IN_AN_HOUR = timedelta(hours=1)


@pytest.fixture(scope="module", autouse=True)
def key_file(sqlite_api: RunningApi) -> Path:
    """The key that the API signs with."""
    make_key_file(sqlite_api.settings.registry_key_file)
    return sqlite_api.settings.registry_key_file


@pytest.fixture(scope="module")
def registry_host(tmp_path_factory: pytest.TempPathFactory, sqlite_api: RunningApi, key_file: Path) -> Iterator[str]:
    """A registry that trusts the API's key, and sends clients to it."""
    with running_registry(tmp_path_factory.mktemp("registry"), key_file, f"{sqlite_api.url}{PATH}") as host:
        yield host


@pytest.fixture
def slug(tenant: Tenant) -> str:
    """The first segment of the organization's personal images."""
    return slug_of(tenant)


def slug_of(tenant: Tenant) -> str:
    with tenant.catalog.read() as session:
        return session.get_one(Organization, tenant.organization_id).slug


def ask(api: RunningApi, user: str, password: str, *scopes: str) -> httpx.Response:
    """GET with Basic credentials, as Docker asks."""
    query = {"service": SERVICE, "account": user, "client_id": "docker", "offline_token": "true", "scope": scopes}
    return api.http.get(PATH, params=query, auth=(user, password))


def granted(answer: httpx.Response) -> dict[str, list[str]]:
    """What the token in the answer opens, by repository; its signature is looked at, too."""
    assert answer.status_code == 200, answer.text
    token = answer.json()["token"]
    (chain,) = jwt.get_unverified_header(token)["x5c"]
    key = x509.load_der_x509_certificate(base64.b64decode(chain)).public_key()
    claims: dict[str, Any] = jwt.decode(token, key, algorithms=["ES256"], audience=SERVICE, issuer=ISSUER)
    assert {one["type"] for one in claims["access"]} <= {"repository"}
    return {one["name"]: one["actions"] for one in claims["access"]}


def pulls(*repositories: str) -> list[str]:
    return [f"repository:{repository}:pull" for repository in repositories]


def build_of(tenant: Tenant, **more: Any) -> str:
    """A container build that goes on."""
    to = target(f"app-{uuid.uuid4().hex[:8]}", owner=slug_of(tenant))
    build_id = add_container(tenant.catalog, tenant.organization_id, to, **more)
    begin(tenant.catalog, build_id)
    return build_id


def build_password(api: RunningApi, build_id: str, organization_id: str, valid: timedelta = IN_AN_HOUR) -> str:
    return api.parts.containers.credentials.issue(build_id, organization_id, datetime.now(UTC) + valid)


def test_a_login_is_answered_with_a_token_that_opens_nothing(api: RunningApi, tenant: Tenant) -> None:
    """Without a scope, good credentials are all that is asked for; any user name will do."""
    answer = ask(api, "anybody", tenant.key)
    assert granted(answer) == {}
    body = answer.json()
    assert body["access_token"] == body["token"]
    assert body["expires_in"] == 300
    assert abs(datetime.fromisoformat(body["issued_at"]) - datetime.now(UTC)) < timedelta(seconds=60)
    assert answer.headers["Cache-Control"] == "no-store"


def test_a_key_pulls_its_own_namespaces_and_pushes_nothing(api: RunningApi, tenant: Tenant, slug: str) -> None:
    """Personal and team images, whether they exist or not; `pull` is left of all actions."""
    own = [f"{slug}/app", f"{slug}/deep/er/app", f"team-{tenant.organization_id}/app"]
    scopes = [f"repository:{name}:pull,push,delete,*" for name in own]
    assert granted(ask(api, "u", tenant.key, *scopes)) == {name: ["pull"] for name in own}
    assert granted(ask(api, "u", tenant.key, " ".join(scopes))) == {name: ["pull"] for name in own}


def test_a_key_that_only_reads_builds_is_enough(api: RunningApi, tenant: Tenant, slug: str) -> None:
    """A key with `builds:read` pulls; one without it is refused."""
    reader, other = tenant.new_key("builds:read"), tenant.new_key("pods:write")
    assert granted(ask(api, "u", reader, *pulls(f"{slug}/app"))) == {f"{slug}/app": ["pull"]}
    refused = ask(api, "u", other, *pulls(f"{slug}/app"))
    assert (refused.status_code, refused.json()) == (401, {"detail": "the API key lacks the scope builds:read"})


def test_others_images_open_only_when_all_of_the_repository_is_public(
    api: RunningApi, tenant: Tenant, neighbour: Tenant
) -> None:
    """Private, mixed and unknown repositories look the same: not granted."""
    owner = slug_of(neighbour)
    for to in (public("open", owner=owner), target("closed", owner=owner), public("mixed", owner=owner)):
        published(api.catalog, neighbour.organization_id, to)
    published(api.catalog, neighbour.organization_id, target("mixed", "v2", owner=owner))
    asked = [f"{owner}/{name}" for name in ("open", "closed", "mixed", "unknown")]
    assert granted(ask(api, "u", tenant.key, *pulls(*asked))) == {f"{owner}/open": ["pull"]}


def test_platform_images_open_to_everybody(api: RunningApi, tenant: Tenant, neighbour: Tenant) -> None:
    """A published platform image is pulled with any key."""
    name = f"tool-{uuid.uuid4().hex[:8]}"
    to = Target(owner_type=OwnerType.PLATFORM, owner="platform", name=name, tag="v1", visibility=Visibility.PUBLIC)
    published(api.catalog, neighbour.organization_id, to)
    assert granted(ask(api, "u", tenant.key, *pulls(f"platform/{name}"))) == {f"platform/{name}": ["pull"]}


@pytest.mark.parametrize(
    "scope",
    [
        "registry:catalog:*",
        "repository::pull",
        "repository",
        "repository(plugin):{slug}/app:pull",
        "repository:{slug}/app:",
        "repository:{slug}/app:push",
        "repository:{slug}/App:pull",
        "repository:{slug}/../other/app:pull",
        "repository:kiln-staging/x:pull",
        "repository:{slug}/app\0:pull",
    ],
)
def test_other_scopes_open_nothing(api: RunningApi, tenant: Tenant, slug: str, scope: str) -> None:
    """What cannot be granted is left out, and is no error."""
    assert granted(ask(api, "u", tenant.key, scope.format(slug=slug))) == {}


def test_wrong_credentials_are_refused(api: RunningApi, tenant: Tenant) -> None:
    """Unknown, expired and missing keys, and a key under a build's user name."""
    expired = tenant.new_key("admin", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    for user, password in (("u", "amk_wrong"), ("u", expired), ("u", ""), (BUILD_USER, tenant.key), ("u", "é:\0")):
        answer = ask(api, user, password)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        assert list(answer.json()) == ["detail"]


@pytest.mark.parametrize("header", ["", "Basic", "Basic !!!", "Basic dXNlcg==", "Basic /w==", "Bearer x"])
def test_a_header_that_is_no_basic_one_is_refused(api: RunningApi, header: str) -> None:
    """Whatever stands there, the answer asks for Basic credentials."""
    answer = api.http.get(PATH, headers={"Authorization": header})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")


def test_another_services_token_is_refused(api: RunningApi, tenant: Tenant) -> None:
    """The registry has one name."""
    answers = [
        api.http.get(PATH, params={"service": "other"}, auth=("u", tenant.key)),
        api.http.post(PATH, data={"service": "other", "password": tenant.key}),
    ]
    for answer in answers:
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith("service: ")


def test_oauth_asks_with_a_form(api: RunningApi, tenant: Tenant, slug: str) -> None:
    """The same grant, told in the answer, and no refresh token."""
    form = {
        "grant_type": "password",
        "service": SERVICE,
        "client_id": "docker",
        "access_type": "offline",
        "scope": " ".join(pulls(f"{slug}/a", f"{slug}/b", "stranger/c")),
        "username": "u",
        "password": tenant.key,
    }
    answer = api.http.post(PATH, data=form)
    assert granted(answer) == {f"{slug}/a": ["pull"], f"{slug}/b": ["pull"]}
    assert answer.json()["scope"] == " ".join(pulls(f"{slug}/a", f"{slug}/b"))
    assert "refresh_token" not in answer.json()


def test_oauth_without_a_password_is_refused(api: RunningApi) -> None:
    """No credentials are a 401, another grant a 422, and an endless form a 413."""
    assert api.http.post(PATH, data={"username": "u"}).status_code == 401
    assert api.http.post(PATH, data={"grant_type": "refresh_token", "refresh_token": "x"}).status_code == 422
    assert api.http.post(PATH, data={"password": "x" * 70_000}).status_code == 413


@pytest.mark.parametrize("method", ["HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_other_methods_are_told_which_there_are(api: RunningApi, method: str) -> None:
    """Both of them (RFC 9110)."""
    answer = api.http.request(method, PATH)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, POST")


def test_a_build_pushes_to_its_staging_repository_only(api: RunningApi, tenant: Tenant, neighbour: Tenant) -> None:
    """It pulls what its organization may read, and what that one's other builds staged; nothing of other builds' more."""
    mine, sibling, stranger = build_of(tenant), build_of(tenant), build_of(neighbour)
    staged = [staging_repository(one) for one in (mine, sibling, stranger)]
    asked = [*staged, f"{slug_of(tenant)}/base", f"{slug_of(neighbour)}/base"]
    scopes = [f"repository:{name}:pull,push" for name in asked]
    password = build_password(api, mine, tenant.organization_id)
    assert granted(ask(api, BUILD_USER, password, *scopes)) == {
        staged[0]: ["pull", "push"],
        staged[1]: ["pull"],
        f"{slug_of(tenant)}/base": ["pull"],
    }


def test_a_build_that_is_over_opens_nothing(api: RunningApi, tenant: Tenant) -> None:
    """Neither one that ended, nor one that is being closed."""
    ended, closing = build_of(tenant), build_of(tenant)
    with api.catalog.transaction() as tx:
        attempts.finish(tx, ended, BuildEnd(status=BuildStatus.CANCELLED))
    rewrite(api.catalog, closing, closing_at=datetime.now(UTC))
    for build_id in (ended, closing):
        password = build_password(api, build_id, tenant.organization_id)
        assert ask(api, BUILD_USER, password).status_code == 401


def test_a_builds_password_is_only_its_own(api: RunningApi, tenant: Tenant, neighbour: Tenant) -> None:
    """Over, of another organization, of no build, or sealed for another purpose: refused."""
    build_id = build_of(tenant)
    sealed = api.parts.sealer.seal({"build_id": build_id, "organization_id": tenant.organization_id})
    assert sealed is not None
    passwords = [
        build_password(api, build_id, tenant.organization_id, timedelta(seconds=-1)),
        build_password(api, build_id, neighbour.organization_id),
        build_password(api, str(uuid.uuid4()), tenant.organization_id),
        sealed.decode(),
    ]
    assert [ask(api, BUILD_USER, password).status_code for password in passwords] == [401] * 4


@pytest.fixture
async def runner(api: RunningApi, owner: Owner) -> AsyncIterator[RunnerCaller]:
    """A runner of the owner's organization."""
    runner = RunnerCaller(api, owner.organization_id)
    await runner.register()
    yield runner
    await runner.aclose()


async def order_image(runner: RunnerCaller, key: str) -> ImageSource:
    order = await runner.calls.begin(key, "shim-1")
    assert order.image is not None
    return order.image


async def test_a_pod_pulls_from_its_images_repository_only(api: RunningApi, owner: Owner, runner: RunnerCaller) -> None:
    """And as long as it is open; its password is nobody else's."""
    row = owner.image_of(owner.published(owner.target("app")))
    ref = runner.add_pod(image_id=row.id)
    source = await order_image(runner, ref.key)
    assert (source.reference, source.registry) == (row.reference, api.settings.registry_host)
    scopes = [f"repository:{owner.slug}/{name}:pull,push" for name in ("app", "other")]
    assert granted(ask(api, POD_USER, source.token, *scopes)) == {f"{owner.slug}/app": ["pull"]}
    assert [ask(api, user, source.token).status_code for user in ("u", BUILD_USER)] == [401, 401]
    terminate(api.catalog, ref)
    assert ask(api, POD_USER, source.token).status_code == 401


async def test_an_image_elsewhere_needs_no_password(api: RunningApi, owner: Owner, runner: RunnerCaller) -> None:
    """Kiln opens its own registry only."""
    row = published(api.catalog, owner.organization_id, target("elsewhere", owner=owner.slug))
    source = await order_image(runner, runner.add_pod(image_id=row.id).key)
    assert (source.reference, source.token) == (f"{HOST}/{owner.slug}/elsewhere@{row.digest}", "")


def test_a_pods_password_is_only_its_own(api: RunningApi, owner: Owner, runner: RunnerCaller, tenant: Tenant) -> None:
    """Over, of another organization, of no pod, of a pod without an image, or a build's: refused."""
    row = owner.image_of(owner.published(owner.target("app")))
    pod_id = runner.add_pod(image_id=row.id).pod_id
    issue, until = api.parts.containers.pod_credentials.issue, datetime.now(UTC) + IN_AN_HOUR
    assert ask(api, POD_USER, issue(pod_id, owner.organization_id, until)).status_code == 200
    passwords = [
        issue(pod_id, owner.organization_id, datetime.now(UTC) - timedelta(seconds=1)),
        issue(pod_id, tenant.organization_id, until),
        issue(str(uuid.uuid4()), owner.organization_id, until),
        issue(runner.add_pod().pod_id, owner.organization_id, until),
        build_password(api, pod_id, owner.organization_id),
    ]
    assert [ask(api, POD_USER, password).status_code for password in passwords] == [401] * 5


def skopeo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A client of somebody else's making, which finds its way from the registry to the API by itself."""
    command = ["skopeo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_client_pulls_with_a_key(
    api: RunningApi, tenant: Tenant, neighbour: Tenant, slug: str, registry_host: str
) -> None:
    """The owner's key opens a private image; a neighbour's does not, and neither does none."""
    pusher = Pusher(registry_host, api.parts.containers.tokens)
    made = pusher.push(f"{slug}/app", image("private"), "v1")
    pusher.close()
    reference = f"docker://{registry_host}/{slug}/app:v1"
    seen = skopeo("inspect", "--tls-verify=false", "--creds", f"u:{tenant.key}", reference)
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout)["Digest"] == made.digest
    for credentials in (["--creds", f"u:{neighbour.key}"], ["--no-creds"]):
        refused = skopeo("inspect", "--tls-verify=false", *credentials, reference)
        assert refused.returncode != 0
        assert "unauthorized" in refused.stderr


def test_a_client_pushes_with_a_builds_password(api: RunningApi, tenant: Tenant, slug: str, registry_host: str) -> None:
    """Into its staging repository, with layers from its organization's image; and nowhere else."""
    registry = KilnRegistry(registry_host, api.parts.containers.tokens)
    pusher = Pusher(registry_host, api.parts.containers.tokens)
    made = pusher.push(f"{slug}/base", image("base"), "v1")
    build_id = build_of(tenant)
    credentials = f"{BUILD_USER}:{build_password(api, build_id, tenant.organization_id)}"
    options = ["--src-tls-verify=false", "--dest-tls-verify=false", "--src-creds", credentials]
    copy = ["copy", "--preserve-digests", *options, "--dest-creds", credentials]
    source = f"docker://{registry_host}/{slug}/base:v1"
    staged = skopeo(*copy, source, f"docker://{registry_host}/{staging_repository(build_id)}:attempt-1")
    refused = skopeo(*copy, source, f"docker://{registry_host}/{slug}/base:v2")
    facts = registry.facts(staging_repository(build_id), "attempt-1")
    registry.close()
    pusher.close()
    assert staged.returncode == 0, staged.stderr
    assert facts is not None
    assert facts.digest == made.digest
    assert refused.returncode != 0


async def test_a_client_pulls_with_a_pods_password(
    api: RunningApi, owner: Owner, runner: RunnerCaller, registry_host: str
) -> None:
    """By digest, the image that it runs from, and no other repository's."""
    pusher = Pusher(registry_host, api.parts.containers.tokens)
    made, other = pusher.push(f"{owner.slug}/app", image("a pod's"), "v1"), f"{owner.slug}/other"
    pusher.push(other, image("another"), "v1")
    pusher.close()
    row = owner.image_of(owner.published(owner.target("app"), made))
    source = await order_image(runner, runner.add_pod(image_id=row.id).key)
    inspect = ["inspect", "--tls-verify=false", "--creds", f"{POD_USER}:{source.token}"]
    seen = skopeo(*inspect, f"docker://{registry_host}/{owner.slug}/app@{made.digest}")
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout)["Digest"] == made.digest
    assert skopeo(*inspect, f"docker://{registry_host}/{other}:v1").returncode != 0
