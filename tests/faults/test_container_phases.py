"""Cancels, ends and losses in every phase of a container build: it ends truthfully, and nothing of it is left."""

import gzip
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import BinaryIO

import httpx
import pytest

from support.container_rig import ContainerRig, busybox, container_rig, context, gone, running
from support.oci_images import digest, image
from support.processes import descendants, eventually, read_proc
from support.registry import serving

pytestmark = [pytest.mark.docker, pytest.mark.fault, pytest.mark.long]
WORKERS = (("control",), ("container", "transfer"))
CONTROL, BUILDER = "worker", "worker-2"
LIMIT_SECONDS = 20
MIB = 1024**2
TEMPORAL_CLI = str(Path(sys.executable).with_name("temporal"))
# Enough to be caught while it is sent or pushed.
LARGE = "RUN /bin/busybox dd if=/dev/urandom of=/large bs=1048576 count=48"


@pytest.fixture(scope="module")
def foreign() -> Iterator["Foreign"]:
    """Somebody else's registry, which never gets to the end of a large blob."""
    foreign = Foreign()
    with serving(foreign.handler()) as foreign.host:
        yield foreign
        foreign.closing.set()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, foreign: "Foreign") -> Iterator[ContainerRig]:
    env = {
        "KILN_CONTAINER_SLOTS": "1",
        "KILN_CONTAINER_TIMEOUT_SECONDS": str(LIMIT_SECONDS),
        "KILN_TRANSFER_REGISTRIES": foreign.host,
        "KILN_CANCEL_GRACE_SECONDS": "3",
    }
    with container_rig(tmp_path_factory.mktemp("kiln"), workers=WORKERS, **env) as rig:
        yield rig


@pytest.fixture(autouse=True)
def _free_slots(rig: ContainerRig) -> Iterator[None]:
    """A test that fails leaves no build behind that holds a slot."""
    yield
    for build in rig.admin.http.get("/api/v1/builds?status=awaiting_context,queued,building").json()["builds"]:
        rig.admin.cancel(build["id"])


# Cancels


def test_while_the_context_is_uploaded(rig: ContainerRig) -> None:
    """The upload ends in a 409, and nothing of it is kept."""
    build_id, url = _order(rig, "uploading")
    archive = _large(2)

    def body() -> Iterator[bytes]:
        yield archive[:MIB]
        rig.admin.cancel(build_id)
        rig.admin.wait(build_id, "cancelled")
        yield archive[MIB:]

    assert httpx.put(url, content=body(), trust_env=False).status_code == 409
    _nothing_is_left(rig, build_id, "uploading")


def test_while_no_builder_of_the_platform_is_there(rig: ContainerRig) -> None:
    """A build that nobody will take up is cancelled at once, twice as well as once."""
    build_id = rig.admin.submit(busybox(), name="seven", platform="linux/arm/v7")
    rig.admin.cancel(build_id)
    rig.admin.cancel(build_id)
    rig.admin.wait(build_id, "cancelled", seconds=20)
    rig.admin.cancel(build_id)
    assert rig.admin.build(build_id)["status"] == "cancelled"
    _nothing_is_left(rig, build_id, "seven")


def test_while_the_engine_takes_the_context_and_hangs(rig: ContainerRig) -> None:
    """An engine that stopped answering keeps no cancel waiting beyond the grace."""
    build_id = rig.admin.submit(_large(48), name="sent")
    assert eventually(lambda: _runs(rig), 20)
    with _frozen(_daemon(rig)):
        rig.admin.cancel(build_id)
        assert eventually(lambda: not _runs(rig), 15), "buildx outlives the cancel"
    rig.admin.wait(build_id, "cancelled")
    _nothing_is_left(rig, build_id, "sent")


def test_while_the_registry_takes_the_push_and_hangs(rig: ContainerRig) -> None:
    """Two cancels are one; the build reads cancelled once the registry is back and shows that nothing is left."""
    build_id = rig.admin.submit(busybox(LARGE), name="pushing")
    rig.admin.until_log(build_id, "pushing")
    with _frozen(rig.stack.parts["registry"]):
        rig.admin.cancel(build_id)
        assert rig.admin.build(build_id)["status"] == "cancelling"
        rig.admin.cancel(build_id)
        assert eventually(lambda: not _runs(rig), 15), "buildx outlives the cancel"
    rig.admin.wait(build_id, "cancelled")
    _nothing_is_left(rig, build_id, "pushing")


def test_while_the_pushed_image_waits_for_its_publication(rig: ContainerRig) -> None:
    """Before the commit, a cancel wins over an image that is complete in the registry."""
    build_id = rig.admin.submit(busybox("RUN echo be''gun; /bin/busybox sleep 1"), name="staged")
    rig.admin.until_log(build_id, "begun")
    with _frozen(rig.stack.parts[CONTROL]):
        assert eventually(lambda: rig.tags(f"kiln-staging/{build_id}"), 20)
        rig.admin.cancel(build_id)
    rig.admin.wait(build_id, "cancelled")
    _nothing_is_left(rig, build_id, "staged")


def test_at_any_moment_around_the_end(rig: ContainerRig) -> None:
    """Either the build succeeded, and its tag points at its image; or it is cancelled, and the tag is as it was."""
    began = time.monotonic()
    build_id = rig.admin.submit(busybox("RUN echo 0"), name="ending")
    current = rig.admin.wait(build_id, "succeeded")["image"]["digest"]
    seconds = time.monotonic() - began
    for number in range(1, 6):
        build_id = rig.admin.submit(busybox(f"RUN echo {number}"), name="ending")
        time.sleep(seconds * random.uniform(0.4, 1.1))
        rig.admin.cancel(build_id)
        seen = rig.admin.wait(build_id, "succeeded", "cancelled")
        assert (seen["image"] is None) == (seen["status"] == "cancelled")
        current = seen["image"]["digest"] if seen["image"] else current
        assert rig.digest_of("default/ending", "latest") == current
        _nothing_is_left(rig, build_id)


def test_while_a_transfer_copies(rig: ContainerRig, foreign: "Foreign") -> None:
    """skopeo ends in the middle of a blob, and no tag appears."""
    body = {"source_image": f"{foreign.host}/tools/large:v1"}
    build_id = rig.admin.http.post("/api/v1/images/build", json=body).json()["build_id"]
    assert foreign.halfway.wait(20)
    rig.admin.cancel(build_id)
    rig.admin.wait(build_id, "cancelled", seconds=20)
    _nothing_is_left(rig, build_id, "large")


# Other ends


def test_a_push_that_takes_too_long(rig: ContainerRig) -> None:
    """The limit holds while the registry hangs, too."""
    build_id = rig.admin.submit(busybox(LARGE), name="late")
    rig.admin.until_log(build_id, "pushing")
    with _frozen(rig.stack.parts["registry"]):
        assert eventually(lambda: not _runs(rig), LIMIT_SECONDS + 15), "buildx outlives its limit"
    seen = rig.admin.wait(build_id, "timed_out")
    assert seen["error"]["message"] == f"the build timed out after {LIMIT_SECONDS} seconds"
    _nothing_is_left(rig, build_id, "late")


@pytest.mark.parametrize(
    ("command", "status", "code"),
    [("cancel", "cancelled", None), ("terminate", "failed", "workflow_terminated")],
)
def test_an_operators_end_in_temporal(rig: ContainerRig, command: str, status: str, code: str | None) -> None:
    """What operators end in Temporal ends here too, within a minute, and is cleaned up after."""
    build_id = rig.admin.submit(busybox("RUN echo be''gun; /bin/busybox sleep 4721"), name=command)
    rig.admin.until_log(build_id, "begun")
    _temporal(rig, "workflow", command, "-w", f"build-{build_id}")
    seen = rig.admin.wait(build_id, status, seconds=60)
    assert (seen["error"] or {}).get("code") == code
    gone("sleep\0" + "4721", 5)
    _nothing_is_left(rig, build_id, command)


# Contexts


def test_another_service_announces_the_context(rig: ContainerRig) -> None:
    """The signal `context_uploaded` builds what was uploaded; before the upload it is ignored."""
    build_id, url = _order(rig, "announced")
    signalled = ("workflow", "signal", "-w", f"build-{build_id}", "--name", "context_uploaded")
    _temporal(rig, *signalled)
    time.sleep(1)
    assert rig.admin.build(build_id)["status"] == "awaiting_context"
    assert httpx.put(url, content=busybox(), trust_env=False).status_code == 200
    _temporal(rig, *signalled)
    rig.admin.wait(build_id, "succeeded")
    assert rig.tags("default/announced") == ["v1"]


def test_a_start_while_temporal_is_away(rig: ContainerRig) -> None:
    """The start is in the catalog: the build begins when Temporal is back."""
    build_id, url = _order(rig, "patient")
    assert httpx.put(url, content=busybox(), trust_env=False).status_code == 200
    rig.stack.kill("temporal")
    rig.stack.wait_for_exit("temporal")
    try:
        start = rig.admin.http.post(f"/api/v1/images/build/{build_id}/start", json={"context_uploaded": True})
        assert (start.status_code, start.json()["status"]) == (200, "PENDING")
    finally:
        rig.stack.start_parts("temporal")
    rig.admin.wait(build_id, "succeeded")
    assert rig.tags("default/patient") == ["v1"]


def test_an_upload_that_breaks_off(rig: ContainerRig) -> None:
    """Nothing of it is kept, and the next one is taken."""
    build_id, url = _order(rig, "broken")
    place, archive = httpx.URL(url), _large(2)
    with socket.create_connection((place.host, place.port)) as connection:
        head = f"PUT {place.raw_path.decode()} HTTP/1.1\r\nHost: {place.host}\r\nContent-Length: {len(archive)}\r\n\r\n"
        connection.sendall(head.encode() + archive[:MIB])
        assert eventually(lambda: rig.contexts)
    assert eventually(lambda: rig.contexts == [])
    assert httpx.put(url, content=busybox(), trust_env=False).status_code == 200
    rig.admin.cancel(build_id)
    rig.admin.wait(build_id, "cancelled")
    _nothing_is_left(rig, build_id, "broken")


# Losses


def test_what_a_lost_builder_had_pushed_is_adopted(rig: ContainerRig) -> None:
    """Killed after its push and before anybody heard of it: the second attempt finds the image and builds nothing."""
    build_id = rig.admin.submit(busybox("RUN echo be''gun; /bin/busybox sleep 1.5"), name="adopted")
    rig.admin.until_log(build_id, "begun")
    with _frozen(rig.stack.parts["temporal"]):
        assert eventually(lambda: rig.tags(f"kiln-staging/{build_id}"), 20)
        pushed = rig.digest_of(f"kiln-staging/{build_id}", "attempt-1")
        rig.stack.kill(BUILDER)
        rig.stack.wait_for_exit(BUILDER)
    rig.stack.start_parts(BUILDER)
    seen = rig.admin.wait(build_id, "succeeded")
    assert (seen["attempt"], seen["image"]["digest"]) == (2, pushed)
    assert f"adopting {pushed}" in rig.admin.log(build_id)
    assert rig.digest_of("default/adopted", "latest") == pushed
    # What the dead worker left in the engine, the next build there removes.
    rig.admin.wait(rig.admin.submit(busybox(), name="next"), "succeeded")
    _nothing_is_left(rig, build_id)


def test_a_registry_lost_in_mid_push(rig: ContainerRig) -> None:
    """Killed and started again: the image is pushed all the same."""
    build_id = rig.admin.submit(busybox(LARGE), name="rebuilt")
    rig.admin.until_log(build_id, "pushing")
    rig.stack.kill("registry")
    rig.stack.wait_for_exit("registry")
    rig.stack.start_parts("registry")
    seen = rig.admin.wait(build_id)
    assert seen["status"] == "succeeded", (seen, rig.admin.log(build_id))
    assert rig.tags("default/rebuilt") == ["latest"]
    _nothing_is_left(rig, build_id)


def test_an_engine_lost_in_mid_build(rig: ContainerRig) -> None:
    """Killed and started again: the build is made again on the new one."""
    build_id = rig.admin.submit(busybox("RUN echo be''gun; /bin/busybox sleep 2.03125"), name="moved")
    rig.admin.until_log(build_id, "begun")
    rig.stack.kill("engine")
    rig.stack.wait_for_exit("engine")
    rig.stack.start_parts("engine")
    seen = rig.admin.wait(build_id)
    assert seen["status"] == "succeeded", (seen, rig.admin.log(build_id))
    assert rig.tags("default/moved") == ["latest"]
    gone("sleep\0" + "2.03125")
    _nothing_is_left(rig, build_id)


# What they are made of


class Foreign:
    """A registry with one image, which sends half of its layer and then nothing until `closing` is set."""

    def __init__(self) -> None:
        self.host = ""
        self.halfway, self.closing = threading.Event(), threading.Event()
        self._image = image("large", shared=gzip.compress(os.urandom(MIB)))

    def handler(self) -> type[BaseHTTPRequestHandler]:
        foreign = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = foreign.content(self.path)
                self.send_response(200)
                self.send_header("Content-Type", foreign.media_type(self.path))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    foreign.send(self.wfile, content)

            do_HEAD = do_GET  # noqa: N815  the base class's name

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
                pass

        return Answer

    def content(self, path: str) -> bytes:
        blobs = {digest(blob): blob for blob in self._image.blobs}
        return blobs.get(path.rpartition("/")[2]) or (self._image.content if "/manifests/" in path else b"{}")

    def media_type(self, path: str) -> str:
        return self._image.media_type if "/manifests/" in path else "application/octet-stream"

    def send(self, file: BinaryIO, content: bytes) -> None:
        half = len(content) if len(content) < MIB else MIB // 2
        file.write(content[:half])
        file.flush()
        if half < len(content):
            self.halfway.set()
            self.closing.wait()


def _order(rig: ContainerRig, name: str) -> tuple[str, str]:
    """A build that waits for its context: its id, and where the context goes."""
    answer = rig.admin.http.post("/api/v1/images/build", json={"image_name": name, "image_tag": "v1"})
    assert answer.status_code == 201, answer.text
    return answer.json()["build_id"], answer.json()["upload_url"]


def _large(size_mib: int) -> bytes:
    """A context that no compression makes smaller."""
    return context("FROM scratch\nCOPY large busybox /\n", {"large": os.urandom(size_mib * MIB)})


def _runs(rig: ContainerRig) -> set[int]:
    """The live tools of this rig's builds: their runs' folders are in their command lines."""
    return running(str(rig.stack.settings.runs_dir))


def _daemon(rig: ContainerRig) -> int:
    """The engine's dockerd."""
    below = descendants(rig.stack.parts["engine"])
    return next(pid for pid in below if read_proc(pid, "cmdline").startswith(b"dockerd\0"))


@contextmanager
def _frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _temporal(rig: ContainerRig, *arguments: str) -> None:
    """Runs Temporal's own command line."""
    address = f"127.0.0.1:{rig.stack.settings.temporal_port}"
    command = [TEMPORAL_CLI, *arguments, "--address", address, "--color", "never"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def _nothing_is_left(rig: ContainerRig, build_id: str, repository: str | None = None) -> None:
    """Neither in the registry nor in the object store, in the engine, in the folders of runs, nor as a process."""
    staging = f"kiln-staging/{build_id}"
    # A build succeeds with its publication, and is cleaned up after then; any other end comes last.
    patience = 10 if rig.admin.build(build_id)["status"] == "succeeded" else 0
    assert eventually(lambda: rig.tags(staging) == rig.revisions(staging) == [], patience)
    assert [path for path in rig.contexts if build_id in str(path)] == []
    assert eventually(lambda: not _runs(rig)), "a tool still runs"
    assert list(rig.stack.settings.runs_dir.glob("*")) == []
    assert eventually(lambda: build_id not in _names(rig)), "the engine keeps a name of it"
    if repository is not None:
        assert (rig.tags(f"default/{repository}"), rig.revisions(f"default/{repository}")) == ([], [])


def _names(rig: ContainerRig) -> str:
    """The images in the engine, by their names."""
    command = ["docker", "--host", rig.stack.containers.hosts[0], "image", "ls", "--format", "{{.Repository}}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
