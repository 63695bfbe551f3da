"""From `POST /api/v1/images/build` to an AMI in EC2 and back to nothing: real Temporal, real Packer, simulated EC2."""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from httpx_sse import connect_sse
from sqlalchemy import select

from kiln.catalog import keys
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Build
from support.account_checks import one_image_and_nothing_else
from support.moto import NOTHING, AccountState
from support.processes import eventually, read_proc
from support.rig import Rig, running_rig

SECRET = "hunter2-is-not-a-good-password"
IMAGE_KEYS = {"image_id", "provider", "region", "status", "created_at", "build_id", "simulated"}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_rig(tmp_path_factory.mktemp("rig") / "home", heartbeat_timeout_seconds=15.0) as rig:
        yield rig


@pytest.fixture
def before(rig: Rig) -> AccountState:
    """The account once the builds of earlier tests have cleaned up after themselves."""
    assert eventually(lambda: not rig.account.snapshot_of_account().instances, 30)
    return rig.account.snapshot_of_account()


def test_an_ami_is_built_listed_and_deleted(rig: Rig, before: AccountState) -> None:
    """What EC2 has is what the API says: tags, name, snapshots; after DELETE all of it is gone."""
    build_id = rig.submit(provider="codex", tags={"team": "platform"}, variables={"extra_packages": "ripgrep"})
    image_id = rig.wait(build_id, "succeeded")["image"]["ami_id"]
    one_image_and_nothing_else(rig, before, image_id)
    image = rig.account.ec2.describe_images(ImageIds=[image_id])["Images"][0]
    tags = {tag["Key"]: tag["Value"] for tag in image["Tags"]}
    assert (tags["kiln:build-id"], tags["kiln:attempt"], tags["team"]) == (build_id, "1", "platform")
    assert image["Name"].endswith(f"{build_id}-1")
    (listed,) = [
        row for row in rig.http.get("/api/v1/images?provider=codex").json()["images"] if row["image_id"] == image_id
    ]
    assert set(listed) == IMAGE_KEYS
    assert (listed["build_id"], listed["status"], listed["simulated"]) == (build_id, "available", True)
    deleted = rig.http.delete(f"/api/v1/images/{image_id}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert rig.account.left_since(before) == NOTHING
    assert rig.http.delete(f"/api/v1/images/{image_id}").json()["error"]["code"] == "image_not_found"


def test_every_resource_carries_the_builds_tags(rig: Rig, before: AccountState) -> None:
    """Instance, volume and security group say whose they are while they live; the key pair says it by its name."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit(tags={"team": "platform"})
        gate.wait_for_request(20)
        alive = rig.account.left_since(before)
        tagged = rig.account.ec2.describe_tags(Filters=[{"Name": "key", "Values": ["kiln:build-id"]}])["Tags"]
        marked = {tag["ResourceId"] for tag in tagged if tag["Value"] == build_id}
        assert alive.instances | alive.security_groups | alive.volumes <= marked
        assert alive.instances
        assert all(name.endswith(f"{build_id}-1") for name in alive.key_pairs)
    rig.wait(build_id, "succeeded")


def test_an_ami_deregistered_behind_kilns_back_leaves_the_list(rig: Rig) -> None:
    """The list is what exists in EC2; the build's record keeps why its image is no more."""
    build_id = rig.submit()
    image_id = rig.wait(build_id, "succeeded")["image"]["ami_id"]
    rig.account.ec2.deregister_image(ImageId=image_id)
    assert eventually(lambda: image_id not in rig.http.get("/api/v1/images").text, 60)
    shown = rig.http.get(f"/api/v1/images/builds/{build_id}").json()
    assert (shown["status"], shown["image_id"]) == ("succeeded", image_id)
    assert "simulated" in shown["image_gone"]


def test_an_ec2_that_errs_proves_no_absence(rig: Rig) -> None:
    """While EC2 does not answer, the list stays as it was."""
    image_id = rig.wait(rig.submit(), "succeeded")["image"]["ami_id"]
    with rig.proxy.outage():
        time.sleep(4)  # several rounds of house-keeping
        assert image_id in rig.http.get("/api/v1/images").text


def test_a_secret_is_nowhere_but_in_packers_file(rig: Rig) -> None:
    """Not in Temporal's history, a log, a process list, an answer, the catalog or any file that is left."""
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit(variables={"npm_token": SECRET})
        gate.wait_for_request(20)
        for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            assert SECRET.encode() not in read_proc(pid, "cmdline")
        packers = rig.packers(build_id)
        assert packers
        assert all(SECRET.encode() not in read_proc(pid, "environ") for pid in packers)
        assert SECRET not in rig.http.get(f"/api/v1/builds/{build_id}").text
    rig.wait(build_id, "succeeded")
    assert SECRET not in rig.log(build_id)
    home = rig.stack.settings.home_dir
    assert eventually(lambda: not _files_with(home, SECRET), 10), _files_with(home, SECRET)


def _files_with(home: Path, text: str) -> list[Path]:
    """Every file below the home that holds a text: catalog, logs, Temporal's database, the parts' output, runs."""
    return [file for file in home.rglob("*") if file.is_file() and text.encode() in _content(file)]


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


def test_the_log_is_streamed_live_numbered_and_ends_with_the_build(rig: Rig) -> None:
    """Numbers without a gap from 1, the end last; a reader that comes back gets the rest and nothing twice."""
    build_id = rig.submit()
    events = list(_events(rig.http, f"/api/v1/images/builds/{build_id}/logs"))
    assert [int(number) for number, _, _ in events[:-1]] == list(range(1, len(events)))
    assert (events[-1][1], events[-1][2]) == ("end", {"status": "succeeded"})
    assert any("AMI: ami-" in data["line"] for _, _, data in events[:-1])
    again = list(_events(rig.http, f"/api/v1/builds/{build_id}/logs", {"Last-Event-ID": "5"}))
    assert again == events[5:]


def _events(
    http: httpx.Client, path: str, headers: dict[str, str] | None = None
) -> Iterator[tuple[str, str, dict[str, str]]]:
    with connect_sse(http, "GET", path, headers=headers or {}) as source:
        for event in source.iter_sse():
            yield event.id if event.event != "end" else "", event.event, json.loads(event.data)


async def test_what_a_build_is_doing_is_readable_in_temporal(rig: Rig) -> None:
    """Search attributes, the `status` query and the current details say it, as long as it lives and after."""
    client = await rig.temporal()
    with rig.proxy.blocked("StopInstances") as gate:
        build_id = rig.submit()
        gate.wait_for_request(20)
        handle = client.get_workflow_handle(f"build-{build_id}")
        assert eventually(lambda: (rig.build(build_id)["progress"] or {}).get("phase") == "building", 10)
        view = await handle.query("status")
        assert (view["id"], view["status"], view["attempt"]) == (build_id, "building", 1)
        assert "Packer is running" in view["progress"]["detail"]
        metadata = await handle.query("__temporal_workflow_metadata")
        assert "Packer is running" in str(metadata)
        attributes = (await handle.describe()).typed_search_attributes
        shown = {pair.key.name: pair.value for pair in attributes}
        assert (shown["KilnKind"], shown["KilnStatus"]) == ("machine", "building")
    image_id = rig.wait(build_id, "succeeded")["image"]["ami_id"]
    await handle.result()
    attributes = (await handle.describe()).typed_search_attributes
    shown = {pair.key.name: pair.value for pair in attributes}
    assert (shown["KilnStatus"], shown["KilnImage"]) == ("succeeded", image_id)


def test_organizations_share_the_builders(rig: Rig, before: AccountState) -> None:
    """One organization's queue does not stand before another's builds; each build has one AMI of its own."""
    with rig.proxy.blocked("StopInstances") as gate:  # the four slots are taken, and everything else queues up
        many = [rig.submit() for _ in range(14)]
        gate.wait_for_request(60, count=4)
        with _client_of_another_organization(rig) as http:
            few = [_submitted(http) for _ in range(2)]
            assert eventually(lambda: all(_is_waiting(http, build_id) for build_id in few), 30)
            gate.release()
            assert eventually(lambda: all(_status(http, build_id) == "succeeded" for build_id in few), 90)
    images = {rig.wait(build_id, "succeeded", seconds=90)["image"]["ami_id"] for build_id in many}
    starts = _starts(rig)
    last_of_few = max(starts[build_id] for build_id in few)
    later = [build_id for build_id in many if starts[build_id] > last_of_few]
    # First come, first served would leave none. How many it is exactly is Temporal's: its order is fair on the whole.
    assert len(later) >= 3, "the second organization's builds waited for all of the first one's"
    assert len(images) == len(many)
    assert eventually(lambda: len(rig.account.left_since(before).images) == len(many) + len(few), 10)
    assert eventually(lambda: not rig.account.left_since(before).instances, 10)


def _is_waiting(http: httpx.Client, build_id: str) -> bool:
    progress = http.get(f"/api/v1/builds/{build_id}").json()["progress"] or {}
    return progress.get("phase") == "waiting"


def _starts(rig: Rig) -> dict[str, datetime]:
    """When each build's tool started, as exactly as the catalog has it."""
    catalog = Catalog(rig.stack.settings.catalog_dsn)
    try:
        with catalog.read() as session:
            rows = session.scalars(select(Build).where(Build.started_at.is_not(None)))
            return {row.id: row.started_at for row in rows if row.started_at is not None}
    finally:
        catalog.close()


def _client_of_another_organization(rig: Rig) -> httpx.Client:
    catalog = Catalog(rig.stack.settings.catalog_dsn)
    try:
        with catalog.transaction() as tx:
            _, key = keys.create(tx, keys.ensure_organization(tx, "another"), "test", ["builds:write"])
    finally:
        catalog.close()
    return httpx.Client(base_url=rig.stack.api_url, headers={"X-API-Key": key}, timeout=40, trust_env=False)


def _submitted(http: httpx.Client) -> str:
    return str(http.post("/api/v1/images/build", json={"provider": "gemini"}).json()["build_id"])


def _status(http: httpx.Client, build_id: str) -> str:
    return str(http.get(f"/api/v1/images/builds/{build_id}").json()["status"])


def test_the_sweep_removes_what_nobody_owns_and_nothing_else(tmp_path: Path) -> None:
    """An instance with this installation's tag whose build is over goes; without the tag, or of unknown builds, it stays."""
    with running_rig(tmp_path / "home", sweep_seconds=1, sweep_grace_seconds=0) as rig:
        build_id = rig.submit()
        image_id = rig.wait(build_id, "succeeded")["image"]["ami_id"]
        image = rig.account.ec2.describe_images(ImageIds=[image_id])["Images"][0]
        own = {tag["Key"]: tag["Value"] for tag in image["Tags"]}["kiln:installation"]
        orphan = _instance(rig, {"kiln:installation": own, "kiln:build-id": build_id})
        strangers = {
            _instance(rig, {"kiln:installation": "another", "kiln:build-id": build_id}),
            _instance(rig, {"kiln:installation": own, "kiln:build-id": "00000000-0000-4000-8000-000000000000"}),
            _instance(rig, {}),
        }
        assert eventually(lambda: orphan not in rig.account.snapshot_of_account().instances, 30)
        left = rig.account.snapshot_of_account()
        assert left.instances == strangers
        assert left.images == {image_id}


def _instance(rig: Rig, tags: dict[str, str]) -> str:
    """An instance of somebody's."""
    source = rig.account.ec2.describe_images(Owners=["099720109477"])["Images"][0]["ImageId"]
    made = rig.account.ec2.run_instances(ImageId=source, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    if tags:
        rig.account.ec2.create_tags(Resources=[made], Tags=[{"Key": k, "Value": v} for k, v in tags.items()])
    return str(made)
