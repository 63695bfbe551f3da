"""Container builds by `docker buildx build --push` alone, on the stack's own engines and to its own registry."""

import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from bench.contexts import small_context
from bench.figures import MeasurementError
from bench.kiln_build import BUILD_SECONDS, PATH, QUIET_SECONDS, api_client, body_of
from bench.plain_build import PlainBuild
from cli.engines import search_path
from cli.home import secret_key
from cli.local_stack import LocalStack
from kiln.adapters.buildx import operator_config
from kiln.adapters.runs import registry_login, write_private
from kiln.catalog import builds
from kiln.catalog.session import Catalog
from kiln.naming import staging_repository
from kiln.registry_tokens import BUILD_USER, BuildCredentials
from kiln.sealing import Sealer

CREDENTIAL_LIFETIME = timedelta(hours=1)
CROWD_SECONDS = 300.0
TAG = "by-hand"
ERROR_CHARACTERS = 500


class PlainContainers:
    """A user with a terminal, as a context manager that removes their files.

    Nobody but builds may push to Kiln's registry: an open build, which waits for a context that never comes, lends its
    credential and its repository.
    """

    def __init__(self, stack: LocalStack) -> None:
        self._hosts = stack.containers.hosts
        self._program = shlex.split(stack.settings.buildx)
        build_id, password = _lent_credential(stack)
        self._resources = ExitStack()
        self._folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="kiln-bench-")))
        registry = stack.settings.registry_host
        self._repository = f"{registry}/{staging_repository(build_id)}"
        plugins = [str(operator_config() / "cli-plugins")]
        login = registry_login(registry, BUILD_USER, password, cliPluginsExtraDirs=plugins)
        write_private(self._folder / "config.json", login)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def build(self) -> PlainBuild:
        """One build on the first engine. Raises MeasurementError unless it is pushed."""
        archive = self._archive(small_context(), TAG)
        time.sleep(QUIET_SECONDS)
        began = last = time.perf_counter()
        said = b""
        with self._start(archive, TAG, self._hosts[0], subprocess.PIPE) as process:
            assert process.stderr is not None
            watchdog = threading.Timer(BUILD_SECONDS, process.kill)
            watchdog.start()
            for line in process.stderr:
                last, said = time.perf_counter(), line
            code = process.wait()
            ended = time.perf_counter()
            watchdog.cancel()
        _check(code, said.decode(errors="replace"))
        self._forget(TAG, self._hosts[0])
        return PlainBuild(seconds=ended - began, exit_seconds=ended - last)

    def crowd(self, archives: Sequence[bytes]) -> float:
        """The seconds that builds take which are all started at once, spread evenly over the engines."""
        places = [(f"{TAG}-{number}", self._hosts[number % len(self._hosts)]) for number in range(len(archives))]
        files = [self._archive(archive, tag) for archive, (tag, _) in zip(archives, places, strict=True)]
        with ExitStack() as outputs:
            said = [outputs.enter_context(tempfile.TemporaryFile()) for _ in files]
            began = time.perf_counter()
            processes = [
                self._start(file, tag, host, output.fileno())
                for file, (tag, host), output in zip(files, places, said, strict=True)
            ]
            codes = _all_codes(processes, CROWD_SECONDS)
            seconds = time.perf_counter() - began
            for code, output in zip(codes, said, strict=True):
                output.seek(0)
                _check(code, output.read().decode(errors="replace")[-ERROR_CHARACTERS:])
        for tag, host in places:
            self._forget(tag, host)
        return seconds

    def _archive(self, content: bytes, tag: str) -> Path:
        path = self._folder / f"{tag}.tar.gz"
        path.write_bytes(content)
        return path

    def _start(self, archive: Path, tag: str, host: str, output: int) -> "subprocess.Popen[bytes]":
        with archive.open("rb") as stdin:
            return subprocess.Popen(
                [*self._program, "build", "--push", f"--tag={self._repository}:{tag}", "-"],
                env=self._environment(host),
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=output,
            )

    def _forget(self, tag: str, host: str) -> None:
        """Kiln drops its images' names from the engines, too."""
        command = ["docker", "image", "rm", "--force", f"{self._repository}:{tag}"]
        subprocess.run(command, env=self._environment(host), capture_output=True, check=False, timeout=BUILD_SECONDS)

    def _environment(self, host: str) -> dict[str, str]:
        folder = str(self._folder)
        return {"PATH": search_path(), "HOME": folder, "DOCKER_HOST": host, "DOCKER_CONFIG": folder}


def _lent_credential(stack: LocalStack) -> tuple[str, str]:
    """A build that stays open, and the password with which its engine would log in to the registry."""
    with api_client(stack) as http:
        answer = http.post(PATH, json={"image_name": "by-hand", "image_tag": TAG})
        build_id = str(body_of(answer, httpx.codes.CREATED)["build_id"])
    catalog = Catalog(stack.settings.catalog_dsn, pool_size=1)
    try:
        with catalog.read() as session:
            build = builds.get(session, build_id)
            assert build is not None
            organization_id = build.organization_id
    finally:
        catalog.close()
    credentials = BuildCredentials(Sealer(secret_key(stack.settings)))
    return build_id, credentials.issue(build_id, organization_id, datetime.now(UTC) + CREDENTIAL_LIFETIME)


def _all_codes(processes: Sequence["subprocess.Popen[bytes]"], seconds: float) -> list[int]:
    """The exit codes. Raises MeasurementError, with none of them left, if they take too long."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"builds by hand do not end within {seconds:.0f} s") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _check(code: int, said: str) -> None:
    if code:
        raise MeasurementError(f"docker buildx build ended with exit code {code}: {said.strip()}")
