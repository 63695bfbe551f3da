"""Settings from the environment."""

import os
from datetime import timedelta
from pathlib import Path

import pytest

from kiln.settings import Ec2Mode, Settings, SettingsError, load_settings

BAD_VALUES = {
    "KILN_API_PORT": "http",
    "KILN_TEMPORAL_PORT": "0",
    "KILN_TEMPORAL_UI_PORT": "65536",
    "KILN_EC2_PORT": "-1",
    "KILN_EC2": "azure",
    "KILN_EC2_ENDPOINT": "http://ec2.example.org",
    "KILN_REGIONS": " , ",
    "KILN_COMMUNICATOR": "telnet",
    "KILN_PACKER_SLOTS": "0",
    "KILN_PACKER_TIMEOUT_SECONDS": "0",
    "KILN_HEARTBEAT_TIMEOUT_SECONDS": "0.5",
    "KILN_CANCEL_GRACE_SECONDS": "-1",
    "KILN_SETTLE_SECONDS": "soon",
    "KILN_HOUSE_SECONDS": "0",
    "KILN_SWEEP_SECONDS": "0",
    "KILN_SWEEP_GRACE_SECONDS": "-1",
    "KILN_CAPACITY_DELAY_SECONDS": "-1",
    "KILN_MAX_ATTEMPTS": "0",
    "KILN_MAX_BODY_BYTES": "10",
}
ENDPOINT = "KILN_EC2_ENDPOINT"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without settings."""
    for name in os.environ:
        if name.startswith("KILN_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("name", "value"), BAD_VALUES.items())
def test_a_wrong_value_is_refused_by_its_name(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Whatever is wrong is said in one line that names the setting."""
    environment.setenv(name, value)
    with pytest.raises(SettingsError, match=name) as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_nothing_needs_to_be_set() -> None:
    """The defaults are the embedded stack: simulated, on loopback, in one region."""
    settings = load_settings()
    assert (settings.simulated, settings.api_host, settings.default_region) == (True, "127.0.0.1", "us-east-1")


def test_credentials_that_lie_around_change_nothing(environment: pytest.MonkeyPatch) -> None:
    """EC2 is simulated unless the setting says otherwise, whatever AWS's variables hold."""
    environment.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    environment.setenv("AWS_ENDPOINT_URL", "https://ec2.example.org")
    settings = load_settings()
    assert (settings.ec2, settings.ec2_url) == (Ec2Mode.SIMULATED, "http://127.0.0.1:5555")


def test_aws_has_no_endpoint_of_kilns(environment: pytest.MonkeyPatch) -> None:
    """On AWS, boto3 and Packer find the endpoints themselves."""
    environment.setenv("KILN_EC2", "aws")
    settings = load_settings()
    assert (settings.simulated, settings.ec2_url) == (False, None)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:5555", "https://ec2.us-east-1.amazonaws.com"])
def test_aws_is_refused_with_an_endpoint(environment: pytest.MonkeyPatch, endpoint: str) -> None:
    """An endpoint that was left over from the simulation is not sent AWS's credentials."""
    environment.setenv("KILN_EC2", "aws")
    environment.setenv(ENDPOINT, endpoint)
    with pytest.raises(SettingsError, match=ENDPOINT):
        load_settings()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:7000", "http://localhost:7000", "http://[::1]:7000"])
def test_the_simulation_is_on_loopback(environment: pytest.MonkeyPatch, endpoint: str) -> None:
    """A simulated EC2 may stand on any port of this host."""
    environment.setenv(ENDPOINT, endpoint)
    assert load_settings().ec2_url == endpoint


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://ec2.us-east-1.amazonaws.com",
        "http://10.0.0.1:5555",
        "http://127.0.0.1.example.org",
        "http://127.0.0.1@example.org",
        "127.0.0.1:5555",
        "http://[::1",
    ],
)
def test_the_simulation_is_nowhere_else(environment: pytest.MonkeyPatch, endpoint: str) -> None:
    """No other host is taken for a simulated EC2."""
    environment.setenv(ENDPOINT, endpoint)
    with pytest.raises(SettingsError, match=ENDPOINT):
        load_settings()


def test_regions_are_a_list(environment: pytest.MonkeyPatch) -> None:
    """Regions are separated by commas; the first is the default."""
    environment.setenv("KILN_REGIONS", "eu-west-1, us-east-1,")
    settings = load_settings()
    assert (settings.regions, settings.default_region) == (("eu-west-1", "us-east-1"), "eu-west-1")


def test_a_foreign_variable_is_nothing(environment: pytest.MonkeyPatch) -> None:
    """Variables of other programs, and of later Kilns, do no harm."""
    environment.setenv("KILN_OF_THE_FUTURE", "1")
    assert load_settings() == Settings()


def test_data_stands_in_the_home(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catalog and logs are files of KILN_HOME unless they have a URL."""
    environment.setenv("KILN_HOME", str(tmp_path))
    settings = load_settings()
    assert settings.catalog_dsn == f"sqlite:///{tmp_path}/catalog.db"
    assert settings.logs_dsn == f"sqlite:///{tmp_path}/logs.db"


def test_a_database_url_comes_first(environment: pytest.MonkeyPatch) -> None:
    """A catalog with a URL is not looked for in KILN_HOME."""
    environment.setenv("KILN_CATALOG_URL", "postgresql://kiln@127.0.0.1/kiln")
    assert load_settings().catalog_dsn == "postgresql://kiln@127.0.0.1/kiln"


def test_a_lease_ends_before_the_heartbeat_timeout(environment: pytest.MonkeyPatch) -> None:
    """An attempt loses its build before Temporal gives the build to another."""
    environment.setenv("KILN_HEARTBEAT_TIMEOUT_SECONDS", "10")
    settings = load_settings()
    assert timedelta(0) < settings.lease < settings.heartbeat_timeout


@pytest.mark.parametrize(("mode", "seconds"), [("simulated", 0), ("aws", 20)])
def test_aws_takes_time_to_show_things(environment: pytest.MonkeyPatch, mode: str, seconds: int) -> None:
    """What was just made may be hidden on AWS, and never in the simulation."""
    environment.setenv("KILN_EC2", mode)
    assert load_settings().settle == timedelta(seconds=seconds)


def test_settings_do_not_change() -> None:
    """Settings are read once, and handed on as they are."""
    with pytest.raises(ValueError, match="frozen"):
        load_settings().packer = "other"  # type: ignore[misc]
