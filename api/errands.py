"""Errands to the registry, tried as soon as their row is committed; the house-keeping repeats those that fail."""

import logging

from activities.errands import carry_out
from api.deps import Parts
from kiln.catalog import errands, pod_images, tags
from kiln.catalog.session import Catalog
from kiln.catalog.tables import RegistryErrand
from kiln.errors import BuildError, UnavailableError
from kiln.ports import Errand

log = logging.getLogger("kiln.api")


class CatalogTags:
    """Implements `activities.errands.TagBook` on the catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def tagged(self, repository: str, tag: str) -> str | None:
        owner, _, name = repository.partition("/")
        with self._catalog.read() as session:
            found = tags.find(session, owner, name, tag)
        return found.tag.digest if found is not None else None

    def needed(self, repository: str, digest: str) -> list[str]:
        with self._catalog.read() as session:
            return tags.needed(session, repository, digest)

    def in_use(self, digest: str) -> bool:
        with self._catalog.read() as session:
            return pod_images.in_use(session, digest)


def run(parts: Parts, row: RegistryErrand) -> bool:
    """Whether the errand is done; one that is not stays for the house-keeping. Blocks; raises nothing of Kiln's."""
    errand = Errand(row.id, row.repository, row.tag, row.digest, row.source_repository)
    try:
        if not carry_out(parts.containers.registry, CatalogTags(parts.catalog), errand):
            return False
        with parts.catalog.transaction() as tx:
            errands.done(tx, errand.id)
    except (UnavailableError, BuildError) as error:
        log.warning("the registry's errand %s waits for the house-keeping: %s", errand.id, error)
        return False
    return True
