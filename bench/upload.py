"""One archive's way to its receiver, in each form that there is, and through the programs that would check it."""

import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import httpx

from bench.figures import MeasurementError
from bench.kiln_build import PATH, api_client, body_of
from bench.memory import PeakMemory
from cli.local_stack import API, LocalStack
from kiln.catalog.keys import DEFAULT_ORGANIZATION

CLOUD_PATH = "/v5/builds"
CHUNK_BYTES = 1024 * 1024
TIMEOUT_SECONDS = 300.0
CHECK = 'gzip -dc -- "$1" | tar -t'
Upload = Callable[[Path], float]


class KilnUploads:
    """Uploads to a stack's API, each of whose builds is cancelled at once, as a context manager.

    `growth_bytes` is the API's memory at its peak, of each upload.
    """

    def __init__(self, stack: LocalStack) -> None:
        self._pid = stack.parts[API]
        self._http = api_client(stack)
        self._http.timeout = httpx.Timeout(TIMEOUT_SECONDS)
        self.growth_bytes: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def post(self, archive: Path) -> float:
        """The seconds of `POST /v5/builds` with the archive as the form's last part."""
        boundary = uuid.uuid4().hex
        form = _Form(boundary, archive)
        headers = {
            "x-selected-account-id": DEFAULT_ORGANIZATION,
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(form.length),
        }
        seconds, answer = self._timed(lambda: self._http.post(CLOUD_PATH, content=form.chunks(), headers=headers))
        build_id = body_of(answer, httpx.codes.OK)["id"]
        account = {"x-selected-account-id": DEFAULT_ORGANIZATION}
        body_of(self._http.post(f"{CLOUD_PATH}/{build_id}/cancel", headers=account), httpx.codes.ACCEPTED)
        return seconds

    def put(self, archive: Path) -> float:
        """The seconds of a PUT to the URL that a build's order answers with."""
        wanted = {"image_name": "bench", "image_tag": "latest"}
        order = body_of(self._http.post(PATH, json=wanted), httpx.codes.CREATED)
        url, headers = order["upload_url"], {"Content-Length": str(archive.stat().st_size)}
        seconds, answer = self._timed(lambda: self._http.put(url, content=_chunks(archive), headers=headers))
        body_of(answer, httpx.codes.OK)
        body_of(self._http.post(f"{PATH}/{order['build_id']}/cancel"), httpx.codes.ACCEPTED)
        return seconds

    def _timed(self, call: Callable[[], httpx.Response]) -> tuple[float, httpx.Response]:
        self._http.get("/healthz")  # a connection that is not measured
        memory = PeakMemory(self._pid)
        began = time.perf_counter()
        answer = call()
        seconds = time.perf_counter() - began
        self.growth_bytes.append(memory.growth_bytes())
        return seconds, answer


class _Form:
    """The multipart body of a build's order (RFC 7578)."""

    def __init__(self, boundary: str, archive: Path) -> None:
        fields = {"image_name": "bench", "image_tag": "latest", "agent_name": "bench"}
        head = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ]
        head.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="context_archive"; filename="context.tar.gz"\r\n'
            "Content-Type: application/gzip\r\n\r\n"
        )
        self._head, self._tail = "".join(head).encode(), f"\r\n--{boundary}--\r\n".encode()
        self._archive = archive

    @property
    def length(self) -> int:
        return len(self._head) + self._archive.stat().st_size + len(self._tail)

    def chunks(self) -> Iterator[bytes]:
        yield self._head
        yield from _chunks(self._archive)
        yield self._tail


def put_to_nginx(url: str, folder: Path) -> Upload:
    """What gives the seconds of a PUT to this nginx, by the same client."""

    def put(archive: Path) -> float:
        with httpx.Client(trust_env=False, timeout=TIMEOUT_SECONDS) as http:
            http.get(url)
            headers = {"Content-Length": str(archive.stat().st_size)}
            began = time.perf_counter()
            answer = http.put(f"{url}/{archive.name}", content=_chunks(archive), headers=headers)
            seconds = time.perf_counter() - began
        (folder / archive.name).unlink(missing_ok=True)
        if answer.status_code != httpx.codes.CREATED:
            raise MeasurementError(f"nginx answers a PUT with {answer.status_code}")
        return seconds

    return put


def check_by_programs(archive: Path) -> float:
    """The seconds of `gzip -dc ARCHIVE | tar -t`. Raises MeasurementError if they do not like it."""
    began = time.perf_counter()
    command = ["bash", "-o", "pipefail", "-c", CHECK, "check", str(archive)]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, timeout=TIMEOUT_SECONDS).returncode
    seconds = time.perf_counter() - began
    if code:
        raise MeasurementError(f"gzip -dc | tar -t ended with exit code {code}")
    return seconds


def settle() -> None:
    """What the upload before left to be written to the disk is written before the next one's time begins."""
    os.sync()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
