"""A build from the agents' template: Packer plays scripts, and the registry is real."""

import pytest

from kiln.models import BuildStatus
from support.container_harness import PUBLIC_HOST, ContainerHarness
from support.container_rows import published, target
from support.container_tools import ContainerRun, pushes_and_hangs
from support.rows import add_organization


@pytest.fixture
def kiln(container_kiln: ContainerHarness) -> ContainerHarness:
    return container_kiln


async def is_making(kiln: ContainerHarness, build: str) -> bool:
    return any("making" in line for line in kiln.log(build))


class TestSuccess:
    async def test_what_was_pushed_is_published(self, kiln: ContainerHarness) -> None:
        """The digest is the one that the registry has under the attempt's tag: Packer names none."""
        async with kiln.workers():
            end = await kiln.end(build := await kiln.submit_agent())
        made = kiln.tools.runs[0].image.digest
        assert (end.status, kiln.pulled(), kiln.tagged()) == (BuildStatus.SUCCEEDED, made, made)
        assert kiln.leftovers(build) == []

    async def test_the_template_gets_the_order(self, kiln: ContainerHarness) -> None:
        """Agent, base image, and the attempt's own names."""
        async with kiln.workers():
            await kiln.end(build := await kiln.submit_agent())
        assert kiln.tools.runs[0].variables == {
            "provider": "codex",
            "agent_version": "latest",
            "extra_packages": "",
            "npm_registry": "",
            "kiln_base_image": f"{PUBLIC_HOST}/library/debian:v1",
            "kiln_container_name": f"kiln-agent-{build}-1",
            "kiln_container_reference": f"{kiln.registry.host}/kiln-staging/{build}:attempt-1",
            "kiln_ca_bundle": "",
        }

    async def test_the_engine_is_told_before_and_cleared_after(self, kiln: ContainerHarness) -> None:
        """Of the container, and of what was pulled and made."""
        async with kiln.workers():
            await kiln.end(build := await kiln.submit_agent())
        (told,) = kiln.engines.expected
        assert kiln.engines.cleared == [told]
        assert told.container == f"kiln-agent-{build}-1"
        assert told.images == (
            f"{kiln.registry.host}/kiln-staging/{build}:attempt-1",
            f"{PUBLIC_HOST}/library/debian:v1",
        )


class TestFailure:
    async def test_it_says_what_the_script_said(self, kiln: ContainerHarness) -> None:
        """Packer itself adds no more than an exit status."""

        async def fails(run: ContainerRun) -> int:
            run.says("error: npm could not install @openai/codex@latest from https://registry.test/")
            run.complains("==> docker.published: Script exited with non-zero exit status: 1.")
            return 1

        kiln.tools.script = fails
        async with kiln.workers():
            error = await kiln.failure(build := await kiln.submit_agent())
        reason = "npm could not install @openai/codex@latest from https://registry.test/"
        assert error.message == f"Script exited with non-zero exit status: 1: {reason}"
        assert (len(kiln.engines.cleared), kiln.leftovers(build)) == (1, [])

    async def test_packer_that_pushed_nothing_made_nothing(self, kiln: ContainerHarness) -> None:
        """Whatever its exit code."""

        async def does_nothing(_: ContainerRun) -> int:
            return 0

        kiln.tools.script = does_nothing
        async with kiln.workers():
            error = await kiln.failure(await kiln.submit_agent())
        assert (error.type, error.message) == ("tool_failed", "Packer ended well, but pushed no image")

    async def test_a_strangers_image_is_refused(self, kiln: ContainerHarness) -> None:
        """Also if it was the organization's to read when the build was ordered."""
        theirs = target(kiln.target.name, owner="stranger")
        published(kiln.catalog, add_organization(kiln.catalog), theirs)
        async with kiln.workers():
            error = await kiln.failure(await kiln.submit_agent(f"{kiln.registry.host}/{theirs.repository}:v1"))
        assert (error.type, kiln.tools.started) == ("source_unavailable", [])
        assert "no such image, or not yours to use" in error.message

    async def test_another_registry_is_refused(self, kiln: ContainerHarness) -> None:
        """Only those are read that transfers are allowed from."""
        async with kiln.workers():
            error = await kiln.failure(await kiln.submit_agent("10.0.0.7/debian:v1"))
        assert (error.type, kiln.tools.started) == ("source_unavailable", [])
        assert "not from the IP address 10.0.0.7" in error.message


async def test_a_cancel_leaves_nothing(kiln: ContainerHarness) -> None:
    """Packer is interrupted, the engine cleared, and what was pushed goes."""
    kiln.tools.script = pushes_and_hangs
    async with kiln.workers():
        build = await kiln.submit_agent()
        await kiln.until(lambda: is_making(kiln, build))
        await kiln.handle(build).cancel()
        await kiln.is_cancelled(build)
    assert kiln.tools.runs[0].interrupted.is_set()
    assert (len(kiln.engines.cleared), kiln.leftovers(build), kiln.tagged()) == (1, [], None)


async def test_another_attempt_adopts_what_was_pushed(kiln: ContainerHarness) -> None:
    """Packer does not run again."""
    kiln.tools.scripts = {1: pushes_and_hangs}
    async with kiln.control():
        async with kiln.builder("worker-1"):
            build = await kiln.submit_agent()
            await kiln.until(lambda: is_making(kiln, build))
        async with kiln.builder("worker-2"):
            end = await kiln.end(build)
    assert (end.status, kiln.tools.started) == (BuildStatus.SUCCEEDED, [1])
    assert kiln.pulled() == kiln.tools.runs[0].image.digest
