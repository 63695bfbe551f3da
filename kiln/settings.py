"""Kiln's settings, read from the environment once at start-up and handed on. Names are `KILN_` and the field's name."""

import hashlib
import os
import platform
import tempfile
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from kiln.errors import InvalidRequestError, KilnError
from kiln.models import AGENT_PATH
from kiln.naming import PLATFORMS
from kiln.references import parse_reference

# Root's homes are closed to the users that its agents run as.
RUNNERS_DIR = Path("/var/lib/kiln")
PROJECT_ROOT = Path(__file__).resolve().parent.parent
# A Unix socket's path has at most 107 bytes; the rest of it is a run's own name and Packer's.
RUNS_PATH_LENGTH = 50
MACHINES = {"x86_64": "linux/amd64", "aarch64": "linux/arm64", "armv7l": "linux/arm/v7"}
ENGINE_SCHEMES = ("unix://", "tcp://", "ssh://")
WILDCARD_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104  to call, not to listen on
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})


class SettingsError(KilnError):
    """A setting is missing or wrong; the message names it."""


class Ec2Mode(StrEnum):
    """Where AMIs are made. Never guessed from credentials that happen to lie around."""

    SIMULATED = "simulated"
    AWS = "aws"


class Settings(BaseSettings):
    """All that an operator may set. docs/operating.md lists every name with its meaning."""

    model_config = SettingsConfigDict(env_prefix="KILN_", frozen=True, extra="ignore")

    home: Path = Path(".kiln")
    secret_key: str = ""

    api_host: str = "127.0.0.1"
    api_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    temporal_port: Annotated[int, Field(ge=1, le=65535)] = 7233
    temporal_ui_port: Annotated[int, Field(ge=1, le=65535)] = 8233
    temporal_ui_url: str = ""
    ec2_port: Annotated[int, Field(ge=1, le=65535)] = 5555
    registry_port: Annotated[int, Field(ge=1, le=65535)] = 5000
    public_url: str = ""

    catalog_url: str = ""
    logs_url: str = ""

    ec2: Ec2Mode = Ec2Mode.SIMULATED
    ec2_endpoint: str = ""
    regions: Annotated[tuple[str, ...], NoDecode] = ("us-east-1",)
    instance_type: str = "t3.medium"
    machine_disk_gb: Annotated[int, Field(ge=1, le=16384)] = 30
    machine_subnet_id: str = ""
    machine_security_groups: Annotated[tuple[str, ...], NoDecode] = ()
    machine_key_name: str = ""
    machine_instance_profile: str = ""
    ami_name_prefix: str = "kiln"
    subnet_id: str = ""
    iam_instance_profile: str = ""
    communicator: Literal["ssh", "ssm"] = "ssh"
    ssh_cidr: str = "0.0.0.0/0"
    ca_bundle: str = ""

    packer: str = "packer"
    packer_slots: Annotated[int, Field(ge=1, le=1000)] = 4
    packer_timeout_seconds: Annotated[int, Field(ge=1)] = 1800
    template_dir: Path | None = None
    agent_base_image: str = "debian:bookworm-slim"
    snapshot_timeout_seconds: Annotated[int, Field(ge=1)] = 7200

    containers: bool = True
    containers_off: str = ""
    registry: str = ""
    registry_token_key: Path | None = None
    engine_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    builder: str = ""
    buildx: str = "docker buildx"
    skopeo: str = "skopeo"
    platforms: Annotated[tuple[str, ...], NoDecode] = ()
    container_slots: Annotated[int, Field(ge=1, le=100)] = 2
    container_timeout_seconds: Annotated[int, Field(ge=1)] = 3600
    slot_memory_bytes: Annotated[int, Field(ge=64 * 1024**2)] = 4 * 1024**3
    slot_cpus: Annotated[float, Field(gt=0)] = 2.0
    slot_processes: Annotated[int, Field(ge=16)] = 2048
    slot_cache_bytes: Annotated[int, Field(ge=0)] = 10 * 1000**3
    registry_cache: bool = False
    transfer_registries: Annotated[tuple[str, ...], NoDecode] = ()
    transfer_slots: Annotated[int, Field(ge=1, le=100)] = 2

    objects: str = ""
    s3_endpoint: str = ""
    upload_seconds: Annotated[int, Field(ge=1)] = 3600
    max_context_bytes: Annotated[int, Field(ge=1024)] = 500 * 1000**2
    max_unpacked_bytes: Annotated[int, Field(ge=1024)] = 20 * 1000**3
    max_context_members: Annotated[int, Field(ge=1)] = 200_000

    runner_token: Annotated[str, Field(repr=False)] = ""
    api_url: str = ""
    runner_places: Annotated[int, Field(ge=1, le=1000)] = 4
    runner_custom_commands: bool = False
    runner_dir: Path | None = None
    runner_engine: str = ""
    agent_uids: Annotated[str, Field(pattern=r"^[1-9][0-9]{2,8}-[1-9][0-9]{2,8}$")] = "200000-209999"
    agent_path: Annotated[str, Field(pattern=r"^/[^:]*(:/[^:]*)*$")] = AGENT_PATH
    pod_memory_mb: Annotated[int, Field(ge=16)] = 4096
    pod_processes: Annotated[int, Field(ge=8)] = 1024
    pod_cpus: Annotated[float, Field(gt=0)] = 2.0
    pod_grace_seconds: Annotated[float, Field(ge=0)] = 10.0
    pod_lease_seconds: Annotated[float, Field(ge=10)] = 300.0
    sandbox_days: Annotated[float, Field(ge=0)] = 7.0

    rate_storage: str = ""
    container_build_rate: str = "150/minute"
    container_list_rate: str = "300/minute"
    container_delete_rate: str = "100/minute"
    container_patch_rate: str = "50/minute"

    heartbeat_timeout_seconds: Annotated[float, Field(ge=1)] = 15.0
    cancel_grace_seconds: Annotated[float, Field(ge=0)] = 60.0
    settle_seconds: Annotated[float, Field(ge=0)] | None = None
    house_seconds: Annotated[float, Field(ge=0.2)] = 10.0
    sweep_seconds: Annotated[float, Field(ge=1)] = 300.0
    sweep_grace_seconds: Annotated[float, Field(ge=0)] = 300.0
    capacity_delay_seconds: Annotated[float, Field(ge=0)] = 30.0
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 10

    max_body_bytes: Annotated[int, Field(ge=1024)] = 1024 * 1024
    machine_build_rate: str = ""
    pod_rate: str = ""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator(
        "regions", "engine_hosts", "platforms", "transfer_registries", "machine_security_groups", mode="before"
    )
    @classmethod
    def _split_names(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("agent_base_image")
    @classmethod
    def _check_reference(cls, value: str) -> str:
        try:
            return str(parse_reference(value))
        except InvalidRequestError as error:
            raise ValueError(error.problem) from None

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        strange = [host for host in self.engine_hosts if not host.startswith(ENGINE_SCHEMES)]
        if strange:
            raise ValueError(f"KILN_ENGINE_HOSTS: {strange[0]} begins with none of {', '.join(ENGINE_SCHEMES)}")
        unknown = set(self.platforms) - set(PLATFORMS)
        if unknown:
            raise ValueError(f"KILN_PLATFORMS names {min(unknown)}, which is none of {', '.join(PLATFORMS)}")
        if not self.regions:
            raise ValueError("KILN_REGIONS names no region")
        if self.ec2 is Ec2Mode.AWS and self.ec2_endpoint:
            raise ValueError("KILN_EC2_ENDPOINT is for the simulated EC2 only; unset it with KILN_EC2=aws")
        if self.ec2 is Ec2Mode.SIMULATED and not _is_loopback(self.simulated_endpoint):
            raise ValueError("KILN_EC2_ENDPOINT must be a loopback address: the simulated EC2 runs on this host")
        return self

    @property
    def simulated(self) -> bool:
        return self.ec2 is Ec2Mode.SIMULATED

    @property
    def simulated_endpoint(self) -> str:
        return self.ec2_endpoint or f"http://127.0.0.1:{self.ec2_port}"

    @property
    def ec2_url(self) -> str | None:
        """The endpoint of the simulated EC2; None on AWS, whose endpoints boto3 and Packer know."""
        return self.simulated_endpoint if self.simulated else None

    @property
    def default_region(self) -> str:
        return self.regions[0]

    @property
    def home_dir(self) -> Path:
        return self.home.expanduser().resolve()

    @property
    def runs_dir(self) -> Path:
        """Where Packer's runs have their directories. Its plugins listen on sockets in them, whose paths must be short."""
        runs = self.home_dir / "runs"
        if len(str(runs)) <= RUNS_PATH_LENGTH:
            return runs
        mark = hashlib.sha256(str(self.home_dir).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"kiln-runs-{mark}"

    @property
    def pods_dir(self) -> Path:
        """Where a runner keeps its pods, whose agents must get there as other users than the runner's."""
        if self.runner_dir is not None:
            return self.runner_dir.expanduser().resolve()
        if os.geteuid():
            return self.home_dir / "runner"
        mark = hashlib.sha256(str(self.home_dir).encode()).hexdigest()[:12]
        return RUNNERS_DIR / f"runner-{mark}"

    @property
    def registry_host(self) -> str:
        """The registry as image references name it."""
        return self.registry or f"127.0.0.1:{self.registry_port}"

    @property
    def registry_key_file(self) -> Path:
        """The private key, and its certificate after it, that sign the tokens which open the registry (PEM)."""
        return self.registry_token_key or self.home_dir / "registry-token.pem"

    @property
    def base_url(self) -> str:
        """Where clients reach the API: KILN_PUBLIC_URL, or this host's own address."""
        host = WILDCARD_HOSTS.get(self.api_host, self.api_host)
        return (self.public_url or f"http://{host}:{self.api_port}").rstrip("/")

    @property
    def builder_platforms(self) -> tuple[str, ...]:
        """The platforms that this host's builders serve: KILN_PLATFORMS, or the host's own. The first is the default."""
        return self.platforms or (MACHINES.get(platform.machine(), "linux/amd64"),)

    @property
    def container_timeout(self) -> timedelta:
        return timedelta(seconds=self.container_timeout_seconds)

    @property
    def upload_patience(self) -> timedelta:
        """How long a build waits for its context."""
        return timedelta(seconds=self.upload_seconds)

    @property
    def catalog_dsn(self) -> str:
        return self.catalog_url or f"sqlite:///{self.home_dir / 'catalog.db'}"

    @property
    def logs_dsn(self) -> str:
        return self.logs_url or f"sqlite:///{self.home_dir / 'logs.db'}"

    @property
    def ui_url(self) -> str:
        return (self.temporal_ui_url or f"http://127.0.0.1:{self.temporal_ui_port}").rstrip("/")

    @property
    def packer_timeout(self) -> timedelta:
        return timedelta(seconds=self.packer_timeout_seconds)

    @property
    def snapshot_timeout(self) -> timedelta:
        return timedelta(seconds=self.snapshot_timeout_seconds)

    @property
    def heartbeat_timeout(self) -> timedelta:
        return timedelta(seconds=self.heartbeat_timeout_seconds)

    @property
    def lease(self) -> timedelta:
        """How long an attempt holds its build without renewal: it ends before the heartbeat time-out does."""
        return self.heartbeat_timeout * 0.8

    @property
    def settle(self) -> timedelta:
        """How long EC2 may hide what was just made from a `Describe` call."""
        seconds = self.settle_seconds
        return timedelta(seconds=(0.0 if self.simulated else 20.0) if seconds is None else seconds)


def _is_loopback(url: str) -> bool:
    try:
        return urlsplit(url).hostname in LOOPBACK_HOSTS
    except ValueError:
        return False


def load_settings() -> Settings:
    """The settings of this process's environment.

    Raises SettingsError with one line that names the setting.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "KILN_" + "_".join(str(part) for part in first["loc"]).upper() if first["loc"] else ""
        problem = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{name}: {problem}" if name else problem) from None
