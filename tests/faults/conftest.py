"""One deployment for the fault tests of this folder; each test leaves it whole and its account as it was found."""

from collections.abc import Iterator

import pytest

from support.moto import AccountState
from support.rig import Rig, running_rig


@pytest.fixture(scope="session")
def shared_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_rig(tmp_path_factory.mktemp("rig") / "home") as rig:
        yield rig


@pytest.fixture
def rig(shared_rig: Rig) -> Iterator[Rig]:
    shared_rig.heal()
    yield shared_rig
    shared_rig.heal()


@pytest.fixture
def before(rig: Rig) -> AccountState:
    """The account as the test finds it."""
    return rig.account.snapshot_of_account()
