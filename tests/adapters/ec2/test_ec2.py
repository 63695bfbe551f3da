"""How Ec2Cloud reaches EC2: credentials, retries, time-outs, and what its errors say."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from kiln.adapters.ec2 import CloudRefusedError, CloudUnavailableError, Ec2Cloud
from kiln.errors import ImageNotFoundError, UnavailableError
from support.ec2_editing import EditingProxy
from support.ec2_message import Reply, Request
from support.moto import REGION, Account, MotoServer

MOTO_ACCOUNT = "123456789012"
STRANGER_KEY = "AKIASTRANGER"
UNKNOWN_IMAGE_ID = "ami-00000000000000000"
PATIENCE_SECONDS = 10.0
PROXY_VARIABLES = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture
def hasty(proxy: EditingProxy) -> Iterator[Ec2Cloud]:
    """A cloud that asks once."""
    cloud = Ec2Cloud(simulated=True, endpoint_url=proxy.url, attempts=1)
    yield cloud
    cloud.close()


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def strange_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment and files full of somebody's settings for AWS, all of which would fail or lead elsewhere."""
    config = tmp_path / "config"
    config.write_text(
        "[default]\nregion = eu-west-3\nmax_attempts = 1\nuse_fips_endpoint = true\n"
        "endpoint_url = http://127.0.0.1:9\nca_bundle = /nowhere\ncredential_process = false\n"
    )
    credentials = tmp_path / "credentials"
    credentials.write_text(f"[default]\naws_access_key_id = {STRANGER_KEY}\naws_secret_access_key = stranger\n")
    settings = {
        "AWS_ACCESS_KEY_ID": STRANGER_KEY,
        "AWS_SECRET_ACCESS_KEY": "stranger",
        "AWS_SESSION_TOKEN": "stranger",
        "AWS_PROFILE": "no-such-profile",
        "AWS_CONFIG_FILE": str(config),
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ENDPOINT_URL_EC2": "http://127.0.0.1:9",
        "AWS_USE_FIPS_ENDPOINT": "true",
        "AWS_USE_DUALSTACK_ENDPOINT": "true",
        "AWS_DEFAULT_REGION": "eu-west-3",
        **dict.fromkeys(PROXY_VARIABLES, "http://127.0.0.1:9"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bare_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without anything that boto3 would take credentials from."""
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_simulated_cloud_asks_both_services_at_its_endpoint(cloud: Ec2Cloud, proxy: EditingProxy) -> None:
    """The account of a simulated EC2 is moto's, and EC2's and STS's calls both come to the endpoint."""
    cloud.own_images(REGION, [UNKNOWN_IMAGE_ID])

    assert cloud.account(REGION) == MOTO_ACCOUNT
    assert [call.action for call in proxy.calls] == ["DescribeImages", "GetCallerIdentity"]


@pytest.mark.usefixtures("strange_surroundings")
def test_a_simulated_cloud_takes_nothing_from_its_surroundings(proxy: EditingProxy) -> None:
    """Keys, profiles, endpoints and proxies of the environment and of AWS's files don't reach a simulated EC2."""
    cloud = Ec2Cloud(simulated=True, endpoint_url=proxy.url)

    cloud.own_images(REGION, [UNKNOWN_IMAGE_ID])
    cloud.account(REGION)
    cloud.close()

    authorizations = proxy.headers_of("Authorization")
    assert len(authorizations) == 2
    assert all("Credential=testing/" in each and f"/{REGION}/" in each for each in authorizations)
    assert proxy.headers_of("X-Amz-Security-Token") == []


@pytest.mark.usefixtures("bare_surroundings")
def test_a_real_cloud_takes_the_usual_credentials(proxy: EditingProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without simulation the credentials are boto3's usual ones, here those of the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", STRANGER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stranger")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    cloud = Ec2Cloud(simulated=False, endpoint_url=None)

    cloud.own_images(REGION, [UNKNOWN_IMAGE_ID])
    cloud.close()

    assert [f"Credential={STRANGER_KEY}/" in each for each in proxy.headers_of("Authorization")] == [True]


@pytest.mark.usefixtures("bare_surroundings")
def test_missing_credentials_are_a_refusal() -> None:
    """Without any credentials, a call on AWS is refused, before anything is sent."""
    cloud = Ec2Cloud(simulated=False, endpoint_url=None)

    with pytest.raises(CloudRefusedError) as refusal:
        cloud.own_images(REGION, [UNKNOWN_IMAGE_ID])

    assert refusal.value.code == "NoCredentialsError"


@pytest.mark.usefixtures("bare_surroundings")
def test_a_profile_that_is_not_there_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On AWS, a profile that no file has is refused by its name."""
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    cloud = Ec2Cloud(simulated=False, endpoint_url=None)

    with pytest.raises(CloudRefusedError, match="no-such-profile"):
        cloud.account(REGION)


@pytest.mark.parametrize(("simulated", "endpoint_url"), [(True, None), (True, ""), (False, "http://127.0.0.1:1")])
def test_simulation_and_endpoint_go_together(*, simulated: bool, endpoint_url: str | None) -> None:
    """A simulated EC2 without an endpoint, and AWS with one, are mistakes."""
    with pytest.raises(ValueError, match="endpoint"):
        Ec2Cloud(simulated=simulated, endpoint_url=endpoint_url)


def test_a_throttled_call_is_repeated(cloud: Ec2Cloud, proxy: EditingProxy) -> None:
    """EC2's RequestLimitExceeded is waited out."""
    proxy.throttle("DescribeImages", times=2)

    assert cloud.own_images(REGION, [UNKNOWN_IMAGE_ID]) == {}
    assert [call.fault for call in proxy.calls_of("DescribeImages")] == ["throttle", "throttle", None]


def test_throttling_without_end_is_unavailability(hasty: Ec2Cloud, proxy: EditingProxy) -> None:
    """When the attempts are used up, the error keeps EC2's code and can be retried."""
    proxy.throttle("DescribeImages")

    with pytest.raises(CloudUnavailableError, match=f"DescribeImages in {REGION}: RequestLimitExceeded"):
        hasty.own_images(REGION, [UNKNOWN_IMAGE_ID])


def test_a_throttled_deletion_does_not_count_as_gone(hasty: Ec2Cloud, proxy: EditingProxy) -> None:
    """A deletion that EC2 throttles says nothing of the AMI, so the pass fails."""
    proxy.throttle("DeregisterImage")

    with pytest.raises(CloudUnavailableError):
        hasty.delete_image(REGION, UNKNOWN_IMAGE_ID, ())


def test_an_outage_is_unavailability(cloud: Ec2Cloud, proxy: EditingProxy) -> None:
    """While EC2 drops every connection, calls fail as unavailable within the time of some attempts."""
    start = time.monotonic()

    with proxy.outage(), pytest.raises(UnavailableError):
        cloud.own_images(REGION, [UNKNOWN_IMAGE_ID])

    assert time.monotonic() - start < PATIENCE_SECONDS


def test_a_cloud_goes_on_after_an_outage(hasty: Ec2Cloud, proxy: EditingProxy) -> None:
    """The same client works again once EC2 does."""
    hasty.own_images(REGION, [UNKNOWN_IMAGE_ID])
    with proxy.outage(), pytest.raises(CloudUnavailableError):
        hasty.own_images(REGION, [UNKNOWN_IMAGE_ID])

    assert hasty.own_images(REGION, [UNKNOWN_IMAGE_ID]) == {}


def test_a_port_that_nobody_serves_is_unavailability(free_port: int) -> None:
    """A refused connection is unavailable, and the message names the endpoint."""
    cloud = Ec2Cloud(simulated=True, endpoint_url=f"http://127.0.0.1:{free_port}", attempts=1)

    with pytest.raises(CloudUnavailableError, match=str(free_port)):
        cloud.account(REGION)


def test_a_hung_endpoint_is_given_up(mute_port: int) -> None:
    """An endpoint that accepts and stays silent costs attempts x call_timeout, and some backing off."""
    endpoint_url = f"http://127.0.0.1:{mute_port}"
    cloud = Ec2Cloud(simulated=True, endpoint_url=endpoint_url, call_timeout=timedelta(seconds=0.3), attempts=2)
    start = time.monotonic()

    with pytest.raises(CloudUnavailableError):
        cloud.own_images(REGION, [UNKNOWN_IMAGE_ID])

    assert 0.6 <= time.monotonic() - start < PATIENCE_SECONDS


def test_an_answer_that_is_not_xml_is_unavailability(hasty: Ec2Cloud, proxy: EditingProxy) -> None:
    """A page that something before EC2 answers with is no answer."""
    body = b"<!doctype html><html lang=en><title>Bad gateway</title>"

    def spoil(_: Request, reply: Reply) -> Reply:
        return reply.with_body(body)

    proxy.edit("DescribeImages", spoil)

    with pytest.raises(CloudUnavailableError):
        hasty.own_images(REGION, [UNKNOWN_IMAGE_ID])


def test_a_missing_permission_is_a_refusal(cloud: Ec2Cloud, proxy: EditingProxy) -> None:
    """A refusal is not repeated, and keeps EC2's code and words."""
    proxy.fail("DescribeImages", "UnauthorizedOperation", "You are not authorized to perform this operation.", 403)

    with pytest.raises(CloudRefusedError, match="UnauthorizedOperation: You are not authorized") as refusal:
        cloud.own_images(REGION, [UNKNOWN_IMAGE_ID])

    assert refusal.value.code == "UnauthorizedOperation"
    assert len(proxy.calls) == 1


def test_a_wrong_signature_does_not_show_what_was_signed(cloud: Ec2Cloud, proxy: EditingProxy) -> None:
    """EC2 repeats signed headers in this error; Kiln's has just the code, and no cause that would tell."""
    proxy.fail("DescribeImages", "SignatureDoesNotMatch", "x-amz-security-token:very-secret", 403)

    with pytest.raises(CloudRefusedError) as refusal:
        cloud.own_images(REGION, [UNKNOWN_IMAGE_ID])

    assert str(refusal.value) == f"DescribeImages in {REGION}: SignatureDoesNotMatch"
    assert refusal.value.__cause__ is None


def test_an_unknown_image_cannot_be_tagged(cloud: Ec2Cloud, proxy: EditingProxy) -> None:
    """Tags for an AMI that EC2 doesn't know are an error of its own kind: it may be gone, or too fresh."""
    proxy.fail("CreateTags", "InvalidAMIID.NotFound", "The image id does not exist")

    with pytest.raises(ImageNotFoundError, match=r"InvalidAMIID\.NotFound"):
        cloud.tag(REGION, [UNKNOWN_IMAGE_ID], {"Name": "agent"})


def test_tags_are_put_on_resources(cloud: Ec2Cloud, account: Account) -> None:
    """EC2 has the tags afterwards."""
    volume_id = account.ec2.create_volume(Size=1, AvailabilityZone=f"{REGION}a")["VolumeId"]

    cloud.tag(REGION, [volume_id], {"Name": "agent", "team": "a=b"})

    volume = account.ec2.describe_volumes(VolumeIds=[volume_id])["Volumes"][0]
    assert {tag["Key"]: tag["Value"] for tag in volume["Tags"]} == {"Name": "agent", "team": "a=b"}


def test_no_tags_are_no_call(cloud: Ec2Cloud, proxy: EditingProxy) -> None:
    """EC2 refuses an empty CreateTags, so it isn't asked."""
    cloud.tag(REGION, [], {"Name": "agent"})
    cloud.tag(REGION, [UNKNOWN_IMAGE_ID], {})

    assert proxy.calls == ()


def test_a_warm_cloud_has_called_both_services(proxy: EditingProxy) -> None:
    """Warming up makes both clients and one call of each."""
    with closing(Ec2Cloud(simulated=True, endpoint_url=proxy.url)) as cloud:
        cloud.warm_up(REGION)

    assert [call.action for call in proxy.calls] == ["GetCallerIdentity", "DescribeImages"]


def test_many_threads_share_a_cloud(moto: MotoServer) -> None:
    """Threads that start at once in several regions each get an answer."""
    regions = ["us-east-1", "us-west-2", "eu-west-1"] * 4
    cloud = Ec2Cloud(simulated=True, endpoint_url=moto.url)
    with ThreadPoolExecutor(len(regions)) as threads:
        accounts = list(threads.map(cloud.account, regions))
    cloud.close()

    assert accounts == [MOTO_ACCOUNT] * len(regions)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
