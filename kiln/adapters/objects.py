"""The object store for build contexts: a directory in the embedded stack, or a bucket (objects_s3)."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Final, Protocol
from urllib.parse import urlsplit

from kiln.adapters.objects_s3 import S3Store
from kiln.errors import ContextMissingError, UnavailableError
from kiln.settings import Settings, SettingsError

READ_BYTES: Final = 1024**2
_PART_SUFFIX: Final = ".part"


class ObjectWriter(Protocol):
    """An object that is being written. Nobody sees it before `commit`."""

    def write(self, data: bytes) -> None:
        """Takes more of the object. Raises UnavailableError, after which only `abort` remains."""
        ...

    def commit(self) -> None:
        """Makes it the object, at once and for good, in the place of one that was there. Raises UnavailableError."""
        ...

    def abort(self) -> None:
        """Leaves nothing, or what `sweep_unfinished` finds. Harmless after `commit`, and when repeated."""
        ...


class ObjectStore(Protocol):
    """Objects of any length by key, a relative path. Calls block; any may raise UnavailableError."""

    def ping(self) -> None:
        """Raises UnavailableError unless the store answers and takes objects."""
        ...

    def begin(self, key: str) -> ObjectWriter:
        """Begins an object."""
        ...

    def read(self, key: str) -> Iterator[bytes]:
        """The object, in chunks. Raises ContextMissingError at the first one."""
        ...

    def size_bytes(self, key: str) -> int | None:
        """How long the object is; None if there is none."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object if it is there."""
        ...

    def stale(self, older_than: timedelta) -> Iterator[str]:
        """The keys of the objects that were written so long ago."""
        ...

    def sweep_unfinished(self, older_than: timedelta) -> None:
        """Removes what writers left that neither committed nor aborted. Those that may still write are younger."""
        ...

    def upload_url(self, key: str, expires: timedelta) -> str | None:
        """A URL that takes the object by PUT without credentials; None if the store has none to give."""
        ...


def open_store(settings: Settings) -> ObjectStore:
    """The store that KILN_OBJECTS names: `s3://BUCKET[/PREFIX]`, or nothing for a directory in KILN_HOME.

    Raises SettingsError. Nothing is asked of the store yet.
    """
    if not settings.objects:
        return DirectoryStore(settings.home_dir / "objects")
    url = urlsplit(settings.objects)
    if url.scheme != "s3" or not url.netloc:
        raise SettingsError("KILN_OBJECTS: must be written s3://BUCKET or s3://BUCKET/PREFIX")
    endpoint = settings.s3_endpoint
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise SettingsError("KILN_S3_ENDPOINT: must be a URL of http or https")
    region = settings.default_region
    return S3Store(url.netloc, url.path, endpoint_url=endpoint or None, default_region=region)


class DirectoryStore:
    """Objects as files below one directory that only Kiln's user reads."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def ping(self) -> None:
        """Raises UnavailableError unless the directory can be written."""
        with _translated("written"):
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self._root / ".ping"
            probe.touch()
            probe.unlink(missing_ok=True)

    def begin(self, key: str) -> "FileWriter":
        """Begins an object, in a file beside its own."""
        path = self._path(key)
        with _translated("written"):
            _make_folder(path.parent)
            return FileWriter(path)

    def read(self, key: str) -> Iterator[bytes]:
        """The object, in chunks. Raises ContextMissingError, UnavailableError."""
        path = self._path(key)
        with _translated("read"):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                raise ContextMissingError("the build context is not in the object store") from None
            with file:
                while chunk := file.read(READ_BYTES):
                    yield chunk

    def size_bytes(self, key: str) -> int | None:
        """How long the object is; None if there is none. Raises UnavailableError."""
        with _translated("read"), suppress(FileNotFoundError):
            return self._path(key).stat().st_size
        return None

    def delete(self, key: str) -> None:
        """Removes the object if it is there. Raises UnavailableError."""
        with _translated("written"):
            self._path(key).unlink(missing_ok=True)

    def stale(self, older_than: timedelta) -> Iterator[str]:
        """The keys of the objects that were written so long ago. Raises UnavailableError."""
        for path in self._files(older_than):
            if path.suffix != _PART_SUFFIX:
                yield path.relative_to(self._root).as_posix()

    def sweep_unfinished(self, older_than: timedelta) -> None:
        """Removes the files of writers that ended neither way, and were not written to for so long."""
        for path in self._files(older_than):
            if path.suffix == _PART_SUFFIX:
                with _translated("written"):
                    path.unlink(missing_ok=True)

    def upload_url(self, key: str, expires: timedelta) -> None:  # noqa: ARG002 - the store's protocol
        """None: uploads come through Kiln's API."""
        return

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(not part or part.startswith(".") for part in parts) or key.endswith(_PART_SUFFIX):
            raise ValueError(f"{key} is no key of an object")
        return self._root.joinpath(*parts)

    def _files(self, age: timedelta) -> Iterator[Path]:
        latest = time.time() - age.total_seconds()
        with _translated("read"):
            for folder, _, names in os.walk(self._root):
                for path in (Path(folder, name) for name in names if not name.startswith(".")):
                    # Gone meanwhile, perhaps.
                    with suppress(FileNotFoundError):
                        if path.stat().st_mtime <= latest:
                            yield path


class FileWriter:
    """An object of a DirectoryStore that is being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_PART_SUFFIX}")
        self._file = new_file(self._part)

    def write(self, data: bytes) -> None:
        """Takes more of the object. Raises UnavailableError."""
        with _translated("written"):
            self._file.write(data)

    def commit(self) -> None:
        """Makes it the object: a crash of the machine does not undo it. Raises UnavailableError."""
        with _translated("written"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.replace(self._path)
            _sync_folder(self._path.parent)

    def abort(self) -> None:
        """Leaves nothing. Harmless after `commit`, and when repeated."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._part.unlink(missing_ok=True)


def new_file(path: Path) -> BinaryIO:
    """A file that was not there (mode 0600), to write to. Raises OSError."""
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode=0o600), "wb")


def _make_folder(folder: Path) -> None:
    """Makes a directory (mode 0700), and those above it, so that a crash of the machine leaves them."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _translated(done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"the object store cannot be {done}: {error.strerror}") from error
