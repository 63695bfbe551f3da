"""Calls that Kiln carried out and whose answers never arrived."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from support.runner_rig import RunnerRig


class Lossy(ThreadingHTTPServer):
    """Passes calls on to a server, and keeps back its first answer to those whose path ends in `call`."""

    daemon_threads = True

    def __init__(self, target: str, call: str) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.target = target
        self.call = call
        self.lost = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Passing(BaseHTTPRequestHandler):
    server: Lossy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name: self.headers[name] for name in ("Authorization", "Content-Type")}
        answer = httpx.post(self.server.target + self.path, content=body, headers=headers, timeout=40, trust_env=False)
        if self.path.endswith(self.server.call) and not self.server.lost.is_set():
            self.server.lost.set()
            self.close_connection = True
            return
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""


@contextmanager
def losing(target: str, call: str) -> Iterator[Lossy]:
    with Lossy(target, call) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("call", ["/beat", "/begin", "/started", "/log", "/ended"])
async def test_lost_reply(rig: RunnerRig, call: str):
    """A call that was carried out, and whose answer was lost, is repeated: the pod has one agent, its log every line once,
    and its end is its own."""
    ref = rig.pod("echo one; sleep 0.3; echo two; exit 3")
    with losing(rig.api.url, call) as server:
        async with rig.process(url=server.url) as process:
            assert (await process.run(ref)).exit_code == 3
        assert server.lost.is_set()
    assert rig.log(ref) == ["the sandbox is prepared", "one", "two", "the sandbox is concluded"]
    assert (rig.row(ref).status, rig.row(ref).exit_code) == ("failed", 3)
