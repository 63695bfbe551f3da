"""House-keeping for pods: what nobody vouches for fails, what lost its workflow gets another, and an end is one everywhere."""

import pytest
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.testing import ActivityEnvironment

from activities.pod_house import ASKED_AT_ONCE, LAPSED, PodHouse
from kiln.catalog import runners
from kiln.models import LostPods, PodPhase, PodRef, PodStatus
from support import pod_rows
from support.pod_harness import DONE, PodHarness

NOTHING = LostPods()
LONG_GONE = "a run of long ago"


@pytest.fixture
def kiln(pod_kiln: PodHarness) -> PodHarness:
    return pod_kiln


def lost(kiln: PodHarness) -> PodRef:
    """An open pod whose run Temporal does not know."""
    kiln.pod_ledger.claim_pod(pod := kiln.order_pod(), LONG_GONE)
    kiln.make_older(pod)
    return pod


class TestLapse:
    async def test_a_pod_that_nobody_vouches_for_fails(self, kiln: PodHarness) -> None:
        """Once the lease is over, pod, workflow and log end, the log with a word on it."""
        async with kiln.workers():
            pod = await kiln.runs()
            kiln.run_out(pod)
            assert await kiln.look_after() == LostPods(lapsed=1)
            assert "the pod's own error says why" in await kiln.fails(pod)
        row = kiln.pod_row(pod)
        assert (row.status, row.error, row.run_id) == ("failed", "its runner did not come back", None)
        assert (kiln.log(pod.pod_id), kiln.log_end(pod)) == ([LAPSED], "failed")

    async def test_a_pod_of_a_disabled_runner_fails(self, kiln: PodHarness) -> None:
        """One that waited for a runner which is not to come any more ends, though no workflow ever had it."""
        pod = kiln.order_pod()
        with kiln.catalog.transaction() as tx:
            runners.disable(tx, kiln.process.runner_id)
        assert await kiln.look_after() == LostPods(lapsed=1)
        kiln.make_older(pod)
        assert await kiln.look_after() == LostPods(settled=1)
        assert (kiln.pod_row(pod).error, kiln.log_end(pod)) == ("its runner was disabled", "failed")

    async def test_one_whose_runner_is_only_away_goes_on(self, kiln: PodHarness) -> None:
        """Until the lease is over an orphaned pod, and one that waits for its runner, are left alone."""
        async with kiln.control():
            async with kiln.runner():
                orphan = await kiln.runs()
            waiting = await kiln.begin()
            await kiln.is_in(waiting, PodPhase.AT_RUNNER)
            pod_rows.go_away(kiln.catalog, kiln.process.runner_id)
            for pod in (orphan, waiting):
                kiln.make_older(pod)
            assert await kiln.look_after() == NOTHING
        assert [kiln.pod_row(pod).status for pod in (orphan, waiting)] == ["running", "creating"]


class TestRelease:
    async def test_a_pod_without_its_workflow_is_the_dispatchers_again(self, kiln: PodHarness) -> None:
        """However many pods have lost their run, each is given back."""
        pods = [lost(kiln) for _ in range(ASKED_AT_ONCE + 1)]
        assert await kiln.look_after() == LostPods(released=len(pods))
        assert {kiln.pod_row(pod).run_id for pod in pods} == {None}

    async def test_a_fresh_one_has_its_time(self, kiln: PodHarness) -> None:
        """A pod gets a few seconds to reach Temporal before anybody asks where it is."""
        kiln.pod_ledger.claim_pod(pod := kiln.order_pod(), LONG_GONE)
        assert await kiln.look_after() == NOTHING
        assert kiln.pod_row(pod).run_id == LONG_GONE

    async def test_a_temporal_that_is_away_proves_nothing(self, kiln: PodHarness) -> None:
        """Whoever cannot ask gives nothing back, and says so."""
        pod = lost(kiln)
        nowhere = await Client.connect("127.0.0.1:1", lazy=True)
        with pytest.raises((RPCError, RuntimeError)):
            await ActivityEnvironment().run(PodHouse(kiln.pod_ledger, kiln.logs, nowhere).look_after)
        assert kiln.pod_row(pod).run_id == LONG_GONE

    async def test_it_is_done_in_each_round(self, kiln: PodHarness) -> None:
        """The installation's house-keeping looks after pods."""
        pod = lost(kiln)
        async with kiln.control():
            await kiln.keep_house(rounds=1)
        assert kiln.pod_row(pod).run_id is None


class TestSettling:
    async def test_a_workflow_that_missed_the_end_hears_of_it(self, kiln: PodHarness) -> None:
        """A pod that its runner has ended, and then vanished, ends in Temporal as it did in the catalog."""
        async with kiln.control():
            async with kiln.runner():
                pod = await kiln.runs()
                kiln.host.tell_end(pod, DONE)
            kiln.make_older(pod)
            assert await kiln.look_after() == NOTHING
            assert await kiln.ends(pod) is PodStatus.COMPLETED
        assert (kiln.pod_row(pod).run_id, kiln.log_end(pod)) == (None, "completed")

    async def test_without_a_workflow_the_log_ends_all_the_same(self, kiln: PodHarness) -> None:
        """What the workflow would have done is done for it; what has ended only just now is its own."""
        async with kiln.workers():
            pod = await kiln.runs()
            await kiln.pod(pod).terminate()
            kiln.host.tell_end(pod, DONE)
            assert (await kiln.look_after(), kiln.log_end(pod)) == (NOTHING, None)
            kiln.make_older(pod)
            assert await kiln.look_after() == LostPods(settled=1)
        row = kiln.pod_row(pod)
        assert (row.status, row.exit_code, row.run_id, kiln.log_end(pod)) == ("completed", 0, None, "completed")

    async def test_a_pod_that_ended_before_it_was_claimed_has_a_log_that_ends(self, kiln: PodHarness) -> None:
        """Terminated before any run had it, a pod is settled once, and a run that comes late does nothing."""
        pod_rows.terminate(kiln.catalog, pod := kiln.order_pod())
        async with kiln.workers():
            await kiln.begin(pod)
            assert await kiln.ends(pod) is None
        kiln.make_older(pod)
        assert [await kiln.look_after() for _ in range(2)] == [LostPods(settled=1), NOTHING]
        assert (kiln.log_end(pod), kiln.host.begun) == ("terminated", [])
