"""What was found out about an image or an archive."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageFacts:
    """What a registry knows of an image. `size_bytes` counts each config and layer once, compressed; `platforms` are
    written `linux/arm/v7`."""

    digest: str
    media_type: str
    platforms: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True)
class ContextFacts:
    """A build context that passed its check. Sizes in bytes; `sha256` in hex, of the archive as it was uploaded."""

    size_bytes: int
    sha256: str
    members: int
    unpacked_bytes: int
