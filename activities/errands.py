"""What the registry does because the catalog says so. The API tries at once, the house-keeping until it is done."""

import contextlib
from collections.abc import Sequence
from typing import Protocol

from kiln.errors import SourceUnavailableError
from kiln.naming import STAGING_OWNER
from kiln.ports import Errand, Registry


class TagBook(Protocol):
    """What the catalog says of tags; each call reads it anew. Any may raise UnavailableError."""

    def tagged(self, repository: str, tag: str) -> str | None:
        """The digest that a tag is to point at; None if it is to be gone."""
        ...

    def needed(self, repository: str, digest: str) -> Sequence[str]:
        """The tags of a repository that are to point at the digest."""
        ...


def carry_out(registry: Registry, book: TagBook, errand: Errand) -> None:
    """Brings the errand's tag to where the catalog has it by now, and deletes its manifest if no tag needs it.

    Publications and other errands may come in between: what is taken away is looked at again afterwards, and given back.
    Repeating it is harmless, also after a crash in the middle. Raises UnavailableError.
    """
    _settle_manifest(registry, book, errand)
    _settle_tag(registry, book, errand)


def _settle_manifest(registry: Registry, book: TagBook, errand: Errand) -> None:
    """A copy is kept aside until nobody can have come to need the manifest while it was being deleted."""
    repository, digest, aside = errand.repository, errand.digest, f"{STAGING_OWNER}/errand-{errand.id}"
    if (
        not book.needed(repository, digest)
        and registry.manifest(repository, digest) is not None
        and not _is_part(registry, repository, digest)
    ):
        with contextlib.suppress(SourceUnavailableError):  # damaged, or gone just now: there is nothing to keep
            registry.copy(repository, digest, aside)
        registry.delete(repository, digest)
    if registry.manifest(aside, digest) is None:
        return
    tags = book.needed(repository, digest)
    if tags or _is_part(registry, repository, digest):
        registry.copy(aside, digest, repository)
    for tag in tags:
        registry.tag(repository, digest, tag)
    registry.delete(aside, digest)


def _is_part(registry: Registry, repository: str, digest: str) -> bool:
    """Whether an image of several platforms, which a tag of the repository points at, has this one among them."""
    tagged = (registry.manifest(repository, tag) for tag in registry.tags(repository))
    return any(each is not None and each.digest != digest and digest.encode() in each.content for each in tagged)


def _settle_tag(registry: Registry, book: TagBook, errand: Errand) -> None:
    repository, tag = errand.repository, errand.tag
    wanted = book.tagged(repository, tag)
    if wanted is None and registry.manifest(repository, tag) is not None:
        registry.untag(repository, tag)
        wanted = book.tagged(repository, tag)
    moved: str | None = None
    while wanted is not None and moved != wanted:
        _point(registry, errand, wanted)
        moved, wanted = wanted, book.tagged(repository, tag)


def _point(registry: Registry, errand: Errand, digest: str) -> None:
    if registry.manifest(errand.repository, digest) is None:
        if errand.source_repository is None:
            return  # its publication is on its way, and moves the tag itself
        try:
            registry.copy(errand.source_repository, digest, errand.repository)
        except SourceUnavailableError:
            return  # neither has it: there is nothing to point at
    registry.tag(errand.repository, digest, errand.tag)
