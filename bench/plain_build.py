"""Builds by Packer alone: the command, variables and environment that Kiln would give it, and no Kiln."""

import subprocess
import tempfile
import threading
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from api.machine_requests import understand
from bench.figures import MeasurementError
from bench.kiln_build import BODY, BUILD_SECONDS, QUIET_SECONDS
from kiln.adapters.ec2 import Ec2Cloud
from kiln.adapters.packer import PackerPlace, PackerRuns
from kiln.adapters.templates import Templates
from kiln.ports import Order, PackerJob
from kiln.settings import PROJECT_ROOT, Settings

# Not the stack's own: its house-keeping has no business with these builds.
INSTALLATION = str(uuid.uuid4())
ARTIFACT = b",artifact,0,id,"


@dataclass(frozen=True)
class PlainBuild:
    """How long Packer ran, and how long it still ran after its last line (`exit_seconds`)."""

    seconds: float
    exit_seconds: float


class PlainBuilds:
    """`packer build` on the EC2 of these settings, as a context manager that removes its files."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._resources = ExitStack()
        templates = Templates(PROJECT_ROOT / "packer", settings.template_dir)
        self._spec = understand(dict(BODY), settings, templates).spec
        work_dir = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="kiln-bench-")))
        self._kit = PackerRuns(_place(settings, work_dir), templates)
        self._group = ""

    def __enter__(self) -> Self:
        """Makes the security group that all these builds share, outside of what is measured."""
        settings = self._settings
        cloud = Ec2Cloud(simulated=settings.simulated, endpoint_url=settings.ec2_url)
        self._resources.callback(cloud.close)
        self._group = cloud.make_security_group(self._spec.region, self._kit.security_group(self._order()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def build(self) -> PlainBuild:
        """One build. Raises MeasurementError unless it makes an AMI."""
        job = self._kit.prepare(self._order(), self._group)
        try:
            time.sleep(QUIET_SECONDS)
            return _run(job)
        finally:
            self._kit.discard(job)

    def _order(self) -> Order:
        return Order(build_id=str(uuid.uuid4()), attempt=1, spec=self._spec, secrets={})


def _run(job: PackerJob) -> PlainBuild:
    began = last = time.perf_counter()
    made = False
    with subprocess.Popen(
        job.argv,
        env=dict(job.env),
        cwd=job.cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(BUILD_SECONDS, process.kill)
        watchdog.start()
        for line in process.stdout:
            last = time.perf_counter()
            made = made or ARTIFACT in line
        code = process.wait()
        ended = time.perf_counter()
        watchdog.cancel()
    if code or not made:
        raise MeasurementError(f"packer build ended with exit code {code}, and an AMI: {made}")
    return PlainBuild(seconds=ended - began, exit_seconds=ended - last)


def _place(settings: Settings, work_dir: Path) -> PackerPlace:
    """As the worker makes it of the same settings."""
    return PackerPlace(
        program=settings.packer,
        work_dir=work_dir,
        installation=INSTALLATION,
        ec2_url=settings.ec2_url,
        name_prefix=settings.ami_name_prefix,
        subnet_id=settings.subnet_id,
        iam_instance_profile=settings.iam_instance_profile,
        communicator=settings.communicator,
        ssh_cidr=settings.ssh_cidr,
        ca_bundle=settings.ca_bundle,
    )
