"""`kiln repositories`: the git repositories that pods may work on, in the catalog itself; no server needs to run."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cli.home import open_catalog, secret_key
from cli.keys import check_catalog, check_organization, check_secret_key, owner, time_text
from cli.render import plain, print_rows
from kiln.catalog import repositories
from kiln.catalog.pod_tables import Repository
from kiln.errors import KilnError
from kiln.sealing import Sealer
from kiln.settings import Settings

STDIN = "-"
CREDENTIAL_BYTES = 64 * 1024


class RepositoryCommandError(KilnError):
    """A credential cannot be read, or is none."""


def add_repository(  # noqa: PLR0913, PLR0917  what a repository is made of
    settings: Settings, name: str, url: str, branch: str, credential_file: str, organization: str
) -> dict[str, Any]:
    """Registers a repository. Raises KilnError; then nothing is made.

    `credential_file` holds what opens it, "-" is standard input, "" none. It is sealed with KILN_SECRET_KEY or the home's
    own key, which is made if there is none yet. The organization is made if it is not there.
    """
    check_organization(organization)
    credential = _read_credential(credential_file) if credential_file else ""
    if credential:
        check_secret_key(settings, "the credential")
    with owner(settings, organization) as (tx, found):
        sealed = Sealer(secret_key(settings)).seal_text(credential) if credential else None
        return _view(repositories.add(tx, found, name, url, branch, sealed), organization)


def list_repositories(settings: Settings) -> list[dict[str, Any]]:
    """Every repository of every organization, by id, without credentials. Raises KilnError."""
    check_catalog(settings)
    with open_catalog(settings) as catalog, catalog.read() as session:
        return [_view(row, slug) for row, slug in repositories.listing(session)]


def remove_repository(settings: Settings, repository_id: int) -> None:
    """Forgets a repository that no open pod works on. Raises KilnError."""
    check_catalog(settings)
    with open_catalog(settings) as catalog, catalog.transaction() as tx:
        repositories.remove(tx, repository_id)


def print_repositories(found: Iterable[Mapping[str, Any]]) -> None:
    rows = [
        (
            str(repository["id"]),
            plain(repository["name"]),
            str(repository["organization"]),
            plain(repository["url"]),
            plain(repository["default_branch"]),
            "yes" if repository["has_credential"] else "no",
        )
        for repository in found
    ]
    print_rows(("ID", "NAME", "ORGANIZATION", "URL", "BRANCH", "CREDENTIAL"), rows, "No repositories.")


def _read_credential(place: str) -> str:
    """A file's text without the line's end. Its content stands in no message."""
    try:
        if place == STDIN:
            data = sys.stdin.buffer.read(CREDENTIAL_BYTES + 1)
        else:
            with Path(place).open("rb") as file:
                data = file.read(CREDENTIAL_BYTES + 1)
        text = data.decode().rstrip("\r\n")
    except OSError as error:
        raise RepositoryCommandError(f"--credential-file {place}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RepositoryCommandError(f"--credential-file {place}: is no text in UTF-8") from None
    if not text.strip() or len(data) > CREDENTIAL_BYTES:
        raise RepositoryCommandError(
            f"--credential-file {place}: must hold a credential, at most {CREDENTIAL_BYTES} bytes"
        )
    return text


def _view(row: Repository, organization: str) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "organization": organization,
        "url": row.url,
        "default_branch": row.default_branch,
        "has_credential": row.sealed_credential is not None,
        "created_at": time_text(row.created_at),
    }
