"""What the registry does because the catalog says so. The API tries at once, the house-keeping until it is done."""

import contextlib
from collections.abc import Sequence
from typing import Protocol

from activities.manifest_tree import tree
from kiln.errors import SourceUnavailableError
from kiln.naming import STAGING_OWNER
from kiln.ports import Errand, Manifest, Registry


class TagBook(Protocol):
    """What the catalog says of tags; each call reads it anew. Any may raise UnavailableError."""

    def tagged(self, repository: str, tag: str) -> str | None:
        """The digest that a tag is to point at; None if it is to be gone."""
        ...

    def needed(self, repository: str, digest: str) -> Sequence[str]:
        """The tags of a repository that are to point at the digest."""
        ...

    def in_use(self, digest: str) -> bool:
        """Whether an open pod runs from an image of this digest."""
        ...


def carry_out(registry: Registry, book: TagBook, errand: Errand) -> bool:
    """Brings the errand's tag to where the catalog has it by now, and deletes its manifest if no tag needs it.

    Publications and other errands may come in between: what is taken away is looked at again afterwards, and given back.
    Returns whether all of it is done: while an open pod runs from the image, its manifest stays. Repeating it is
    harmless, also after a crash in the middle. Raises UnavailableError.
    """
    held = book.in_use(errand.digest)
    if not held:
        _settle_manifest(registry, book, errand)
    _settle_tag(registry, book, errand)
    return not held


def _settle_manifest(registry: Registry, book: TagBook, errand: Errand) -> None:
    """A copy is kept aside until nobody can have come to need the manifest while it was being deleted."""
    repository, digest, aside = errand.repository, errand.digest, f"{STAGING_OWNER}/errand-{errand.id}"
    found = registry.manifest(repository, digest)
    if found is not None and not _needed(registry, book, repository, [found]):
        with contextlib.suppress(SourceUnavailableError):  # damaged, or gone just now: there is nothing to keep
            registry.copy(repository, digest, aside)
        registry.delete(repository, digest)
    kept = registry.manifest(aside, digest)
    if kept is not None:
        _settle_tree(registry, book, repository, aside, tree(registry, aside, kept))


def _settle_tree(registry: Registry, book: TagBook, repository: str, aside: str, manifests: Sequence[Manifest]) -> None:
    """Deletes what nothing needs of the manifests that are kept aside, gives back what something needs by now."""
    needed = _needed(registry, book, repository, manifests)
    for each in reversed(manifests):
        if each not in needed:
            registry.delete(repository, each.digest)
    for each in reversed(_needed(registry, book, repository, manifests)):
        registry.copy(aside, each.digest, repository)
        for tag in book.needed(repository, each.digest):
            registry.tag(repository, each.digest, tag)
    for each in reversed(manifests):
        registry.delete(aside, each.digest)


def _needed(registry: Registry, book: TagBook, repository: str, manifests: Sequence[Manifest]) -> list[Manifest]:
    """Those that a tag is to point at, and the parts of what one points at. An index stands before its parts."""
    tagged = (registry.manifest(repository, tag) for tag in registry.tags(repository))
    wholes = [each.content for each in tagged if each is not None]
    needed: list[Manifest] = []
    for each in manifests:
        if book.needed(repository, each.digest) or any(each.digest.encode() in whole for whole in wholes):
            needed.append(each)
            wholes.append(each.content)
    return needed


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
