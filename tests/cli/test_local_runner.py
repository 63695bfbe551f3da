"""The stack's own runner: its row and token, what its process sees, and what is left when the stack has stopped."""

import asyncio
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from cli.agents import end_agents, living_agents
from cli.home import leave_no_folder, local_runner, open_catalog
from cli.main import PRIVATE_UMASK
from cli.parts import PartFactory, TemporalPlace
from cli.runners import create_runner, disable_runner, list_runners
from kiln.adapters.sandbox_files import make_passable
from kiln.settings import Settings
from support.agents import Agents, printed
from support.processes import marked

LIMIT = timedelta(seconds=10)
# More than a runner's own: keys, catalogs, other programs' secrets.
OTHERS = {
    "AWS_ACCESS_KEY_ID": "of-others",
    "KILN_API_KEY": "of-others",
    "KILN_SECRET_KEY": "of-others",
    "KILN_CATALOG_URL": "of-others",
    "AGENT_TOKEN": "of-others",
    "DOCKER_HOST": "of-others",
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", secret_key="the-secret-key", catalog_url=f"sqlite:///{tmp_path}/c.db")


def environment(settings: Settings, temporal: TemporalPlace | None = None) -> dict[str, str]:
    """What the runner's process gets to see."""
    with open_catalog(settings) as catalog:
        part = PartFactory(settings, "the-secret-key", temporal, {}).runner(local_runner(settings, catalog))
    return dict(part.env)


def test_its_row_is_made_once(settings: Settings) -> None:
    """It is `local`, of the organization `default`; the home keeps its token with mode 0600."""
    with open_catalog(settings) as catalog:
        first, again = local_runner(settings, catalog), local_runner(settings, catalog)
    assert first == again
    assert [(row["id"], row["name"], row["organization"]) for row in list_runners(settings)] == [
        (first.runner_id, "local", "default")
    ]
    file = settings.home_dir / "runner-token"
    assert file.read_text() == f"{first.token}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert first.token not in repr(first)


def test_a_disabled_one_is_replaced_under_a_free_name(settings: Settings) -> None:
    """Names of disabled runners, and of other organizations', are no hindrance."""
    create_runner(settings, "local-2", "research")
    with open_catalog(settings) as catalog:
        first = local_runner(settings, catalog)
        disable_runner(settings, first.runner_id)
        second = local_runner(settings, catalog)
    assert (first.name, second.name) == ("local", "local-2")
    assert first.token != second.token


def test_its_process_sees_nothing_but_its_own(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its token and settings, the API's address and Temporal's: no key, no catalog, no AWS, nothing of the shell's."""
    for name, value in {**OTHERS, "TEMPORAL_API_KEY": "of-others"}.items():
        monkeypatch.setenv(name, value)
    seen = environment(settings)
    assert {"of-others", "the-secret-key"}.isdisjoint(seen.values())
    assert not [name for name in seen if name.startswith("AWS_") or "CATALOG" in name or "KILN_HOME" in name]
    assert seen["KILN_RUNNER_TOKEN"].startswith("krt_")
    assert (seen["KILN_API_URL"], seen["KILN_RUNNER_DIR"]) == ("http://127.0.0.1:8000", str(settings.pods_dir))
    assert (seen["KILN_TEMPORAL_PORT"], seen["TEMPORAL_CONFIG_FILE"]) == ("7233", os.devnull)


def test_it_finds_a_temporal_elsewhere_as_workers_do(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """TEMPORAL_* is handed on where the stack does not embed its own."""
    monkeypatch.setenv("TEMPORAL_ADDRESS", "temporal.example.com:7233")
    seen = environment(settings, TemporalPlace("temporal.example.com:7233"))
    assert seen["TEMPORAL_ADDRESS"] == "temporal.example.com:7233"
    assert "TEMPORAL_CONFIG_FILE" not in seen


@pytest.mark.parametrize(("said", "allowed"), [(None, "True"), (True, "True"), (False, "False")])
def test_it_allows_custom_commands_unless_told_not_to(settings: Settings, said: bool | None, allowed: str) -> None:
    """Other runners take the setting's default, which is no."""
    told = settings if said is None else settings.model_copy(update={"runner_custom_commands": said})
    assert environment(told)["KILN_RUNNER_CUSTOM_COMMANDS"] == allowed


@pytest.mark.parametrize(("told", "used"), [("", "unix:///first"), ("unix:///mine", "unix:///mine")])
def test_its_containers_run_in_the_stacks_first_engine(settings: Settings, told: str, used: str) -> None:
    """Unless KILN_RUNNER_ENGINE names another."""
    hosts = ("unix:///first", "unix:///second")
    chosen = settings.model_copy(update={"engine_hosts": hosts, "runner_engine": told})
    assert environment(chosen)["KILN_RUNNER_ENGINE"] == used


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    """Agents that a runner has left alive."""
    yield (agents := Agents(tmp_path, uuid.uuid4().hex))
    end_agents(living_agents(tmp_path / "pods"), LIMIT, lambda: False)
    assert not marked(agents.mark)


async def test_agents_end_with_the_stack(agents: Agents) -> None:
    """All at once, with their grace: the one that ignores SIGTERM is killed. How each ended waits for the next runner."""
    willing, deaf = await agents.sh("sleep 600"), await agents.sh("trap '' TERM; echo up; while :; do sleep 600; done")
    ended = await agents.sh("exit 3")
    await ended.wait()
    await printed(deaf, "up")
    await _ended(agents, LIMIT, hurried=False)
    assert not marked(agents.mark)
    assert [(await one.wait()).error for one in (willing, deaf)] == ["terminated", "terminated"]


async def test_whoever_hurries_does_not_wait_for_agents(agents: Agents) -> None:
    """The agent has heard of its end, and its shim sees to it."""
    deaf = await agents.sh("trap '' TERM; echo up; while :; do sleep 600; done", grace_seconds=1)
    await printed(deaf, "up")
    await _ended(agents, LIMIT, hurried=True)
    assert deaf.is_alive()
    assert (await deaf.wait()).error == "terminated"


async def _ended(agents: Agents, limit: timedelta, *, hurried: bool) -> None:
    await asyncio.to_thread(end_agents, living_agents(agents.root / "pods"), limit, lambda: hurried)


def test_no_pods_at_all(tmp_path: Path) -> None:
    """A runner that never ran a pod has no directory of them."""
    assert living_agents(tmp_path / "pods") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's agents are other users")
def test_agents_get_to_a_folder_that_is_made_for_them(tmp_path: Path) -> None:
    """Also through those above it, under the umask of `kiln up`, which closes all that it makes."""
    before = os.umask(PRIVATE_UMASK)
    try:
        make_passable(tmp_path / "kiln" / "runner" / "pods")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in tmp_path.glob("**/*")] == [0o711] * 3


@pytest.mark.skipif(os.geteuid() != 0, reason="without root, the folder stands in the home")
@pytest.mark.parametrize("is_used", [False, True], ids=["empty", "used"])
def test_roots_folder_goes_with_the_stack_unless_something_is_left(tmp_path: Path, is_used: bool) -> None:
    """An ended pod's sandbox, or a clone, keeps it; the lock of a runner that has ended does not."""
    settings = Settings(home=tmp_path)
    folder = settings.pods_dir
    make_passable(folder / "pods")
    (folder / "lock").touch()
    if is_used:
        (folder / "repositories" / "1.git").mkdir(parents=True)
    leave_no_folder(settings)
    assert folder.exists() is is_used
    if is_used:
        shutil.rmtree(folder)
        leave_no_folder(settings)
    assert not folder.exists()


def test_a_folder_that_the_operator_named_stays(tmp_path: Path) -> None:
    """Empty or not: it may be a mount, or have its owner's modes."""
    settings = Settings(home=tmp_path / "home", runner_dir=tmp_path / "runner")
    settings.pods_dir.mkdir()
    leave_no_folder(settings)
    assert settings.pods_dir.exists()
