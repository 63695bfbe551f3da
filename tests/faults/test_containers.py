"""Faults in container builds: killed workers, cancels in every phase, time-outs; the engine and the registry are asked."""

import signal
import time
from collections.abc import Iterator

import pytest

from support.container_rig import ContainerRig, busybox, container_rig, gone, running
from support.processes import descendants, eventually

pytestmark = [pytest.mark.docker, pytest.mark.fault, pytest.mark.long]
# Two workers with builders: when one is lost, the other is there.
WORKERS = (("control", "transfer"), ("container",), ("container",))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerRig]:
    with container_rig(tmp_path_factory.mktemp("kiln"), workers=WORKERS) as rig:
        yield rig


@pytest.fixture(autouse=True)
def _free_slots(rig: ContainerRig) -> Iterator[None]:
    """A test that fails leaves no build behind that holds a slot."""
    yield
    for build in rig.admin.http.get("/api/v1/builds?status=queued,building").json()["builds"]:
        rig.admin.cancel(build["id"])


def sleeping(mark: int) -> bytes:
    """A build whose step sleeps so many seconds, which is how its process is found."""
    return busybox(f"RUN echo be''gun && /bin/busybox sleep {mark}")


def test_a_killed_worker_s_build_is_taken_up(rig: ContainerRig) -> None:
    """One image, by the second attempt; the first one's processes are gone from the engine."""
    build_id = rig.admin.submit(busybox("RUN echo be''gun && /bin/busybox sleep 6.0625"), name="survivor")
    rig.admin.until_log(build_id, "begun")
    worker = next(name for name in ("worker-2", "worker-3") if _builds(rig, name))
    rig.stack.kill(worker, signal.SIGKILL)
    try:
        seen = rig.admin.wait(build_id, "succeeded")
    finally:
        rig.stack.wait_for_exit(worker)
        rig.stack.start_parts(worker)
    assert seen["attempt"] == 2
    assert rig.tags("default/survivor") == ["latest"]
    assert eventually(lambda: rig.tags(f"kiln-staging/{build_id}") == [])
    gone("sleep\0" + "6.0625")


def test_a_cancel_ends_what_runs_in_the_engine(rig: ContainerRig) -> None:
    """No process of the build's is left, no tag appears, and its context is deleted."""
    build_id = rig.admin.submit(sleeping(4713), name="stopped")
    rig.admin.until_log(build_id, "begun")
    assert running("sleep\0" + "4713")
    rig.admin.cancel(build_id)
    rig.admin.wait(build_id, "cancelled")
    gone("sleep\0" + "4713", 1)
    _nothing_is_left(rig, build_id, "default/stopped")


def test_a_cancel_in_the_queue_is_at_once(rig: ContainerRig) -> None:
    """Builds beyond the slots wait; one that is cancelled there never starts."""
    holders = [rig.admin.submit(sleeping(4714), name=f"holder-{number}") for number in range(2)]
    for holder in holders:
        rig.admin.until_log(holder, "begun")
    build_id = rig.admin.submit(sleeping(4715), name="queued")
    time.sleep(0.5)
    assert rig.admin.build(build_id)["status"] == "queued"
    rig.admin.cancel(build_id)
    rig.admin.wait(build_id, "cancelled", seconds=20)
    for holder in holders:
        rig.admin.cancel(holder)
        rig.admin.wait(holder, "cancelled")
    _nothing_is_left(rig, build_id, "default/queued")


def test_a_cancel_while_pushing_moves_no_tag(rig: ContainerRig) -> None:
    """The user's tag stays where it was, whatever was pushed already."""
    rig.admin.wait(rig.admin.submit(busybox("RUN echo first"), name="pushed"), "succeeded")
    before = rig.digest_of("default/pushed", "latest")
    step = "RUN /bin/busybox dd if=/dev/urandom of=/big bs=1048576 count=150"
    build_id = rig.admin.submit(busybox(step), name="pushed")
    rig.admin.until_log(build_id, "pushing")
    rig.admin.cancel(build_id)
    rig.admin.wait(build_id, "cancelled")
    time.sleep(1)
    assert rig.digest_of("default/pushed", "latest") == before
    assert rig.tags(f"kiln-staging/{build_id}") == []


def test_a_build_that_takes_too_long_is_ended(rig: ContainerRig, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It reads timed_out, and nothing of it runs on."""
    env = {"KILN_CONTAINER_TIMEOUT_SECONDS": "3"}
    with container_rig(tmp_path_factory.mktemp("hasty"), **env) as hasty:
        build_id = hasty.admin.submit(sleeping(4716), name="slow")
        seen = hasty.admin.wait(build_id, "timed_out")
        assert seen["error"]["message"] == "the build timed out after 3 seconds"
        gone("sleep\0" + "4716", 1)
        _nothing_is_left(hasty, build_id, "default/slow")


def test_a_stopped_worker_hands_its_build_over(rig: ContainerRig) -> None:
    """SIGTERM interrupts the build, and the other worker makes the image."""
    build_id = rig.admin.submit(busybox("RUN echo be''gun && /bin/busybox sleep 5.03125"), name="handed")
    rig.admin.until_log(build_id, "begun")
    worker = next(name for name in ("worker-2", "worker-3") if _builds(rig, name))
    rig.stack.stop_part(worker)
    try:
        rig.admin.wait(build_id, "succeeded")
    finally:
        rig.stack.start_parts(worker)
    assert rig.tags("default/handed") == ["latest"]


def test_a_copy_only_build_survives_everything_being_killed(rig: ContainerRig) -> None:
    """Every process is killed in mid-build; after the next start the build goes on to its end."""
    build_id = rig.admin.submit(busybox("RUN echo be''gun && /bin/busybox sleep 4.015625"), name="phoenix")
    rig.admin.until_log(build_id, "begun")
    names = list(rig.stack.parts)
    for name in names:
        rig.stack.kill(name, signal.SIGKILL)
    for name in names:
        rig.stack.wait_for_exit(name)
    for wave in (("temporal", "ec2", "registry"), tuple(name for name in names if "engine" in name)):
        rig.stack.start_parts(*(name for name in wave if name in names))
    rest = [name for name in names if name.startswith(("worker", "api"))]
    rig.stack.start_parts(*rest)
    rig.admin.wait(build_id, "succeeded")
    assert rig.tags("default/phoenix") == ["latest"]


def _nothing_is_left(rig: ContainerRig, build_id: str, repository: str) -> None:
    assert rig.tags(repository) == []
    assert rig.tags(f"kiln-staging/{build_id}") == []
    assert rig.revisions(f"kiln-staging/{build_id}") == []
    assert [path for path in rig.contexts if build_id in str(path)] == []


def _builds(rig: ContainerRig, worker: str) -> bool:
    """Whether a worker's process has a buildx below it."""
    return bool(descendants(rig.stack.parts[worker]) & running("buildx"))
