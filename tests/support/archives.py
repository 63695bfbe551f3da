"""Archives for tests: tar.gz bytes out of files, links, and headers that no decent program writes; and their check."""

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping

import pytest

from kiln.adapters.archive import ArchiveCheck, ArchiveLimits
from kiln.errors import ContextInvalidError

DOCKERFILE = b"FROM scratch\nCOPY . /\n"
BLOCK = 512
END = bytes(2 * BLOCK)
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"

LIMITS = ArchiveLimits(archive_bytes=10**7, unpacked_bytes=10**8, members=1000)

Member = tuple[tarfile.TarInfo, bytes]


def context_archive(files: Mapping[str, bytes] | None = None, *, dockerfile: bytes = DOCKERFILE) -> bytes:
    """A build context (tar.gz) of a `Dockerfile` and these files, by their paths."""
    return archive({"Dockerfile": dockerfile, **(files or {})})


def archive(files: Mapping[str, bytes], *others: Member, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar.gz of files by their paths, and of other members after them."""
    return packed(tar(*(file(name, content) for name, content in files.items()), *others, tar_format=tar_format))


def tar(*members: Member, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of these members, in their order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as written:
        for info, content in members:
            written.addfile(info, io.BytesIO(content))
    return out.getvalue()


def packed(content: bytes) -> bytes:
    """A gzip, the same for the same content."""
    return gzip.compress(content, compresslevel=1, mtime=0)


def file(name: str, content: bytes = b"") -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


def folder(name: str) -> Member:
    return special(name, tarfile.DIRTYPE)


def symlink(name: str, target: str) -> Member:
    return special(name, tarfile.SYMTYPE, target)


def hard_link(name: str, target: str) -> Member:
    return special(name, tarfile.LNKTYPE, target)


def special(name: str, kind: bytes, target: str = "") -> Member:
    """A member without content, such as a device (`tarfile.CHRTYPE`)."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info, b""


def header(name: str = "x", *, size: int = 0, kind: bytes = b"0", patches: Mapping[int, bytes] | None = None) -> bytes:
    """One header block with its checksum; `patches` are written over it, by their offsets, before the sum is made."""
    info = tarfile.TarInfo(name)
    info.size = size
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[156:157] = kind
    for offset, content in (patches or {}).items():
        block[offset : offset + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extension(kind: bytes, content: bytes) -> bytes:
    """An extension of the next member: `x` (pax), `g` (pax, global), `L` (GNU long name), `K` (GNU long link)."""
    return header("extension", size=len(content), kind=kind) + content + bytes(-len(content) % BLOCK)


def record(key: str, value: str) -> bytes:
    """A pax record, its length counted with its own digits."""
    rest = f" {key}={value}\n".encode()
    length = len(rest) + len(str(len(rest)))
    length = len(rest) + len(str(length))
    return str(length).encode() + rest


def repeated(begin: bytes, piece: bytes, times: int, end: bytes = b"") -> bytes:
    """A gzip of `begin`, so many pieces, and `end`: packed once, however many there are."""
    pieces = [(begin, 1), (piece, times), (end, 1)]
    deflated = b"".join(_block(content) * count for content, count in pieces if content)
    checksum, length = _sum_of(pieces)
    last = zlib.compressobj(wbits=-15).flush()
    return GZIP_HEADER + deflated + last + struct.pack("<II", checksum, length % 2**32)


def bomb(begin: bytes, piece: bytes, times: int) -> bytes:
    """As `repeated`, without an end and a checksum, which nobody is to get to."""
    return GZIP_HEADER + _block(begin) + _block(piece) * times


def checked(
    data: bytes, *, dockerfile: str = "Dockerfile", limits: ArchiveLimits = LIMITS, step: int = 65536
) -> tuple[int, int]:
    """How many members an archive has, and how long their contents are, once it has passed in pieces of `step` bytes."""
    check = ArchiveCheck(limits, dockerfile)
    for at in range(0, len(data), step):
        check.feed(data[at : at + step])
    return check.finish()


def refusal(data: bytes, *, dockerfile: str = "Dockerfile", limits: ArchiveLimits = LIMITS, step: int = 65536) -> str:
    """Why an archive is refused. It fails the test if it is not."""
    with pytest.raises(ContextInvalidError) as raised:
        checked(data, dockerfile=dockerfile, limits=limits, step=step)
    return str(raised.value)


def _block(content: bytes) -> bytes:
    # A full flush ends on a byte and forgets what was before it, so the block can stand anywhere.
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)


def _sum_of(pieces: Iterable[tuple[bytes, int]]) -> tuple[int, int]:
    checksum = length = 0
    for content, count in pieces:
        for _ in range(count):
            checksum = zlib.crc32(content, checksum)
        length += len(content) * count
    return checksum, length
