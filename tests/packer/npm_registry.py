"""A private npm registry with one package in it, which answers only to who has its token."""

import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

PACKAGE = "@openai/codex"
COMMAND = "codex"


@dataclass
class NpmRegistry:
    """A running registry. `refused` and `served` hold the paths that were asked for."""

    token: str
    version: str
    url: str = ""
    served: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[str, bytes] | None:
        """Content type and body of a path; None for one that does not exist."""
        archive = _archive(self.version)
        if path == f"/{PACKAGE}":
            return "application/json", json.dumps(self._metadata(archive)).encode()
        if path == f"/{PACKAGE}.tgz":
            return "application/octet-stream", archive
        return None

    def _metadata(self, archive: bytes) -> dict[str, object]:
        # https://github.com/npm/registry/blob/main/docs/responses/package-metadata.md
        digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
        release = {
            "name": PACKAGE,
            "version": self.version,
            "bin": {COMMAND: "run.js"},
            "dist": {"tarball": f"{self.url}{PACKAGE}.tgz", "integrity": f"sha512-{digest}"},
        }
        return {"name": PACKAGE, "dist-tags": {"latest": self.version}, "versions": {self.version: release}}


def _archive(version: str) -> bytes:
    manifest = json.dumps({"name": PACKAGE, "version": version, "bin": {COMMAND: "run.js"}})
    program = f"#!/usr/bin/env node\nconsole.log('{COMMAND} {version}')\n"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in (("package/package.json", manifest), ("package/run.js", program)):
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


@contextmanager
def npm_registry(token: str, version: str) -> Iterator[NpmRegistry]:
    registry = NpmRegistry(token, version)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(self.path)
            if self.headers.get("Authorization") != f"Bearer {registry.token}":
                registry.refused.append(path)
                self.send_error(401)
                return
            answer = registry.answer(path)
            if answer is None:
                self.send_error(404)
                return
            registry.served.append(path)
            self.send_response(200)
            self.send_header("Content-Type", answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        registry.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()
