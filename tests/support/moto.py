"""Simulated EC2 for tests: `moto_server` as a process of its own, and its state as EC2 itself tells it."""

import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import boto3
from botocore.config import Config
from mypy_boto3_ec2 import EC2Client
from mypy_boto3_ec2.type_defs import FilterTypeDef

from support.servers import running_server

STARTED = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")
REGION = "us-east-1"
DUMMY_KEY = "testing"


# One for all clients: each new session reads EC2's large model again.
SESSION = boto3.Session(DUMMY_KEY, DUMMY_KEY, region_name=REGION)


def ec2_client(url: str, region: str = REGION, attempts: int = 1) -> EC2Client:
    """A client of EC2 at `url` that asks up to `attempts` times."""
    config = Config(retries={"total_max_attempts": attempts})
    return SESSION.client("ec2", region_name=region, endpoint_url=url, config=config)


@dataclass(frozen=True)
class AccountState:
    """What exists in one account and region: instances that aren't terminated, key pairs by name, security
    groups but the default ones, volumes, and the account's own AMIs (also pending ones) and snapshots."""

    instances: frozenset[str] = frozenset()
    key_pairs: frozenset[str] = frozenset()
    security_groups: frozenset[str] = frozenset()
    volumes: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()
    snapshots: frozenset[str] = frozenset()

    def __sub__(self, other: "AccountState") -> "AccountState":
        names = [each.name for each in fields(self)]
        return AccountState(**{name: getattr(self, name) - getattr(other, name) for name in names})


NOTHING = AccountState()


class Account:
    """Reads what exists, straight from simulated EC2."""

    def __init__(self, url: str, region: str = REGION) -> None:
        self.ec2 = ec2_client(url, region)
        self.account_id = SESSION.client("sts", endpoint_url=url).get_caller_identity()["Account"]

    def snapshot_of_account(self) -> AccountState:
        ec2 = self.ec2
        # By a filter, because moto ignores OwnerIds here.
        own: FilterTypeDef = {"Name": "owner-id", "Values": [self.account_id]}
        groups = ec2.describe_security_groups()["SecurityGroups"]
        images = ec2.describe_images(Owners=["self"])["Images"]
        snapshots = ec2.describe_snapshots(Filters=[own])["Snapshots"]
        return AccountState(
            instances=frozenset(self._instance_ids()),
            key_pairs=frozenset(pair["KeyName"] for pair in ec2.describe_key_pairs()["KeyPairs"]),
            security_groups=frozenset(one["GroupId"] for one in groups if one["GroupName"] != "default"),
            volumes=frozenset(volume["VolumeId"] for volume in ec2.describe_volumes()["Volumes"]),
            images=frozenset(image["ImageId"] for image in images),
            snapshots=frozenset(one["SnapshotId"] for one in snapshots),
        )

    def left_since(self, before: AccountState) -> AccountState:
        """What exists now and didn't then; equals `NOTHING` if the account is as it was found."""
        return self.snapshot_of_account() - before

    def _instance_ids(self) -> Iterator[str]:
        for page in self.ec2.get_paginator("describe_instances").paginate():
            for reservation in page["Reservations"]:
                for instance in reservation["Instances"]:
                    if instance["State"]["Name"] != "terminated":
                        yield instance["InstanceId"]


@dataclass(frozen=True)
class MotoServer:
    """A running `moto_server`."""

    url: str

    def account(self, region: str = REGION) -> Account:
        return Account(self.url, region)


@contextmanager
def running_moto() -> Iterator[MotoServer]:
    """Run `moto_server` on a free loopback port until the block's end. Raises as `running_server`."""
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", "0"]
    with tempfile.TemporaryFile() as output, running_server(command, STARTED, output) as url:
        yield MotoServer(url)
