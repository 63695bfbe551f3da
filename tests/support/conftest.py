"""One simulated EC2 for all tests of a file, and a proxy of its own before it for each."""

from collections.abc import Iterator

import pytest
from mypy_boto3_ec2 import EC2Client

from support.ec2_proxy import Ec2Proxy
from support.moto import Account, AccountState, MotoServer, ec2_client, running_moto


@pytest.fixture(scope="module")
def moto() -> Iterator[MotoServer]:
    with running_moto() as server:
        yield server


@pytest.fixture
def proxy(moto: MotoServer) -> Iterator[Ec2Proxy]:
    with Ec2Proxy(moto.url) as proxy:
        yield proxy


@pytest.fixture
def ec2(proxy: Ec2Proxy) -> EC2Client:
    """A client of the proxy that never tries again by itself."""
    return ec2_client(proxy.url)


@pytest.fixture
def account(moto: MotoServer) -> Account:
    return moto.account()


@pytest.fixture
def before(account: Account) -> AccountState:
    """What existed before the test."""
    return account.snapshot_of_account()
