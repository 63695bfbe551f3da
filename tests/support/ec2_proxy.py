"""A proxy before simulated EC2 that makes it as slow, forgetful and inconsistent as EC2 is.

    with running_moto() as moto, Ec2Proxy(moto.url) as proxy:
        proxy.hold_available()
        ...                                     # point the code under test to proxy.url
        proxy.wait_for("CreateImage", timeout=20)

It runs in threads of the test's own process. Requests and answers of any AWS service pass byte for byte,
except where a fault (`ec2_faults`) or lag (`ec2_lag`) is set.
"""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from support.ec2_faults import Effect, Fault, RequestFaults
from support.ec2_lag import ResourceLag
from support.ec2_message import Reply, Request, Upstream

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")


class Ec2Proxy(RequestFaults, ResourceLag):
    """Serves on a free loopback port within its `with`, whose end raises an error of the proxy itself."""

    def __init__(self, upstream_url: str) -> None:
        RequestFaults.__init__(self)
        ResourceLag.__init__(self)
        self._upstream = Upstream(upstream_url)
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="ec2-proxy")
        self._is_out = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def is_out(self) -> bool:
        return self._is_out

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Close every connection, also with a request under way, and each new one, until the block's end."""
        self._is_out = True
        self._server.sever()
        try:
            yield
        finally:
            self._is_out = False

    def answer(self, request: Request) -> Reply | None:
        """The answer to send; None to close the connection without one."""
        arrived = time.time()
        fault = self.admit(request)
        reply = self._outcome(request, fault)
        self.note(request, arrived, reply.status if reply else None, self._cause(fault, reply))
        self.hold_reply(request)
        return None if fault and fault.effect is Effect.DROP_REPLY else reply

    def _outcome(self, request: Request, fault: Fault | None) -> Reply | None:
        if self._is_out or (fault and fault.effect is Effect.DROP_REQUEST):
            return None
        if fault and fault.effect is Effect.REFUSE:
            return fault.refuse(request)
        with suppress(OSError, http.client.HTTPException):
            return self.execute(request, self._upstream)
        return None

    def _cause(self, fault: Fault | None, reply: Reply | None) -> str | None:
        if fault:
            return fault.name
        if reply:
            return reply.fault
        return "outage" if self._is_out else "no_answer"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop_waiting()
        self._server.shutdown()
        self._thread.join()
        self._server.sever(for_good=True)
        self._server.server_close()
        if self._server.errors and error is None:
            raise self._server.errors[0]


class _Server(ThreadingHTTPServer):
    # Its threads are joined at the end, so that none outlives the test.
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, proxy: Ec2Proxy) -> None:
        self.proxy = proxy
        self.errors: list[Exception] = []
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        self._is_over = False
        super().__init__(("127.0.0.1", 0), _Handler)

    def verify_request(self, _request: Any, _client_address: Any) -> bool:
        return not self.proxy.is_out

    def opened(self, connection: socket.socket) -> None:
        with self._connections_lock:
            self._connections.add(connection)
            if self._is_over:
                _shut(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._connections_lock:
            self._connections.discard(connection)

    def sever(self, *, for_good: bool = False) -> None:
        """Cut all connections; `for_good` also those whose thread is only about to start."""
        with self._connections_lock:
            self._is_over = for_good
            for connection in self._connections:
                _shut(connection)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer leaves in one write; otherwise its body waits for the acknowledgement of its head.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.opened(self.connection)

    def finish(self) -> None:
        self.server.closed(self.connection)
        with suppress(OSError):
            super().finish()

    def handle(self) -> None:
        try:
            with suppress(OSError):
                super().handle()
        except Exception as error:  # noqa: BLE001  the proxy's own mistake: told by its end
            self.server.errors.append(error)

    def exchange(self) -> None:
        reply = self.server.proxy.answer(self._read())
        if reply is None:
            self.close_connection = True
            return
        self.send_response_only(reply.status, reply.reason or None)
        for name, value in reply.headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  named by the base class
        """Print nothing: the proxy's log is `calls`."""

    def _read(self) -> Request:
        target, headers = self.requestline.split()[1], tuple(self.headers.items())
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return Request(self.command, target, headers, b"").with_body(b"".join(self._chunks()))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return Request(self.command, target, headers, body)

    def _chunks(self) -> Iterator[bytes]:
        """Content of the chunks (RFC 9112, 7.1)."""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass


for _method in METHODS:
    setattr(_Handler, f"do_{_method}", _Handler.exchange)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
