"""The sandbox `container`: an agent in a container of an image that Kiln built.

The container is made here, without being started; the pod's shim then runs `pod_container.py`, which starts it and stands
for the agent. Nothing of the runner's host is in it: files are sent by the engine's API, which may be somewhere else.

Its user is the image's own, unless that is root or nobody: then it is 1000, with HOME and working directory made its own.
HOME is the image's `ENV HOME`, else the account's, else `/home/agent`; the working directory the image's `WORKDIR`, else
HOME (`work` below it for 1000). PATH is the image's own.

What the engine tells of the container (`docker inspect`) has the environment, and the command line with the prompt in it:
whoever may ask the engine is the host's master anyway.
"""

import asyncio
import base64
import json
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

from kiln.adapters import pod_container
from kiln.adapters.agent_commands import AgentCommand, agent_command
from kiln.adapters.pod_engine import EngineApi, EngineError, MissingError, engine_host
from kiln.adapters.sandbox_image import Inside, look_inside
from kiln.adapters.sandboxes import SandboxTerms, agent_environment, limited, secret_values
from kiln.errors import OperationFailedError
from kiln.ports.pods import ImageSource, PodOrder, ShimOrder
from kiln.ports.sandboxes import Say
from kiln.registry_tokens import POD_USER

T = TypeVar("T")

MARK_FILE = "engine-mark"
POD_LABEL = "kiln.pod"
ROOT_LABEL = "kiln.runner-root"
# What the wrapper needs after the agent's grace: to see the end, and to remove the container.
WRAPPER_SECONDS = 30.0
PULL_PAUSE_SECONDS = 300.0
MEGABYTE = 1024 * 1024
BILLION = 1_000_000_000
ROWS_AND_COLUMNS = (50, 200)
EMPTY_TAR = bytes(1024)
NO_ENGINE = "this runner has no container engine"


class ContainerSandboxes:
    """`kiln.ports.sandboxes.Sandboxes` for containers of one engine."""

    def __init__(self, terms: SandboxTerms) -> None:
        self._terms = terms
        self._host = engine_host(terms.engine)
        self._api = EngineApi(self._host)

    async def prepare(self, order: PodOrder, say: Say) -> ShimOrder:
        """Raises OperationFailedError."""
        if order.image is None:
            raise OperationFailedError("the pod has no image")
        try:
            await self._begin(order.key, order.image)
            await say(f"pulling {order.image.reference}")
            await self._pull(order.image)
            inside = await _whole(self._look_inside, order.key, order.image)
            command = agent_command(order, inside.account.home, inside.work)
            for warning in await _whole(self._create, order, command, inside):
                await say(f"the container engine warns: {warning}")
        except EngineError as error:
            raise _for_users(error) from error
        return self._shim_order(order, command)

    async def stop(self, key: str) -> None:
        """Raises OSError if the engine does not answer."""
        if self._image_of(key) is None:
            return
        grace = ceil(self._terms.grace_seconds)
        with suppress(MissingError):
            await _whole(self._stop_container, _path(key), grace)

    async def conclude(self, key: str, say: Say) -> None:
        if self._image_of(key) is None:
            return
        try:
            await _whole(self._remove_container, _name(key))
        except EngineError as error:
            await say(f"the agent's container may run on: {error}")

    async def remove(self, key: str) -> None:
        """The image goes too, unless another container is of it. Raises OSError."""
        image = self._image_of(key)
        if image is not None:
            await _whole(self._remove_container, _name(key))
            with suppress(EngineError):
                await _whole(self._api.call, "DELETE", f"/images/{image}")
        with suppress(FileNotFoundError):
            await _whole(shutil.rmtree, self._pod(key))

    async def sweep(self, living: frozenset[str]) -> None:
        """Removes the containers of this host's pods that are not among `living`. Raises OSError if the engine does not
        answer."""
        label = f"{ROOT_LABEL}={await _whole(self._mark)}"
        query = {"all": 1, "filters": json.dumps({"label": [label]})}
        for found in await _whole(self._api.call, "GET", "/containers/json", query):
            if found["Labels"].get(POD_LABEL) not in living:
                await _whole(self._remove_container, found["Id"])

    def limits(self) -> list[str]:
        """`disk_mb`, if the engine enforces it: it alone knows, of its driver and its disk, and is tried. Blocks."""
        image = container = ""
        try:
            image = self._import_nothing()
            body = {"Image": image, "Cmd": ["none"], "HostConfig": {"StorageOpt": {"size": "64M"}}}
            container = self._api.call("POST", "/containers/create", body=body)["Id"]
        except EngineError:
            return []
        finally:
            with suppress(EngineError):
                if container:
                    self._remove_container(container)
                if image:
                    self._api.call("DELETE", f"/images/{image}")
        return ["disk_mb"]

    async def _begin(self, key: str, image: ImageSource) -> None:
        """Notes that the pod has a container, before it has one; removes what an earlier call has left."""
        record = self._record(key)
        record.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        record.write_text(json.dumps({"image": image.reference}))
        await _whole(self._remove_container, _name(key))

    async def _pull(self, image: ImageSource) -> None:
        """Asks even if the engine has the image: by another repository's name, the registry may not let this pod have it."""
        given_up = threading.Event()
        try:
            await _whole(self._pull_now, image, given_up, on_cancel=given_up.set)
        except EngineError as error:
            if error.status is None:
                raise
            problem = str(error).replace(image.token, "***") if image.token else str(error)
            raise OperationFailedError(f"cannot pull {image.reference}: {problem}") from None

    def _pull_now(self, image: ImageSource, given_up: threading.Event) -> None:
        login = {"username": POD_USER, "password": image.token, "serveraddress": image.registry}
        headers = {"X-Registry-Auth": base64.urlsafe_b64encode(json.dumps(login).encode()).decode()}
        query = {"fromImage": image.reference}
        with self._api.stream("POST", "/images/create", query, headers=headers, seconds=PULL_PAUSE_SECONDS) as answer:
            for line in answer:
                if given_up.is_set():
                    return
                if problem := json.loads(line).get("error"):
                    raise EngineError(" ".join(problem.split()), answer.status)

    def _look_inside(self, key: str, image: ImageSource) -> Inside:
        """Looks into a container that is never started."""
        config = self._api.call("GET", f"/images/{image.reference}/json").get("Config") or {}
        body = {"Image": image.reference, "Entrypoint": ["none"], "Labels": self._labels(key)}
        container = self._api.call("POST", "/containers/create", body=body)["Id"]
        try:
            return look_inside(self._api, container, config)
        finally:
            self._remove_container(container)

    def _create(self, order: PodOrder, command: AgentCommand, inside: Inside) -> Sequence[str]:
        """Makes the pod's container, whole but not started; the engine's warnings."""
        body = {
            **self._command(order, command, inside),
            "Labels": self._labels(order.key),
            "HostConfig": self._host_config(order),
        }
        made = self._api.call("POST", "/containers/create", {"name": _name(order.key)}, body)
        self._api.call("PUT", f"{_path(order.key)}/archive", {"path": "/"}, inside.archive(command.files))
        return list(made.get("Warnings") or [])

    def _command(self, order: PodOrder, command: AgentCommand, inside: Inside) -> Mapping[str, object]:
        environment = agent_environment(order, command, inside.base)
        return {
            "Image": order.image and order.image.reference,
            "Hostname": order.key,
            "User": inside.user,
            "WorkingDir": inside.work,
            "Env": [f"{name}={value}" for name, value in environment.items()],
            "Entrypoint": inside.started(command.argv),
            "Tty": True,
            "OpenStdin": True,
            "StopSignal": "SIGTERM",
            "Healthcheck": {"Test": ["NONE"]},
        }

    def _host_config(self, order: PodOrder) -> Mapping[str, object]:
        asked, terms = order.spec.limits, self._terms
        memory = limited(asked.memory_mb, terms.memory_mb) * MEGABYTE
        return {
            "Init": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "Memory": memory,
            "MemorySwap": memory,
            "PidsLimit": limited(asked.processes, terms.processes),
            "NanoCpus": int(terms.cpus * BILLION),
            "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
            # The shim has the output; the engine would keep it a second time, without end.
            "LogConfig": {"Type": "none"},
            "ConsoleSize": ROWS_AND_COLUMNS,
            **({} if asked.disk_mb is None else {"StorageOpt": {"size": f"{asked.disk_mb}M"}}),
        }

    def _shim_order(self, order: PodOrder, command: AgentCommand) -> ShimOrder:
        terms, grace = self._terms, ceil(self._terms.grace_seconds)
        program = [sys.executable, "-I", "-S", "-X", "utf8", pod_container.__file__]
        left = None if order.deadline_at is None else (order.deadline_at - datetime.now(UTC)).total_seconds()
        return ShimOrder(
            shim="",
            argv=[*program, _name(order.key), str(grace)],
            cwd=Path("/"),
            environment={"DOCKER_HOST": self._host},
            limit_seconds=left,
            grace_seconds=grace + WRAPPER_SECONDS,
            lease_seconds=terms.lease_seconds,
            prompted=command.prompted,
            secrets=secret_values(order),
        )

    def _labels(self, key: str) -> Mapping[str, str]:
        return {POD_LABEL: key, ROOT_LABEL: self._mark()}

    def _mark(self) -> str:
        """Tells this host's containers from those of others at the same engine: made once, by chance."""
        file = self._terms.root / MARK_FILE
        if not file.exists():
            file.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            fresh = file.with_name(f".{MARK_FILE}-{secrets.token_hex(4)}")
            fresh.write_text(secrets.token_hex(16))
            # Whole at once, and never another than somebody has read already.
            with suppress(FileExistsError):
                file.hardlink_to(fresh)
            fresh.unlink()
        return file.read_text()

    def _import_nothing(self) -> str:
        """The id of an image with nothing in it."""
        made = self._api.call("POST", "/images/create", {"fromSrc": "-"}, EMPTY_TAR)
        return str(made["status"])

    def _stop_container(self, path: str, grace_seconds: int) -> None:
        self._api.call("POST", f"{path}/stop", {"t": grace_seconds}, seconds=grace_seconds + WRAPPER_SECONDS)

    def _remove_container(self, name: str) -> None:
        with suppress(MissingError):
            self._api.call("DELETE", f"/containers/{name}", {"force": 1, "v": 1})

    def _image_of(self, key: str) -> str | None:
        """The image of a pod's container; None if the pod has none here."""
        with suppress(FileNotFoundError):
            return str(json.loads(self._record(key).read_text())["image"])
        return None

    def _record(self, key: str) -> Path:
        return self._pod(key) / "sandbox" / "container.json"

    def _pod(self, key: str) -> Path:
        return self._terms.root / "pods" / key


def _name(key: str) -> str:
    return f"kiln-{key}"


def _path(key: str) -> str:
    return f"/containers/{_name(key)}"


def _for_users(error: EngineError) -> OperationFailedError:
    return OperationFailedError(NO_ENGINE if error.status is None else f"cannot make the container: {error}")


async def _whole(work: Callable[..., T], *arguments: Any, on_cancel: Callable[[], None] | None = None) -> T:
    """Runs what blocks, to its end even if this is cancelled meanwhile: nothing is made behind a caller's back."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if on_cancel is not None:
            on_cancel()
        await asyncio.wait([task])
        raise
