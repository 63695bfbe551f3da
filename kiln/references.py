"""Image references and the names in them, by the rules of Docker and the OCI distribution specification.

Grammar: https://pkg.go.dev/github.com/distribution/reference
"""

import re
from dataclasses import dataclass
from typing import Final

from kiln.errors import InvalidRequestError

DOCKER_HUB: Final = "docker.io"
DEFAULT_TAG: Final = "latest"
NAME_LENGTH: Final = 255

_HUB_ALIASES: Final = frozenset({"index.docker.io", "registry-1.docker.io"})
_HUB_OFFICIAL: Final = "library/"
_TAG_LENGTH: Final = 128
_REFERENCE_LENGTH: Final = 1024
_DIGEST_MARK_LENGTH: Final = 16
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST: Final = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?")


@dataclass(frozen=True)
class Reference:
    """A whole image reference. One without a digest has a tag; one with a digest may have a tag beside it."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def target(self) -> str:
        """What a registry is asked for: the digest where there is one, since it is what the caller means, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def __str__(self) -> str:
        """`host/name@digest` or `host/name:tag`, never with both: skopeo takes only one of them."""
        return f"{self.host}/{self.repository}{'@' if self.digest else ':'}{self.target}"


def parse_reference(text: str, field: str = "source_image") -> Reference:
    """A reference made whole as Docker does it: `busybox` is `docker.io/library/busybox:latest`.

    Raises InvalidRequestError, which names `field`.
    """
    problem = _text_problem(text)
    if problem is not None:
        raise InvalidRequestError(field, problem)
    name, digest = _split_digest(text)
    name, tag = _split_tag(name)
    host, repository = _split_host(name)
    problem = _part_problem(host, repository, tag, digest)
    if problem is not None:
        raise InvalidRequestError(field, problem)
    return Reference(host, repository, DEFAULT_TAG if tag is None and digest is None else tag, digest)


def repository_at(host: str, text: str) -> str | None:
    """The repository of a reference that leads to this registry; None for one that does not, and for what is none."""
    try:
        reference = parse_reference(text)
    except InvalidRequestError:
        return None
    return reference.repository if reference.host == host.lower() else None


def derived_name(reference: Reference, *, platform: bool = False) -> tuple[str, str]:
    """The name and tag of a copy for which none were given (`container-images.md`). `platform`: it is a platform image."""
    if platform or reference.host == DOCKER_HUB:
        name = reference.repository
        if reference.host == DOCKER_HUB:
            name = name.removeprefix(_HUB_OFFICIAL)
    else:
        name = reference.repository.rpartition("/")[2]
    return name.lower(), reference.tag or _digest_tag(reference.target)


def image_name_problem(name: str, owner: str = "") -> str | None:
    """Why this is no repository name below `owner`, in a few words; None if it is one."""
    if not name:
        return "must not be empty"
    if len(f"{owner}/{name}" if owner else name) > NAME_LENGTH:
        return f"must have at most {NAME_LENGTH} characters, its owner counted in"
    if not _REPOSITORY.fullmatch(name):
        return "must be lower-case letters and digits, with single . _ / or - between them"
    return None


def image_tag_problem(tag: str) -> str | None:
    """Why this is no tag, in a few words; None if it is one."""
    if not tag:
        return "must not be empty"
    if len(tag) > _TAG_LENGTH:
        return f"must have at most {_TAG_LENGTH} characters"
    if not _TAG.fullmatch(tag):
        return "must be letters, digits, _ . and -, and begin with none of . and -"
    return None


def _text_problem(text: str) -> str | None:
    if not text.strip():
        return "must not be empty"
    if len(text) > _REFERENCE_LENGTH:
        return f"must have at most {_REFERENCE_LENGTH} characters"
    if "://" in text:
        return "must be an image reference without a scheme, as in docker.io/library/busybox:1.36"
    return None


def _part_problem(host: str, repository: str, tag: str | None, digest: str | None) -> str | None:
    """The first part that breaks its rule. A registry's host counts into a name's length, as with Docker."""
    if not _HOST.fullmatch(host):
        return "its registry is no host name"
    name_problem = image_name_problem(repository, host)
    if name_problem is not None:
        return f"its name {name_problem}"
    tag_problem = image_tag_problem(tag) if tag is not None else None
    if tag_problem is not None:
        return f"its tag {tag_problem}"
    if digest is not None and not _DIGEST.fullmatch(digest):
        return "its digest must be sha256: and 64 hex digits, or sha512: and 128"
    return None


def _split_digest(text: str) -> tuple[str, str | None]:
    name, mark, digest = text.partition("@")
    return name, digest if mark else None


def _split_tag(name: str) -> tuple[str, str | None]:
    """A colon is a tag's only in the last segment: elsewhere it is a port's."""
    start = name.rfind("/") + 1
    last, mark, tag = name[start:].partition(":")
    return (name[:start] + last, tag) if mark and start + len(last) else (name, None)


def _split_host(name: str) -> tuple[str, str]:
    """The first segment is a host if it cannot be a name's: it has a dot, a colon or capitals, or is `localhost`."""
    first, slash, rest = name.partition("/")
    if slash and (any(mark in first for mark in ".:") or first == "localhost" or first != first.lower()):
        host, repository = first.lower(), rest
    else:
        host, repository = DOCKER_HUB, name
    if host in _HUB_ALIASES:
        host = DOCKER_HUB
    return host, repository if host != DOCKER_HUB or "/" in repository else f"{_HUB_OFFICIAL}{repository}"


def _digest_tag(digest: str) -> str:
    algorithm, _, value = digest.partition(":")
    return f"{algorithm}-{value[:_DIGEST_MARK_LENGTH]}"
