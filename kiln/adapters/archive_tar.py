"""The tar format, read as a stream: headers become members, contents are passed over and never held.

What is checked must be what is built, so names and sizes come about as in Go's archive/tar, which unpacks build
contexts: v7, ustar, pax, GNU and star. Where readers of tar differ over a header, the archive is refused.
Source: POSIX.1-2017, "pax Interchange Format"; GNU tar's manual, "Basic Tar Format".
"""

import re
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Final, Protocol
from zlib import adler32

from kiln.errors import ContextInvalidError

BLOCK_BYTES: Final = 512
# One header's extension; Go's reader refuses longer ones.
EXTENSION_LIMIT_BYTES: Final = 1024**2

_ZERO_BLOCK: Final = bytes(BLOCK_BYTES)
_OCTAL: Final = re.compile(rb" *([0-7]*)[\0 ]*")
_RECORD: Final = re.compile(rb"([0-9]{1,7}) ([^=]+)=")
_SIZE: Final = re.compile(rb"[0-9]{1,19}")
_USTAR: Final = b"ustar\0"
_GNU: Final = b"ustar  \0"
_STAR_TRAILER: Final = b"tar\0"
_QUOTED_LENGTH: Final = 100


class Kind(Enum):
    """What a member is."""

    FILE = auto()
    HARD_LINK = auto()
    SYMLINK = auto()
    DIRECTORY = auto()
    DEVICE = auto()


_KINDS: Final = {
    ord("\0"): Kind.FILE,
    ord("0"): Kind.FILE,
    ord("1"): Kind.HARD_LINK,
    ord("2"): Kind.SYMLINK,
    ord("3"): Kind.DEVICE,
    ord("4"): Kind.DEVICE,
    ord("5"): Kind.DIRECTORY,
    ord("6"): Kind.DEVICE,
}
_SPARSE: Final = ord("S")
_LONG_NAME: Final = ord("L")
_LONG_LINK: Final = ord("K")
_PAX: Final = ord("x")
_PAX_GLOBAL: Final = ord("g")
_GNU_EXTENSIONS: Final = frozenset({_LONG_NAME, _LONG_LINK})
_EXTENSIONS: Final = _GNU_EXTENSIONS | {_PAX, _PAX_GLOBAL}

_PATH: Final = b"path"
_LINK_PATH: Final = b"linkpath"
_PAX_SIZE: Final = b"size"
_PAX_SPARSE: Final = b"GNU.sparse."


class Visitor(Protocol):
    """Who hears of the members, in the archive's order, and may refuse them with ContextInvalidError."""

    def member(self, name: bytes, kind: Kind, size: int, target: bytes) -> int:
        """Hears of a member. `size` is its content's, in bytes; `target` a link's.

        Returns how many bytes of the content `content` is to get, `size` at most.
        """
        ...

    def content(self, data: bytes) -> None:
        """Hears the beginning of the last member's content, as long as `member` asked for."""
        ...


class TarReader:
    """Takes a tar in pieces of any size. Holds at most a header, its extension, or the content that was asked for."""

    def __init__(self, visitor: Visitor, extensions_limit_bytes: int) -> None:
        """`extensions_limit_bytes` bounds all extensions together: they cost time, and no member shows them."""
        self._visitor = visitor
        self._extensions_limit = self._extensions_left = extensions_limit_bytes
        self._begun = self._ended = False
        # What is read next, how many bytes of it must be there at once, and how many go by before it.
        self._read: Callable[[bytes, int], int] = self._header
        self._need = BLOCK_BYTES
        self._skip = 0
        self._held = bytearray()
        # The last member's name, the size and type of what is being read, and what extensions say of the next member.
        self._name = b""
        self._size = 0
        self._flag = 0
        self._pending: set[int] = set()
        self._overrides: dict[bytes, bytes] = {}

    def feed(self, data: bytes) -> None:
        """Takes more of the tar. Raises ContextInvalidError, after which no more may come."""
        if self._ended:
            return
        if self._skip >= len(data):
            self._skip -= len(data)
            return
        if self._held:
            self._held += data
            if len(self._held) < self._need:
                return
            data = bytes(self._held)
            self._held.clear()
        self._walk(data)

    def finish(self) -> None:
        """Ends the tar. Raises ContextInvalidError if that is within a member.

        Of the two zero blocks at the end, one or both may be missing: readers take the end for the end.
        """
        if not self._begun:
            raise ContextInvalidError("the archive is not a tar")
        between = self._read in (self._header, self._second_zero_block)
        if self._skip or self._held or self._pending or not between:
            raise ContextInvalidError(f"the archive ends in the middle of its tar, after {quoted(self._name)}")

    def _walk(self, data: bytes) -> None:
        position = self._skip
        end = len(data)
        while position + self._need <= end and not self._ended:
            position = self._read(data, position)
        self._skip = max(position - end, 0)
        if position < end and not self._ended:
            self._held += data[position:]

    def _await(self, read: Callable[[bytes, int], int], need: int) -> None:
        self._read = read
        self._need = need

    def _header(self, data: bytes, start: int) -> int:
        if not data[start] and data[start : start + BLOCK_BYTES] == _ZERO_BLOCK:
            self._begun = True
            self._await(self._second_zero_block, BLOCK_BYTES)
            return start + BLOCK_BYTES
        size = _number(data, start + 124, start + 136)
        if size is None or not _checksum_fits(data, start):
            raise self._broken()
        self._begun = True
        self._flag = data[start + 156]
        if self._flag in _EXTENSIONS:
            self._announce_extension(size)
            return start + BLOCK_BYTES
        return self._member(data, start, size)

    def _second_zero_block(self, data: bytes, start: int) -> int:
        if data[start : start + BLOCK_BYTES] != _ZERO_BLOCK:
            raise self._broken()
        # What follows is padding, or something that no builder reads.
        self._ended = True
        return start + BLOCK_BYTES

    def _member(self, data: bytes, start: int, size: int) -> int:
        name = self._prefix(data, start) + _text(data, start, start + 100)
        target = _text(data, start + 157, start + 257)
        if self._pending:
            name, target, size = self._overridden(name, target, size)
        kind = self._kind(name)
        if size and kind is not Kind.FILE:
            raise self._broken()
        self._name = name
        wanted = self._visitor.member(name, kind, size, target)
        if wanted:
            self._size = size
            self._await(self._content, wanted)
            return start + BLOCK_BYTES
        return start + BLOCK_BYTES + _padded(size)

    def _content(self, data: bytes, start: int) -> int:
        self._visitor.content(data[start : start + self._need])
        self._await(self._header, BLOCK_BYTES)
        return start + _padded(self._size)

    def _kind(self, name: bytes) -> Kind:
        kind = _KINDS.get(self._flag)
        if kind is None:
            what = "a sparse file" if self._flag == _SPARSE else f"of the tar type {quoted(bytes([self._flag]))}"
            raise ContextInvalidError(f"member {quoted(name)} is {what}, which a build context cannot hold")
        # v7 has no type for directories.
        return Kind.DIRECTORY if not self._flag and name.endswith(b"/") else kind

    def _prefix(self, data: bytes, start: int) -> bytes:
        """What stands before the name of a header, with its slash."""
        if not data[start + 345] and not data[start + 357]:
            return b""
        magic = data[start + 257 : start + 265]
        if magic.startswith(_USTAR):
            is_star = data[start + 508 : start + 512] == _STAR_TRAILER
            prefix = _text(data, start + 345, start + (476 if is_star else 500))
            return prefix + b"/" if prefix else b""
        # GNU has two times here, v7 has nothing, and of anything else some readers make a prefix.
        times = [_number(data, start + at, start + at + 12) for at in (345, 357)]
        if magic != _GNU or None in times:
            raise self._broken()
        return b""

    def _announce_extension(self, size: int) -> None:
        # Readers differ over which of two wins, and over whether a global one between two headers ends the first.
        if self._pending and not ({self._flag, *self._pending} <= _GNU_EXTENSIONS and self._flag not in self._pending):
            raise ContextInvalidError(
                f"a member after {quoted(self._name)} has two tar headers that contradict each other"
            )
        self._extensions_left -= BLOCK_BYTES + size
        if size > EXTENSION_LIMIT_BYTES:
            raise ContextInvalidError(
                f"a tar header after {quoted(self._name)} is longer than {EXTENSION_LIMIT_BYTES} bytes"
            )
        if self._extensions_left < 0:
            limit = self._extensions_limit
            raise ContextInvalidError(f"the archive's extended tar headers are longer than {limit} bytes together")
        if self._flag != _PAX_GLOBAL:
            self._pending.add(self._flag)
        self._size = size
        self._await(self._extension, _padded(size))

    def _extension(self, data: bytes, start: int) -> int:
        end = start + self._need
        if self._flag in _GNU_EXTENSIONS:
            self._take_name(data, start, end)
        else:
            self._take_records(data[start : start + self._size])
        self._await(self._header, BLOCK_BYTES)
        return end

    def _take_name(self, data: bytes, start: int, end: int) -> None:
        name = _text(data, start, start + self._size)
        # Some readers take the padding for more of the name.
        if not name or name != _text(data, start, end):
            raise self._broken()
        self._overrides[_PATH if self._flag == _LONG_NAME else _LINK_PATH] = name

    def _take_records(self, content: bytes) -> None:
        for key, value in self._records(content):
            if key.startswith(_PAX_SPARSE):
                raise ContextInvalidError(
                    f"the member after {quoted(self._name)} is a sparse file, which a build context cannot hold"
                )
            if key in (_PATH, _LINK_PATH, _PAX_SIZE):
                # Go applies no global record to a member, and an empty value overrides nothing; other readers differ.
                if self._flag == _PAX_GLOBAL or not value or b"\0" in value:
                    raise self._broken()
                self._overrides[key] = value

    def _records(self, content: bytes) -> Iterator[tuple[bytes, bytes]]:
        """pax: `LENGTH KEY=VALUE` and a line end, the length counting all of it."""
        position = 0
        while position < len(content):
            match = _RECORD.match(content, position)
            end = position + int(match[1]) if match else 0
            if not match or not match.end() < end <= len(content) or content[end - 1] != ord("\n"):
                raise self._broken()
            yield match[2], content[match.end() : end - 1]
            position = end

    def _overridden(self, name: bytes, target: bytes, size: int) -> tuple[bytes, bytes, int]:
        overrides, self._overrides = self._overrides, {}
        self._pending.clear()
        digits = overrides.get(_PAX_SIZE, b"%d" % size)
        if not _SIZE.fullmatch(digits):
            raise self._broken()
        return overrides.get(_PATH, name), overrides.get(_LINK_PATH, target), int(digits)

    def _broken(self) -> ContextInvalidError:
        if not self._begun:
            return ContextInvalidError("the archive is not a tar")
        return ContextInvalidError(f"the archive's tar is broken after {quoted(self._name)}")


def quoted(name: bytes) -> str:
    """A member's name for a message: one line of at most 100 characters, in quotes."""
    text = name[: 4 * _QUOTED_LENGTH + 4].decode(errors="replace")
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return f"'{line}'" if len(line) <= _QUOTED_LENGTH else f"'{line[: _QUOTED_LENGTH - 1]}…'"


def _text(data: bytes, start: int, end: int) -> bytes:
    """A field up to its first NUL."""
    stop = data.find(b"\0", start, end)
    return data[start : stop if stop >= 0 else end]


def _padded(size: int) -> int:
    return (size + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES


def _octal(data: bytes, start: int, end: int) -> int | None:
    match = _OCTAL.fullmatch(data, start, end)
    return int(match[1] or b"0", 8) if match else None


def _number(data: bytes, start: int, end: int) -> int | None:
    """A numeric field, octal or GNU's base 256; None if it is neither, is negative or takes more than 63 bits."""
    if not data[start] & 0x80:
        return _octal(data, start, end)
    value = int.from_bytes(data[start:end]) ^ 0x80 << 8 * (end - start - 1)
    return value if value < 2**63 else None


def _checksum_fits(data: bytes, start: int) -> bool:
    checksum = _octal(data, start + 148, start + 156)
    # The checksum counts as eight spaces: 256. Adler-32's lower half is 1 and the sum of the bytes modulo 65521, so
    # it is the sum of up to 256 bytes: a tenth of the time of `sum`, which a tar of small files spends mostly here.
    total = 253 + (adler32(data[start : start + 148]) & 0xFFFF)
    total += (adler32(data[start + 156 : start + 404]) & 0xFFFF) + (adler32(data[start + 404 : start + 512]) & 0xFFFF)
    return checksum == total or checksum == _signed_sum(data[start : start + BLOCK_BYTES])


def _signed_sum(block: bytes) -> int:
    """The checksum of old tars, whose bytes had signs."""
    return 256 + sum(memoryview(block[:148] + block[156:]).cast("b"))
