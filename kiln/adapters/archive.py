"""Checks the archive of a build context while it streams by: gzip, tar, and what may be in it.

Nothing is unpacked to disk, and memory is bounded whatever the archive claims.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kiln.adapters.archive_rules import ContextRules, too_large_unpacked
from kiln.adapters.archive_tar import TarReader
from kiln.errors import ContextInvalidError, ContextTooLargeError

# zlib copies what it leaves of its input, and what it puts out stays in the processor's cache.
_INPUT_BYTES: Final = 64 * 1024
_OUTPUT_BYTES: Final = 256 * 1024
_MAGIC: Final = b"\x1f\x8b\x08"
_GZIP_WINDOW_BITS: Final = 31
# Extensions and gzip members cost time and no member shows them: generous, and no more, for what writers write.
_EXTENSION_BYTES_PER_MEMBER: Final = 1024
_EXTENSION_BYTES: Final = 1024**2
_STREAMS_PER_MEMBER: Final = 4


@dataclass(frozen=True)
class ArchiveLimits:
    """The most that an archive may have. `unpacked_bytes` bounds the tar, and the contents of all members together."""

    archive_bytes: int
    unpacked_bytes: int
    members: int

    def check_archive(self, size_bytes: int) -> None:
        """Raises ContextTooLargeError if an archive of this length is too long."""
        if size_bytes > self.archive_bytes:
            raise ContextTooLargeError(f"the archive is longer than {self.archive_bytes} bytes")


class ArchiveCheck:
    """One archive's check, fed in pieces of any size. After an error it takes no more."""

    def __init__(self, limits: ArchiveLimits, dockerfile: str) -> None:
        """Raises ContextInvalidError if `dockerfile`, a path in the archive, leads out of it."""
        self._limits = limits
        self._rules = ContextRules(
            members_limit=limits.members, unpacked_limit_bytes=limits.unpacked_bytes, dockerfile=dockerfile
        )
        extension_bytes = _EXTENSION_BYTES + limits.members * _EXTENSION_BYTES_PER_MEMBER
        self._tar = TarReader(self._rules, extension_bytes)
        self._gzip = _GzipReader(limits.members * _STREAMS_PER_MEMBER)
        self._archive_bytes = 0
        self._tar_bytes = 0

    def feed(self, data: bytes) -> None:
        """Takes more of the archive. Raises ContextInvalidError, ContextTooLargeError as soon as it is known."""
        self._archive_bytes += len(data)
        self._limits.check_archive(self._archive_bytes)
        view = memoryview(data)
        for start in range(0, len(data), _INPUT_BYTES):
            for chunk in self._gzip.unpacked(view[start : start + _INPUT_BYTES]):
                self._tar_bytes += len(chunk)
                if self._tar_bytes > self._limits.unpacked_bytes:
                    raise too_large_unpacked(self._limits.unpacked_bytes)
                self._tar.feed(chunk)

    def finish(self) -> tuple[int, int]:
        """Ends the archive; returns how many members it has, and how long their contents are together, in bytes.

        Raises ContextInvalidError.
        """
        if not self._archive_bytes:
            raise ContextInvalidError("the archive is empty")
        self._gzip.finish()
        self._tar.finish()
        self._rules.finish()
        return self._rules.members, self._rules.unpacked_bytes


class _GzipReader:
    """Takes what `gzip -dc` takes without a warning: members one after the other, then perhaps zeros."""

    def __init__(self, members_limit: int) -> None:
        self._members_limit = members_limit
        self._members = 0
        self._member: zlib._Decompress | None = None
        self._padded = False

    def unpacked(self, data: memoryview | bytes) -> Iterator[bytes]:
        """What more of the archive unpacks to, in chunks. Raises ContextInvalidError."""
        while len(data) and not self._is_padding(data):
            member = self._member = self._member or self._next_member(data)
            full = True
            while full and not member.eof:
                chunk = _inflated(member, data)
                data = member.unconsumed_tail
                full = len(chunk) == _OUTPUT_BYTES
                if chunk:
                    yield chunk
            if member.eof:
                data = member.unused_data
                self._member = None

    def finish(self) -> None:
        """Raises ContextInvalidError if the archive ends within a member."""
        if self._member is not None:
            raise ContextInvalidError("the archive ends in the middle of its gzip stream")

    def _is_padding(self, data: memoryview | bytes) -> bool:
        if not self._padded and (self._member or not self._members or data[0]):
            return False
        if any(data):
            raise _trailing_data()
        self._padded = True
        return True

    def _next_member(self, data: memoryview | bytes) -> zlib._Decompress:
        if not _MAGIC.startswith(bytes(data[: len(_MAGIC)])):
            raise _trailing_data() if self._members else ContextInvalidError("the archive is not a gzip file")
        self._members += 1
        if self._members > self._members_limit:
            raise ContextInvalidError(f"the archive has more than {self._members_limit} gzip members")
        return zlib.decompressobj(_GZIP_WINDOW_BITS)


def _inflated(member: zlib._Decompress, data: memoryview | bytes) -> bytes:
    try:
        return member.decompress(data, _OUTPUT_BYTES)
    except zlib.error:
        raise ContextInvalidError("the archive's gzip stream is broken") from None


def _trailing_data() -> ContextInvalidError:
    return ContextInvalidError("the archive has other data after its gzip stream")
