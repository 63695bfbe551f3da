"""cloud-builds end to end: the published client, a real engine and a real registry."""

import json
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest
from scale_gp_beta import SGPClient

from support.container_rig import Caller, ContainerRig, busybox, container_rig, context
from support.processes import eventually

pytestmark = [pytest.mark.docker, pytest.mark.slow]
STATUS_KEYS = {
    "id", "object", "account_id", "agent_name", "agent_id", "build_status", "cloud_provider_build_id", "created_at",
    "created_by", "image_name", "image_tag", "image_url", "build_start_time", "build_end_time", "source_commit",
    "source_dirty", "source_ref", "source_repo", "source_subpath", "working_tree_hash",
}  # fmt: skip


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerRig]:
    with container_rig(tmp_path_factory.mktemp("kiln"), KILN_PLATFORMS="linux/amd64,linux/arm64") as rig:
        yield rig


@pytest.fixture(scope="module")
def acme(rig: ContainerRig) -> Caller:
    return rig.caller("acme")


@pytest.fixture(scope="module")
def client(rig: ContainerRig, acme: Caller) -> Iterator[SGPClient]:
    with httpx.Client(trust_env=False) as http:
        url = rig.stack.api_url
        yield SGPClient(api_key=acme.key, account_id=acme.slug, base_url=url, http_client=http)


def test_the_published_client_builds_an_image(rig: ContainerRig, acme: Caller, client: SGPClient) -> None:
    """From an archive to a digest in the registry, whose log and whose JSON are the contract's."""
    archive = busybox("ARG GREETING=none", 'RUN echo "said $GREETING"', 'CMD ["/bin/busybox", "echo", "hi"]')
    made = client.build.create(
        image_name="greeter",
        image_tag="v1",
        agent_name="greeter",
        build_args=json.dumps({"GREETING": "hello"}),
        source_commit="c" * 40,
        context_archive=("context.tar.gz", archive, "application/gzip"),
    )
    acme.wait(made.id)
    found = client.build.retrieve(made.id)
    raw = acme.http.get(f"/v5/builds/{made.id}", headers={"x-selected-account-id": acme.organization_id}).json()

    assert found.build_status == "success", acme.log(made.id)
    assert raw.keys() == STATUS_KEYS
    digest = rig.digest_of("acme/greeter", "v1")
    assert raw["image_url"] == f"{rig.registry}/acme/greeter@{digest}"
    assert "said hello" in _log(acme, made.id)
    seen = acme.build(made.id)
    assert (seen["image"]["digest"], seen["image"]["platform"]) == (digest, "linux/amd64")
    assert seen["image"]["size_bytes"] > 500_000
    assert eventually(lambda: rig.contexts == [])
    assert eventually(lambda: rig.tags(f"kiln-staging/{made.id}") == [])


def test_a_failed_step_says_what_failed(acme: Caller) -> None:
    """The message has the Dockerfile's line, the command, its exit code and its last words."""
    build_id = acme.submit(busybox("RUN echo all is well", "RUN echo the disk is on fire >&2; exit 42"), name="burning")
    seen = acme.wait(build_id, "failed")
    message = seen["error"]["message"]
    assert seen["error"]["code"] == "tool_failed"
    for words in ("RUN echo the disk is on fire", "42", "the disk is on fire"):
        assert words in message
    assert "the disk is on fire" in _log(acme, build_id)


def test_another_platform_is_built(rig: ContainerRig, acme: Caller) -> None:
    """linux/arm64 needs no emulation where the Dockerfile only copies, and the image says so."""
    build_id = acme.submit(context("FROM scratch\nCOPY busybox /b\n"), name="arm", platform="linux/arm64")
    assert acme.wait(build_id, "succeeded")["image"]["platform"] == "linux/arm64"
    assert rig.tags("acme/arm") == ["latest"]


def test_a_platform_without_builder_waits(acme: Caller) -> None:
    """The build stays queued, and says what it waits for; it can be cancelled."""
    build_id = acme.submit(busybox(), name="seven", platform="linux/arm/v7")
    deadline = time.monotonic() + 20
    while "none is connected" not in str((acme.build(build_id)["progress"] or {}).get("waiting_for")):
        assert time.monotonic() < deadline, acme.build(build_id)
        time.sleep(0.1)
    assert acme.build(build_id)["progress"]["waiting_for"] == "waiting for a linux/arm/v7 builder; none is connected"
    assert acme.build(build_id)["status"] == "queued"
    acme.cancel(build_id)
    acme.wait(build_id, "cancelled")


def test_an_unchanged_context_comes_from_the_cache(acme: Caller) -> None:
    """The second build of the same archive runs none of its steps, and makes the same image."""
    archive = busybox("RUN echo ra''n && /bin/busybox sleep 2")
    seen = []
    for _ in range(2):
        build_id = acme.submit(archive, name="sleeper")
        seen.append((acme.wait(build_id, "succeeded")["image"]["digest"], acme.log(build_id)))
    (first, first_log), (second, second_log) = seen
    assert "ran" in first_log
    assert "ran" not in second_log
    assert second_log.count("CACHED") >= 3
    assert first == second


def test_a_build_sees_nothing_of_the_worker(acme: Caller) -> None:
    """Its variables are its Dockerfile's; its files are its image's."""
    build_id = acme.submit(
        busybox(
            "ARG WANTED=yes",
            "RUN /bin/busybox env | /bin/busybox sort",
            "RUN /bin/busybox ls / && /bin/busybox ls /proc/1/root",
        ),
        name="nosy",
    )
    acme.wait(build_id, "succeeded")
    log = acme.log(build_id)
    for secret in ("KILN_", "AWS_", "DOCKER_", "TEMPORAL_"):
        assert secret not in log
    assert "WANTED=yes" in log


def test_host_network_and_privileges_are_refused(acme: Caller) -> None:
    """A Dockerfile cannot give itself what nobody granted."""
    for step in ("--network=host", "--security=insecure"):
        build_id = acme.submit(busybox(f"RUN {step} echo inside"), name="greedy")
        assert acme.wait(build_id, "failed")["error"]["code"] == "tool_failed"
        assert "inside\n" not in acme.log(build_id).replace(f"RUN {step} echo inside", "")


def test_a_logged_in_engine_pulls_and_runs_the_image(rig: ContainerRig, acme: Caller, tmp_path_factory) -> None:
    """`docker login` takes a Kiln key; what was pulled by digest runs."""
    seen = acme.wait(acme.submit(busybox('CMD ["/bin/busybox", "echo", "it runs"]'), name="runner"), "succeeded")
    docker = _docker(rig, tmp_path_factory.mktemp("docker"))
    assert "Succeeded" in docker("login", "-u", "anybody", "-p", acme.key, rig.registry)
    reference = seen["image"]["reference"]
    docker("pull", reference)
    assert docker("run", "--rm", "--network=none", reference).strip() == "it runs"
    docker("image", "rm", "-f", reference)


def _docker(rig: ContainerRig, config):
    """The docker command against one of the stack's own engines."""
    host = rig.stack.containers.hosts[0]

    def run(*arguments: str) -> str:
        command = ["docker", "--host", host, "--config", str(config), *arguments]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run


def _log(caller: Caller, build_id: str) -> str:
    """The log as cloud-builds' own stream gives it, which ends by itself."""
    headers = {"x-selected-account-id": caller.slug, "Accept": "application/json"}
    answer = caller.http.get(f"/v5/builds/{build_id}/logs", headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line for line in answer.text.split("\n\n") if line and not line.startswith(":")]
    assert all(event.startswith('data: {"line": ') and "\n" not in event for event in events)
    return "\n".join(json.loads(event.removeprefix("data: "))["line"] for event in events)
