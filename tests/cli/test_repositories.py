"""`kiln repositories`, in the catalog of a home of the test's own."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.home import secret_key
from cli.keys import KeyCommandError
from cli.repositories import RepositoryCommandError, add_repository, list_repositories, remove_repository
from kiln.catalog import keys, repositories
from kiln.catalog.session import Catalog
from kiln.errors import InvalidRequestError, NotFoundError
from kiln.models import PodSpec
from kiln.sealing import Sealer
from kiln.settings import Settings
from support.pod_rows import add_pod, add_runner, terminate
from support.stack import run_kiln

URL = "https://git.example.com/team/project.git"
CREDENTIAL = "not-for-anybody"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def credential_file(tmp_path: Path) -> str:
    file = tmp_path / "credential"
    file.write_text(CREDENTIAL + "\n")
    return str(file)


@contextmanager
def opened(settings: Settings) -> Iterator[Catalog]:
    """The home's catalog."""
    catalog = Catalog(settings.catalog_dsn)
    try:
        yield catalog
    finally:
        catalog.close()


def sealed_credential(settings: Settings) -> bytes | None:
    """What the catalog keeps of the only repository's credential."""
    with opened(settings) as catalog, catalog.read() as session:
        ((row, _),) = repositories.listing(session)
        return row.sealed_credential


def test_a_repository_is_added_listed_and_removed(tmp_path: Path, settings: Settings, credential_file: str) -> None:
    """Its credential comes from a file, is sealed, and stands in no output."""
    home = tmp_path / "home"
    added = run_kiln(home, "repositories", "add", "project", URL, "--credential-file", credential_file)
    assert (added.returncode, added.stdout) == (0, "1\n"), added.stderr
    table = run_kiln(home, "repositories", "list").stdout
    assert re.search(rf"1 +project +default +{re.escape(URL)} +main +yes", table)
    sealed = sealed_credential(settings)
    assert sealed is not None
    assert CREDENTIAL not in f"{added.stdout}{added.stderr}{table}{sealed!r}"
    assert Sealer(secret_key(settings)).open_text(sealed) == CREDENTIAL
    assert run_kiln(home, "repositories", "remove", "1").stdout == "repository 1 is forgotten\n"
    assert list_repositories(settings) == []


def test_a_credential_may_come_from_standard_input(tmp_path: Path, settings: Settings) -> None:
    """So it need not stand in a file."""
    arguments = ("repositories", "add", "project", URL, "--credential-file", "-", "--json")
    ran = run_kiln(tmp_path / "home", *arguments, given=CREDENTIAL)
    assert ran.returncode == 0, ran.stderr
    assert CREDENTIAL not in ran.stdout + ran.stderr
    shown = json.loads(ran.stdout)
    assert (shown["id"], shown["default_branch"], shown["has_credential"]) == (1, "main", True)
    sealed = sealed_credential(settings)
    assert sealed is not None
    assert Sealer(secret_key(settings)).open_text(sealed) == CREDENTIAL


def test_a_public_repository_needs_no_credential(settings: Settings) -> None:
    """The home gets no key of its own for it."""
    added = add_repository(settings, "project", URL, "trunk", "", "research")
    assert (added["organization"], added["default_branch"], added["has_credential"]) == ("research", "trunk", False)
    assert list_repositories(settings) == [added]
    assert not (settings.home_dir / "secret-key").exists()


def test_a_url_with_a_password_is_refused(settings: Settings) -> None:
    """The line does not repeat it."""
    with pytest.raises(InvalidRequestError, match="url: must hold no user or password") as caught:
        add_repository(settings, "project", f"https://me:{CREDENTIAL}@git.example.com/p.git", "main", "", "default")
    assert CREDENTIAL not in str(caught.value)
    assert list_repositories(settings) == []


def test_a_repository_that_an_open_pod_works_on_stays(settings: Settings) -> None:
    """The pod is named; once it has ended, the repository can go."""
    added = add_repository(settings, "project", URL, "main", "", keys.DEFAULT_ORGANIZATION)
    with opened(settings) as catalog:
        with catalog.transaction() as tx:
            organization_id = keys.ensure_organization(tx, keys.DEFAULT_ORGANIZATION).id
        runner = add_runner(catalog, organization_id)
        pod = add_pod(catalog, organization_id, runner.runner_id, spec=PodSpec(repository_id=added["id"]))
        refused = run_kiln(settings.home_dir, "repositories", "remove", str(added["id"]))
        terminate(catalog, pod)
    assert refused.returncode == 1
    assert refused.stderr == f"kiln: repository 1 is worked on by {pod.key}: terminate it first\n"
    remove_repository(settings, added["id"])
    assert list_repositories(settings) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory"),
        (b"\n", "must hold a credential, at most 65536 bytes"),
        (b"x" * 65537, "must hold a credential, at most 65536 bytes"),
        (b"\xff", "is no text in UTF-8"),
    ],
)
def test_a_credential_that_is_none_makes_nothing(
    tmp_path: Path, settings: Settings, content: bytes | None, said: str
) -> None:
    """The option and the file are named."""
    file = tmp_path / "credential"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RepositoryCommandError, match=re.escape(f"--credential-file {file}: {said}")):
        add_repository(settings, "project", URL, "main", str(file), "default")
    assert not settings.home_dir.exists()


def test_another_servers_catalog_needs_its_secret_key(tmp_path: Path, credential_file: str) -> None:
    """A credential that is sealed with a new home's own key could not be read there; nothing is made."""
    settings = Settings(home=tmp_path / "home", catalog_url=f"sqlite:///{tmp_path / 'elsewhere.db'}")
    with pytest.raises(KeyCommandError, match="KILN_SECRET_KEY: must be set to the servers' own: the credential"):
        add_repository(settings, "project", URL, "main", credential_file, "default")
    assert not settings.home_dir.exists()


def test_removing_an_unknown_repository_fails(settings: Settings) -> None:
    """The id that nothing has is in the line."""
    add_repository(settings, "project", URL, "main", "", "default")
    with pytest.raises(NotFoundError, match="there is no repository 7"):
        remove_repository(settings, 7)
