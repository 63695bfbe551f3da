"""Container images: the registry, the build contexts, and the tools that build and copy."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from kiln.ports.facts import ContextFacts, ImageFacts
from kiln.ports.ledger import Order


@dataclass(frozen=True)
class Manifest:
    """A manifest, or an index of manifests, byte by byte as the registry has it."""

    digest: str
    media_type: str
    content: bytes = field(repr=False)


class Registry(Protocol):
    """Kiln's own registry (OCI distribution). Kiln signs the tokens that open it, so no call asks for one.

    A `reference` is a tag or a digest. Any call may raise UnavailableError; repeating any of them is harmless.
    """

    host: str

    def ping(self) -> None:
        """Raises UnavailableError unless the registry answers and takes Kiln's tokens."""
        ...

    def close(self) -> None:
        """Closes its connections."""
        ...

    def manifest(self, repository: str, reference: str) -> Manifest | None:
        """The manifest; None if the registry has none."""
        ...

    def facts(self, repository: str, reference: str) -> ImageFacts | None:
        """Digest, platforms and size; None if the registry has no such manifest."""
        ...

    def copy(self, source: str, digest: str, target: str) -> None:
        """Makes an image of one repository be in another, under its digest only: blobs are mounted, not moved.

        Raises SourceUnavailableError if the source does not have it.
        """
        ...

    def tag(self, repository: str, digest: str, tag: str) -> None:
        """Points a tag at a manifest of the same repository. Raises SourceUnavailableError if that is not there."""
        ...

    def untag(self, repository: str, tag: str) -> None:
        """Takes a tag away and leaves its manifest, also in registries that only delete digests."""
        ...

    def delete(self, repository: str, digest: str) -> None:
        """Deletes a manifest, and with it every tag of the repository that points at it."""
        ...

    def tags(self, repository: str) -> list[str]:
        """The tags of a repository; none if there is no such repository."""
        ...


class PublicRegistries(Protocol):
    """Other people's registries, read without credentials."""

    def problem(self, host: str) -> str | None:
        """Why images may not be taken from this host, in one sentence; None if they may."""
        ...

    def facts(self, reference: str) -> ImageFacts:
        """Of `host/name:tag` or `host/name@digest`. Raises SourceUnavailableError, UnavailableError."""
        ...


class ContextUpload(Protocol):
    """An archive that is checked while it comes in. For one thread at a time; not for the event loop."""

    def write(self, data: bytes) -> None:
        """Takes more of the archive. Raises ContextInvalidError, ContextTooLargeError as soon as it is known,
        UnavailableError; after any of them only `abort` remains."""
        ...

    def commit(self) -> ContextFacts:
        """Ends the archive and makes it the object, in the place of one that was there. Raises as `write`."""
        ...

    def abort(self) -> None:
        """Leaves nothing. Harmless after `commit`, and when repeated."""
        ...


class Contexts(Protocol):
    """The object store's build contexts, checked. Calls block; any may raise UnavailableError."""

    def ping(self) -> None:
        """Raises UnavailableError unless the object store takes objects."""
        ...

    def receive(self, key: str, dockerfile: str) -> ContextUpload:
        """Begins an upload. `dockerfile` is the path that must be in the archive."""
        ...

    def check(self, key: str, dockerfile: str) -> ContextFacts:
        """Streams an object back and checks it. Raises ContextMissingError, ContextInvalidError, ContextTooLargeError."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        ...

    def fetch(self, key: str, path: Path) -> str:
        """Writes the object to a new file (mode 0600); returns its SHA-256 in hex. Raises ContextMissingError."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object if it is there."""
        ...

    def upload_url(self, key: str, expires: timedelta) -> str | None:
        """A URL that takes the object by PUT, without credentials (S3); None where uploads come through Kiln's API."""
        ...

    def stale(self, older_than: timedelta) -> Iterator[str]:
        """The keys of objects that have been there so long."""
        ...

    def sweep_unfinished(self, older_than: timedelta) -> None:
        """Removes what uploads left that never ended: a killed server's."""
        ...


@dataclass(frozen=True)
class ToolJob:
    """A tool's run, ready to start: what to call, the directory of its own, and the file that it reads as its input."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    cwd: Path
    stdin: Path | None = None


@dataclass(frozen=True)
class Engine:
    """A Docker engine that this attempt has to itself, or shares where it is not Kiln's own. `host` is a DOCKER_HOST."""

    name: str
    host: str


@dataclass(frozen=True)
class Traces:
    """What a tool that was killed may leave in an engine: a container, images with its name as their label `kiln-build`,
    and images by these names."""

    container: str
    images: tuple[str, ...]


class EnginePool(Protocol):
    """The engines of this worker, one a slot."""

    def lease(self, affinity: str) -> AbstractAsyncContextManager[Engine]:
        """An engine for one build, preferably the one that built `affinity` (the repository) last: it has its layers."""
        ...

    def keep_private(self, engine: Engine) -> None:
        """Says that the engine, which is leased, comes to have what only the owner of the affinity may read.

        It forgets that before it is leased for another owner, unless others than Kiln have it, too.
        """
        ...

    async def forget(self, engine: Engine, references: Collection[str]) -> None:
        """Drops a build's image names from the engine, whose layer cache stays."""
        ...

    def expect(self, engine: Engine, traces: Traces) -> None:
        """Says what a build is going to make in the engine, which is leased: if this process dies, that goes before the
        engine is leased again, unless others than Kiln have it, too."""
        ...

    async def clear(self, engine: Engine, traces: Traces) -> None:
        """Removes from the engine what is there of it."""
        ...


class ContainerKit(Protocol):
    """Makes runs of `docker buildx build` out of orders."""

    def folder(self, order: Order) -> Path:
        """A new directory for this run (mode 0700), which also takes the context file."""
        ...

    def prepare(self, order: Order, folder: Path, context: Path, engine: Engine) -> ToolJob:
        """The run that builds `context` and pushes to the attempt's staging name."""
        ...

    def staging_reference(self, order: Order) -> str:
        """`{registry}/{staging repository}:{attempt's tag}`."""
        ...

    def digest(self, job: ToolJob) -> str | None:
        """The digest of the pushed manifest, as BuildKit reported it; None if it did not."""
        ...

    def discard(self, folder: Path) -> None:
        """Removes the run's directory."""
        ...


class AgentKit(Protocol):
    """Makes runs of Packer's agents' template out of orders."""

    def folder(self, order: Order) -> Path:
        """A new directory for this run (mode 0700)."""
        ...

    def prepare(self, order: Order, folder: Path, engine: Engine) -> ToolJob:
        """The run that installs the order's agent on its base image and pushes to the attempt's staging name."""
        ...

    def traces(self, order: Order) -> Traces:
        """What the run makes in the engine."""
        ...

    def discard(self, folder: Path) -> None:
        """Removes the run's directory."""
        ...


class TransferKit(Protocol):
    """Makes runs of `skopeo copy` out of orders."""

    def folder(self, order: Order) -> Path:
        """A new directory for this run (mode 0700)."""
        ...

    def prepare(self, order: Order, folder: Path) -> ToolJob:
        """The run that copies all platforms of the source to the attempt's staging name."""
        ...

    def digest(self, job: ToolJob) -> str | None:
        """The digest of the copied manifest, as skopeo reported it."""
        ...

    def discard(self, folder: Path) -> None:
        """Removes the run's directory."""
        ...
