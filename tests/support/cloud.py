"""An account of cloud-builds, as its clients see it: forms of any make, the published client, and what a POST leaves."""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from scale_gp_beta import SGPClient

from kiln.catalog.tables import Organization
from support.api_server import REQUEST_SECONDS, RunningApi, plain_client
from support.archives import context_archive
from support.tenants import Tenant, row_counts

BOUNDARY = "a-boundary"
POLL_SECONDS = 0.02
Part = tuple[str, bytes | str]

# Byte for byte the same each time: what differs between two builds is what a test says.
ARCHIVE = context_archive({"app/main.py": b"print('ready')\n"})


def fields(**changes: str | None) -> dict[str, str]:
    """The texts of a form that is sound; None leaves one out."""
    return {
        name: text for name, text in {"image_name": "app", "agent_name": "scout", **changes}.items() if text is not None
    }


class Account(Tenant):
    """An organization whose key is sent as cloud-builds' clients send it. `cloud` is such a client without comforts."""

    def __init__(self, api: RunningApi) -> None:
        super().__init__(api)
        with api.catalog.read() as session:
            self.slug = session.get_one(Organization, self.organization_id).slug
        self.headers = {"x-api-key": self.key, "x-selected-account-id": self.organization_id}
        self.cloud = plain_client(api.url, **self.headers)

    def post(self, archive: bytes | None = ARCHIVE, *, retry: int = 0, **changes: str | None) -> httpx.Response:
        """POST of a form whose file is last, as clients send it."""
        file = [("context_archive", archive)] if archive is not None else []
        return self.post_parts([*fields(**changes).items(), *file], **{"x-stainless-retry-count": str(retry)})

    def post_parts(self, parts: Sequence[Part], **headers: str) -> httpx.Response:
        """POST of these parts in their order."""
        return self.cloud.post("/v5/builds", content=form(parts), headers={**FORM_HEADERS, **headers})

    def submitted(self, **changes: Any) -> dict[str, Any]:
        """A build that was taken on."""
        answer = self.post(**changes)
        assert answer.status_code == 200, answer.text
        build: dict[str, Any] = answer.json()
        return build

    def get(self, path: str = "", **query: Any) -> httpx.Response:
        return self.cloud.get(f"/v5/builds{path}", params=query)

    def shown(self, build_id: str) -> dict[str, Any]:
        build: dict[str, Any] = self.get(f"/{build_id}").json()
        return build

    def cancel(self, build_id: str) -> httpx.Response:
        return self.cloud.post(f"/v5/builds/{build_id}/cancel", headers={"Content-Type": "application/json"})

    def head(self, length: int | None) -> bytes:
        """The beginning of a POST by hand; without a length its body comes in chunks."""
        body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        sent = {"Host": "kiln", **self.headers, **FORM_HEADERS}
        lines = ["POST /v5/builds HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items()), body, "", ""]
        return "\r\n".join(lines).encode()

    def close(self) -> None:
        self.cloud.close()
        super().close()


@contextmanager
def published_client(account: Account) -> Iterator[SGPClient]:
    """The client that users have, without its patience for a server that fails."""
    http = httpx.Client(verify=False, timeout=REQUEST_SECONDS, trust_env=False)
    with SGPClient(
        api_key=account.key,
        account_id=account.organization_id,
        base_url=account.api.url,
        http_client=http,
        max_retries=0,
    ) as client:
        yield client


FORM_HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, content: bytes | str = b"") -> bytes:
    """One part, from its boundary on, without the line end after it."""
    filename = '; filename="context.tar.gz"' if name == "context_archive" else ""
    data = content if isinstance(content, bytes) else content.encode()
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + data


def form(parts: Sequence[Part]) -> bytes:
    """A whole form."""
    return b"".join(part(name, content) + b"\r\n" for name, content in parts) + f"--{BOUNDARY}--\r\n".encode()


class Kept:
    """What an API has kept: rows by table, and files below its object store. Two of them can be compared."""

    def __init__(self, api: RunningApi) -> None:
        folder = Path(api.settings.home_dir) / "objects"
        self.rows = row_counts(api.catalog)
        self.files = {path.name for path in folder.rglob("*") if path.is_file()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and (self.rows, self.files) == (other.rows, other.files)

    def __hash__(self) -> int:
        return hash(tuple(self.files))

    def __repr__(self) -> str:
        return f"{self.rows} {self.files}"


def until_kept(api: RunningApi, wanted: Kept, seconds: float = 10) -> None:
    """Returns once the API has kept exactly this; fails after so many seconds."""
    end = time.monotonic() + seconds
    while (kept := Kept(api)) != wanted:
        assert time.monotonic() < end, f"{kept} is not {wanted}"
        time.sleep(POLL_SECONDS)


@contextmanager
def connection(api: RunningApi) -> Iterator[socket.socket]:
    """A socket to the server, for requests that no client would send."""
    url = httpx.URL(api.url)
    with socket.create_connection((url.host, url.port or 80), timeout=10) as opened:
        yield opened


def answer_of(opened: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """The answer's status, headers (by their names in lower case) and body."""
    with opened.makefile("rb") as stream:
        status = int(stream.readline().split(b" ", 2)[1])
        lines = iter(lambda: stream.readline().decode().rstrip(), "")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return status, headers, stream.read(int(headers["content-length"]))
