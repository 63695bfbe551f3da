"""Agents' container images by the API: from a base image in Kiln's registry to a pod whose agent says its version."""

import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from cli.docker_engine import BASE_SUITE
from cli.local_stack import API, ENGINE, REGISTRY, RUNNER, TEMPORAL, WORKER, LocalStack
from kiln.catalog.session import Catalog
from kiln.settings import Settings
from packer.tools import ca_bundle
from support.container_rig import Caller, ContainerRig, client_of, context, running, skip_without_engine
from support.pod_rig import PORTS, PodRig, runner_folder
from support.ports import free_ports
from support.processes import eventually
from support.stack import print_logs

pytestmark = [pytest.mark.docker, pytest.mark.long]

PARTS = (TEMPORAL, REGISTRY, ENGINE, WORKER, API, RUNNER)
WORKERS = (("control",), ("container",))
BUILDER = "worker-2"
QUICK = {"house_seconds": 1.0, "heartbeat_timeout_seconds": 3.0, "cancel_grace_seconds": 10.0}
# Not the latest, so that a pin that is not heeded shows.
VERSION = "0.166.0"
BUILD_SECONDS = 240
INSTALLING = "==> installing ca-certificates"
SCRIPTS = "kiln-build/build.sh"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A minimal Debian, as a tar archive."""
    archive = tmp_path_factory.mktemp("debian") / "rootfs.tar"
    command = ["mmdebstrap", "--variant=minbase", "--format=tar", BASE_SUITE, str(archive)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("mmdebstrap is not installed")
    assert made.returncode == 0, made.stderr
    return archive.read_bytes()


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodRig]:
    """A stack with one engine, a builder and a runner."""
    skip_without_engine()
    home = tmp_path_factory.mktemp("kiln") / "home"
    ports: dict[str, Any] = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    with runner_folder() as folder:
        settings = Settings(home=home, runner_dir=folder, container_slots=1, ca_bundle=ca_bundle(), **QUICK, **ports)
        stack = LocalStack(settings, parts=PARTS, workers=WORKERS, embedded=True)
        try:
            with stack, client_of(stack, stack.api_key) as http:
                yield PodRig(stack, http, folder)
        except BaseException:
            print_logs(home)
            raise


@pytest.fixture(scope="module")
def rig(pods: PodRig) -> Iterator[ContainerRig]:
    """The same stack."""
    catalog = Catalog(pods.stack.settings.catalog_dsn)
    yield ContainerRig(pods.stack, Caller("", "default", pods.stack.api_key, pods.http), catalog)
    catalog.close()


@pytest.fixture(scope="module")
def base_image(rig: ContainerRig, root: bytes) -> str:
    """Debian as a private image of the organization's, whose user is not root."""
    archive = context("FROM scratch\nADD rootfs.tar /\nUSER daemon\n", {"rootfs.tar": root})
    rig.admin.wait(rig.admin.submit(archive, name="debian", tag="minbase"), "succeeded")
    return f"{rig.registry}/default/debian:minbase"


def ordered(caller: Caller, name: str, base_image: str, **more: str) -> str:
    """The id of a build of codex."""
    body = {"image_name": name, "image_tag": "v1", "provider": "codex", "base_image": base_image, **more}
    answer = caller.http.post("/api/v1/images/build", json=body)
    assert answer.status_code == 201, answer.text
    build_id: str = answer.json()["build_id"]
    return build_id


def docker(rig: ContainerRig, *arguments: str) -> list[str]:
    """The words that the command prints."""
    command = ["docker", "--host", rig.stack.containers.hosts[0], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def left_in_the_engine(rig: ContainerRig) -> list[str]:
    """Its containers and images, and the scripts that run in it."""
    scripts = [f"process {pid}" for pid in running(SCRIPTS)]
    return [*scripts, *docker(rig, "ps", "--all", "--quiet"), *docker(rig, "image", "ls", "--all", "--quiet")]


@pytest.fixture(scope="module")
def build_id(rig: ContainerRig, base_image: str) -> str:
    """A build that succeeded."""
    made = ordered(rig.admin, "agents/codex", base_image, agent_version=VERSION, extra_packages="less, jq")
    rig.admin.wait(made, "succeeded", seconds=BUILD_SECONDS)
    return made


def test_a_build_leaves_its_image_only(rig: ContainerRig, build_id: str) -> None:
    """It is under its tag in the registry, and nothing is under the attempt's, or in the engine."""
    seen = rig.admin.build(build_id)
    assert (seen["kind"], seen["attempt"], seen["image"]["platform"]) == ("container", 1, "linux/amd64")
    assert rig.digest_of("default/agents/codex", "v1") == seen["image"]["digest"]
    assert rig.revisions(f"kiln-staging/{build_id}") == []
    assert left_in_the_engine(rig) == []


def test_a_pod_runs_from_it(rig: ContainerRig, pods: PodRig, build_id: str) -> None:
    """The agent answers, in the version that was asked for, to a user that is not root; the packages are there."""
    script = "codex --version && id -un && command -v jq"
    key = pods.create(script, sandbox_type="container", image=build_id)
    try:
        assert pods.wait(key, seconds=120)["status"] == "completed", pods.log(key)
        assert pods.log(key).splitlines()[-3:] == [f"codex-cli {VERSION}", "agent", "/usr/bin/jq"]
    finally:
        assert eventually(lambda: docker(rig, "ps", "--all", "--quiet") == [])
        docker(rig, "image", "rm", "--force", rig.admin.build(build_id)["image"]["reference"])


def test_a_cancel_leaves_nothing(rig: ContainerRig, base_image: str) -> None:
    """Neither container nor image nor process in the engine, and no tag in the registry."""
    build_id = ordered(rig.admin, "agents/never", base_image)
    rig.admin.until_log(build_id, INSTALLING)
    assert len(left_in_the_engine(rig)) >= 3
    rig.admin.cancel(build_id)
    rig.admin.wait(build_id, "cancelled")
    assert left_in_the_engine(rig) == []
    assert (rig.tags(f"kiln-staging/{build_id}"), rig.tags("default/agents/never")) == ([], [])


@pytest.mark.fault
def test_what_a_killed_builder_left_goes_before_the_next_attempt(rig: ContainerRig, base_image: str) -> None:
    """The second attempt's container is alone in the engine."""
    build_id = ordered(rig.admin, "agents/survivor", base_image)
    rig.admin.until_log(build_id, INSTALLING)
    rig.stack.kill(BUILDER, signal.SIGKILL)
    rig.stack.wait_for_exit(BUILDER)
    assert docker(rig, "ps", "--format={{.Names}}") == [f"kiln-agent-{build_id}-1"]
    rig.stack.start_parts(BUILDER)
    second = [f"kiln-agent-{build_id}-2"]
    assert eventually(lambda: docker(rig, "ps", "--all", "--format={{.Names}}") == second, 30)
    rig.admin.cancel(build_id)
    rig.admin.wait(build_id, "cancelled")
    assert left_in_the_engine(rig) == []


def test_an_image_that_is_not_there_fails_the_build(rig: ContainerRig) -> None:
    """It says which."""
    reference = f"{rig.registry}/default/none:v1"
    seen = rig.admin.wait(ordered(rig.admin, "agents/baseless", reference), "failed")
    assert seen["error"]["code"] == "source_unavailable"
    assert seen["error"]["message"].startswith(f"{reference}: ")
