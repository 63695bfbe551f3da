"""The tests talk to this machine only: whatever else an environment names is refused before the first of them runs."""

import sys
from collections.abc import Mapping
from urllib.parse import urlsplit

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost", "0.0.0.0", "::", ""})
URL_SETTINGS = ("KILN_EC2_ENDPOINT", "KILN_CATALOG_URL", "KILN_LOGS_URL", "KILN_URL", "TEMPORAL_ADDRESS")
AWS_URL_PREFIX = "AWS_ENDPOINT_URL"


def refusal(environment: Mapping[str, str]) -> str | None:
    """Why the tests must not run with these settings; None if they may."""
    if environment.get("KILN_EC2", "simulated") != "simulated":
        return "KILN_EC2: the tests run against the simulated EC2 only"
    for name, value in environment.items():
        if (name in URL_SETTINGS or name.startswith(AWS_URL_PREFIX)) and not _is_local(value):
            return f"{name}: the tests refuse an endpoint that is not loopback"
    return None


def _is_local(value: str) -> bool:
    return (urlsplit(value if "//" in value else f"//{value}").hostname or "") in LOOPBACK


def refuse_other_hosts() -> None:
    """From now on, a connection of this process to another host raises. It cannot be undone."""
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event != "socket.connect":
        return
    address = arguments[1]
    if isinstance(address, tuple) and not _is_loopback_address(str(address[0])):
        raise PermissionError(f"a test tried to reach {address[0]}, which is not this machine")


def _is_loopback_address(host: str) -> bool:
    return host in LOOPBACK or host.startswith("127.")
