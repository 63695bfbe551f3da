"""`kiln runners`: what pods run on, in the catalog itself; no server needs to run."""

from collections.abc import Iterable, Mapping
from typing import Any

from cli.home import open_catalog
from cli.keys import check_catalog, check_organization, owner, time_text
from cli.render import plain, print_rows
from kiln.catalog import runners
from kiln.catalog.runners import KnownRunner
from kiln.errors import KilnError
from kiln.settings import Settings


class RunnerCommandError(KilnError):
    """There is no such runner."""


def create_runner(settings: Settings, name: str, organization: str) -> dict[str, Any]:
    """Makes a runner and returns it with `token`, which nobody can read again. Raises KilnError.

    The organization is made if it is not there.
    """
    check_organization(organization)
    with owner(settings, organization) as (tx, found):
        row, token = runners.create(tx, found, name)
        known = runners.find(tx, found.id, row.id)
        if known is None:
            raise TypeError("a runner that was just made is not there")
        return {**_view(known, organization), "token": token}


def list_runners(settings: Settings) -> list[dict[str, Any]]:
    """Every runner, oldest first, without the tokens. Raises KilnError."""
    check_catalog(settings)
    with open_catalog(settings) as catalog, catalog.read() as session:
        return [_view(known, slug) for known, slug in runners.listing(session)]


def disable_runner(settings: Settings, runner_id: str) -> dict[str, Any]:
    """Shuts a runner's token for good. Raises KilnError, also if there is no such runner."""
    check_catalog(settings)
    with open_catalog(settings) as catalog, catalog.transaction() as tx:
        if not runners.disable(tx, runner_id):
            raise RunnerCommandError(f"no runner has the id {runner_id}: kiln runners list shows them")
        return next(_view(known, slug) for known, slug in runners.listing(tx) if known.runner.id == runner_id)


def print_runners(found: Iterable[Mapping[str, Any]]) -> None:
    rows = [
        (
            str(runner["id"]),
            plain(runner["name"]),
            str(runner["organization"]),
            f"{runner['hint']}…",
            str(runner["status"]),
            f"{runner['current_pods']}/{runner['max_concurrent_pods']}",
            ", ".join(runner["available_agents"]) or "none",
            str(runner["state"]),
            str(runner["seen_at"] or "never"),
        )
        for runner in found
    ]
    titles = ("ID", "NAME", "ORGANIZATION", "TOKEN", "STATUS", "PODS", "AGENTS", "STATE", "SEEN")
    print_rows(titles, rows, "No runners.")


def _view(known: KnownRunner, organization: str) -> dict[str, Any]:
    row = known.runner
    return {
        "id": row.id,
        "name": row.name,
        "organization": organization,
        "hint": row.hint,
        "status": known.status.value,
        "current_pods": known.current_pods,
        "max_concurrent_pods": row.max_concurrent_pods,
        "available_agents": row.available_agents,
        "allows_custom_commands": row.allows_custom_commands,
        "state": "usable" if row.disabled_at is None else "disabled",
        "created_at": time_text(row.created_at),
        "seen_at": time_text(row.seen_at),
        "disabled_at": time_text(row.disabled_at),
    }
