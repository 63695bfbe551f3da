"""A PostgreSQL server for tests: a cluster of its own, gone with the block that asked for it."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

USER = "kiln"
# PostgreSQL refuses to run as root; Debian's packages make this user.
SYSTEM_USER = "postgres"
DEBIAN_PROGRAMS = "/usr/lib/postgresql"
START_SECONDS = 60
STOP_SECONDS = 60
POLL_SECONDS = 0.05
# Nothing here outlives a crash of the machine.
SETTINGS = (
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "listen_addresses=127.0.0.1",
    "max_connections=200",
)


@contextmanager
def postgres_server(base: Path) -> Iterator[str]:
    """The URL (`postgresql://…`) of a new server's database `postgres`; its log is in `base`."""
    with tempfile.TemporaryDirectory(prefix="kiln-postgres-", ignore_cleanup_errors=True) as folder:
        # Not in `base`: root's private folders are closed to the user that the server runs as.
        data = Path(folder, "data")
        data.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(folder, SYSTEM_USER)
            shutil.chown(data, SYSTEM_USER)
        with (base / "postgres.log").open("wb") as log:
            initdb = [*_as_server(), _program("initdb"), "-D", str(data), "-U", USER, "-A", "trust", "--no-sync"]
            subprocess.run([*initdb, "-E", "UTF8", "--locale=C.UTF-8"], check=True, cwd=folder, stdout=log, stderr=log)
            with _running(data, log.fileno()) as url:
                yield url


@contextmanager
def _running(data: Path, log: int) -> Iterator[str]:
    port = _free_port()
    options = [f"unix_socket_directories={data.parent}", f"port={port}", *SETTINGS]
    argv = [_program("postgres"), "-D", str(data), *(part for option in options for part in ("-c", option))]
    # Fast shutdown at SIGINT, immediate at SIGQUIT: https://www.postgresql.org/docs/current/server-shutdown.html
    with subprocess.Popen([*_as_server("--pdeathsig", "QUIT"), *argv], cwd=data, stdout=log, stderr=log) as server:
        try:
            url = f"postgresql://{USER}@127.0.0.1:{port}/postgres"
            _wait_until_it_answers(url, server)
            yield url
        finally:
            _stop(server)


def _as_server(*options: str) -> list[str]:
    """What to put before a command that must not, or may not, run as this user."""
    if os.geteuid() != 0:
        return ["setpriv", *options] if options else []
    return ["setpriv", "--reuid", SYSTEM_USER, "--regid", SYSTEM_USER, "--init-groups", *options]


def _program(name: str) -> str:
    """Debian keeps the server's programs out of the PATH, a folder for each version."""
    found = sorted(Path(DEBIAN_PROGRAMS).glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    program = str(found[-1]) if found else shutil.which(name)
    if program is None:
        raise FileNotFoundError(f"{name}: install PostgreSQL's server (Debian's package postgresql)")
    return program


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_until_it_answers(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < end:
        with suppress(psycopg.OperationalError):
            psycopg.connect(url, connect_timeout=5).close()
            return
        time.sleep(POLL_SECONDS)
    raise TimeoutError("PostgreSQL did not start; its log says why")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.send_signal(signal.SIGQUIT)
