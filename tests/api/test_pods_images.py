"""The images that pods run from: which one a name means, and that it stays while an open pod needs it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from api import errands
from kiln.catalog import pod_images, pods, tags
from kiln.catalog.pod_images import Runs
from kiln.catalog.tables import Image
from kiln.models import Api, OwnerType, PodSpec, Target
from support.api_server import RunningApi
from support.containers import IMAGES, KilnsRegistry, waiting_errands
from support.oci_images import Made, image
from support.parallel import Pending
from support.pod_rows import pod_row
from support.pod_tenants import PodTenant, pod_refusal
from support.tenants import on_both_databases


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[PodTenant]:
    tenant = PodTenant(api)
    yield tenant
    tenant.close()


def build_of(tenant: PodTenant, text: str, **fields: Any) -> str | None:
    """The build whose image a new pod runs from; None if the image is an unknown one."""
    answer = tenant.post(body={"runner_id": tenant.runner().runner_id, "image": text, **fields})
    if answer.status_code != 201:
        assert pod_refusal(answer)[:2] == (404, "RESOURCE_NOT_FOUND")
        assert pod_refusal(answer)[2].startswith("image: ")
        return None
    pod = answer.json()["pod"]
    assert pod["sandbox_type"] == "container"
    with tenant.catalog.read() as session:
        return session.get_one(Image, pod_row(tenant.catalog, pod["key"]).image_id).build_id


def team(tenant: PodTenant, name: str, tag: str = "v1") -> Target:
    return tenant.target(name, tag, owner_type=OwnerType.TEAM, owner=f"team-{tenant.organization_id}")


@on_both_databases
def test_an_image_is_named_in_many_ways(tenant: PodTenant) -> None:
    """By name and tag, with its owner and registry, by digest, and by the build that made it."""
    made = image("an agent")
    build, host = tenant.published(tenant.target("tools/agent"), made), tenant.api.settings.registry_host
    names = [
        "tools/agent:v1",
        f"{tenant.slug}/tools/agent:v1",
        f"{host}/{tenant.slug}/tools/agent:v1",
        f"{host}/{tenant.slug}/tools/agent@{made.digest}",
        f"{tenant.slug}/tools/agent:v1@{made.digest}",
        made.digest,
        build,
        build.upper(),
    ]
    assert [build_of(tenant, name) for name in names] == [build] * len(names)


def test_a_container_brings_its_agent_and_its_engine_the_limits(tenant: PodTenant) -> None:
    """What the runner has installed, and what its host can enforce, is of no matter; what its engine cannot is refused."""
    made = tenant.published(tenant.target("app"), image("an agent"))
    plain = tenant.runner(available_agents=[], limits=["disk_mb"])
    limits = {"memory_mb": 64, "processes": 64}
    body = {"runner_id": plain.runner_id, "image": made, "agent_type_id": "codex", "limits": limits}
    assert tenant.post(body=body).status_code == 201
    refused = pod_refusal(tenant.post(body={**body, "limits": {"disk_mb": 64}}))
    assert refused[:2] == (400, "VALIDATION_FAILED")
    assert refused[2].startswith("limits.disk_mb: ")
    better = tenant.runner(limits=["container.disk_mb"])
    assert tenant.post(body={**body, "runner_id": better.runner_id, "limits": {"disk_mb": 64}}).status_code == 201


def test_a_name_without_a_tag_is_the_latest(tenant: PodTenant) -> None:
    """Of the personal namespace before the team's; and builds of cloud-builds are images too."""
    theirs = tenant.published(team(tenant, "app", "latest"), image("a team's"))
    assert build_of(tenant, "app") == theirs
    own = tenant.published(tenant.target("app", "latest"), api=Api.CLOUD_BUILDS)
    assert build_of(tenant, "app") == own
    assert build_of(tenant, f"team-{tenant.organization_id}/app") == theirs


def test_an_older_build_of_a_tag_is_run_by_its_id(tenant: PodTenant) -> None:
    """The tag means the newest one."""
    old, new = (tenant.published(made=image(text)) for text in ("old", "new"))
    assert (build_of(tenant, "app:v1"), build_of(tenant, old), build_of(tenant, new)) == (new, old, new)


@on_both_databases
def test_an_unknown_image_is_a_404(tenant: PodTenant) -> None:
    """So is what is no reference at all, and a build that is not over; nothing is written."""
    waiting = tenant.waiting(tenant.target("waiting"))
    ami = tenant.succeeded()
    odd = ("nothing", "app:", ":", "@", "/", "a/b/c@x", "Bad Name", "sha256:" + "0" * 64, "://", "%", "x" * 1024)
    assert [build_of(tenant, text) for text in (*odd, waiting, "waiting:v1", ami)] == [None] * (len(odd) + 3)
    assert tenant.get("/pods")["total"] == 0


@on_both_databases
def test_anothers_images_are_run_only_if_they_are_public(tenant: PodTenant, api: RunningApi) -> None:
    """By their whole name; their digests and builds stay unknown. The platform's are everybody's."""
    other = PodTenant(api)
    private, public = image(f"{other.slug} private"), image(f"{other.slug} public")
    kept = other.published(other.target("private"), private)
    shown = other.published(other.target("public", visibility="PUBLIC"), public)
    for text in (f"{other.slug}/private:v1", private.digest, public.digest, kept, shown, "public:v1"):
        assert build_of(tenant, text) is None
    assert build_of(tenant, f"{other.slug}/public:v1") == shown
    name = f"tool-{other.slug}"
    platform = other.published(other.target(name, owner_type=OwnerType.PLATFORM, owner="platform", visibility="PUBLIC"))
    assert build_of(tenant, f"platform/{name}:v1") == platform
    other.close()


def test_a_deleted_image_is_run_no_more(tenant: PodTenant) -> None:
    """By no name."""
    made = image(tenant.slug)
    build = tenant.published(made=made)
    with tenant.catalog.transaction() as tx:
        found = tags.find(tx, tenant.slug, "app", "v1")
        assert found is not None
        tags.remove(tx, found.tag)
    assert [build_of(tenant, text) for text in ("app:v1", made.digest, build)] == [None] * 3


@on_both_databases
def test_a_deletion_waits_for_the_pod_that_is_being_written(tenant: PodTenant) -> None:
    """Whichever comes first, an errand of the deletion sees the pod, or the pod does not get the image."""
    made = image(f"{tenant.slug} raced")
    tenant.published(made=made)
    runner = tenant.runner()
    who = Runs(tenant.organization_id, tenant.slug, tenant.api.settings.registry_host)

    def delete() -> bool:
        """Whether the deletion, once committed, finds the image in use."""
        with tenant.catalog.transaction() as tx:
            found = tags.find(tx, tenant.slug, "app", "v1")
            assert found is not None
            tags.remove(tx, found.tag)
        with tenant.catalog.read() as session:
            return pod_images.in_use(session, made.digest)

    with tenant.catalog.transaction() as tx:
        found = pod_images.find(tx, who, "app:v1")
        assert found is not None
        deletion = Pending(delete)
        assert deletion.is_waiting()
        pods.insert(tx, pods.NewPod(tenant.organization_id, runner.runner_id, PodSpec(), "a-key", image_id=found.id))
    assert deletion.result()
    with tenant.catalog.transaction() as tx:
        assert pod_images.find(tx, who, made.digest) is None


@on_both_databases
def test_a_pod_waits_for_the_deletion_that_is_being_written(tenant: PodTenant) -> None:
    """And then does not get the image."""
    build = tenant.published(made=image(f"{tenant.slug} going"))
    with tenant.catalog.transaction() as tx:
        found = tags.find(tx, tenant.slug, "app", "v1")
        assert found is not None
        tags.remove(tx, found.tag)
        creation = Pending(partial(build_of, tenant, build))
        assert creation.is_waiting()
    assert creation.result() is None


class PodKeeper(PodTenant):
    """An organization with pods whose images are in the registry."""

    def __init__(self, api: RunningApi, registry: KilnsRegistry) -> None:
        super().__init__(api)
        self.registry = registry

    def image(self, text: str) -> Made:
        made = self.registry.push(f"{self.slug}/app", "v1", text)
        self.published(self.target(), made)
        return made

    def has(self, digest: str, repository: str = "app") -> bool:
        return self.api.parts.containers.registry.manifest(f"{self.slug}/{repository}", digest) is not None

    def house_keeping(self) -> None:
        """Repeats what the registry was told to do, as the dispatcher does."""
        for row in waiting_errands(self.api, self.slug):
            errands.run(self.api.parts, row)


@pytest.fixture
def keeping(registry_api: RunningApi, registry: KilnsRegistry) -> Iterator[PodKeeper]:
    keeping = PodKeeper(registry_api, registry)
    yield keeping
    keeping.close()
    assert waiting_errands(registry_api, keeping.slug) == []


def test_the_manifest_of_a_deleted_image_stays_while_a_pod_needs_it(keeping: PodKeeper) -> None:
    """The tag goes at once, the manifest with the last open pod."""
    made = keeping.image("in use")
    pod = keeping.created(keeping.runner(), image="app:v1")
    assert keeping.http.delete(f"{IMAGES}/app/v1").status_code == 200
    assert keeping.refs() == []
    keeping.house_keeping()
    assert (keeping.has(made.digest), keeping.has("v1")) == (True, False)
    keeping.post(f"/pods/{pod['key']}/terminate")
    keeping.house_keeping()
    assert not keeping.has(made.digest)


def test_the_manifest_of_a_renamed_image_stays_while_a_pod_needs_it(keeping: PodKeeper) -> None:
    """Under the name that the pod's runner may be pulling it by."""
    made = keeping.image("renamed")
    runner = keeping.runner()
    pod = keeping.created(runner, image="app:v1")
    (result,) = keeping.results((f"{keeping.slug}/app:v1", {"name": "other"}))
    assert result["success"]
    assert (keeping.has(made.digest), keeping.has(made.digest, "other")) == (True, True)
    order = keeping.api.parts.pods.begin(runner, pod["key"], "5a6b7c8d-0000-4000-8000-000000000000")
    assert order.image is not None
    assert order.image.reference.endswith(f"{keeping.slug}/other@{made.digest}")
    keeping.post(f"/pods/{pod['key']}/terminate")
    keeping.house_keeping()
    assert not keeping.has(made.digest)
    assert keeping.has("v1", "other")
