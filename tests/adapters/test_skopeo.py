"""Runs of `skopeo copy` between two real registries: a public one, and one that takes Kiln's tokens."""

import asyncio
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from activities import skopeo_output
from kiln.adapters.skopeo import SkopeoPlace, SkopeoRuns
from kiln.adapters.toolbox import GuardedToolbox
from kiln.errors import SourceUnavailableError
from kiln.models import OwnerType, Target, TransferSpec
from kiln.ports import Order
from kiln.redact import Redactor
from kiln.registry_tokens import BUILD_USER, RegistryTokens, make_key_file
from support.oci_images import Made, Pusher, image, index
from support.registry import running_registry
from support.token_realm import token_realm

PASSWORD = "the build's own credential"
LEASE = timedelta(seconds=60)
TARGET = Target(owner_type=OwnerType.PERSONAL, owner="acme", name="app", tag="v1")


def order(reference: str) -> Order:
    return Order(str(uuid.uuid4()), 1, TransferSpec(target=TARGET, reference=reference), {}, organization_id="org-1")


@dataclass
class Transfers:
    """A public registry, Kiln's, and the runs between them."""

    public: Pusher
    ours: Pusher
    runs: SkopeoRuns

    async def copy(self, job: Order) -> tuple[int | None, list[str], str | None]:
        """The run's exit code, its lines, and the digest that it reported."""
        folder = await asyncio.to_thread(self.runs.folder, job)
        run = await asyncio.to_thread(self.runs.prepare, job, folder)
        async with await GuardedToolbox().start(run.argv, run.env, run.cwd, Redactor(), LEASE) as tool:
            lines = [line.text async for line in tool.lines()]
            ended = await tool.wait()
        digest = await asyncio.to_thread(self.runs.digest, run)
        await asyncio.to_thread(self.runs.discard, folder)
        return ended.code, lines, digest


@pytest.fixture(scope="module")
def transfers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Transfers]:
    if shutil.which("docker-registry") is None or shutil.which("skopeo") is None:
        pytest.skip("docker-registry or skopeo is not installed")
    folder = tmp_path_factory.mktemp("ours")
    make_key_file(folder / "key.pem")
    tokens = RegistryTokens(folder / "key.pem")
    with ExitStack() as cleanup:
        realm = cleanup.enter_context(token_realm(tokens, BUILD_USER, PASSWORD, "kiln-staging/", "acme/"))
        host = cleanup.enter_context(running_registry(folder, folder / "key.pem", realm))
        public = cleanup.enter_context(running_registry(tmp_path_factory.mktemp("public")))
        pushers = Pusher(public), Pusher(host, tokens)
        for pusher in pushers:
            cleanup.callback(pusher.close)
        yield Transfers(*pushers, SkopeoRuns(SkopeoPlace("skopeo", folder / "runs", host), lambda _: PASSWORD))


def host_of(pusher: Pusher) -> str:
    return pusher.http.base_url.netloc.decode()


def staged(transfers: Transfers, job: Order, made: Made) -> bytes:
    """What Kiln's registry has at the staging repository under an image's digest."""
    repository = f"kiln-staging/{job.build_id}"
    path = f"/v2/{repository}/manifests/{made.digest}"
    return transfers.ours._send(repository, transfers.ours.http.get, path, headers={"Accept": made.media_type}).content


@pytest.mark.parametrize("docker", [False, True])
async def test_all_platforms(transfers: Transfers, docker: bool) -> None:
    """All of an image's platforms are copied, byte by byte, under the digest that the run reports."""
    made = index(image("one", docker=docker), image("two", "linux/arm64", docker=docker), docker=docker)
    transfers.public.push("library/app", made, "v1")
    job = order(f"{host_of(transfers.public)}/library/app:v1")
    code, lines, digest = await transfers.copy(job)
    assert (code, digest) == (0, made.digest), lines
    for each in (made, *made.children):
        assert await asyncio.to_thread(staged, transfers, job, each) == each.content


async def test_missing_source(transfers: Transfers) -> None:
    """A source that does not exist is told apart from all else."""
    code, lines, digest = await transfers.copy(order(f"{host_of(transfers.public)}/library/nothing:v1"))
    assert (code, digest) == (1, None)
    assert isinstance(skopeo_output.failure(lines), SourceUnavailableError)


async def test_private_source(transfers: Transfers) -> None:
    """The build's credential opens nothing as a source, even where it could: sources are public."""
    transfers.ours.push("acme/private", image("private"), "v1")
    _, lines, _ = await transfers.copy(order(f"{host_of(transfers.ours)}/acme/private:v1"))
    assert isinstance(skopeo_output.failure(lines), SourceUnavailableError)


def test_nothing_of_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """skopeo gets neither the worker's environment nor its logins, and its own login is a private file."""
    for name in ("AWS_SECRET_ACCESS_KEY", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, "/the/workers")
    runs = SkopeoRuns(SkopeoPlace("skopeo", tmp_path, "registry.test"), lambda _: PASSWORD)
    job = order("docker.io/library/busybox:1")
    run = runs.prepare(job, runs.folder(job))
    assert not {"AWS_SECRET_ACCESS_KEY", "REGISTRY_AUTH_FILE"} & set(run.env)
    assert run.env["XDG_RUNTIME_DIR"] == str(run.cwd)
    assert stat.S_IMODE((run.cwd / "login.json").stat().st_mode) == 0o600
    assert PASSWORD not in f"{run.argv} {run.env}"


def test_remote_registries_are_verified(tmp_path: Path) -> None:
    """Only a registry on this machine is spoken to without TLS."""
    runs = SkopeoRuns(SkopeoPlace("skopeo", tmp_path, "127.0.0.1:5000"), lambda _: PASSWORD)
    job = order("docker.io/library/busybox:1")
    argv = runs.prepare(job, runs.folder(job)).argv
    assert [argument for argument in argv if "tls" in argument] == ["--dest-tls-verify=false"]
