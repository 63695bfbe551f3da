"""For all tests of a file one simulated EC2, one proxy before it and one cloud: reading EC2's model takes a while."""

from collections.abc import Iterator
from datetime import timedelta

import pytest

from kiln.adapters.ec2 import Ec2Cloud
from support.ec2_editing import EditingProxy
from support.ec2_things import BuildThings
from support.moto import Account, AccountState, MotoServer, running_moto


@pytest.fixture(scope="module")
def moto() -> Iterator[MotoServer]:
    with running_moto() as server:
        # moto loads Amazon's AMIs at the first call in a region, which takes longer than some tests wait.
        server.account().ec2.describe_images(Owners=["self"])
        yield server


@pytest.fixture(scope="module")
def shared_proxy(moto: MotoServer) -> Iterator[EditingProxy]:
    with EditingProxy(moto.url) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: EditingProxy) -> EditingProxy:
    """The proxy that `cloud` talks to, as new."""
    shared_proxy.start_over()
    return shared_proxy


@pytest.fixture(scope="module")
def account(moto: MotoServer) -> Account:
    """EC2's own word, past the proxy."""
    return moto.account()


@pytest.fixture
def before(account: Account) -> AccountState:
    """What existed before the test made anything."""
    return account.snapshot_of_account()


@pytest.fixture(scope="module")
def shared_cloud(shared_proxy: EditingProxy) -> Iterator[Ec2Cloud]:
    cloud = Ec2Cloud(simulated=True, endpoint_url=shared_proxy.url, call_timeout=timedelta(seconds=10))
    yield cloud
    cloud.close()


@pytest.fixture
def cloud(shared_cloud: Ec2Cloud, proxy: EditingProxy) -> Ec2Cloud:
    """The cloud under test, before a proxy as new."""
    return shared_cloud


@pytest.fixture
def things(account: Account, before: AccountState) -> BuildThings:
    """Makes things of a build of this installation."""
    return BuildThings(account.ec2)
