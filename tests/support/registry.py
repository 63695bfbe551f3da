"""A real registry as a process of its own: Docker's, with Kiln's tokens or without any, and a proxy that mounts nothing."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from kiln.registry_tokens import ISSUER, SERVICE, write_certificate
from support.servers import POLL_SECONDS, running_server

LISTENING = re.compile(r"listening on (127\.0\.0\.1:\d+)")
PROXY_SECONDS = 10.0


@contextmanager
def running_registry(folder: Path, key_file: Path | None = None, realm: str = "") -> Iterator[str]:
    """The host and port of a registry that keeps its data in `folder`, until the block's end.

    With the file of Kiln's key it takes tokens that this key signed, and sends clients without one to `realm`.
    """
    config = folder / "config.yml"
    config.write_text(json.dumps(_config(folder, key_file, realm)), encoding="utf-8")  # JSON is YAML, too
    command = ["docker-registry", "serve", str(config)]
    with (folder / "registry.log").open("w+b") as output, running_server(command, LISTENING, output) as host:
        yield host


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


def half_write(folder: Path, repository: str, tag: str) -> None:
    """What a registry leaves that dies while it writes a tag: its history is begun, and it points nowhere yet."""
    tags = folder / "data/docker/registry/v2/repositories" / repository / "_manifests/tags"
    (tags / tag / "index").mkdir(parents=True)


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
