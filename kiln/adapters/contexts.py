"""Build contexts in the object store, each checked as it comes in or before it is built from."""

import hashlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from kiln.adapters.archive import ArchiveCheck, ArchiveLimits
from kiln.adapters.objects import ObjectStore, ObjectWriter, new_file, open_store
from kiln.errors import ContextMissingError
from kiln.ports import ContextFacts
from kiln.settings import Settings


def open_contexts(settings: Settings) -> "StoredContexts":
    """The build contexts of these settings. Raises SettingsError; nothing is asked of the store yet."""
    limits = ArchiveLimits(
        archive_bytes=settings.max_context_bytes,
        unpacked_bytes=settings.max_unpacked_bytes,
        members=settings.max_context_members,
    )
    return StoredContexts(open_store(settings), limits)


class StoredContexts:
    """Build contexts, by key. Any number of threads may share it; any call may raise UnavailableError."""

    def __init__(self, store: ObjectStore, limits: ArchiveLimits) -> None:
        self._store = store
        self._limits = limits

    def ping(self) -> None:
        """Raises UnavailableError unless the object store takes objects."""
        self._store.ping()

    def receive(self, key: str, dockerfile: str) -> "CheckedUpload":
        """Begins an upload. Raises ContextInvalidError if `dockerfile` is no path inside an archive."""
        inspection = _Inspection(self._limits, dockerfile)
        return CheckedUpload(inspection, self._store.begin(key))

    def check(self, key: str, dockerfile: str) -> ContextFacts:
        """Streams an object back and checks it. Raises ContextMissingError, ContextInvalidError, ContextTooLargeError."""
        inspection = _Inspection(self._limits, dockerfile)
        size_bytes = self._store.size_bytes(key)
        if size_bytes is None:
            raise ContextMissingError("the build context is not in the object store")
        self._limits.check_archive(size_bytes)
        for chunk in self._store.read(key):
            inspection.feed(chunk)
        return inspection.finish()

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        return self._store.size_bytes(key) is not None

    def fetch(self, key: str, path: Path) -> str:
        """Writes the object to a new file (mode 0600), which a failure leaves none of.

        Returns its SHA-256 in hex: whoever has the URL of an upload may have replaced what was checked.
        Raises ContextMissingError, and OSError if the file cannot be written.
        """
        digest = hashlib.sha256()
        with new_file(path) as file:
            try:
                for chunk in self._store.read(key):
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return digest.hexdigest()

    def delete(self, key: str) -> None:
        """Removes the object if it is there."""
        self._store.delete(key)

    def upload_url(self, key: str, expires: timedelta) -> str | None:
        """A URL that takes the object by PUT, without credentials (S3); None where uploads come through Kiln's API."""
        return self._store.upload_url(key, expires)

    def stale(self, older_than: timedelta) -> Iterator[str]:
        """The keys of objects that have been there so long."""
        return self._store.stale(older_than)

    def sweep_unfinished(self, older_than: timedelta) -> None:
        """Removes what uploads left that never ended: a killed server's. Longer than the longest upload, or it ends that."""
        self._store.sweep_unfinished(older_than)


class CheckedUpload:
    """An archive on its way into the store. Every byte is judged before it is stored."""

    def __init__(self, inspection: "_Inspection", writer: ObjectWriter) -> None:
        self._inspection = inspection
        self._writer = writer

    def write(self, data: bytes) -> None:
        """Takes more of the archive. Raises ContextInvalidError, ContextTooLargeError as soon as it is known,
        UnavailableError; after any of them only `abort` remains."""
        self._inspection.feed(data)
        self._writer.write(data)

    def commit(self) -> ContextFacts:
        """Ends the archive and makes it the object, in the place of one that was there. Raises as `write`."""
        facts = self._inspection.finish()
        self._writer.commit()
        return facts

    def abort(self) -> None:
        """Leaves nothing. Harmless after `commit`, and when repeated."""
        self._writer.abort()


class _Inspection:
    """Everything that is found out about an archive while it goes by."""

    def __init__(self, limits: ArchiveLimits, dockerfile: str) -> None:
        self._check = ArchiveCheck(limits, dockerfile)
        self._digest = hashlib.sha256()
        self._size_bytes = 0

    def feed(self, data: bytes) -> None:
        self._check.feed(data)
        self._digest.update(data)
        self._size_bytes += len(data)

    def finish(self) -> ContextFacts:
        members, unpacked_bytes = self._check.finish()
        return ContextFacts(
            size_bytes=self._size_bytes,
            sha256=self._digest.hexdigest(),
            members=members,
            unpacked_bytes=unpacked_bytes,
        )
