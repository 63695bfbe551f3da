"""What can be found wrong before anything is started."""

import errno
import random
import shutil
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from kiln.errors import KilnError, ToolMissingError, UnavailableError
from kiln.settings import Settings, SettingsError

# Below Linux's range for outgoing connections, which would take a free port away again.
FREE_PORTS = range(12000, 32000)
FREE_PORT_TRIES = 1000
ANSWER_SECONDS = 5.0
ANY_HOST = "127.0.0.1"


class PortTakenError(KilnError):
    """A port cannot be listened on; the message names it and its setting."""


def check_packer(settings: Settings) -> None:
    """Raises ToolMissingError."""
    if shutil.which(settings.packer) is None:
        raise ToolMissingError(f"{settings.packer} is not installed: apt-get install packer, or set KILN_PACKER")


def check_ports(ports: Mapping[str, tuple[str, int]]) -> None:
    """Whether each setting's host and port can be listened on. Raises PortTakenError."""
    owners: dict[int, str] = {}
    for setting, (host, port) in ports.items():
        if port in owners:
            raise PortTakenError(f"{owners[port]} and {setting} are both {port}: set one of them to another port")
        owners[port] = setting
        problem = _problem(host, port)
        if problem:
            raise PortTakenError(problem.format(setting=setting))


def check_answers(address: str, what: str) -> None:
    """Whether somebody accepts connections at `host:port`. Raises UnavailableError with `what` and the address."""
    place = urlsplit(f"//{address}")
    try:
        socket.create_connection((place.hostname, place.port), ANSWER_SECONDS).close()
    except (OSError, ValueError, TypeError):
        raise UnavailableError(what.format(address=address)) from None


def free_ports(count: int) -> list[int]:
    """Different ports of this host that nobody listens on now. Raises PortTakenError if there are too few."""
    found: set[int] = set()
    for _ in range(FREE_PORT_TRIES):
        port = random.choice(FREE_PORTS)  # noqa: S311  not a secret
        if not _problem(ANY_HOST, port):
            found.add(port)
        if len(found) == count:
            return list(found)
    raise PortTakenError(f"no {count} free ports between {FREE_PORTS.start} and {FREE_PORTS.stop}")


def _problem(host: str, port: int) -> str:
    """Why one cannot listen there, as a text with the place `{setting}`; empty if one can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A port whose last connections linger (TIME_WAIT) is free all the same.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        return f"KILN_API_HOST: {host} is no address of this host"
    except PermissionError:
        return f"port {port} needs more rights than this user has: set {{setting}}"
    except OSError as error:
        return f"port {port} is taken: set {{setting}}" if _in_use(error) else f"{host}: {error.strerror}"
    return ""


def _in_use(error: OSError) -> bool:
    return error.errno == errno.EADDRINUSE


def check_objects(settings: Settings) -> None:
    """Raises SettingsError if the contexts are to go to AWS, whose credentials the parts of this stack do not have."""
    if settings.simulated and settings.objects.startswith("s3://") and not settings.s3_endpoint:
        raise SettingsError(
            "KILN_OBJECTS: beside a simulated EC2 the stack's parts have no AWS credentials; "
            "set KILN_S3_ENDPOINT to an S3 on this host, or KILN_EC2=aws"
        )
