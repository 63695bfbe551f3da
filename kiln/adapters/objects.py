"""The object store for build contexts: a directory, in the embedded stack."""

from pathlib import Path

from kiln.errors import UnavailableError


class DirectoryStore:
    """Objects as files below one directory that only Kiln's user reads."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def ping(self) -> None:
        """Raises UnavailableError unless the directory can be written."""
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self._root / ".ping"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise UnavailableError(f"the object store cannot be written: {error.strerror}") from error
