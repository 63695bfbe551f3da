"""What the check of an uploaded archive lets through, what it refuses, and how it says so."""

import gzip
import subprocess
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiln.adapters.archive import ArchiveCheck, ArchiveLimits
from kiln.errors import ContextInvalidError, ContextTooLargeError
from support.archives import (
    DOCKERFILE,
    END,
    LIMITS,
    archive,
    bomb,
    checked,
    context_archive,
    extension,
    file,
    folder,
    hard_link,
    header,
    packed,
    record,
    refusal,
    repeated,
    symlink,
    tar,
)

MEBIBYTE = 1024**2
LONG = "/".join(["a-folder-of-a-long-path"] * 9)
DOCKER = file("Dockerfile", DOCKERFILE)
DOCKER_TAR = tar(DOCKER)[:1024]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_python(tar_format: int):
    """Members and the length of their contents are counted in every format, in one read or a byte at a time."""
    long_link = "x" * (80 if tar_format == tarfile.USTAR_FORMAT else 180)
    others = [symlink("link", long_link), hard_link("hard", "Dockerfile"), folder("empty"), folder(".")]
    data = archive({"Dockerfile": DOCKERFILE, "./é/b": b"12", LONG: bytes(1000)}, *others, tar_format=tar_format)
    assert checked(data) == checked(data, step=1) == (7, len(DOCKERFILE) + 1002)


@pytest.mark.parametrize("tar_format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_formats_of_gnu_tar(tar_format: str, tmp_path: Path):
    """What GNU tar writes of a directory passes, in every format that it knows."""
    (tmp_path / "Dockerfile").write_bytes(DOCKERFILE)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(bytes(700))
    (tmp_path / "folder" / "link").symlink_to("../Dockerfile")
    (tmp_path / "hard").hardlink_to(tmp_path / "Dockerfile")
    if tar_format in {"gnu", "posix"}:
        (tmp_path / "folder" / ("n" * 200)).write_bytes(b"1")
    command = ["tar", "-C", str(tmp_path), f"--format={tar_format}", "-czf", "-", "."]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    long_names = 1 if tar_format in {"gnu", "posix"} else 0
    assert checked(data) == (6 + long_names, len(DOCKERFILE) + 700 + long_names)


@pytest.mark.parametrize(
    ("data", "members"),
    [
        pytest.param(packed(tar(DOCKER)[:700]) + packed(tar(DOCKER)[700:]), 1, id="gzip-members"),
        pytest.param(context_archive() + bytes(70_000), 1, id="zeros-after-gzip"),
        pytest.param(packed(tar(DOCKER) + b"after the end"), 1, id="data-after-the-end-of-tar"),
        pytest.param(packed(DOCKER_TAR), 1, id="no-end-of-tar"),
        pytest.param(archive({"./Dockerfile": DOCKERFILE}), 1, id="dot-slash-dockerfile"),
        pytest.param(archive({}, DOCKER, symlink("python", "/usr/bin/python3")), 2, id="absolute-symlink"),
        pytest.param(archive({}, DOCKER, symlink("a/b", "../Dockerfile")), 2, id="symlink-up-to-the-root"),
        pytest.param(archive({"a/../Dockerfile": DOCKERFILE}), 1, id="dots-that-stay-inside"),
        pytest.param(packed(extension(b"g", record("comment", "0123abcd")) + tar(DOCKER)), 1, id="git-archive"),
        pytest.param(
            packed(extension(b"x", record("size", "22")) + header("Dockerfile") + DOCKERFILE.ljust(512, b"\0") + END),
            1,
            id="pax-size",
        ),
        pytest.param(
            packed(header("Dockerfile", patches={124: b"\x80".ljust(12, b"\0")}) + END), 1, id="base-256-size"
        ),
    ],
)
def test_accepted(data: bytes, members: int):
    """What builders and `gzip -dc` read without a word is accepted."""
    assert checked(data)[0] == members


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "the archive is empty", id="empty"),
        pytest.param(b"PK\x03\x04" + bytes(600), "the archive is not a gzip file", id="zip"),
        pytest.param(tar(DOCKER), "the archive is not a gzip file", id="plain-tar"),
        pytest.param(context_archive()[:-9], "the archive ends in the middle of its gzip stream", id="cut"),
        pytest.param(context_archive()[:-3], "the archive ends in the middle of its gzip stream", id="cut-trailer"),
        pytest.param(context_archive()[:-8] + bytes(8), "the archive's gzip stream is broken", id="checksum-of-gzip"),
        pytest.param(context_archive() + b"x", "the archive has other data after its gzip stream", id="trailing"),
        pytest.param(
            context_archive() + b"\0" + context_archive(),
            "the archive has other data after its gzip stream",
            id="member-after-zeros",
        ),
        pytest.param(packed(b""), "the archive is not a tar", id="nothing-in-gzip"),
        pytest.param(packed(b"just text"), "the archive is not a tar", id="text"),
        pytest.param(packed(b"text" * 500), "the archive is not a tar", id="long-text"),
        pytest.param(packed(END), "the archive has no members", id="no-members"),
        pytest.param(
            packed(tar(DOCKER, file("a", bytes(2000)))[:2500]),
            "the archive ends in the middle of its tar, after 'a'",
            id="cut-content",
        ),
        pytest.param(
            packed(DOCKER_TAR + header("a")[:100]),
            "the archive ends in the middle of its tar, after 'Dockerfile'",
            id="cut-header",
        ),
        pytest.param(
            packed(DOCKER_TAR + extension(b"L", b"name\0")),
            "the archive ends in the middle of its tar, after 'Dockerfile'",
            id="extension-of-nothing",
        ),
        pytest.param(
            packed(DOCKER_TAR + b"y" + header("x")[1:]),
            "the archive's tar is broken after 'Dockerfile'",
            id="checksum-of-tar",
        ),
        pytest.param(
            packed(DOCKER_TAR + bytes(512) + header("x")),
            "the archive's tar is broken after 'Dockerfile'",
            id="lone-zero-block",
        ),
        pytest.param(
            packed(DOCKER_TAR + header("x", patches={124: b"-0000000001"})),
            "the archive's tar is broken after 'Dockerfile'",
            id="negative-size",
        ),
        pytest.param(
            packed(DOCKER_TAR + header("x", patches={124: b"\xff" * 12})),
            "the archive's tar is broken after 'Dockerfile'",
            id="negative-base-256-size",
        ),
        pytest.param(
            packed(DOCKER_TAR + header("x", size=5, kind=b"5")),
            "the archive's tar is broken after 'Dockerfile'",
            id="folder-with-content",
        ),
        pytest.param(
            packed(DOCKER_TAR + header("x", patches={257: b"ustar  \0", 345: b"../.."})),
            "the archive's tar is broken after 'Dockerfile'",
            id="prefix-in-gnu-header",
        ),
        pytest.param(
            packed(DOCKER_TAR + header("x", patches={257: bytes(8), 345: b"../.."})),
            "the archive's tar is broken after 'Dockerfile'",
            id="prefix-in-v7-header",
        ),
        pytest.param(
            packed(DOCKER_TAR + extension(b"x", b"99 path=x\n")),
            "the archive's tar is broken after 'Dockerfile'",
            id="pax-length",
        ),
        pytest.param(
            packed(DOCKER_TAR + extension(b"x", record("size", "-1")) + header("x")),
            "the archive's tar is broken after 'Dockerfile'",
            id="pax-size",
        ),
        pytest.param(
            packed(DOCKER_TAR + extension(b"L", b"\0") + header("x")),
            "the archive's tar is broken after 'Dockerfile'",
            id="empty-long-name",
        ),
        pytest.param(
            packed(DOCKER_TAR + header("x", size=2, kind=b"L") + b"name".ljust(512, b"\0") + header("x")),
            "the archive's tar is broken after 'Dockerfile'",
            id="name-in-padding",
        ),
        pytest.param(
            packed(DOCKER_TAR + extension(b"g", record("path", "x")) + header("x")),
            "the archive's tar is broken after 'Dockerfile'",
            id="global-path",
        ),
        pytest.param(
            packed(DOCKER_TAR + extension(b"L", b"x") + extension(b"x", record("path", "y")) + header("x")),
            "a member after 'Dockerfile' has two tar headers that contradict each other",
            id="two-names",
        ),
        pytest.param(
            packed(DOCKER_TAR + header("x", size=2**21, kind=b"x")),
            "a tar header after 'Dockerfile' is longer than 1048576 bytes",
            id="long-extension",
        ),
        pytest.param(
            packed(DOCKER_TAR + header("x", kind=b"S")),
            "member 'x' is a sparse file, which a build context cannot hold",
            id="sparse",
        ),
        pytest.param(
            packed(DOCKER_TAR + extension(b"x", record("GNU.sparse.realsize", "9" * 15)) + header("x")),
            "the member after 'Dockerfile' is a sparse file, which a build context cannot hold",
            id="pax-sparse",
        ),
        pytest.param(
            packed(DOCKER_TAR + header("x", kind=b"V")),
            "member 'x' is of the tar type 'V', which a build context cannot hold",
            id="volume-label",
        ),
    ],
)
def test_broken(data: bytes, message: str):
    """What is no tar.gz, or would be read differently by different programs, is refused with the reason."""
    assert (refusal(data), refusal(data, step=1)) == (message, message)


def test_archive_too_long():
    """An archive that is too long is refused at its first byte too many, whatever it holds."""
    check = ArchiveCheck(ArchiveLimits(archive_bytes=100, unpacked_bytes=10**6, members=10), "Dockerfile")
    data = context_archive()
    check.feed(data[:100])
    with pytest.raises(ContextTooLargeError, match=r"^the archive is longer than 100 bytes$"):
        check.feed(data[100:101])


def test_too_many_members():
    """The number of members is bounded."""
    limits = ArchiveLimits(archive_bytes=10**6, unpacked_bytes=10**6, members=2)
    data = archive({"Dockerfile": DOCKERFILE, "a": b"", "b": b""})
    assert refusal(data, limits=limits) == "the archive has more than 2 members"


def test_headers_without_members():
    """Headers that no member follows are bounded too."""
    message = refusal(repeated(DOCKER_TAR, header("x", kind=b"g"), 5000))
    assert message == f"the archive's extended tar headers are longer than {MEBIBYTE + 1000 * 1024} bytes together"


def test_too_many_gzip_members():
    """The number of gzip members is bounded."""
    limits = ArchiveLimits(archive_bytes=10**6, unpacked_bytes=10**6, members=2)
    assert refusal(context_archive() + packed(b"") * 8, limits=limits) == "the archive has more than 8 gzip members"


def test_declared_size():
    """A member that claims 50 GB is refused at its header."""
    check = ArchiveCheck(LIMITS, "Dockerfile")
    claim = header("huge", patches={124: b"\x80" + (50 * 10**9).to_bytes(11, "big")})
    with pytest.raises(ContextInvalidError, match=r"^the archive is longer than 100000000 bytes when unpacked$"):
        check.feed(gzip.compress(claim + bytes(512)))


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        pytest.param(DOCKER_TAR + header("zeros", size=10**8 - 2000), bytes(MEBIBYTE), id="content"),
        pytest.param(DOCKER_TAR + END, bytes(MEBIBYTE), id="after-the-end"),
    ],
)
def test_bombs(begin: bytes, piece: bytes):
    """A gzip that unpacks to 8 GB is left as soon as it is past the limit, with little memory."""
    data = bomb(begin, piece, 8000)
    check = ArchiveCheck(LIMITS, "Dockerfile")
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(ContextInvalidError, match=r"^the archive is longer than 100000000 bytes when unpacked$"):
        check.feed(data)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (peak_bytes < 2 * MEBIBYTE, time.process_time() - begun < 2) == (True, True)


@pytest.mark.parametrize("kind", [b"0", b"2"])
def test_memory_of_many_members(kind: bytes):
    """Members cost no memory, and symbolic links a number each."""
    links = b"".join(header(f"{'n' * 80}{n}", kind=kind, patches={157: b"target"}) for n in range(1000))
    data = repeated(DOCKER_TAR, links, 20, END)
    limits = ArchiveLimits(archive_bytes=10**7, unpacked_bytes=10**8, members=30_000)
    tracemalloc.start()
    members = checked(data, limits=limits)[0]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (members, peak_bytes < 2 * MEBIBYTE) == (20_001, True)


@settings(database=None, deadline=None, max_examples=60)
@given(at=st.integers(0, 3000), byte=st.integers(0, 255), step=st.integers(1, 4000))
def test_any_damage(at: int, byte: int, step: int):
    """A tar with one byte changed is accepted or refused, the same in any pieces, and nothing else happens."""
    content = bytearray(tar(DOCKER, file("é" * 60, b"content"), symlink("a/b", "../Dockerfile"), folder("c")))
    content[at % len(content)] = byte
    data = packed(bytes(content))
    assert outcome(data, step) == outcome(data, 65536)


def outcome(data: bytes, step: int) -> object:
    try:
        return checked(data, step=step)
    except ContextInvalidError as error:
        return str(error)
