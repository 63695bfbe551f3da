"""The store of build contexts: the same facts in a directory and in a bucket of (simulated) S3."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import httpx
import pytest

from kiln.adapters.archive import ArchiveLimits
from kiln.adapters.contexts import StoredContexts, open_contexts
from kiln.adapters.objects import DirectoryStore, open_store
from kiln.adapters.objects_s3 import PART_BYTES, S3Store
from kiln.errors import ContextInvalidError, ContextMissingError, ContextTooLargeError, UnavailableError
from kiln.ports import ContextFacts, Contexts
from kiln.settings import Settings, SettingsError
from support.archives import DOCKERFILE, archive, context_archive, symlink
from support.moto import DUMMY_KEY, REGION, running_moto
from support.ports import free_ports

LIMITS = ArchiveLimits(archive_bytes=3 * PART_BYTES, unpacked_bytes=10**8, members=1000)
KEY = "contexts/0a1b"
SMALL = context_archive({"app.py": b"print()"})
# Of more than two parts, because it cannot be packed.
NOISE = random.Random(1).randbytes(2 * PART_BYTES + 1000)
LARGE = context_archive({"noise": NOISE})
NOW, AN_HOUR = timedelta(), timedelta(hours=1)


@dataclass
class Place:
    """A store of contexts, and everything that is in it by the word of its operating system or of S3 itself."""

    contexts: Contexts

    def left(self) -> list[str]:
        raise NotImplementedError

    def put(self, key: str, data: bytes) -> None:
        raise NotImplementedError


@dataclass
class DirectoryPlace(Place):
    root: Path

    def left(self) -> list[str]:
        return sorted(path.name for path in self.root.rglob("*") if path.is_file())

    def put(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True)
        path.write_bytes(data)


@dataclass
class S3Place(Place):
    s3: Any
    bucket: str
    prefix: str = field(default="kiln/objects/")

    def left(self) -> list[str]:
        objects = self.s3.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        uploads = self.s3.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])
        return sorted(entry["Key"].rpartition("/")[2] for entry in [*objects, *uploads])

    def put(self, key: str, data: bytes) -> None:
        self.s3.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data)


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """Simulated S3, and credentials for it where boto3's chain looks first."""
    with running_moto() as moto, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", DUMMY_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", DUMMY_KEY)
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        yield moto.url


@pytest.fixture
def bucket_place(s3_url: str, request: pytest.FixtureRequest) -> S3Place:
    s3 = boto3.client("s3", endpoint_url=s3_url)
    bucket = f"bucket-{hashlib.sha256(request.node.name.encode()).hexdigest()[:20]}"
    s3.create_bucket(Bucket=bucket)
    store = S3Store(bucket, "/kiln/objects/", endpoint_url=s3_url, default_region=REGION)
    return S3Place(StoredContexts(store, LIMITS), s3, bucket)


@pytest.fixture
def directory_place(tmp_path: Path) -> DirectoryPlace:
    root = tmp_path / "home" / "objects"
    return DirectoryPlace(StoredContexts(DirectoryStore(root), LIMITS), root)


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(f"{request.param}_place")


def stored(place: Place, data: bytes, key: str = KEY) -> ContextFacts:
    """Uploads in pieces such as a server reads."""
    upload = place.contexts.receive(key, "Dockerfile")
    for at in range(0, len(data), 100_000):
        upload.write(data[at : at + 100_000])
    facts = upload.commit()
    upload.abort()
    return facts


@pytest.mark.parametrize("data", [pytest.param(SMALL, id="small"), pytest.param(LARGE, id="large")])
def test_round_trip(place: Place, data: bytes, tmp_path: Path):
    """An archive comes back byte by byte in a file that only its owner reads; upload and check find the same facts."""
    facts = stored(place, data)
    fetched = tmp_path / "context.tar.gz"
    digest = place.contexts.fetch(KEY, fetched)
    assert fetched.read_bytes() == data
    assert fetched.stat().st_mode & 0o777 == 0o600
    assert (facts.sha256, facts.size_bytes, facts.members) == (hashlib.sha256(data).hexdigest(), len(data), 2)
    assert (digest, place.contexts.check(KEY, "Dockerfile")) == (facts.sha256, facts)
    assert place.left() == ["0a1b"]


def test_unpacked_bytes(place: Place):
    """The length of all contents is told."""
    assert stored(place, SMALL).unpacked_bytes == len(DOCKERFILE) + len(b"print()")


def test_nothing_before_commit(place: Place):
    """An upload shows as an object only once it is committed."""
    upload = place.contexts.receive(KEY, "Dockerfile")
    upload.write(LARGE)
    before = place.contexts.exists(KEY)
    upload.commit()
    assert (before, place.contexts.exists(KEY)) == (False, True)


def test_replaced(place: Place):
    """A second upload takes the place of the first one, and not before it is committed."""
    first = stored(place, LARGE)
    upload = place.contexts.receive(KEY, "Dockerfile")
    upload.write(SMALL)
    assert place.contexts.check(KEY, "Dockerfile") == first
    second = upload.commit()
    assert place.contexts.check(KEY, "Dockerfile") == second != first


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(LARGE[:-1], id="cut"),
        pytest.param(archive({"Dockerfile": DOCKERFILE, "noise": NOISE}, symlink("a", "../../x")), id="climbing"),
    ],
)
def test_refused_upload(place: Place, data: bytes):
    """An upload that is refused leaves nothing once it is aborted, also when parts of it were stored already."""
    upload = place.contexts.receive(KEY, "Dockerfile")
    with pytest.raises(ContextInvalidError):
        for piece in (data[: 2 * PART_BYTES], data[2 * PART_BYTES :]):
            upload.write(piece)
        upload.commit()
    upload.abort()
    upload.abort()
    assert (place.left(), place.contexts.exists(KEY)) == ([], False)


def test_refused_upload_spares_the_object(place: Place):
    """An upload that is refused leaves the object that was there."""
    facts = stored(place, SMALL)
    upload = place.contexts.receive(KEY, "Dockerfile")
    with pytest.raises(ContextInvalidError):
        upload.write(b"no gzip")
    upload.abort()
    assert place.contexts.check(KEY, "Dockerfile") == facts


def test_too_long_upload(place: Place):
    """An upload is refused at its first byte too many."""
    upload = place.contexts.receive(KEY, "Dockerfile")
    data = context_archive({"noise": NOISE * 2})
    upload.write(data[: 3 * PART_BYTES])
    with pytest.raises(ContextTooLargeError, match=f"^the archive is longer than {3 * PART_BYTES} bytes$"):
        upload.write(data[3 * PART_BYTES :][:1])
    upload.abort()
    assert place.left() == []


def test_impossible_dockerfile(place: Place):
    """An upload whose Dockerfile is outside begins nothing."""
    with pytest.raises(ContextInvalidError):
        place.contexts.receive(KEY, "../Dockerfile")
    assert place.left() == []


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"text", ContextInvalidError, "the archive is not a gzip file"),
        (bytes(3 * PART_BYTES + 1), ContextTooLargeError, f"the archive is longer than {3 * PART_BYTES} bytes"),
    ],
)
def test_check_of_what_came_otherwise(place: Place, data: bytes, error: type[Exception], message: str):
    """An object that was not uploaded through Kiln is checked by the same rules; one too long is not even read."""
    place.put(KEY, data)
    with pytest.raises(error, match=f"^{message}$"):
        place.contexts.check(KEY, "Dockerfile")


def test_missing(place: Place, tmp_path: Path):
    """A missing object is told apart, and leaves no file."""
    missing = "^the build context is not in the object store$"
    with pytest.raises(ContextMissingError, match=missing):
        place.contexts.check(KEY, "Dockerfile")
    with pytest.raises(ContextMissingError, match=missing):
        place.contexts.fetch(KEY, tmp_path / "file")
    assert ((tmp_path / "file").exists(), place.contexts.exists(KEY)) == (False, False)


def test_delete(place: Place):
    """Deleting removes the one object, and what is not there is no error."""
    stored(place, SMALL)
    stored(place, SMALL, "contexts/0a1c")
    place.contexts.delete(KEY)
    place.contexts.delete(KEY)
    assert place.left() == ["0a1c"]


def test_stale(place: Place):
    """Objects are listed by their age, uploads that still come in are not."""
    stored(place, SMALL)
    upload = place.contexts.receive("contexts/0a1c", "Dockerfile")
    upload.write(LARGE)
    assert (list(place.contexts.stale(NOW)), list(place.contexts.stale(AN_HOUR))) == ([KEY], [])
    upload.abort()


def test_sweep(place: Place):
    """What a killed server's upload left goes by its age, and objects stay."""
    stored(place, SMALL)
    upload = place.contexts.receive("contexts/0a1c", "Dockerfile")
    upload.write(LARGE)
    before = len(place.left())
    place.contexts.sweep_unfinished(NOW)
    assert (before, place.left()) == (2, ["0a1b"])
    upload.abort()


def test_ping(place: Place):
    """A store that works says nothing, and holds nothing afterwards."""
    place.contexts.ping()
    assert place.left() == []


def test_sweep_spares_the_young(directory_place: DirectoryPlace):
    """An upload that was written to lately is not swept away."""
    upload = directory_place.contexts.receive(KEY, "Dockerfile")
    upload.write(SMALL)
    directory_place.contexts.sweep_unfinished(AN_HOUR)
    assert upload.commit().members == 2


def test_modes_of_a_directory(directory_place: DirectoryPlace):
    """Only Kiln's user reads what is stored."""
    stored(directory_place, SMALL)
    paths = [directory_place.root, directory_place.root / "contexts", directory_place.root / KEY]
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o700, 0o700, 0o600]


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", "a/./b", "", "a.part", ".ping"])
def test_keys_of_a_directory(directory_place: DirectoryPlace, key: str):
    """A key that is no path below the directory is a mistake of the program."""
    with pytest.raises(ValueError, match="is no key"):
        directory_place.contexts.delete(key)


def test_no_url_of_a_directory(directory_place: DirectoryPlace):
    """Uploads into a directory come through Kiln."""
    assert directory_place.contexts.upload_url(KEY, AN_HOUR) is None


def test_unwritable_directory(tmp_path: Path):
    """A directory that cannot be is an outage."""
    (tmp_path / "objects").touch()
    contexts = StoredContexts(DirectoryStore(tmp_path / "objects"), LIMITS)
    with pytest.raises(UnavailableError, match=r"^the object store cannot be written: File exists$"):
        contexts.receive(KEY, "Dockerfile")


def test_upload_url(bucket_place: S3Place):
    """A URL takes the object of whatever content type, without credentials, and ends in its time."""
    url = bucket_place.contexts.upload_url(KEY, AN_HOUR)
    query = parse_qs(urlsplit(url).query)
    assert (query["X-Amz-SignedHeaders"], query["X-Amz-Expires"]) == (["host"], ["3600"])
    answer = httpx.put(url, content=SMALL, headers={"content-type": "application/octet-stream"})
    assert (answer.status_code, bucket_place.contexts.check(KEY, "Dockerfile").size_bytes) == (200, len(SMALL))


def test_bucket_is_missing(s3_url: str):
    """A bucket that is not there is an outage, with S3's own code."""
    contexts = StoredContexts(S3Store("missing", "", endpoint_url=s3_url, default_region=REGION), LIMITS)
    with pytest.raises(UnavailableError, match=r"^the object store refuses HeadBucket: 404$"):
        contexts.ping()
    with pytest.raises(UnavailableError, match=r"^the object store refuses GetObject: NoSuchBucket$"):
        list(S3Store("missing", "", endpoint_url=s3_url, default_region=REGION).read(KEY))


def test_s3_does_not_answer(s3_url: str):
    """An S3 that is not there is an outage, also to an upload that is aborted."""
    gone = f"http://127.0.0.1:{free_ports(1)[0]}"
    contexts = StoredContexts(S3Store("bucket", "", endpoint_url=gone, default_region=REGION), LIMITS)
    upload = contexts.receive(KEY, "Dockerfile")
    upload.write(SMALL)
    with pytest.raises(UnavailableError, match=r"^the object store does not answer: "):
        upload.commit()
    upload.abort()


def test_settings_of_a_directory(tmp_path: Path):
    """Without a setting, contexts lie in Kiln's home, under the limits that are set."""
    contexts = open_contexts(Settings(home=tmp_path, max_context_members=1))
    upload = contexts.receive(KEY, "Dockerfile")
    with pytest.raises(ContextInvalidError, match="more than 1 members"):
        upload.write(SMALL)
    assert (tmp_path / "objects" / "contexts").is_dir()
    upload.abort()


def test_settings_of_a_bucket(bucket_place: S3Place, s3_url: str):
    """KILN_OBJECTS names bucket and prefix, KILN_S3_ENDPOINT where they are."""
    objects = f"s3://{bucket_place.bucket}/{bucket_place.prefix}"
    contexts = open_contexts(Settings(objects=objects, s3_endpoint=s3_url))
    stored(bucket_place, SMALL)
    assert contexts.exists(KEY)


@pytest.mark.parametrize(
    ("objects", "endpoint", "name"),
    [
        ("/var/objects", "", "KILN_OBJECTS"),
        ("s3:///prefix", "", "KILN_OBJECTS"),
        ("s3://b", "host:1", "KILN_S3_ENDPOINT"),
    ],
)
def test_wrong_settings(objects: str, endpoint: str, name: str):
    """A setting that cannot be meant is refused by its name."""
    with pytest.raises(SettingsError, match=f"^{name}: must be "):
        open_store(Settings(objects=objects, s3_endpoint=endpoint))
