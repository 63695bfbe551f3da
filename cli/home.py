"""KILN_HOME: its folders, its lock, its keys, its runner, and the catalog that it belongs to."""

import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cli.places import api_key_file, lock_file, runner_token_file, secret_key_file
from kiln.catalog import keys, runners
from kiln.catalog.session import Catalog, Transaction
from kiln.catalog.tables import Organization
from kiln.errors import KilnError
from kiln.sealing import Sealer
from kiln.settings import Settings, SettingsError

PRIVATE_FOLDER = 0o700
FOLDERS = ("logs",)
FIRST_KEY_NAME = "first start"
RUNNER_NAME = "local"


class HomeInUseError(KilnError):
    """Another stack runs on this home."""


@dataclass(frozen=True)
class FirstKey:
    """The admin key that the home keeps. `made` says that it is new: nobody has seen it yet."""

    file: Path
    plain: str
    made: bool


@dataclass(frozen=True)
class LocalRunner:
    """The stack's own runner, whose token the home keeps."""

    runner_id: str
    organization_id: str
    name: str
    token: str = field(repr=False)


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


def local_runner(settings: Settings, catalog: Catalog) -> LocalRunner:
    """The runner whose token the home holds, made in the organization `default` if the catalog knows none such: it is
    named `local`, or `local-2` where that name is taken."""
    file = runner_token_file(settings)
    if file.exists():
        token = file.read_text().strip()
        with catalog.read() as session:
            known = runners.identify(session, token)
            if known is not None:
                return LocalRunner(known.id, known.organization_id, known.name, token)
    with catalog.transaction() as tx:
        organization = keys.ensure_organization(tx, keys.DEFAULT_ORGANIZATION)
        row, token = runners.create(tx, organization, _free_name(tx, organization))
        # Before the commit, as the first key.
        write_private(file, token + "\n")
        return LocalRunner(row.id, organization.id, row.name, token)


def _free_name(tx: Transaction, organization: Organization) -> str:
    """Runners that were disabled keep their names."""
    taken = {known.runner.name for known, slug in runners.listing(tx) if slug == organization.slug}
    names = (RUNNER_NAME if number == 1 else f"{RUNNER_NAME}-{number}" for number in itertools.count(1))
    return next(name for name in names if name not in taken)


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


def leave_no_folder(settings: Settings) -> None:
    """Removes what a stack has outside of its home, unless something is left in it: the folder of runs where the home's
    path is long, and root's folder of pods. One that KILN_RUNNER_DIR names is the operator's."""
    if not settings.runs_dir.is_relative_to(settings.home_dir):
        _remove_empty(settings.runs_dir)
    pods = settings.pods_dir
    if settings.runner_dir is None and not pods.is_relative_to(settings.home_dir):
        contents = (pods / "pods", pods / "repositories")
        _remove_empty(*contents)
        # What else is there are marks and locks of the runner's, which has ended.
        if not any(folder.exists() for folder in contents):
            shutil.rmtree(pods, ignore_errors=True)
        _remove_empty(pods.parent)


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


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
