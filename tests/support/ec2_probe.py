"""Small questions that the proxy's own tests put to EC2."""

import time
from collections.abc import Callable

import pytest
from botocore.exceptions import ClientError
from mypy_boto3_ec2 import EC2Client

PATIENCE_SECONDS = 15.0
POLL_SECONDS = 0.05
UBUNTU = "ami-1e749f67"  # one of Canonical's that moto has


def run_instance(ec2: EC2Client) -> str:
    made = ec2.run_instances(ImageId=UBUNTU, MinCount=1, MaxCount=1, InstanceType="t3.micro")
    return made["Instances"][0]["InstanceId"]


def code_of(call: Callable[[], object]) -> str:
    """EC2's code of the error that `call` must end in."""
    with pytest.raises(ClientError) as caught:
        call()
    return caught.value.response["Error"]["Code"]


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within `PATIENCE_SECONDS`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(POLL_SECONDS)
    return False
