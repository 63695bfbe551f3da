"""nginx on loopback that takes files by PUT: what a web server without a check can do."""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

from bench.figures import MeasurementError
from bench.place import free_ports
from cli.engines import search_path

START_SECONDS = 10.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02
CONFIG = """\
{user}daemon off;
worker_processes 1;
pid nginx.pid;
error_log error.log;
events {{}}
http {{
    access_log off;
    client_max_body_size 0;
    client_body_buffer_size 1m;
    client_body_temp_path body;
    fastcgi_temp_path unused;
    proxy_temp_path unused;
    scgi_temp_path unused;
    uwsgi_temp_path unused;
    server {{
        listen 127.0.0.1:{port};
        root files;
        location / {{ dav_methods PUT; }}
    }}
}}
"""


def nginx_program() -> str | None:
    """Where nginx is, if this machine has it."""
    return which("nginx", path=search_path())


@contextmanager
def running_nginx(program: str) -> Iterator[tuple[str, Path]]:
    """Its URL, and the folder into which it puts what is sent to it, until the block's end."""
    with tempfile.TemporaryDirectory(prefix="kiln-bench-") as home:
        folder = Path(home)
        (folder / "files").mkdir()
        (port,) = free_ports(1)
        # Root's nginx would put its files as somebody else, who may not write here.
        user = "user root root;\n" if os.geteuid() == 0 else ""
        config = folder / "nginx.conf"
        config.write_text(CONFIG.format(user=user, port=port))
        command = [program, "-p", home, "-c", str(config), "-e", str(folder / "error.log")]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                _wait(process, port, folder / "error.log")
                yield f"http://127.0.0.1:{port}", folder / "files"
            finally:
                _stop(process)


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(POLL_SECONDS)
    said = log.read_text().strip() if log.exists() else "it said nothing"
    raise MeasurementError(f"nginx does not start: {said}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
