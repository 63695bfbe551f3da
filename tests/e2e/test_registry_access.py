"""Who may pull what, and what a build may reach: the published Docker client, and builds that try what they must not."""

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from cli.engine_slot import LINK_PREFIX, Slot
from support.container_rig import BUSYBOX, FROM_BUSYBOX, Caller, ContainerRig, busybox, container_rig, context, running

pytestmark = [pytest.mark.docker, pytest.mark.long]
# One engine, so that it has everybody's layers; and so small that a test can fill it.
SMALL = {
    "KILN_CONTAINER_SLOTS": "1",
    "KILN_SLOT_MEMORY_BYTES": str(128 * 1024**2),
    "KILN_SLOT_PROCESSES": "64",
}
MARK = "what only acme may read"
NOT_YOURS = "no such image, or not yours to use"
TOKEN = "npm-s3cr3t-0123456789"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerRig]:
    with container_rig(tmp_path_factory.mktemp("kiln"), **SMALL) as rig:
        yield rig


@pytest.fixture(scope="module")
def acme(rig: ContainerRig) -> Caller:
    return rig.caller("acme")


@pytest.fixture(scope="module")
def rival(rig: ContainerRig) -> Caller:
    return rig.caller("rival")


@pytest.fixture(scope="module")
def secret(rig: ContainerRig, acme: Caller) -> str:
    """The digest of acme's private image, whose manifest and layers the engine has, since acme built on it too."""
    digest = built(acme, busybox(f"RUN echo '{MARK}' > /note"), name="secret")
    for reference in (f"{rig.registry}/acme/secret", f"{rig.registry}/acme/secret@{digest}"):
        built(acme, context(f"FROM {reference}\nRUN grep only /note\n"), name="own")
    return digest


@pytest.fixture
def docker(rig: ContainerRig, tmp_path: Path) -> "Docker":
    """Docker's own client, logged in nowhere."""
    return Docker(rig.stack.containers.hosts[0], tmp_path / "docker", rig.registry)


class Docker:
    """The docker command against the stack's own engine, with a configuration of its own."""

    def __init__(self, host: str, config: Path, registry: str) -> None:
        self._command = ["docker", "--host", host, "--config", str(config)]
        self._registry = registry

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*self._command, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def login(self, key: str) -> bool:
        return self.run("login", "-u", "anybody", "-p", key, self._registry).returncode == 0

    def pulls(self, path: str) -> bool:
        """Whether the registry lets it have the image. Fails if something else than a refusal is the reason."""
        reference = f"{self._registry}/{path}"
        pulled = self.run("pull", reference)
        self.run("image", "rm", "--force", reference)
        assert pulled.returncode == 0 or "denied" in pulled.stderr or "unauthorized" in pulled.stderr, pulled.stderr
        return pulled.returncode == 0


def built(caller: Caller, archive: bytes, **fields: str) -> str:
    """The digest of the image that a build makes."""
    digest: str = caller.wait(caller.submit(archive, **fields), "succeeded")["image"]["digest"]
    return digest


def ordered(caller: Caller, archive: bytes, **fields: str) -> None:
    """A build by container-images' API, seen to its end."""
    answer = caller.http.post("/api/v1/images/build", json=fields)
    assert answer.status_code == 201, answer.text
    order = answer.json()
    assert httpx.put(order["upload_url"], content=archive, trust_env=False).status_code == 200
    start = caller.http.post(f"/api/v1/images/build/{order['build_id']}/start", json={"context_uploaded": True})
    assert start.status_code == 200, start.text
    caller.wait(order["build_id"], "succeeded")


def show(caller: Caller, reference: str, visibility: str) -> None:
    """Changes who may pull an image."""
    body = {"mode": "explicit", "updates": [{"source": {"reference": reference}, "set": {"visibility": visibility}}]}
    answer = caller.http.patch("/api/v1/images", json=body).json()
    assert answer["success"], answer


# Docker's client


def test_a_key_logs_in_and_anything_else_does_not(docker: Docker, acme: Caller) -> None:
    """`docker login` says yes to a Kiln key, and no to a wrong one."""
    assert docker.login(acme.key)
    assert not docker.login(acme.key[:-1] + "x")


def test_private_images_are_their_owners(docker: Docker, acme: Caller, rival: Caller, secret: str) -> None:
    """A key pulls its own organization's private image by tag and digest, another organization's by neither."""
    assert docker.login(acme.key)
    assert docker.pulls("acme/secret:latest")
    assert docker.pulls(f"acme/secret@{secret}")
    assert docker.login(rival.key)
    assert not docker.pulls("acme/secret:latest")
    assert not docker.pulls(f"acme/secret@{secret}")


def test_visibility_opens_and_closes(docker: Docker, acme: Caller, rival: Caller) -> None:
    """PUBLIC lets another organization pull, PRIVATE not any more; a single PRIVATE tag keeps a repository closed."""
    built(acme, busybox("RUN echo one"), name="shown", tag="v1")
    assert docker.login(rival.key)
    show(acme, "acme/shown:v1", "PUBLIC")
    assert docker.pulls("acme/shown:v1")
    built(acme, busybox("RUN echo two"), name="shown", tag="v2")
    assert not docker.pulls("acme/shown:v1")
    show(acme, "acme/shown:v2", "PUBLIC")
    assert docker.pulls("acme/shown:v1")
    show(acme, "acme/shown:v1", "PRIVATE")
    assert not docker.pulls("acme/shown:v2")


def test_without_a_key_nothing_is_pulled(docker: Docker, acme: Caller) -> None:
    """Not even what is PUBLIC."""
    built(acme, busybox("RUN echo for every key"), name="open")
    show(acme, "acme/open:latest", "PUBLIC")
    assert not docker.pulls("acme/open:latest")


def test_a_key_pushes_nothing(rig: ContainerRig, docker: Docker, acme: Caller, secret: str) -> None:
    """Images come from builds: not even its own repositories are open to a key's push."""
    assert docker.login(acme.key)
    source, target = f"{rig.registry}/acme/secret@{secret}", f"{rig.registry}/acme/pushed:v1"
    assert docker.run("pull", source).returncode == 0
    assert docker.run("tag", source, target).returncode == 0
    pushed = docker.run("push", target)
    docker.run("image", "rm", "--force", source, target)
    assert pushed.returncode != 0
    assert "denied" in pushed.stderr
    assert (rig.tags("acme/pushed"), rig.revisions("acme/pushed")) == ([], [])


def test_platform_images_are_everybodys(rig: ContainerRig, docker: Docker, rival: Caller) -> None:
    """What an administrator builds for the platform is pulled with any key, and built upon."""
    fields = {"image_name": "base", "image_tag": "v1", "owner_scope": "platform", "visibility": "PUBLIC"}
    ordered(rig.admin, busybox("RUN echo base > /base"), **fields)
    assert docker.login(rival.key)
    assert docker.pulls("platform/base:v1")
    built(rival, context(f"FROM {rig.registry}/platform/base:v1\nRUN grep base /base\n"), name="on-platform")


# FROM


READERS: dict[str, Callable[[str], str]] = {
    "from": lambda image: f"FROM {image}\nRUN cat /note\n",
    "copy": lambda image: f"{FROM_BUSYBOX}COPY --from={image} /note /note\nRUN cat /note\n",
    "mount": lambda image: f"{FROM_BUSYBOX}RUN --mount=type=bind,from={image},target=/there cat /there/note\n",
    "stage": lambda image: f"FROM {image} AS theirs\n{FROM_BUSYBOX}COPY --from=theirs /note /\nRUN cat /note\n",
}
# The engine knows a manifest by its digest, whatever name of whatever host stands before it.
THEFTS = [
    ("from", "{host}/acme/secret"),
    ("copy", "{host}/acme/secret@{digest}"),
    ("mount", "{host}/acme/secret@{digest}"),
    ("copy", "{host}/rival/anything@{digest}"),
    ("mount", "{host}/rival/anything:v1@{digest}"),
    ("copy", "localhost:{port}/acme/secret@{digest}"),
    ("stage", "elsewhere.invalid/anything@{digest}"),
]


@pytest.mark.parametrize(("reader", "name"), THEFTS)
def test_another_organizations_private_image_cannot_be_read(
    rig: ContainerRig, acme: Caller, rival: Caller, secret: str, reader: str, name: str
) -> None:
    """A build ends with `source_unavailable`, though the engine has manifest and layers, and prints nothing of it."""
    _has_manifest(rig, acme, secret)
    image = name.format(host=rig.registry, port=rig.stack.settings.registry_port, digest=secret)
    build_id = rival.submit(context(READERS[reader](image)), name="thief")
    assert rival.wait(build_id, "failed")["error"]["code"] == "source_unavailable"
    assert MARK not in rival.log(build_id)
    assert rig.tags("rival/thief") == []


def test_a_refused_build_carries_nothing_away(rig: ContainerRig, acme: Caller, rival: Caller, secret: str) -> None:
    """Not even what a step takes along in a cache mount before its build is ended."""
    _has_manifest(rig, acme, secret)
    image = f"{rig.registry}/acme/secret@{secret}"
    steal = f"RUN --mount=type=cache,target=/c --mount=type=bind,from={image},target=/m cp /m/note /c/note"
    rival.wait(rival.submit(busybox(steal), name="thief"), "failed")
    build_id = rival.submit(busybox("RUN --mount=type=cache,target=/c cat /c/*; echo looked"), name="fence")
    rival.wait(build_id, "succeeded")
    assert MARK not in rival.log(build_id)


def test_a_public_image_is_built_upon_until_it_is_private(rig: ContainerRig, acme: Caller, rival: Caller) -> None:
    """What was PUBLIC at one build is refused to the next one after it was made PRIVATE, cached as it is."""
    digest = built(acme, busybox("RUN echo public > /note"), name="lent")
    archive = context(READERS["copy"](f"{rig.registry}/acme/lent@{digest}"))
    show(acme, "acme/lent:latest", "PUBLIC")
    built(rival, archive, name="borrower")
    show(acme, "acme/lent:latest", "PRIVATE")
    refused = rival.wait(rival.submit(archive, name="borrower"), "failed")
    assert refused["error"]["code"] == "source_unavailable"


def test_an_image_that_two_have_is_each_ones_own(rig: ContainerRig) -> None:
    """Two organizations that build the same get the same digest, and each may build upon it."""
    north, south = rig.caller("north"), rig.caller("south")
    archive = busybox("RUN echo the same")
    digest = built(north, archive, name="same")
    assert built(south, archive, name="same") == digest
    for caller in (south, north):
        built(caller, context(f"FROM {rig.registry}/{caller.slug}/same@{digest}\nRUN echo more\n"), name="more")


def _has_manifest(rig: ContainerRig, acme: Caller, digest: str) -> None:
    """The engine forgets it when another organization builds there; then acme builds on its image again."""
    name = digest.removeprefix("sha256:")
    kept = rig.stack.settings.home_dir / "engines" / "slot-1" / "data" / "buildkit" / "content" / "blobs" / "sha256"
    if not (kept / name).exists():
        built(acme, context(f"FROM {rig.registry}/acme/secret@{digest}\nRUN grep only /note\n"), name="own")
    assert (kept / name).exists()


# What a build may reach


def test_cache_mounts_are_an_organizations_own(acme: Caller, rival: Caller) -> None:
    """What one organization's build leaves in a cache mount, its own next build finds, and another's never does."""
    step = "RUN --mount=type=cache,id=shared,target=/c ls /c; echo {0} && touch /c/left-by-{0}"
    built(acme, busybox(step.format("acme")), name="cache")
    theirs = rival.submit(busybox(step.format("rival")), name="cache")
    rival.wait(theirs, "succeeded")
    ours = acme.submit(busybox(step.format("acme-again")), name="cache")
    acme.wait(ours, "succeeded")
    assert "left-by-acme" not in rival.log(theirs)
    assert "left-by-acme\n" in acme.log(ours)
    assert "left-by-rival" not in acme.log(ours)


@pytest.mark.parametrize("name", ["BUILDKIT_CACHE_MOUNT_NS", "BUILDKIT_SYNTAX", "buildkit_inline_cache"])
def test_arguments_that_steer_buildkit_are_refused(acme: Caller, name: str) -> None:
    """A request cannot give BuildKit orders."""
    answer = acme.post(busybox(), build_args=json.dumps({name: "x"}))
    assert answer.status_code == 422
    assert "build_args" in answer.json()["detail"]


def test_a_secret_argument_shows_nowhere(acme: Caller) -> None:
    """The value is in the build's environment, and in no command line and no line of its log."""
    archive = busybox("ARG NPM_TOKEN", 'RUN echo "be""gun $NPM_TOKEN" && busybox sleep 3')
    build_id = acme.submit(archive, name="token", build_args=json.dumps({"NPM_TOKEN": TOKEN}))
    acme.until_log(build_id, "begun")
    assert running("sleep\0" + "3")
    assert running(TOKEN) == set()
    acme.wait(build_id, "succeeded")
    assert "begun ***" in acme.log(build_id)
    assert TOKEN not in acme.log(build_id)
    assert TOKEN not in json.dumps(acme.build(build_id))


def test_the_hosts_services_are_out_of_reach(rig: ContainerRig, acme: Caller) -> None:
    """A RUN reaches no service of the host's at any of its addresses, nor metadata; BuildKit's own ADD none on loopback."""
    settings = rig.stack.settings
    with _service() as port:
        ports = (port, settings.registry_port, settings.api_port, settings.temporal_port)
        addresses = _addresses(Slot(settings.home_dir, 1).link)
        assert [address for address in addresses if not _answers(address, port)] == []
        places = [f"{address}:{one}" for address in ("$GATEWAY", *addresses) for one in ports]
        build_id = acme.submit(busybox(_asking([*places, "169.254.169.254:80"])), name="curious")
        acme.wait(build_id, "succeeded")
        adding = acme.submit(busybox(f"ADD http://127.0.0.1:{port}/ /x"), name="adder")
        acme.wait(adding, "failed")
    log = acme.log(build_id)
    assert "own: reached" in log
    assert "there: reached" not in log, log


def _asking(places: list[str]) -> str:
    """A step that tries all places at once, after one of its own for comparison.

    nc ends with 1 where it cannot connect in time, and otherwise with its input.
    """
    return (
        "RUN busybox httpd -p 127.0.0.1:8080; "
        "GATEWAY=$(busybox ip route | busybox awk '/default/ {print $3}'); test -n \"$GATEWAY\" || exit 1; "
        "knock() { busybox timeout 5 busybox nc -w 2 ${1%:*} ${1#*:} </dev/null >/dev/null; "
        'test $? = 1 || echo "$2: rea"\'ched\'" $1"; }; '
        "knock 127.0.0.1:8080 own; "
        f"for place in {' '.join(places)}; do knock $place there & done; wait"
    )


@contextmanager
def _service() -> Iterator[int]:
    """A service on all of this host's addresses; its port."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
            pass

    server = ThreadingHTTPServer(("0.0.0.0", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _addresses(uplink: str) -> list[str]:
    """This host's IPv4 addresses, its end of the engine's link among them, and no other engine's."""
    links = json.loads(subprocess.run(["ip", "-4", "-j", "address"], capture_output=True, check=True).stdout)
    ours = [link for link in links if link["ifname"] == uplink or not link["ifname"].startswith(LINK_PREFIX)]
    assert uplink in {link["ifname"] for link in ours}
    return [info["local"] for link in ours for info in link.get("addr_info", [])]


def _answers(address: str, port: int) -> bool:
    """Whether this host itself reaches it: by another process, as this one keeps to loopback."""
    command = [str(BUSYBOX), "nc", "-w", "5", address, str(port)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize(
    "step",
    ["RUN busybox tail /dev/zero", "RUN while true; do busybox sleep 1000 & done"],
    ids=["memory", "processes"],
)
def test_a_greedy_build_ends_alone(rig: ContainerRig, acme: Caller, step: str) -> None:
    """It fails at its slot's limit, and the same engine builds the next image."""
    engine = rig.stack.parts["engine"]
    assert acme.wait(acme.submit(busybox(step), name="greedy"))["error"]["code"] == "tool_failed"
    built(acme, busybox("RUN echo all is well"), name="next")
    assert rig.stack.parts["engine"] == engine
