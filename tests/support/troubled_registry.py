"""A real registry that can be stopped, and the real adapter for it, whose calls a test can fail, hold back or follow."""

import asyncio
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kiln.adapters.registry import KilnRegistry
from kiln.errors import UnavailableError
from kiln.ports import ImageFacts, Manifest
from kiln.registry_tokens import make_key_file
from support.harness import PATIENCE_SECONDS
from support.registry import half_write, running_registry

REALM = "http://127.0.0.1:9/registry/token"


class RegistrySite:
    """A registry that takes the tokens of one key. It can be stopped, and started again where it was."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = ExitStack()
        self.key_file = folder / "token.pem"
        self.host = ""
        make_key_file(self.key_file)

    def start(self) -> None:
        with pytest.MonkeyPatch.context() as environment:
            if self.host:
                environment.setenv("REGISTRY_HTTP_ADDR", self.host)
            self.host = self._process.enter_context(running_registry(self._folder, self.key_file, REALM))

    def stop(self) -> None:
        self._process.close()

    def manifests(self, repository: str) -> list[str]:
        """The digests of all manifests of a repository, tagged or not; `*` stands for any name."""
        links = f"data/docker/registry/v2/repositories/{repository}/_manifests/revisions/*/*/link"
        return [link.parent.name for link in self._folder.glob(links)]

    def half_write(self, repository: str, tag: str) -> None:
        """What its death leaves while it writes a tag."""
        half_write(self._folder, repository, tag)

    def lose_blob(self, digest: str) -> None:
        """What a damaged disk does."""
        algorithm, _, name = digest.partition(":")
        (self._folder / "data/docker/registry/v2/blobs" / algorithm / name[:2] / name / "data").unlink()


@contextmanager
def registry_site(folder: Path) -> Iterator[RegistrySite]:
    """A registry that runs until the block's end."""
    site = RegistrySite(folder)
    site.start()
    try:
        yield site
    finally:
        site.stop()


class Hold:
    """A call to the registry, with this argument, that waits until its test opens it."""

    def __init__(self, about: str) -> None:
        self.about = about
        self._reached = threading.Event()
        self._opened = threading.Event()

    def passes(self) -> None:
        self._reached.set()
        assert self._opened.wait(PATIENCE_SECONDS)

    async def is_reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, PATIENCE_SECONDS)

    def open(self) -> None:
        self._opened.set()


class TroubledRegistry:
    """The real adapter behind a test that makes calls fail, holds them back, or does something before or after one."""

    def __init__(self, registry: KilnRegistry) -> None:
        self._registry = registry
        self.host = registry.host
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._faults: Counter[str] = Counter()
        self._holds: defaultdict[str, list[Hold]] = defaultdict(list)
        self._before: dict[str, Callable[[], object]] = {}
        self._after: dict[str, Callable[[], object]] = {}

    def fail(self, call: str, times: int = 1_000_000) -> None:
        """The next so many calls of that name get no answer."""
        self._faults[call] = times

    def heal(self) -> None:
        self._faults.clear()

    def hold(self, call: str, about: str) -> Hold:
        """The next call of that name with this argument waits before it is made."""
        hold = Hold(about)
        self._holds[call].append(hold)
        return hold

    def after(self, call: str, action: Callable[[], object]) -> None:
        """Does something once, right after the next call of that name."""
        self._after[call] = action

    def before(self, call: str, action: Callable[[], object]) -> None:
        """Does something once, right before the next call of that name."""
        self._before[call] = action

    # kiln.ports.Registry

    def ping(self) -> None:
        self._call("ping")

    def close(self) -> None:
        self._registry.close()

    def tags(self, repository: str) -> list[str]:
        return self._call("tags", repository)

    def manifest(self, repository: str, reference: str) -> Manifest | None:
        return self._call("manifest", repository, reference)

    def facts(self, repository: str, reference: str) -> ImageFacts | None:
        return self._call("facts", repository, reference)

    def copy(self, source: str, digest: str, target: str) -> None:
        self._call("copy", source, digest, target)

    def tag(self, repository: str, digest: str, tag: str) -> None:
        self._call("tag", repository, digest, tag)

    def untag(self, repository: str, tag: str) -> None:
        self._call("untag", repository, tag)

    def delete(self, repository: str, digest: str) -> None:
        self._call("delete", repository, digest)

    def _call(self, name: str, *arguments: str) -> Any:
        self.calls[name] += 1
        with self._lock:
            held = next((hold for hold in self._holds[name] if hold.about in arguments), None)
            if held is not None:
                self._holds[name].remove(held)
        if held is not None:
            held.passes()
        self._answers(name)
        self._before.pop(name, lambda: None)()
        answer = getattr(self._registry, name)(*arguments)
        self._after.pop(name, lambda: None)()
        return answer

    def _answers(self, name: str) -> None:
        with self._lock:
            if self._faults[name] > 0:
                self._faults[name] -= 1
                raise UnavailableError(f"{name}: the registry does not answer")
