"""`kiln runners`: rows and tokens, in the catalog of a home of the test's own."""

import json
import re
from pathlib import Path

import pytest

from cli.keys import KeyCommandError
from cli.runners import RunnerCommandError, create_runner, disable_runner, list_runners
from kiln.catalog import keys, runners
from kiln.catalog.session import Catalog
from kiln.errors import InvalidRequestError
from kiln.ports.pods import RunnerProcess
from kiln.settings import Settings
from support.pod_rows import register
from support.stack import run_kiln


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def registered(settings: Settings, runner_id: str) -> RunnerProcess:
    """The runner's process, as the API writes it down."""
    catalog = Catalog(settings.catalog_dsn)
    try:
        return register(catalog, runner_id)
    finally:
        catalog.close()


def owner_of(settings: Settings, token: str) -> str | None:
    """The id of the runner that a token opens."""
    catalog = Catalog(settings.catalog_dsn)
    try:
        with catalog.read() as session:
            row = runners.identify(session, token)
            return row.id if row else None
    finally:
        catalog.close()


def test_a_runner_is_made_listed_and_disabled(tmp_path: Path, settings: Settings) -> None:
    """The one line on standard output is the token; afterwards nobody shows it again."""
    home = tmp_path / "home"
    made = run_kiln(home, "runners", "create", "desk")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    assert re.fullmatch(r"krt_[0-9a-f]{80}", token)
    assert token not in made.stderr

    table = run_kiln(home, "runners", "list").stdout
    assert re.search(r"desk +default +krt_\w{8}… +offline +0/0 +none +usable +never", table)
    assert token not in table
    runner_id = owner_of(settings, token)
    assert runner_id is not None
    disabled = run_kiln(home, "runners", "disable", runner_id)
    assert disabled.stdout == f"{runner_id} is disabled\n"
    assert owner_of(settings, token) is None


def test_json_of_a_new_runner_holds_its_token_once(tmp_path: Path, settings: Settings) -> None:
    """`--json` prints one object with the token, its id and its organization; the list has no token."""
    made = json.loads(run_kiln(tmp_path / "home", "runners", "create", "desk", "--org", "research", "--json").stdout)
    assert (made["name"], made["organization"], made["state"], made["seen_at"]) == ("desk", "research", "usable", None)
    assert owner_of(settings, made["token"]) == made["id"]
    (listed,) = json.loads(run_kiln(tmp_path / "home", "runners", "list", "--json").stdout)["runners"]
    assert listed == {name: value for name, value in made.items() if name != "token"}


def test_what_a_runner_said_of_itself_is_listed(settings: Settings) -> None:
    """Its places, its agents and when it was last seen."""
    made = create_runner(settings, "desk", "default")
    registered(settings, made["id"])
    (shown,) = list_runners(settings)
    assert (shown["status"], shown["current_pods"], shown["max_concurrent_pods"]) == ("online", 0, 2)
    assert (shown["available_agents"], shown["allows_custom_commands"]) == (["claude-code"], True)
    assert shown["seen_at"] is not None


def test_a_disabled_runner_is_offline_at_once(settings: Settings) -> None:
    """Its row stays, and so does its name."""
    made = create_runner(settings, "desk", "default")
    registered(settings, made["id"])
    assert disable_runner(settings, made["id"])["state"] == "disabled"
    assert [(row["status"], row["state"]) for row in list_runners(settings)] == [("offline", "disabled")]
    with pytest.raises(InvalidRequestError, match="has a runner desk already"):
        create_runner(settings, "desk", "default")


def test_a_wrong_organization_makes_nothing(settings: Settings) -> None:
    """The option is named, and no home is made."""
    with pytest.raises(KeyCommandError, match="--org No Body: must be lower-case letters"):
        create_runner(settings, "desk", "No Body")
    assert not settings.home_dir.exists()


def test_disabling_an_unknown_runner_fails(settings: Settings) -> None:
    """The id that nobody has is in the line; no name is taken for an id."""
    create_runner(settings, "desk", keys.DEFAULT_ORGANIZATION)
    with pytest.raises(RunnerCommandError, match="no runner has the id desk: kiln runners list shows them"):
        disable_runner(settings, "desk")


def test_a_mistyped_home_is_no_empty_catalog(settings: Settings) -> None:
    """Reading makes no home."""
    with pytest.raises(KeyCommandError, match="there is no catalog in"):
        list_runners(settings)
    assert not settings.home_dir.exists()
