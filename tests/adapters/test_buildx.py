"""Runs of `docker buildx build` in a real engine, pushed to a real registry that takes Kiln's tokens."""

import asyncio
import json
import shutil
import socket
import stat
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from activities.buildkit_output import BuildkitOutput
from cli.docker_engine import EngineUnavailable, docker, docker_engine
from kiln.adapters.buildx import BuildxPlace, BuildxRuns
from kiln.adapters.process import Exit
from kiln.adapters.runs import new_run_dir, sweep_work_dir
from kiln.adapters.toolbox import GuardedToolbox
from kiln.errors import SourceUnavailableError
from kiln.models import ContainerBuildSpec, OwnerType, Target
from kiln.ports import Engine, Order, ToolJob
from kiln.redact import Redactor
from kiln.registry_tokens import BUILD_USER, RegistryTokens, make_key_file
from support import archives
from support.oci_images import Pusher, image
from support.processes import descendants, read_proc
from support.registry import running_registry
from support.token_realm import token_realm

BUSYBOX = Path("/bin/busybox")
PASSWORD = "the build's own credential"
SECRET = "correct-horse-battery"
LEASE = timedelta(seconds=60)
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
TARGET = Target(owner_type=OwnerType.PERSONAL, owner="acme", name="app", tag="v1")


def order(dockerfile: str = "Dockerfile", platform: str = "linux/amd64", **arguments: str) -> Order:
    """An order whose arguments with the value SECRET are secrets."""
    secrets = {name: value for name, value in arguments.items() if value == SECRET}
    public = {name: value for name, value in arguments.items() if value != SECRET}
    spec = ContainerBuildSpec(target=TARGET, dockerfile=dockerfile, build_args=public, secret_names=tuple(secrets))
    return Order(str(uuid.uuid4()), 2, spec, secrets, organization_id="org-1", platform=platform)


def _password(_: Order) -> str:
    return PASSWORD


# What a run is made of


@pytest.fixture
def runs(tmp_path: Path) -> BuildxRuns:
    place = BuildxPlace(("docker", "buildx"), tmp_path / "runs", "registry.test:5000", docker_config=tmp_path / "mine")
    return BuildxRuns(place, _password)


def prepared(runs: BuildxRuns, job: Order, host: str = "unix:///engine.sock") -> ToolJob:
    folder = runs.folder(job)
    return runs.prepare(job, folder, folder / "context.tar.gz", Engine("engine", host))


def test_values_are_not_on_the_command_line(runs: BuildxRuns) -> None:
    """A build argument's value is in the environment only."""
    job = prepared(runs, order(TOKEN=SECRET, GREETING="hello there"))
    assert {"--build-arg=TOKEN", "--build-arg=GREETING"} < set(job.argv)
    assert (job.env["TOKEN"], job.env["GREETING"]) == (SECRET, "hello there")


@pytest.mark.parametrize("name", ["PATH", "HOME", "DOCKER_HOST", "BUILDX_BUILDER", "https_proxy", "LD_PRELOAD"])
def test_arguments_named_as_the_tools_own(runs: BuildxRuns, name: str) -> None:
    """A build argument that is called as a variable of docker's own reaches the build, and not docker."""
    job = prepared(runs, order(**{name: "x"}))
    assert f"--build-arg={name}=x" in job.argv
    assert job.env.get(name) != "x"


@pytest.mark.parametrize("name", ["LDAP_PASSWORD", "GOPROXY_TOKEN", "MY_PATH", "GIT_TOKEN"])
def test_arguments_named_almost_so(runs: BuildxRuns, name: str) -> None:
    """A name that only resembles one of the tool's is an argument like any other."""
    assert prepared(runs, order(**{name: SECRET})).env[name] == SECRET


def test_buildkits_own_arguments(runs: BuildxRuns) -> None:
    """Cache mounts are the organization's own, and no request can say otherwise."""
    job = prepared(runs, order(BUILDKIT_CACHE_MOUNT_NS="other", BUILDKIT_SYNTAX="evil"))
    named = [argument for argument in job.argv if "BUILDKIT_" in argument]
    assert named == ["--build-arg=BUILDKIT_CACHE_MOUNT_NS=org-1"]


def test_environment_is_made_from_nothing(runs: BuildxRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the worker's environment gets to docker but its PATH."""
    for name in ("AWS_SECRET_ACCESS_KEY", "KILN_SECRET_KEY", "DOCKER_CONTEXT", "BUILDX_BUILDER", "HTTPS_PROXY"):
        monkeypatch.setenv(name, SECRET)
    job = prepared(runs, order())
    assert set(job.env) == {
        *("PATH", "LANG", "HOME", "TMPDIR"),
        *("DOCKER_HOST", "DOCKER_CONFIG", "BUILDX_CONFIG", "BUILDX_GIT_INFO"),
    }
    assert SECRET not in job.env.values()


def test_engine_across_the_network(runs: BuildxRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For an engine on another host the operator's TLS settings hold, with their certificates."""
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    job = prepared(runs, order(), host="tcp://engine.test:2376")
    assert (job.env["DOCKER_TLS_VERIFY"], job.env["DOCKER_CERT_PATH"]) == ("1", str(tmp_path / "mine"))


def test_credential_is_private(runs: BuildxRuns) -> None:
    """The registry's password is in a file that only the worker's user can read."""
    job = prepared(runs, order())
    config = job.cwd / "docker" / "config.json"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert stat.S_IMODE(job.cwd.stat().st_mode) == 0o700
    assert PASSWORD not in f"{job.argv} {job.env}"


def test_named_builder(tmp_path: Path) -> None:
    """A builder that the operator made is found by a run, which has no other directory in common with it."""
    instances = tmp_path / "mine" / "buildx" / "instances"
    instances.mkdir(parents=True)
    (instances / "farm").write_text("{}")
    place = BuildxPlace(
        ("docker", "buildx"), tmp_path / "runs", "registry.test", builder="farm", docker_config=tmp_path / "mine"
    )
    job = prepared(BuildxRuns(place, _password), order())
    assert "--builder=farm" in job.argv
    assert Path(job.env["BUILDX_CONFIG"], "instances", "farm").read_text() == "{}"


@pytest.mark.parametrize(
    "written", ["", "[]", '{"containerimage.digest": "sha256:12"}', '{"containerimage.digest": 1}']
)
def test_no_digest(runs: BuildxRuns, written: str) -> None:
    """Metadata that name no digest are no digest."""
    job = prepared(runs, order())
    (job.cwd / "metadata.json").write_text(written)
    assert runs.digest(job) is None


def test_sweep(tmp_path: Path) -> None:
    """The directories of a worker that is gone are removed, a living one's and everybody else's stay."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    kinds = ("packer", "container", "transfer")
    mine = {new_run_dir(tmp_path, kind) for kind in kinds}
    for kind in kinds:
        (tmp_path / f"{kind}-{gone.pid}-x").mkdir()
    (tmp_path / f"other-{gone.pid}-x").mkdir()
    sweep_work_dir(tmp_path)
    assert set(tmp_path.iterdir()) == {*mine, tmp_path / f"other-{gone.pid}-x"}


# Real builds


@dataclass
class Ran:
    """A run that ended."""

    exit: Exit
    log: list[str]
    output: BuildkitOutput
    digest: str | None
    command_lines: bytes


class Builds:
    """Makes and runs builds; each has busybox in its context."""

    def __init__(self, place: BuildxPlace, engine: Engine, pusher: Pusher) -> None:
        self._runs = {cached: BuildxRuns(replace(place, registry_cache=cached), _password) for cached in (True, False)}
        self.engine = engine
        self.pusher = pusher
        self.host = place.registry_host

    async def run(self, dockerfile: str, job: Order | None = None, *, registry_cache: bool = True) -> Ran:
        job, runs = job or order(), self._runs[registry_cache]
        folder = await asyncio.to_thread(runs.folder, job)
        try:
            return await self._run(runs, await asyncio.to_thread(self._prepare, runs, job, folder, dockerfile))
        finally:
            await asyncio.to_thread(runs.discard, folder)

    def _prepare(self, runs: BuildxRuns, job: Order, folder: Path, dockerfile: str) -> ToolJob:
        context = folder / "context.tar.gz"
        info, content = archives.file("busybox", BUSYBOX.read_bytes())
        info.mode = 0o755
        context.write_bytes(
            archives.packed(archives.tar(archives.file("Dockerfile", dockerfile.encode()), (info, content)))
        )
        return runs.prepare(job, folder, context, self.engine)

    async def _run(self, runs: BuildxRuns, job: ToolJob) -> Ran:
        output = BuildkitOutput(Redactor([SECRET]))
        log: list[str] = []
        seen = b""
        starting = GuardedToolbox().start(job.argv, job.env, job.cwd, Redactor(), LEASE, stdin=job.stdin)
        async with await starting as tool:
            async for line in tool.lines():
                log.extend(text for _, text in output.feed(line.stream, line.text))
                seen = seen or b"\0".join(read_proc(pid, "cmdline") for pid in {tool.pid, *descendants(tool.pid)})
            ended = await tool.wait()
        return Ran(ended, log, output, runs.digest(job), seen)

    def manifest(self, job: Order) -> tuple[str, dict[str, Any]]:
        """The digest and the manifest that the registry has at the attempt's staging name."""
        repository, _, tag = self._runs[True].staging_reference(job).removeprefix(f"{self.host}/").partition(":")
        path = f"/v2/{repository}/manifests/{tag}"
        answer = self.pusher._send(repository, self.pusher.http.get, path, headers={"Accept": MANIFEST})
        return answer.headers["Docker-Content-Digest"], answer.json()

    def config(self, job: Order) -> dict[str, Any]:
        """The image's configuration."""
        blob = self.manifest(job)[1]["config"]["digest"]
        return json.loads(self.pusher.blob(f"kiln-staging/{job.build_id}", blob))


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    """An engine, a registry that takes Kiln's tokens, and a server that gives them to the build's credential."""
    if not BUSYBOX.exists() or shutil.which("docker-registry") is None:
        pytest.skip("busybox-static or docker-registry is not installed")
    if subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False).returncode:
        pytest.skip("the docker-buildx plugin is not installed")
    folder = tmp_path_factory.mktemp("registry")
    make_key_file(folder / "key.pem")
    tokens = RegistryTokens(folder / "key.pem")
    with ExitStack() as cleanup:
        try:
            engine = Engine("test", cleanup.enter_context(docker_engine()))
        except EngineUnavailable as error:
            pytest.skip(str(error))
        realm = cleanup.enter_context(token_realm(tokens, BUILD_USER, PASSWORD, "kiln-staging/", "acme/"))
        host = cleanup.enter_context(running_registry(folder, folder / "key.pem", realm))
        pusher = Pusher(host, tokens)
        cleanup.callback(pusher.close)
        place = BuildxPlace(("docker", "buildx"), folder / "runs", host)
        yield Builds(place, engine, pusher)


@pytest.mark.docker
async def test_build(builds: Builds) -> None:
    """What the run reports is what the registry has: one image, which tells other engines how it was built."""
    job = order()
    ran = await builds.run("FROM scratch\nCOPY busybox /bin/busybox\n", job)
    assert ran.exit.code == 0, ran.log
    digest, manifest = await asyncio.to_thread(builds.manifest, job)
    assert (ran.digest, manifest["mediaType"]) == (digest, MANIFEST)
    assert "moby.buildkit.cache.v0" in await asyncio.to_thread(builds.config, job)


@pytest.mark.docker
async def test_unchanged_build(builds: Builds) -> None:
    """The same context again is the same image, without the notes on the cache, which name each upload."""
    dockerfile = "FROM scratch\nCOPY busybox /bin/busybox\nENV SAME=1\n"
    first, second = [(await builds.run(dockerfile, registry_cache=False)).digest for _ in range(2)]
    assert first is not None
    assert first == second


@pytest.mark.docker
async def test_arguments(builds: Builds) -> None:
    """Arguments reach the build whatever they are called, without passing the command line, and nothing else does."""
    dockerfile = """
        FROM scratch
        COPY busybox /bin/busybox
        ARG TOKEN
        ARG DOCKER_HOST
        RUN ["/bin/busybox", "env"]
    """
    job = order(TOKEN=SECRET, DOCKER_HOST="tcp://elsewhere:1")
    ran = await builds.run(dockerfile, job)
    assert ran.exit.code == 0, ran.log
    assert b"--build-arg=TOKEN" in ran.command_lines
    assert SECRET.encode() not in ran.command_lines
    printed = {line.split(" ", 2)[2] for line in ran.log if "=" in line and line.split()[1][0].isdigit()}
    assert {line.partition("=")[0] for line in printed} == {"PATH", "HOME", "TOKEN", "DOCKER_HOST"}
    assert {"TOKEN=***", "DOCKER_HOST=tcp://elsewhere:1"} < printed


@pytest.mark.docker
@pytest.mark.parametrize("platform", ["linux/arm64", "linux/arm/v7"])
async def test_other_platforms(builds: Builds, platform: str) -> None:
    """A Dockerfile that only copies builds for a processor that this machine does not have."""
    job = order(platform=platform)
    ran = await builds.run("FROM scratch\nCOPY busybox /bin/busybox\n", job)
    assert ran.exit.code == 0, ran.log
    config = await asyncio.to_thread(builds.config, job)
    named = [config["os"], config["architecture"], *filter(None, [config.get("variant")])]
    assert "/".join(named) == platform


@pytest.mark.docker
async def test_base_image(builds: Builds) -> None:
    """A base image in the registry is read with the build's credential, and known as a source."""
    await asyncio.to_thread(builds.pusher.push, "acme/base", image("base", docker=True), "v1")
    ran = await builds.run(f"FROM {builds.host}/acme/base:v1\nENV A=1\n")
    assert (ran.exit.code, ran.output.sources) == (0, {f"{builds.host}/acme/base:v1"}), ran.log


@pytest.mark.docker
async def test_image_of_another_in_the_engine(builds: Builds, tmp_path: Path) -> None:
    """An image that the engine has already is not used for a build that may not read it."""
    foreign = f"{builds.host}/rival/base:v1"
    root = tmp_path / "root.tar"
    root.write_bytes(archives.tar(archives.file("x", b"theirs")))
    imported = await asyncio.to_thread(docker, builds.engine.host, "import", str(root), foreign)
    assert imported.returncode == 0, imported.stderr
    try:
        ran = await builds.run(f"FROM {foreign}\nENV A=1\n")
    finally:
        await asyncio.to_thread(docker, builds.engine.host, "image", "rm", foreign)
    assert ran.exit.code == 1, ran.log
    assert isinstance(ran.output.failure(), SourceUnavailableError)


@pytest.mark.docker
async def test_dockerfile_that_looks_like_a_url(builds: Builds) -> None:
    """A Dockerfile's name is a path in the context, and nothing else is asked for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        job = order(dockerfile=f"http://127.0.0.1:{server.getsockname()[1]}/Dockerfile")
        ran = await builds.run("FROM scratch\n", job)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "no such file" in str(ran.output.failure())
