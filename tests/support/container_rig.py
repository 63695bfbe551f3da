"""A whole Kiln with container builds: private engines, a registry, workers and the API as processes of their own."""

import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.local_stack import LocalStack
from cli.parts import ALL_ROLES
from kiln.catalog import keys
from kiln.catalog.session import Catalog
from support.processes import read_proc
from support.stack import running_stack

BUSYBOX = Path("/bin/busybox")
ENDED = frozenset({"succeeded", "failed", "cancelled", "timed_out"})
FROM_BUSYBOX = "FROM scratch\nCOPY busybox /bin/busybox\nCOPY busybox /bin/sh\n"


@dataclass(frozen=True)
class Caller:
    """An organization and a key of its own."""

    organization_id: str
    slug: str
    key: str
    http: httpx.Client

    def build(self, build_id: str) -> dict[str, Any]:
        """The build as kiln shows it."""
        answer = self.http.get(f"/api/v1/builds/{build_id}")
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def log(self, build_id: str) -> str:
        return self.http.get(f"/api/v1/builds/{build_id}/logs", headers={"Accept": "text/plain"}).text

    def wait(self, build_id: str, *statuses: str, seconds: float = 90) -> dict[str, Any]:
        """The build once it has one of the statuses (any end, without). Fails after so many seconds."""
        wanted = frozenset(statuses) or ENDED
        end = time.monotonic() + seconds
        while (body := self.build(build_id))["status"] not in wanted:
            report = f"still {body['status']}: {json.dumps(body, indent=1)}\n{self.log(build_id)}"
            assert time.monotonic() < end, report
            assert body["status"] not in ENDED, report
            time.sleep(0.05)
        return body

    def until_log(self, build_id: str, text: str, seconds: float = 60) -> None:
        """Returns once the build's log has the text."""
        end = time.monotonic() + seconds
        while text not in self.log(build_id):
            assert time.monotonic() < end, self.log(build_id)
            time.sleep(0.05)

    def submit(self, archive: bytes, *, name: str = "app", tag: str = "latest", **fields: str) -> str:
        """A build by cloud-builds' API."""
        answer = self.post(archive, name=name, tag=tag, **fields)
        assert answer.status_code == 200, answer.text
        build_id: str = answer.json()["id"]
        return build_id

    def post(self, archive: bytes, *, name: str = "app", tag: str = "latest", **fields: str) -> httpx.Response:
        data = {"image_name": name, "image_tag": tag, "agent_name": "agent", **fields}
        headers = {"x-selected-account-id": self.slug}
        return self.http.post("/v5/builds", data=data, files={"context_archive": archive}, headers=headers)

    def cancel(self, build_id: str) -> None:
        assert self.http.post(f"/api/v1/builds/{build_id}/cancel").status_code == 202


@dataclass
class ContainerRig:
    """What a test works with."""

    stack: LocalStack
    admin: Caller
    catalog: Catalog

    @property
    def registry(self) -> str:
        return self.stack.settings.registry_host

    def caller(self, slug: str, scopes: tuple[str, ...] = ("builds:write",)) -> Caller:
        """A key of an organization, which is made if it is not there."""
        with self.catalog.transaction() as tx:
            organization = keys.ensure_organization(tx, slug)
            _, plain = keys.create(tx, organization, "test", scopes)
            return Caller(organization.id, slug, plain, client_of(self.stack, plain))

    def tags(self, repository: str) -> list[str]:
        """What the registry itself says, by its files."""
        folder = self.repositories / repository / "_manifests" / "tags"
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        # The registry makes a tag's folder and file first, and then writes the digest into it.
        return sorted(name for name in names if self.digest_of(repository, name))

    def revisions(self, repository: str) -> list[str]:
        """The manifests that the registry has in a repository."""
        folder = self.repositories / repository / "_manifests" / "revisions" / "sha256"
        found = [entry for entry in folder.iterdir() if (entry / "link").exists()] if folder.is_dir() else []
        return sorted(f"sha256:{entry.name}" for entry in found)

    @property
    def repositories(self) -> Path:
        return self.stack.settings.home_dir / "registry" / "docker" / "registry" / "v2" / "repositories"

    @property
    def contexts(self) -> list[Path]:
        """The objects in the store, and what unfinished uploads left."""
        folder = self.stack.settings.home_dir / "objects"
        return [path for path in folder.rglob("*") if path.is_file()]

    def digest_of(self, repository: str, tag: str) -> str:
        """What a tag points at; nothing while the registry has not said so."""
        link = self.repositories / repository / "_manifests" / "tags" / tag / "current" / "link"
        return link.read_text().strip() if link.exists() else ""


def client_of(stack: LocalStack, key: str) -> httpx.Client:
    """A client with the key, as every contract but organization-images takes it."""
    return httpx.Client(base_url=stack.api_url, headers={"X-API-Key": key}, timeout=60, trust_env=False)


@contextmanager
def container_rig(home: Path, workers: Sequence[Sequence[str]] = (ALL_ROLES,), **env: str) -> Iterator[ContainerRig]:
    """A rig of its own. Skips the test, with the reason, where no engine can be had."""
    skip_without_engine()
    with running_stack(home, workers=workers, containers=True, **env) as stack:
        assert "registry" in stack.parts, f"the stack runs no registry: {stack.parts}"
        catalog = Catalog(stack.settings.catalog_dsn)
        admin = Caller("", "default", stack.api_key, client_of(stack, stack.api_key))
        try:
            yield ContainerRig(stack, admin, catalog)
        finally:
            catalog.close()


def skip_without_engine() -> None:
    """As `make test` installs them where it can, what is missing cannot be had."""
    for program in ("dockerd", "docker", "docker-registry", "skopeo"):
        if shutil.which(program) is None and not Path(f"/usr/sbin/{program}").exists():
            pytest.skip(f"{program} is not installed")
    if os.geteuid() != 0:
        pytest.skip("only root can start a private Docker engine")
    if not BUSYBOX.exists():
        pytest.skip("busybox-static is not installed")


def context(dockerfile: str, files: Mapping[str, bytes] | None = None, *, at: str = "Dockerfile") -> bytes:
    """A build context with Debian's static busybox in it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        tar.add(BUSYBOX, "busybox")
        for name, content in {at: dockerfile.encode(), **(files or {})}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def busybox(*steps: str) -> bytes:
    """A context whose Dockerfile has busybox as its shell, and then these lines."""
    return context(FROM_BUSYBOX + "\n".join(steps) + "\n")


def running(needle: str) -> set[int]:
    """The live processes with this in their command line, whoever's they are."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            command = read_proc(int(entry.name), "cmdline")
            if needle.encode() in command:
                found.add(int(entry.name))
    return found


def gone(needle: str, seconds: float = 20) -> None:
    """Returns once no process has this in its command line. Fails after so many seconds."""
    end = time.monotonic() + seconds
    while left := running(needle):
        assert time.monotonic() < end, f"{needle} still runs: {left}"
        time.sleep(0.05)
