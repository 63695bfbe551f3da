"""Which build gets which engine."""

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from kiln.adapters.engines import Engines
from kiln.errors import UnavailableError
from kiln.ports import Engine, Traces

HOSTS = ("unix:///a.sock", "unix:///b.sock", "unix:///c.sock")


async def host_of(engines: Engines, affinity: str) -> str:
    async with engines.lease(affinity) as engine:
        return engine.host


async def waiting(task: asyncio.Task[str]) -> bool:
    """Whether a task still waits after everything that is ready to run has run."""
    for _ in range(5):
        await asyncio.sleep(0)
    return not task.done()


async def test_a_repository_comes_back_to_the_engine_that_has_its_layers() -> None:
    """Whatever other engines were free for longer."""
    engines = Engines(HOSTS, 3)
    first = await host_of(engines, "acme/app")
    assert [await host_of(engines, "acme/app") for _ in range(3)] == [first] * 3


async def test_a_restarted_worker_finds_the_engine_again() -> None:
    """What a repository's name leads to is the same in every process."""
    names = [f"acme/{number}" for number in range(20)]
    ours, theirs = Engines(HOSTS, 3), Engines(HOSTS, 3)
    placed = [await host_of(ours, name) for name in names]
    assert [await host_of(theirs, name) for name in reversed(names)] == placed[::-1]
    assert set(placed) == set(HOSTS)


async def test_a_busy_engine_is_not_waited_for_while_another_is_free() -> None:
    """Layers are worth less than time; the repository then belongs to the engine that built it last."""
    engines = Engines(HOSTS[:2], 2)
    async with engines.lease("acme/app") as first, engines.lease("acme/app") as second:
        assert first.host != second.host
    assert await host_of(engines, "acme/app") == second.host


async def test_who_waits_first_is_served_first() -> None:
    """An engine has one build at a time."""
    engines = Engines(HOSTS[:1], 1)
    served: list[str] = []

    async def build(name: str) -> None:
        async with engines.lease("acme/app"):
            served.append(name)

    async with asyncio.TaskGroup() as group, engines.lease("acme/other"):
        for name in ("a", "b", "c"):
            group.create_task(build(name))
            await asyncio.sleep(0)
        assert served == []
    assert served == ["a", "b", "c"]


async def test_a_build_that_is_cancelled_while_it_waits_takes_no_engine_along() -> None:
    """Neither before the engine is free nor at that very moment."""
    engines = Engines(HOSTS[:1], 1)
    async with AsyncExitStack() as held:
        await held.enter_async_context(engines.lease("x"))
        early, late = (asyncio.create_task(host_of(engines, name)) for name in ("early", "late"))
        assert await waiting(early)
        early.cancel()
        await held.aclose()
        late.cancel()
    await asyncio.gather(early, late, return_exceptions=True)
    assert await asyncio.wait_for(host_of(engines, "y"), 1) == HOSTS[0]


async def test_one_engine_elsewhere_is_lent_as_often_as_there_are_slots() -> None:
    """A third build waits for one of the two to end."""
    engines = Engines(HOSTS[:1], 2)
    async with engines.lease("a") as first, engines.lease("b") as second:
        assert (first.host, second.host) == (HOSTS[0], HOSTS[0])
        third = asyncio.create_task(host_of(engines, "c"))
        assert await waiting(third)
    assert await third == HOSTS[0]


async def test_two_workers_never_build_in_one_engine(tmp_path: Path) -> None:
    """Each takes what the other has not; a third build waits until one of them ends."""
    ours, theirs = Engines(HOSTS[:2], 2, locks=tmp_path), Engines(HOSTS[:2], 2, locks=tmp_path)
    async with ours.lease("acme/app") as first:
        async with theirs.lease("acme/app") as second:
            assert first.host != second.host
            third = asyncio.create_task(host_of(theirs, "acme/app"))
            await asyncio.sleep(0.3)
            assert not third.done()
        assert await asyncio.wait_for(third, 2) == second.host


def recording_docker(folder: Path, code: int = 0, listing: str = "") -> tuple[str, Path]:
    """A docker command that notes its arguments, lists what `listing` echoes, and ends with this code; its path, and the
    notes' file."""
    notes, script = folder / "notes", folder / "docker"
    script.write_text(f'#!/bin/sh\necho "$@" >>{notes}\n{listing}\nexit {code}\n')
    script.chmod(0o755)
    notes.touch()
    return str(script), notes


async def build_privately(engines: Engines, repository: str) -> None:
    async with engines.lease(repository) as engine:
        engines.keep_private(engine)


async def test_another_owner_s_build_finds_no_private_layers(tmp_path: Path) -> None:
    """They are pruned before it begins, and stay for their own owner."""
    program, notes = recording_docker(tmp_path)
    engines = Engines(HOSTS[:1], 1, locks=tmp_path / "locks", program=program)
    await build_privately(engines, "acme/app")
    await build_privately(engines, "acme/other")
    assert "prune" not in notes.read_text()
    await host_of(engines, "rival/app")
    assert "builder prune --all --force" in notes.read_text()


async def test_an_engine_that_keeps_private_layers_takes_no_other_owner(tmp_path: Path) -> None:
    """The build is tried again, rather than begun beside them."""
    program, _ = recording_docker(tmp_path, code=1)
    engines = Engines(HOSTS[:1], 1, locks=tmp_path / "locks", program=program)
    await build_privately(engines, "acme/app")
    with pytest.raises(UnavailableError, match="another owner's layers"):
        await host_of(engines, "rival/app")
    assert await host_of(engines, "acme/app") == HOSTS[0]


TRACES = Traces("kiln-agent-1", ("registry.test/kiln-staging/1:attempt-1", "registry.test/acme/base:v1"))
CLEARING = [
    "container ls --all --no-trunc --quiet --filter=name=^/?kiln-agent-1$",
    "image ls --no-trunc --quiet --filter=label=kiln-build=kiln-agent-1",
    "image rm --force registry.test/kiln-staging/1:attempt-1 registry.test/acme/base:v1",
]


def asked(notes: Path) -> list[str]:
    """What the docker command was called with, less the host."""
    return [line.removeprefix(f"--host {HOSTS[0]} ") for line in notes.read_text().splitlines()]


async def test_what_a_dead_build_was_going_to_make_goes_before_the_next(tmp_path: Path) -> None:
    """The lock and its mark outlive the process that took them, also if it said later that the engine is private."""
    program, notes = recording_docker(tmp_path)
    engines = Engines(HOSTS[:1], 1, locks=tmp_path / "locks", program=program)
    async with engines.lease("acme/agent") as engine:
        engines.expect(engine, TRACES)
        engines.keep_private(engine)
        mark = next((tmp_path / "locks").iterdir())
        as_it_dies = mark.read_bytes()
        await engines.clear(engine, TRACES)
    notes.write_text("")
    assert await host_of(engines, "acme/agent") == HOSTS[0]
    assert asked(notes) == []
    mark.write_bytes(as_it_dies)
    await host_of(engines, "acme/agent")
    assert asked(notes)[:3] == CLEARING
    assert not any("prune" in line for line in asked(notes))
    assert (await host_of(engines, "rival/agent"), "builder prune" in notes.read_text()) == (HOSTS[0], True)


async def test_what_could_not_be_removed_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the engine's next lease; what was removed is not looked for any more."""
    failing, notes = recording_docker(tmp_path, code=1)
    locks = tmp_path / "locks"
    for program, seen in ((failing, 1), (failing, 2), ("true", 2), (failing, 2)):
        engines = Engines(HOSTS[:1], 1, locks=locks, program=program)
        async with engines.lease("acme/agent") as engine:
            if seen == 1:
                engines.expect(engine, TRACES)
                await engines.clear(engine, TRACES)
        assert asked(notes).count(CLEARING[0]) == seen
    assert "engine-1 keeps what a build has left" in caplog.text


async def test_containers_and_images_are_found_by_the_builds_name(tmp_path: Path) -> None:
    """Both are removed by their ids, and whatever is named."""
    listing = 'case "$*" in *" container ls "*) echo c1;; *" image ls "*) echo i1; echo i1;; esac'
    program, notes = recording_docker(tmp_path, listing=listing)
    await Engines(HOSTS, 1, program=program).clear(Engine("engine-1", HOSTS[0]), TRACES)
    assert asked(notes) == [CLEARING[0], "container rm --force --volumes c1", CLEARING[1], f"{CLEARING[2]} i1"]


@pytest.mark.parametrize("program", ["false", "no-such-docker"])
async def test_names_that_cannot_be_dropped_stop_nothing(caplog: pytest.LogCaptureFixture, program: str) -> None:
    """It is logged with the engine's name: the build is over, and what it made is in the registry."""
    with caplog.at_level(logging.WARNING, "kiln.engines"):
        await Engines(HOSTS, 1, program=program).forget(Engine("engine-1", HOSTS[0]), ["acme/app:v1"])
    assert "engine-1 keeps names of images" in caplog.text
