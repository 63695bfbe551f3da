"""A real registry as a process of its own: Docker's, with Kiln's tokens or without any, and a proxy that mounts nothing."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from kiln.registry_tokens import ISSUER, SERVICE, write_certificate

START_SECONDS = 20.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02
LISTENING = re.compile(r"listening on (127\.0\.0\.1:\d+)")
PROXY_SECONDS = 10.0


@contextmanager
def running_registry(folder: Path, key_file: Path | None = None, realm: str = "") -> Iterator[str]:
    """The host and port of a registry that keeps its data in `folder`, until the block's end.

    With the file of Kiln's key it takes tokens that this key signed, and sends clients without one to `realm`.
    """
    config = folder / "config.yml"
    config.write_text(json.dumps(_config(folder, key_file, realm)), encoding="utf-8")  # JSON is YAML, too
    with (folder / "registry.log").open("wb") as output:
        command = ["docker-registry", "serve", str(config)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield _host_of(process, folder / "registry.log")
    finally:
        _stop(process)


def _config(folder: Path, key_file: Path | None, realm: str) -> dict[str, object]:
    config: dict[str, object] = {
        "version": "0.1",
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}},
        "http": {"addr": "127.0.0.1:0", "secret": "known to these tests only"},
    }
    if key_file is not None:
        certificate = folder / "token-certificate.pem"
        write_certificate(key_file, certificate)
        token = {"realm": realm, "service": SERVICE, "issuer": ISSUER, "rootcertbundle": str(certificate)}
        config["auth"] = {"token": token}
    return config


def _host_of(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        printed = log.read_text(errors="replace")
        if started := LISTENING.search(printed):
            return started[1]
        if process.poll() is not None:
            raise RuntimeError(f"docker-registry ended: {printed}")
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"docker-registry does not listen within {START_SECONDS} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The host and port of a small server on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": POLL_SECONDS})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def without_mounts(host: str) -> Iterator[str]:
    """The same registry behind a proxy through which it never mounts a blob, as some registries never do."""

    class Proxy(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0] if "mount=" in self.path else self.path
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            with httpx.Client(trust_env=False, verify=False, timeout=PROXY_SECONDS) as client:
                answer = client.request(self.command, f"http://{host}{path}", content=body, headers=headers)
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _forward  # noqa: N815  the base class's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
            pass

    with serving(Proxy) as proxy:
        yield proxy
