"""`kiln keys`, as processes on a home of the test's own."""

import json
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cli.home import secret_key
from cli.keys import KeyCommandError, create_hmac_key, create_key, disable_key, list_keys
from kiln.catalog import keys
from kiln.catalog.session import Catalog
from kiln.sealing import Sealer
from kiln.settings import Settings
from support.parallel import in_parallel
from support.stack import run_kiln


@contextmanager
def opened(home: Path) -> Iterator[Catalog]:
    """The home's catalog."""
    catalog = Catalog(f"sqlite:///{home / 'catalog.db'}")
    try:
        yield catalog
    finally:
        catalog.close()


def test_a_key_is_made_listed_and_disabled(tmp_path: Path) -> None:
    """The one line on standard output is the key; afterwards nobody shows it again."""
    home = tmp_path / "home"
    made = run_kiln(home, "keys", "create", "--name", "ci", "--scope", "builds:read", "--expires-in", "30d")
    assert made.returncode == 0, made.stderr
    plain = made.stdout.strip()
    assert re.fullmatch(r"amk_[0-9a-f]{80}", plain)

    listed = run_kiln(home, "keys", "list", "--json")
    (key,) = json.loads(listed.stdout)["keys"]
    assert (key["name"], key["organization"], key["scopes"], key["state"]) == (
        "ci",
        "default",
        ["builds:read"],
        "usable",
    )
    assert plain.startswith(key["hint"])
    assert plain not in listed.stdout
    lifetime = datetime.fromisoformat(key["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=29) < lifetime <= timedelta(days=30)

    disabled = run_kiln(home, "keys", "disable", key["id"], "--json")
    assert json.loads(disabled.stdout)["state"] == "disabled"
    table = run_kiln(home, "keys", "list").stdout
    assert key["id"] in table
    assert "plain" in table
    assert "disabled" in table


def test_json_of_a_new_key_holds_everything_once(tmp_path: Path) -> None:
    """`--json` prints one object with the key, its id, its organization and its scopes."""
    home = tmp_path / "home"
    made = json.loads(run_kiln(home, "keys", "create", "--org", "research", "--scope", "admin", "--json").stdout)
    catalog = Catalog(f"sqlite:///{home / 'catalog.db'}")
    with catalog.read() as session:
        known = keys.identify(session, made["key"])
    catalog.close()
    assert known is not None
    assert known.usable
    assert (known.identity.key_id, known.identity.organization_slug) == (made["id"], "research")
    assert made["scopes"] == ["admin"]
    assert made["expires_at"] is None


def test_an_hmac_key_is_made_before_the_first_start(tmp_path: Path) -> None:
    """Its id and its secret are two lines on standard output, once; the home's new key opens the secret."""
    home = tmp_path / "home"
    made = run_kiln(home, "keys", "create", "--hmac", "--name", "desk")
    assert made.returncode == 0, made.stderr
    key, secret = made.stdout.splitlines()
    assert re.fullmatch(r"hk_[0-9a-f]{32} [0-9a-f]{64}", f"{key} {secret}")
    assert secret not in made.stderr
    assert stat.S_IMODE((home / "secret-key").stat().st_mode) == 0o600
    with opened(home) as catalog, catalog.read() as session:
        known = keys.find_hmac(session, key)
    assert known is not None
    assert Sealer(secret_key(Settings(home=home))).open_text(known.sealed_secret) == secret

    (row,) = list_keys(Settings(home=home))
    assert (row["kind"], row["name"], row["hint"], row["scopes"]) == (
        "hmac",
        "desk",
        key[:12],
        ["organization:read", "organization:write"],
    )
    assert secret not in str(row)


def test_an_hmac_key_is_disabled_as_any(tmp_path: Path) -> None:
    """By its row's id, which `--json` prints beside the key and the secret."""
    home = tmp_path / "home"
    made = json.loads(run_kiln(home, "keys", "create", "--hmac", "--scope", "admin", "--json").stdout)
    assert (made["kind"], len(made["key"]), len(made["secret"]), made["scopes"]) == ("hmac", 35, 64, ["admin"])
    assert disable_key(Settings(home=home), made["id"])["state"] == "disabled"
    with opened(home) as catalog, catalog.read() as session:
        known = keys.find_hmac(session, made["key"])
    assert known is not None
    assert not known.usable


def test_a_given_secret_key_seals(tmp_path: Path) -> None:
    """With KILN_SECRET_KEY set, the home gets no key of its own."""
    settings = Settings(home=tmp_path / "home", secret_key=Sealer.new_key())
    made = create_hmac_key(settings, "", "default", [], "")
    with opened(settings.home) as catalog, catalog.read() as session:
        known = keys.find_hmac(session, made["key"])
    assert known is not None
    assert Sealer(settings.secret_key).open_text(known.sealed_secret) == made["secret"]
    assert not (settings.home / "secret-key").exists()


def test_another_servers_catalog_needs_its_secret_key(tmp_path: Path) -> None:
    """A key that is sealed with a new home's own key would open nothing there; nothing is made."""
    settings = Settings(home=tmp_path / "home", catalog_url=f"sqlite:///{tmp_path / 'elsewhere.db'}")
    with pytest.raises(KeyCommandError, match="KILN_SECRET_KEY: must be set"):
        create_hmac_key(settings, "", "default", [], "")
    assert list(tmp_path.iterdir()) == []


def test_of_two_first_starts_at_once_one_makes_the_secret_key(tmp_path: Path) -> None:
    """Whoever is second reads the first one's: what either seals, both open."""
    settings = Settings(home=tmp_path)
    assert len(set(in_parallel([lambda: secret_key(settings)] * 8))) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["secret-key"]


def test_what_keys_writes_is_its_users_alone(tmp_path: Path) -> None:
    """The home's mode is 0700, the catalog's 0600."""
    home = tmp_path / "home"
    assert run_kiln(home, "keys", "create").returncode == 0
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "catalog.db").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("scopes", "lifetime", "organization", "said"),
    [
        (["builds:all"], "", "default", "--scope builds:all: no such scope; there are builds:read, builds:write"),
        ([], "soon", "default", "--expires-in soon: must be a number and s, m, h, d or w"),
        ([], "0d", "default", "--expires-in 0d: must be a number and s, m, h, d or w"),
        ([], "", "No Body", "--org No Body: must be lower-case letters"),
    ],
)
def test_a_wrong_option_is_refused_and_makes_nothing(
    tmp_path: Path, scopes: list[str], lifetime: str, organization: str, said: str
) -> None:
    """The option and what it takes are named, and no home is made."""
    with pytest.raises(KeyCommandError, match=re.escape(said)):
        create_key(Settings(home=tmp_path / "home"), "", organization, scopes, lifetime)
    assert not (tmp_path / "home").exists()


def test_a_mistyped_home_is_no_empty_catalog(tmp_path: Path) -> None:
    """Exit code 1, one line on standard error, and no home is made."""
    answer = run_kiln(tmp_path / "home", "keys", "list")
    assert answer.returncode == 1
    assert answer.stderr == f"kiln: KILN_HOME: there is no catalog in {tmp_path / 'home'}\n"
    assert not (tmp_path / "home").exists()


def test_disabling_an_unknown_key_fails(tmp_path: Path) -> None:
    """The id that nobody has is in the line."""
    home = tmp_path / "home"
    assert run_kiln(home, "keys", "create").returncode == 0
    answer = run_kiln(home, "keys", "disable", "nobody")
    assert answer.returncode == 1
    assert answer.stderr == "kiln: no API key has the id nobody: kiln keys list shows them\n"
