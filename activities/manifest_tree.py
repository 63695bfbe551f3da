"""An image of several platforms is an index and the manifests that it names: they come and go together."""

import json

from kiln.ports import Manifest, Registry


def tree(registry: Registry, repository: str, root: Manifest) -> list[Manifest]:
    """The manifest, then all below it that the repository has: deleting from the end leaves the rest to be found.

    Raises UnavailableError.
    """
    found, known = [root], {root.digest}
    for each in found:
        for digest in sorted(_named(each) - known):
            known.add(digest)
            part = registry.manifest(repository, digest)
            if part is not None:
                found.append(part)
    return found


def _named(manifest: Manifest) -> set[str]:
    """What an index names; nothing if it is an image, or cannot be read."""
    try:
        said = json.loads(manifest.content).get("manifests") or ()
        return {str(each["digest"]) for each in said}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()
