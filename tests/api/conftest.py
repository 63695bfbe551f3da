"""The API on a real catalog and a real Temporal without workers: what a test sees is the API's own doing."""

from collections.abc import Iterator

import pytest

from support.api_server import RunningApi, settings_for
from support.containers import Keeper, KilnsRegistry, Owner, kilns_registry, waiting_errands
from support.dev_temporal import DevTemporal, running_temporal
from support.ports import free_ports
from support.rows import fresh_database
from support.tenants import Tenant

REGIONS = ("us-east-1", "eu-central-1")


@pytest.fixture(scope="session", autouse=True)
def _own_temporal() -> Iterator[None]:
    """The environment may name a Temporal of somebody else's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TEMPORAL_ADDRESS", "TEMPORAL_NAMESPACE", "TEMPORAL_CONFIG_FILE", "TEMPORAL_PROFILE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def temporal() -> Iterator[DevTemporal]:
    with running_temporal() as server:
        yield server


@pytest.fixture(scope="session")
def sqlite_api(tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal) -> Iterator[RunningApi]:
    with RunningApi(settings_for(tmp_path_factory.mktemp("api"), temporal.port, regions=REGIONS)) as api:
        yield api


@pytest.fixture(scope="session")
def postgresql_api(
    tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal, postgres_url: str
) -> Iterator[RunningApi]:
    with fresh_database(postgres_url) as url:
        home = tmp_path_factory.mktemp("api")
        settings = settings_for(home, temporal.port, regions=REGIONS, catalog_url=url, logs_url=url)
        with RunningApi(settings) as api:
            yield api


@pytest.fixture
def api(request: pytest.FixtureRequest) -> RunningApi:
    """On SQLite, or on the database that the test's `on_both_databases` names."""
    database: str = getattr(request, "param", "sqlite")
    running: RunningApi = request.getfixturevalue(f"{database}_api")
    return running


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[Tenant]:
    """An organization of this test's own."""
    tenant = Tenant(api)
    yield tenant
    tenant.close()


@pytest.fixture
def neighbour(api: RunningApi) -> Iterator[Tenant]:
    """Another organization on the same server."""
    tenant = Tenant(api)
    yield tenant
    tenant.close()


@pytest.fixture
def owner(api: RunningApi) -> Iterator[Owner]:
    """An organization that uses container-images."""
    owner = Owner(api)
    yield owner
    owner.close()


@pytest.fixture
def stranger(api: RunningApi) -> Iterator[Owner]:
    """Another one on the same server."""
    stranger = Owner(api)
    yield stranger
    stranger.close()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilnsRegistry]:
    with kilns_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="session")
def registry_api(
    tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal, registry: KilnsRegistry
) -> Iterator[RunningApi]:
    """A server with a registry."""
    changes = {"registry": registry.host, "registry_token_key": registry.key_file}
    with RunningApi(settings_for(tmp_path_factory.mktemp("api"), temporal.port, **changes)) as api:
        yield api


@pytest.fixture(scope="session")
def lonely_api(
    tmp_path_factory: pytest.TempPathFactory, temporal: DevTemporal, registry: KilnsRegistry
) -> Iterator[RunningApi]:
    """A server whose registry does not answer."""
    changes = {"registry": f"127.0.0.1:{free_ports(1)[0]}", "registry_token_key": registry.key_file}
    with RunningApi(settings_for(tmp_path_factory.mktemp("lonely"), temporal.port, **changes)) as api:
        yield api


@pytest.fixture
def keeper(registry_api: RunningApi, registry: KilnsRegistry) -> Iterator[Keeper]:
    keeper = Keeper(registry_api, registry)
    yield keeper
    keeper.close()
    assert waiting_errands(registry_api, keeper.slug) == []


@pytest.fixture
def rival(registry_api: RunningApi, registry: KilnsRegistry) -> Iterator[Keeper]:
    """Another organization on the server with a registry."""
    rival = Keeper(registry_api, registry)
    yield rival
    rival.close()
