"""Simulated EC2 for tests: `moto_server` as a process of its own, and its state as EC2 itself tells it."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import boto3
from botocore.config import Config
from mypy_boto3_ec2 import EC2Client
from mypy_boto3_ec2.type_defs import FilterTypeDef

START_SECONDS = 30.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.05
STARTED = re.compile(rb"Running on (http://127\.0\.0\.1:\d+)")
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
    pid: int

    def account(self, region: str = REGION) -> Account:
        return Account(self.url, region)


@contextmanager
def running_moto() -> Iterator[MotoServer]:
    """Run `moto_server` on a free loopback port until the block's end.

    Raises RuntimeError with its output if it ends at once, TimeoutError if it doesn't answer in time.
    """
    with tempfile.TemporaryFile() as output:
        process = _start(output)
        try:
            yield MotoServer(_url_of(process, output), process.pid)
        finally:
            _stop(process)


def _start(output: BinaryIO) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", "0"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def _url_of(process: subprocess.Popen[bytes], output: BinaryIO) -> str:
    """The address it prints once it listens."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        printed = os.pread(output.fileno(), 65536, 0)
        if started := STARTED.search(printed):
            return started.group(1).decode()
        if process.poll() is not None:
            raise RuntimeError(f"moto_server ended: {printed.decode(errors='replace')}")
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"moto_server doesn't answer within {START_SECONDS} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
