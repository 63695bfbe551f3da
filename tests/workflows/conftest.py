"""Each test of the workflows has a time-skipping server, a catalog and an EC2 of its own."""

import logging
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from kiln.catalog.session import Catalog
from support.container_harness import ContainerHarness
from support.dev_temporal import DevTemporal, running_temporal
from support.harness import Harness, copied_catalog, register_search_attributes
from support.machine_harness import MachineHarness
from support.pod_harness import PodHarness
from support.troubled_registry import RegistrySite, registry_site
from workflows.start import SEARCH_ATTRIBUTES


@pytest_asyncio.fixture
async def environment() -> AsyncIterator[WorkflowEnvironment]:
    """A Temporal server that skips time while a test waits for a workflow's end.

    One for each test: it never skips again once an activity was cancelled that no worker had taken.
    """
    program = str(Path(sys.executable).with_name("temporal-test-server"))
    async with await WorkflowEnvironment.start_time_skipping(
        test_server_existing_path=program, data_converter=pydantic_data_converter
    ) as environment:
        await register_search_attributes(environment.client)
        yield environment


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite catalog with its tables, to be copied."""
    file = tmp_path_factory.mktemp("migrated") / "catalog.db"
    catalog = Catalog(f"sqlite:///{file}")
    catalog.migrate()
    catalog.close()
    return file


@pytest.fixture
def kiln(environment: WorkflowEnvironment, migrated_file: Path, tmp_path: Path) -> Iterator[Harness]:
    """A Kiln without workers: a test starts those that it needs."""
    harness = Harness(environment.client, copied_catalog(migrated_file, tmp_path), tmp_path, skips_time=True)
    yield harness
    harness.close()


@pytest.fixture
def machine_kiln(
    environment: WorkflowEnvironment, migrated_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MachineHarness]:
    """A Kiln for machines, whose activities look often."""
    for module in ("machines", "snapshot", "ami_search"):
        monkeypatch.setattr(f"activities.{module}.POLL", timedelta(milliseconds=50))
    catalog = copied_catalog(migrated_file, tmp_path)
    harness = MachineHarness(environment.client, catalog, tmp_path, skips_time=True)
    yield harness
    harness.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistrySite]:
    with registry_site(tmp_path_factory.mktemp("registry")) as site:
        yield site


@pytest.fixture
def container_kiln(
    environment: WorkflowEnvironment, migrated_file: Path, tmp_path: Path, site: RegistrySite
) -> Iterator[ContainerHarness]:
    """A Kiln for container images, whose registry the tests of one file share."""
    catalog = copied_catalog(migrated_file, tmp_path)
    harness = ContainerHarness(environment.client, catalog, tmp_path, site, skips_time=True)
    yield harness
    harness.close()


@pytest.fixture(scope="module")
def pod_temporal() -> Iterator[DevTemporal]:
    """A server for the pods of one file, to which a history is long soon: Temporal's own limit is 4096 events."""
    with running_temporal(limit__historyCount__suggestContinueAsNew="60") as temporal:
        yield temporal


@pytest_asyncio.fixture
async def pod_kiln(pod_temporal: DevTemporal, migrated_file: Path, tmp_path: Path) -> AsyncIterator[PodHarness]:
    """A Kiln for pods, with a runner."""
    client = await Client.connect(f"127.0.0.1:{pod_temporal.port}", data_converter=pydantic_data_converter)
    harness = PodHarness(client, copied_catalog(migrated_file, tmp_path), tmp_path, skips_time=False)
    yield harness
    await harness.leave()
    harness.close()


@pytest_asyncio.fixture
async def real_kiln(migrated_file: Path, tmp_path: Path) -> AsyncIterator[Harness]:
    """A Kiln on a server that skips no time: the other one misses no heartbeat once a cancel was asked for."""
    async with await WorkflowEnvironment.start_local(
        dev_server_existing_path=str(Path(sys.executable).with_name("temporal")),
        dev_server_log_level="error",
        data_converter=pydantic_data_converter,
        search_attributes=SEARCH_ATTRIBUTES,
    ) as environment:
        harness = Harness(environment.client, copied_catalog(migrated_file, tmp_path), tmp_path, skips_time=False)
        yield harness
        harness.close()


@pytest.fixture(autouse=True)
def _no_errors_of_the_sdk(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A workflow task or an eviction that fails is tried again, and would be seen in the log only."""
    yield
    errors = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in errors if record.name.startswith("temporalio.")] == []
