"""KILN_HOME: its folders, its lock, its two keys, and the catalog that it belongs to."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cli.places import api_key_file, lock_file, secret_key_file
from kiln.catalog import keys
from kiln.catalog.session import Catalog
from kiln.errors import KilnError
from kiln.sealing import Sealer
from kiln.settings import Settings, SettingsError

PRIVATE_FOLDER = 0o700
FOLDERS = ("logs",)
FIRST_KEY_NAME = "first start"


class HomeInUseError(KilnError):
    """Another stack runs on this home."""


@dataclass(frozen=True)
class FirstKey:
    """The admin key that the home keeps. `made` says that it is new: nobody has seen it yet."""

    file: Path
    plain: str
    made: bool


def prepare_home(settings: Settings) -> None:
    """Makes the home and its folders, for this user only. Raises SettingsError."""
    for folder in (settings.home_dir, *(settings.home_dir / name for name in FOLDERS)):
        try:
            folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"KILN_HOME: cannot make {folder}: {error.strerror}") from None


@contextmanager
def locked_home(settings: Settings) -> Iterator[None]:
    """Holds the home for one stack. Raises HomeInUseError if another one runs on it."""
    with (lock_file(settings)).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(settings) from None
        yield


def check_home_is_free(settings: Settings) -> None:
    """Raises HomeInUseError if another stack runs on this home; makes nothing."""
    if (lock_file(settings)).exists():
        with locked_home(settings):
            pass


def secret_key(settings: Settings) -> str:
    """KILN_SECRET_KEY, or the home's own key, which the first start makes. Raises SealError if it is malformed."""
    file = secret_key_file(settings)
    if not settings.secret_key and not file.exists():
        write_private(file, Sealer.new_key() + "\n", replace=False)
    key = settings.secret_key or file.read_text().strip()
    Sealer(key)
    return key


def first_key(settings: Settings, catalog: Catalog) -> FirstKey:
    """The admin key of the organization `default`, made with it unless the home holds one that the catalog knows."""
    file = api_key_file(settings)
    if file.exists():
        plain = file.read_text().strip()
        with catalog.read() as session:
            if keys.identify(session, plain):
                return FirstKey(file, plain, made=False)
    with catalog.transaction() as tx:
        organization = keys.ensure_organization(tx, keys.DEFAULT_ORGANIZATION)
        _, plain = keys.create(tx, organization, FIRST_KEY_NAME, ["admin"])
        # Before the commit: a key that nobody could read would be of no use.
        write_private(file, plain + "\n")
    return FirstKey(file, plain, made=True)


@contextmanager
def open_catalog(settings: Settings) -> Iterator[Catalog]:
    """The catalog with its tables up to date. Raises KilnError."""
    prepare_home(settings)
    catalog = Catalog(settings.catalog_dsn)
    try:
        catalog.migrate()
        yield catalog
    finally:
        catalog.close()


def write_private(file: Path, text: str, *, replace: bool = True) -> None:
    """Writes a file of mode 0600, whole or not at all; without `replace`, the first of two writers' stays.

    Raises SettingsError.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
        if replace:
            Path(name).replace(file)
        else:
            _link(Path(name), file)
    except OSError as error:
        raise SettingsError(f"KILN_HOME: cannot write {file}: {error.strerror}") from None


def _link(written: Path, file: Path) -> None:
    try:
        file.hardlink_to(written)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        written.replace(file)
        return
    written.unlink()


def _in_use(settings: Settings) -> HomeInUseError:
    return HomeInUseError(f"another stack runs on {settings.home_dir}: stop it, or set KILN_HOME")
