"""Archives to build from: a small one, of which each build has a new layer, and long ones to upload."""

import gzip
import io
import os
import sysconfig
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from bench.figures import MeasurementError

BUSYBOX = Path("/bin/busybox")
DOCKERFILE = """\
FROM scratch
COPY busybox /bin/sh
RUN echo made >/made
COPY changing /changing
"""
# Some seconds of one core's work after the layer that changes, as a compiler or a package manager has.
WORK = """\
COPY busybox /bin/busybox
RUN busybox dd if=/dev/zero bs=1048576 count=600 | busybox sha256sum >/sum
"""
SLOW = """\
COPY busybox /bin/busybox
RUN busybox sleep 5
"""
UPLOADED_DOCKERFILE = "FROM scratch\nCOPY . /\n"
CHANGING_BYTES = 64 * 1024
COMPRESS_LEVEL = 6
GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
RAW_WINDOW_BITS = -15
END = tarfile.NUL * tarfile.BLOCKSIZE * 2
MEMBER_BYTES = 4 * 1024**2
# Text in whole files of Python's own library. Of the small ones a long archive would have more than a context may.
SOURCE_BYTES = 16 * 1024
SOURCES = 500


def slow_context() -> bytes:
    """A small context whose step after the changing layer takes five seconds. Raises MeasurementError."""
    return small_context(SLOW)


def working_context() -> bytes:
    """A small context whose build has work to do. Raises MeasurementError."""
    return small_context(WORK)


def small_context(steps: str = "") -> bytes:
    """A context that is like every other one of these but for one file, and so for one layer. Raises MeasurementError."""
    if not BUSYBOX.exists():
        raise MeasurementError(f"{BUSYBOX} is not there: apt-get install busybox-static")
    members = {
        "Dockerfile": (DOCKERFILE + steps).encode(),
        "busybox": BUSYBOX.read_bytes(),
        "changing": os.urandom(CHANGING_BYTES),
    }
    return gzip.compress(_tar(members) + END, compresslevel=1)


def write_incompressible(path: Path, size_bytes: int) -> None:
    """An archive of about this length whose contents no compression shortens, as those of wheels and models."""
    _write_long(path, size_bytes, {f"model-{number}": os.urandom(MEMBER_BYTES) for number in range(2)})


def write_text(path: Path, size_bytes: int) -> None:
    """An archive of about this length, of source code, which unpacks to a multiple of it."""
    library = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    sources = [source for source in library if source.stat().st_size > SOURCE_BYTES][:SOURCES]
    _write_long(path, size_bytes, {f"sources/{source.name}": source.read_bytes() for source in sources})


def _write_long(path: Path, size_bytes: int, members: dict[str, bytes]) -> None:
    """The members over and over: compressed once, since a deflate stream that was flushed knows nothing of itself."""
    parts = (_tar({"Dockerfile": UPLOADED_DOCKERFILE.encode()}), _tar(members), END)
    head, body, end = (_deflated(part, last=part is END) for part in parts)
    repeats = max(1, (size_bytes - len(head) - len(end)) // len(body))
    with path.open("wb") as file:
        file.write(GZIP_HEAD + head)
        for _ in range(repeats):
            file.write(body)
        file.write(end + _trailer([parts[0], *[parts[1]] * repeats, END]))


def _tar(members: dict[str, bytes]) -> bytes:
    """A tar's members without its end, so that others may follow."""
    packed = io.BytesIO()
    for name, content in members.items():
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), 0o755
        packed.write(member.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE))
    return packed.getvalue()


def _deflated(data: bytes, *, last: bool) -> bytes:
    compressor = zlib.compressobj(COMPRESS_LEVEL, wbits=RAW_WINDOW_BITS)
    return compressor.compress(data) + compressor.flush(zlib.Z_FINISH if last else zlib.Z_FULL_FLUSH)


def _trailer(plain: Iterable[bytes]) -> bytes:
    """Checksum and length at a gzip stream's end (RFC 1952)."""
    checksum = length = 0
    for data in plain:
        checksum = zlib.crc32(data, checksum)
        length += len(data)
    return checksum.to_bytes(4, "little") + (length % 2**32).to_bytes(4, "little")
