"""What passes the proxy, and the faults that meet single requests: boto3 before real `moto_server`."""

import http.client
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import BotoCoreError, ClientError, ConnectionClosedError, HTTPClientError
from mypy_boto3_ec2 import EC2Client

from support.ec2_probe import PATIENCE_SECONDS, code_of, eventually, run_instance
from support.ec2_proxy import Ec2Proxy
from support.moto import NOTHING, SESSION, Account, AccountState, MotoServer, ec2_client

DESCRIBE_VPCS = b"Action=DescribeVpcs&Version=2016-11-15"
# moto tells by the signature's scope which service is meant.
SIGNATURE = "AWS4-HMAC-SHA256 Credential=key/20200101/us-east-1/ec2/aws4_request, Signature=0"
HEADERS = {"Authorization": SIGNATURE, "Content-Type": "application/x-www-form-urlencoded"}


def ask_raw(url: str, body: bytes | Iterable[bytes]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_SECONDS)
    try:
        connection.request("POST", "/", body, HEADERS)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class TestPassing:
    def test_an_answer_is_byte_for_byte_that_of_moto(self, moto: MotoServer, proxy: Ec2Proxy) -> None:
        """Without faults, status and body are those that moto gives."""
        expected = ask_raw(moto.url, DESCRIBE_VPCS)
        assert b"<DescribeVpcsResponse" in expected[1]
        assert ask_raw(proxy.url, DESCRIBE_VPCS) == expected

    def test_bytes_pass(self, proxy: Ec2Proxy) -> None:
        """An object put into S3 through the proxy is read back through it."""
        s3 = SESSION.client("s3", endpoint_url=proxy.url)
        s3.create_bucket(Bucket="passing")
        s3.put_object(Bucket="passing", Key="a/b", Body=bytes(range(256)))
        assert s3.get_object(Bucket="passing", Key="a/b")["Body"].read() == bytes(range(256))

    def test_the_answer_to_head_has_a_length_and_no_body(self, proxy: Ec2Proxy) -> None:
        """S3 says how long the object is, and the connection can be used again."""
        s3 = SESSION.client("s3", endpoint_url=proxy.url)
        s3.create_bucket(Bucket="heads")
        s3.put_object(Bucket="heads", Key="a", Body=b"12345")
        lengths = [s3.head_object(Bucket="heads", Key="a")["ContentLength"] for _ in range(2)]
        assert lengths == [5, 5]

    def test_a_body_in_chunks_passes(self, proxy: Ec2Proxy) -> None:
        """A request without a length arrives whole."""
        chunks = iter([DESCRIBE_VPCS[:9], DESCRIBE_VPCS[9:]])
        assert b"<DescribeVpcsResponse" in ask_raw(proxy.url, chunks)[1]

    def test_a_connection_is_kept_alive(self, proxy: Ec2Proxy) -> None:
        """Two requests go over one connection."""
        connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc)
        ports = []
        for _ in range(2):
            connection.request("POST", "/", DESCRIBE_VPCS, HEADERS)
            connection.getresponse().read()
            ports.append(connection.sock.getsockname()[1] if connection.sock else None)
        connection.close()
        assert ports[0] is not None
        assert ports[0] == ports[1]

    def test_the_log_has_action_parameters_and_status(self, proxy: Ec2Proxy, ec2: EC2Client) -> None:
        """The log tells what was asked and how it was answered."""
        code_of(lambda: ec2.describe_key_pairs(KeyNames=["absent"]))
        (call,) = proxy.calls_of("DescribeKeyPairs")
        assert (call.params["KeyName.1"], call.status, call.fault) == ("absent", 400, None)

    def test_nothing_is_left_after_the_end(self, moto: MotoServer) -> None:
        """Its threads and its port are gone, though a client still has a connection open."""
        threads = set(threading.enumerate())
        with Ec2Proxy(moto.url) as proxy:
            address = ("127.0.0.1", int(proxy.url.rpartition(":")[2]))
            idle = socket.create_connection(address)
        idle.close()
        assert set(threading.enumerate()) == threads
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


class TestSingleRequests:
    def test_throttled_calls_are_refused_as_often_as_said(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """RequestLimitExceeded with status 503, twice, then the answer."""
        proxy.throttle("DescribeVpcs", times=2)
        codes = [code_of(ec2.describe_vpcs), code_of(ec2.describe_vpcs)]
        ec2.describe_vpcs()
        assert codes == ["RequestLimitExceeded"] * 2
        assert [call.status for call in proxy.calls_of("DescribeVpcs")] == [503, 503, 200]

    def test_boto3_tries_throttled_calls_again(self, proxy: Ec2Proxy) -> None:
        """botocore knows the error as throttling."""
        proxy.throttle(times=2)
        ec2_client(proxy.url, attempts=3).describe_vpcs()
        assert [call.fault for call in proxy.calls] == ["throttle", "throttle", None]

    def test_no_capacity_starts_nothing(
        self, ec2: EC2Client, proxy: Ec2Proxy, account: Account, before: AccountState
    ) -> None:
        """RunInstances is refused with InsufficientInstanceCapacity, and no instance exists."""
        proxy.no_capacity()
        assert code_of(lambda: run_instance(ec2)) == "InsufficientInstanceCapacity"
        assert account.left_since(before) == NOTHING

    def test_no_capacity_names_the_instance_type(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """The message is about the type that was asked for."""
        proxy.no_capacity()
        with pytest.raises(ClientError, match=r"sufficient t3\.micro capacity"):
            run_instance(ec2)

    def test_any_error_can_be_answered(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """Code, message and status are the test's choice."""
        proxy.fail("DeleteSecurityGroup", "DependencyViolation", "resource sg-1 has a dependent object")
        with pytest.raises(ClientError, match=r"DependencyViolation.*sg-1 has a dependent object"):
            ec2.delete_security_group(GroupId="sg-1")

    def test_a_dropped_request_is_not_executed(
        self, ec2: EC2Client, proxy: Ec2Proxy, account: Account, before: AccountState
    ) -> None:
        """The connection is closed and no key pair exists."""
        proxy.drop_request("CreateKeyPair")
        with pytest.raises(ConnectionClosedError):
            ec2.create_key_pair(KeyName="never-made")
        assert account.left_since(before) == NOTHING

    def test_a_request_whose_reply_is_dropped_is_executed(
        self, ec2: EC2Client, proxy: Ec2Proxy, account: Account, before: AccountState
    ) -> None:
        """The connection is closed, but the key pair exists."""
        proxy.drop_reply("CreateKeyPair")
        with pytest.raises(ConnectionClosedError):
            ec2.create_key_pair(KeyName="made-unheard")
        assert account.left_since(before).key_pairs == {"made-unheard"}

    def test_a_delayed_call_takes_longer(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """The delay is added to the answer's own time."""
        proxy.delay("DescribeVpcs", 0.4)
        began = time.monotonic()
        ec2.describe_vpcs()
        assert time.monotonic() - began >= 0.4

    def test_cleared_faults_no_longer_meet_anything(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """After `clear` the next call is answered."""
        proxy.throttle("DescribeVpcs", times=100)
        proxy.clear()
        assert ec2.describe_vpcs()["Vpcs"]

    def test_in_an_outage_every_connection_closes(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """A client with an open connection and one without both get no answer."""
        ec2.describe_vpcs()
        with proxy.outage():
            for client in (ec2, ec2_client(proxy.url)):
                with pytest.raises(HTTPClientError):
                    client.describe_vpcs()

    def test_in_an_outage_held_requests_are_lost(
        self, ec2: EC2Client, proxy: Ec2Proxy, account: Account, before: AccountState
    ) -> None:
        """A request that was held when the outage began is not executed."""
        with ThreadPoolExecutor() as pool, proxy.blocked("CreateKeyPair") as gate:
            pool.submit(ec2.create_key_pair, KeyName="lost")
            gate.wait_for_request(PATIENCE_SECONDS)
            with proxy.outage():
                gate.release()
                assert eventually(lambda: len(proxy.calls_of("CreateKeyPair")) == 1)
        assert account.left_since(before) == NOTHING

    def test_after_an_outage_calls_are_answered(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """The same client works again."""
        with proxy.outage():
            pass
        assert ec2.describe_vpcs()["Vpcs"]

    def test_a_dead_upstream_closes_the_connection(self) -> None:
        """Where nobody answers the proxy, it doesn't either."""
        with Ec2Proxy(f"http://127.0.0.1:{free_port()}") as proxy:
            with pytest.raises(BotoCoreError):
                ec2_client(proxy.url).describe_vpcs()
            assert [call.fault for call in proxy.calls] == ["no_answer"]


class TestHeldRequests:
    def test_a_blocked_request_is_executed_after_its_release(
        self, ec2: EC2Client, proxy: Ec2Proxy, account: Account
    ) -> None:
        """While the gate is shut nothing exists; afterwards the key pair does."""
        with ThreadPoolExecutor() as pool, proxy.blocked("CreateKeyPair") as gate:
            pool.submit(ec2.create_key_pair, KeyName="held")
            gate.wait_for_request(PATIENCE_SECONDS)
            while_held = account.snapshot_of_account().key_pairs
        assert "held" not in while_held
        assert "held" in account.snapshot_of_account().key_pairs

    def test_a_request_with_a_blocked_reply_is_executed_at_once(
        self, ec2: EC2Client, proxy: Ec2Proxy, account: Account
    ) -> None:
        """The resource exists while its maker still waits for the answer."""
        with ThreadPoolExecutor() as pool, proxy.reply_blocked("CreateKeyPair") as gate:
            pool.submit(ec2.create_key_pair, KeyName="mute")
            gate.wait_for_request(PATIENCE_SECONDS)
            assert "mute" in account.snapshot_of_account().key_pairs

    def test_waiting_for_a_request_gives_its_parameters(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """A test learns what the second request of an action asked for."""
        ec2.create_key_pair(KeyName="first")
        with ThreadPoolExecutor() as pool:
            pool.submit(ec2.create_key_pair, KeyName="second")
            assert proxy.wait_for("CreateKeyPair", PATIENCE_SECONDS, count=2)["KeyName"] == "second"

    def test_waiting_in_vain_ends(self, ec2: EC2Client, proxy: Ec2Proxy) -> None:
        """The error says what was seen instead."""
        ec2.describe_vpcs()
        with pytest.raises(TimeoutError, match="seen: DescribeVpcs"):
            proxy.wait_for("RunInstances", 0.05)

    def test_held_requests_do_not_keep_the_proxy_from_ending(self, moto: MotoServer) -> None:
        """At its end the proxy lets go of a request that is delayed and of one before a gate."""
        with ThreadPoolExecutor() as pool, ExitStack() as gates:
            with Ec2Proxy(moto.url) as proxy:
                ec2 = ec2_client(proxy.url)
                proxy.delay("DescribeVpcs", 600)
                gates.enter_context(proxy.blocked("DescribeSubnets"))
                asked: list[Future[Any]] = [pool.submit(ec2.describe_vpcs), pool.submit(ec2.describe_subnets)]
                for action in ("DescribeVpcs", "DescribeSubnets"):
                    proxy.wait_for(action, PATIENCE_SECONDS)
            assert not wait(asked, PATIENCE_SECONDS).not_done
