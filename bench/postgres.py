"""A PostgreSQL server on loopback with a cluster of its own, as its packages set one up."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.figures import MeasurementError
from bench.place import free_ports

USER = "kiln"
# PostgreSQL refuses to run as root; its packages make this user.
SYSTEM_USER = "postgres"
# Debian keeps the server's programs out of the PATH, a folder for each version.
DEBIAN_FOLDERS = ("/usr/lib/postgresql", "*/bin/postgres")
START_SECONDS = 30.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.05


def postgres_programs() -> Path | None:
    """The folder of the newest server's programs, if this machine has one."""
    found = sorted(Path(DEBIAN_FOLDERS[0]).glob(DEBIAN_FOLDERS[1]), key=lambda path: float(path.parts[-3]))
    program = str(found[-1]) if found else shutil.which("postgres")
    return Path(program).parent if program else None


@contextmanager
def running_postgres(programs: Path) -> Iterator[str]:
    """The URL of its only database, until the block's end."""
    with tempfile.TemporaryDirectory(prefix="kiln-bench-", ignore_cleanup_errors=True) as home:
        folder = Path(home)
        if os.geteuid() == 0:
            shutil.chown(folder, SYSTEM_USER)
        data, log = folder / "data", folder / "log"
        made = [str(programs / "initdb"), "-D", str(data), "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8"]
        with log.open("wb") as output:
            subprocess.run([*_as_server(), *made], cwd=folder, stdout=output, stderr=output, check=True)
            with _served(programs, data, output.fileno(), log) as port:
                yield f"postgresql://{USER}@127.0.0.1:{port}/postgres"


@contextmanager
def _served(programs: Path, data: Path, output: int, log: Path) -> Iterator[int]:
    (port,) = free_ports(1)
    options = (f"port={port}", f"unix_socket_directories={data.parent}", "listen_addresses=127.0.0.1")
    command = [str(programs / "postgres"), "-D", str(data), *(word for option in options for word in ("-c", option))]
    # However the bench ends, the server ends with it.
    guarded = [*_as_server("--pdeathsig", "QUIT"), *command]
    with subprocess.Popen(guarded, cwd=data, stdout=output, stderr=output, start_new_session=True) as server:
        try:
            _wait(programs, server, port, log)
            yield port
        finally:
            _stop(server)


def _as_server(*options: str) -> list[str]:
    """What a command is begun with: root's runs as the packages' user."""
    who = ["--reuid", SYSTEM_USER, "--regid", SYSTEM_USER, "--init-groups"] if os.geteuid() == 0 else []
    return ["setpriv", *who, *options] if who or options else []


def _wait(programs: Path, server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    asked = [str(programs / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={port}"]
    while time.monotonic() < deadline and server.poll() is None:
        if subprocess.run(asked, check=False).returncode == 0:
            return
        time.sleep(POLL_SECONDS)
    raise MeasurementError(f"PostgreSQL does not start: {log.read_text().strip()}")


def _stop(server: "subprocess.Popen[bytes]") -> None:
    # Fast shutdown, then immediate: https://www.postgresql.org/docs/current/server-shutdown.html
    server.send_signal(signal.SIGINT)
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.send_signal(signal.SIGQUIT)
