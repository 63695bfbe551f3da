"""What the members of a build context must be.

The builder resolves all links below the context's root, so these rules guard it a second time, and tell the user early
what the build would fail of. Links are therefore judged by their text alone.
"""

import re
from collections.abc import Iterator
from typing import Final

from kiln.adapters.archive_tar import Kind, quoted
from kiln.errors import ContextInvalidError

# Linux's PATH_MAX, less its NUL.
PATH_LIMIT_BYTES: Final = 4095
DEPTH_LIMIT: Final = 255
DOCKERFILE_HEAD_BYTES: Final = 64 * 1024

_SYNTAX: Final = re.compile(r"(?:#|//)\s*syntax\s*=\s*([^ ]+)", re.IGNORECASE)
_FRONTEND: Final = re.compile(
    r"(?:docker\.io/)?docker/dockerfile(?:-upstream)?(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)


class ContextRules:
    """Judges members in the archive's order. Holds a number for each symbolic link, and nothing of other members."""

    def __init__(self, *, members_limit: int, unpacked_limit_bytes: int, dockerfile: str) -> None:
        """Raises ContextInvalidError if `dockerfile` is no path below the context's root."""
        self._members_limit = members_limit
        self._unpacked_limit = unpacked_limit_bytes
        path = normal_path(dockerfile.encode(errors="surrogateescape"))
        if not path or dockerfile.startswith("/"):
            raise ContextInvalidError(
                f"the Dockerfile's path {quoted(dockerfile.encode(errors='replace'))} is not inside the build context"
            )
        self._dockerfile = path
        self._dockerfile_size = 0
        self._has_dockerfile = False
        self._folders = frozenset(_ancestors(path))
        # Hashes stand for the names, which may be long; a collision, of 64 bits under this process's key, refuses.
        self._symlinks: set[int] = set()
        self._sound_folder = b""
        self.members = 0
        self.unpacked_bytes = 0

    def member(self, name: bytes, kind: Kind, size: int, target: bytes) -> int:
        """Judges a member; asks for the beginning of the Dockerfile. Raises ContextInvalidError."""
        self._count(size)
        path = self._inside(name)
        if not path and kind is not Kind.DIRECTORY:
            raise _refused(name, "takes the place of the context's root")
        if self._symlinks:
            self._check_written_directly(name, path)
        if kind is Kind.SYMLINK:
            self._check_symlink(name, path, target)
        elif kind is Kind.HARD_LINK:
            self._check_hard_link(name, target)
        elif kind is Kind.DEVICE:
            raise _refused(name, "is a device or a pipe, which a build context cannot hold")
        if path == self._dockerfile or path in self._folders:
            return self._dockerfile_wanted(name, path, kind, size)
        return 0

    def content(self, data: bytes) -> None:
        """Judges the beginning of the Dockerfile. Raises ContextInvalidError."""
        check_frontend(data, whole=len(data) == self._dockerfile_size)

    def finish(self) -> None:
        """Raises ContextInvalidError if something is missing."""
        if not self.members:
            raise ContextInvalidError("the archive has no members")
        if not self._has_dockerfile:
            raise ContextInvalidError(f"the archive has no {quoted(self._dockerfile)}, the Dockerfile to build from")

    def _count(self, size: int) -> None:
        self.members += 1
        self.unpacked_bytes += size
        if self.members > self._members_limit:
            raise ContextInvalidError(f"the archive has more than {self._members_limit} members")
        if self.unpacked_bytes > self._unpacked_limit:
            raise too_large_unpacked(self._unpacked_limit)

    def _inside(self, name: bytes) -> bytes:
        if not name:
            raise ContextInvalidError(f"member {self.members} of the archive has no name")
        if name.startswith(b"/"):
            raise _refused(name, "has an absolute path")
        path = normal_path(name)
        if path is None:
            raise _refused(name, "climbs out of the build context")
        if len(path) > PATH_LIMIT_BYTES or path.count(b"/") >= DEPTH_LIMIT:
            raise _refused(name, f"has a path of more than {PATH_LIMIT_BYTES} bytes or {DEPTH_LIMIT} folders")
        return path

    def _check_written_directly(self, name: bytes, path: bytes) -> None:
        folder = path.rpartition(b"/")[0]
        if folder == self._sound_folder:
            return
        link = self._symlink_above(path)
        if link is not None:
            raise _refused(name, f"is written through the symbolic link {quoted(link)}")
        self._sound_folder = folder

    def _symlink_above(self, path: bytes) -> bytes | None:
        return next((folder for folder in _ancestors(path) if hash(folder) in self._symlinks), None)

    def _check_symlink(self, name: bytes, path: bytes, target: bytes) -> None:
        # An absolute target is what virtual environments hold, and stands for a place in the image or the context:
        # the builder resolves it below the root of either.
        if not target or len(target) > PATH_LIMIT_BYTES:
            raise _refused(name, f"is a symbolic link to a path of no bytes, or of more than {PATH_LIMIT_BYTES}")
        folder = path.rpartition(b"/")[0]
        if not target.startswith(b"/") and normal_path(folder + b"/" + target) is None:
            raise _refused(name, f"is a symbolic link that climbs out of the build context, to {quoted(target)}")
        self._symlinks.add(hash(path))
        self._sound_folder = b""

    def _check_hard_link(self, name: bytes, target: bytes) -> None:
        """A hard link's target is the name of an earlier member."""
        path = None if target.startswith(b"/") else normal_path(target)
        if path is None:
            raise _refused(name, f"is a hard link that climbs out of the build context, to {quoted(target)}")
        # The name would be a second symbolic link, whose target counts from elsewhere.
        if self._symlinks and (hash(path) in self._symlinks or self._symlink_above(path) is not None):
            raise _refused(name, f"is a hard link to or through a symbolic link, {quoted(target)}")

    def _dockerfile_wanted(self, name: bytes, path: bytes, kind: Kind, size: int) -> int:
        # A link could lead to a file whose beginning has gone by unread.
        if path != self._dockerfile:
            if kind is not Kind.DIRECTORY:
                raise _refused(name, f"must be a folder: {quoted(self._dockerfile)} is to be in it")
            return 0
        if kind is not Kind.FILE:
            raise _refused(name, "is the Dockerfile to build from, and must be a regular file")
        self._has_dockerfile = True
        self._dockerfile_size = size
        return min(size, DOCKERFILE_HEAD_BYTES)


def normal_path(name: bytes) -> bytes | None:
    """A path without empty parts, `.` and `..`, as text; "" for the root, None if it leads out of it on its way."""
    parts = [part for part in name.split(b"/") if part and part != b"."]
    if b".." not in parts:
        return b"/".join(parts)
    kept: list[bytes] = []
    for part in parts:
        if part != b"..":
            kept.append(part)
        elif kept:
            kept.pop()
        else:
            return None
    return b"/".join(kept)


def check_frontend(head: bytes, *, whole: bool) -> None:
    """Refuses a Dockerfile that has itself read by a frontend other than Docker's own.

    `head` is its beginning, or all of it. Takes in every form of the directive that some BuildKit knows, and looks for
    it in all comments before the first instruction. Raises ContextInvalidError.
    """
    # As text, because BuildKit passes over what Unicode calls a space.
    for line in head.decode("utf-8-sig", errors="replace").split("\n"):
        text = line.strip()
        if text.startswith("{"):
            raise ContextInvalidError("the Dockerfile is JSON, which could name a frontend; write it as a Dockerfile")
        # One slash may be what the end of `head` has left of two.
        if text and text != "/" and not text.startswith(("#", "//")):
            return
        match = _SYNTAX.match(text)
        if match and not _FRONTEND.fullmatch(match[1]):
            raise ContextInvalidError(
                f"the Dockerfile's syntax directive names the frontend {quoted(match[1].encode())}; only"
                " docker/dockerfile and docker/dockerfile-upstream are allowed"
            )
    if not whole:
        raise ContextInvalidError(f"the Dockerfile begins with more than {DOCKERFILE_HEAD_BYTES} bytes of comments")


def too_large_unpacked(limit_bytes: int) -> ContextInvalidError:
    return ContextInvalidError(f"the archive is longer than {limit_bytes} bytes when unpacked")


def _ancestors(path: bytes) -> Iterator[bytes]:
    """The folders above a normal path, from the root on, without the root."""
    end = path.find(b"/")
    while end >= 0:
        yield path[:end]
        end = path.find(b"/", end + 1)


def _refused(name: bytes, reason: str) -> ContextInvalidError:
    return ContextInvalidError(f"member {quoted(name)} {reason}")
