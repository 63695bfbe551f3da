"""One builder slot's Docker engine, as a process of the stack: `python -m cli.engine_main --home HOME --slot 1 …`.

dockerd runs in network, mount and process namespaces of its own and in a cgroup with limits, so that neither a build
nor BuildKit itself (`ADD http://…`) reaches this host's services. Of an engine that is killed at once, only its cgroup
and its firewall chains stay; the next start of the same home removes them. Standard library only.

    this process          the host's end: cgroup, link, firewall, relay to the registry
    └── unshare
        └── engine_init   the first process inside; its end is the end of all below
            └── dockerd, containerd, builds
"""

import argparse
import asyncio
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, cast

from cli.docker_engine import EngineUnavailable
from cli.engine_cgroup import CgroupError, SlotCgroup, remove_cgroup, slot_cgroup
from cli.engine_network import PEER, Place, Uplink, nameservers, remove_uplink, slot_uplink
from cli.engine_relay import listen_inside, relay
from cli.engine_slot import Slot, SlotLimits

INIT = Path(__file__).with_name("engine_init.py")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NAMESPACES = ("--mount", "--net", "--pid", "--ipc", "--fork", "--mount-proc", "--kill-child=SIGKILL")
PREDECESSOR_SECONDS = 4.0
STOP_SECONDS = 2.0
POLL_SECONDS = 0.02
LOOPBACK = "127."
# What dockerd itself may need to fetch a base image; RUN processes get none of it.
KEPT_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
                  "SSL_CERT_FILE", "SSL_CERT_DIR")  # fmt: skip


@dataclass(frozen=True)
class EngineOrder:
    """What to run. `reach` are the registry and the API, wherever they are; the cache is kept below `keep_bytes`."""

    slot: Slot
    limits: SlotLimits
    keep_bytes: int
    reach: tuple[Place, ...]


def run_engine(order: EngineOrder) -> int:
    """Runs the engine until a signal ends it; the exit code. Raises EngineUnavailable."""
    slot = order.slot
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_here)
    with ExitStack() as cleanup:
        lock = cleanup.enter_context(_exclusive(slot))
        remove_uplink(slot.link)
        remove_cgroup(slot.cgroup)
        cleanup.enter_context(_run_folder(slot))
        cgroup = cleanup.enter_context(_cgroup(order))
        uplink = cleanup.enter_context(_uplink(order))
        inside = cleanup.enter_context(_namespaces(slot, lock))
        try:
            return _serve(order, cgroup, uplink, inside)
        finally:
            _hear_no_more()


def _stop_here(_number: int, _frame: object) -> NoReturn:
    """A stop while the engine starts: what was made so far is taken away on the way out."""
    _hear_no_more()
    sys.exit(0)


def _hear_no_more() -> None:
    """Nothing shall interrupt the cleanup but SIGKILL."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _serve(order: EngineOrder, cgroup: SlotCgroup, uplink: Uplink | None, inside: "Inside") -> int:
    cgroup.take_in(inside.pid)
    if uplink is not None:
        uplink.connect(inside.pid)
    inside.tell(_instructions(order, cgroup, uplink))
    listeners = listen_inside(inside.pid, [place for place in order.reach if _is_loopback(place)])
    return asyncio.run(_until_the_end(inside, listeners))


async def _until_the_end(inside: "Inside", listeners: list[tuple[socket.socket, Place]]) -> int:
    stopping = asyncio.Event()
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    tasks = [asyncio.create_task(work) for work in (relay(listeners), stopping.wait(), inside.ended())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return 0 if stopping.is_set() else 1


# ---- What stands before it ------------------------------------------------------------------------------------------


@contextmanager
def _exclusive(slot: Slot) -> Iterator[int]:
    """Holds the slot's data; yields the lock's descriptor, which the first process inside shares until its end.

    A predecessor that was killed ends in a moment, or is ended. Raises EngineUnavailable if one is alive and well.
    """
    slot.data_root.mkdir(parents=True, exist_ok=True)
    with (slot.data_root / "kiln.lock").open("w") as lock:
        for wait in (_nothing, _end_orphans):
            wait(slot)
            if _locked_soon(lock.fileno()):
                break
        else:
            raise EngineUnavailable(f"another engine runs on {slot.data_root}")
        yield lock.fileno()


def _locked_soon(lock: int) -> bool:
    deadline = time.monotonic() + PREDECESSOR_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        else:
            return True


def _nothing(_slot: Slot) -> None:
    pass


def _end_orphans(slot: Slot) -> None:
    """Kills a first process of this slot whose own `engine_main` is dead, and with it all of its namespaces."""
    for pid, parent, command in _processes():
        if command[-2:] == [str(INIT), slot.name] and "unshare" in command[0]:
            mains = [words for other, _, words in _processes() if other == parent]
            if not any("cli.engine_main" in words for words in mains):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _processes() -> Iterator[tuple[int, int, list[str]]]:
    """Pid, parent and command line of every process (proc(5))."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                yield int(entry.name), parent, words


@contextmanager
def _run_folder(slot: Slot) -> Iterator[None]:
    """No mount of the engine's is seen outside of its namespace, so that removing the folder removes only files."""
    shutil.rmtree(slot.run_folder, ignore_errors=True)
    slot.run_folder.mkdir(mode=0o700, parents=True)
    try:
        yield
    finally:
        shutil.rmtree(slot.run_folder, ignore_errors=True)


@contextmanager
def _cgroup(order: EngineOrder) -> Iterator[SlotCgroup]:
    try:
        with slot_cgroup(order.slot.cgroup, order.limits) as cgroup:
            yield cgroup
    except CgroupError as error:
        raise EngineUnavailable(f"no limits for builds: {error.strerror}") from None


@contextmanager
def _uplink(order: EngineOrder) -> Iterator[Uplink | None]:
    """The way out; None where none can be had: builds then reach nothing, rather than the host."""
    allowed = [place for place in order.reach if not _is_loopback(place)]
    with ExitStack() as cleanup:
        try:
            uplink = cleanup.enter_context(slot_uplink(order.slot.link, nameservers(), allowed))
        except (OSError, subprocess.CalledProcessError) as error:
            _say(f"builds have no network: {_reason(error)}")
            uplink = None
        yield uplink


# ---- Its processes --------------------------------------------------------------------------------------------------


class Inside:
    """The namespaces, seen from outside. `pid` is their first process's."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._heard("here")
        self.pid = next(pid for pid, parent, _ in _processes() if parent == process.pid)

    def tell(self, instructions: dict[str, object]) -> None:
        """Lets it set up its network; returns when that is done, and dockerd about to start."""
        _input(self._process).write(json.dumps(instructions).encode() + b"\n")
        _input(self._process).flush()
        self._heard("ready")

    async def ended(self) -> None:
        while self._process.poll() is None:
            await asyncio.sleep(POLL_SECONDS)

    def _heard(self, word: str) -> None:
        if _output(self._process).readline().decode().strip() != word:
            raise EngineUnavailable("the engine's namespaces cannot be set up")


@contextmanager
def _namespaces(slot: Slot, lock: int) -> Iterator[Inside]:
    command = ["unshare", *NAMESPACES, "--", sys.executable, "-I", "-S", str(INIT), slot.name]
    process = subprocess.Popen(
        command,
        env={"PATH": os.environ.get("PATH", os.defpath)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(lock,),
    )
    try:
        yield Inside(process)
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Closing its standard input is the request to end; the kernel ends the rest with the first process."""
    with suppress(BrokenPipeError):
        _input(process).close()
    _output(process).close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _input(process: "subprocess.Popen[bytes]") -> IO[bytes]:
    return cast("IO[bytes]", process.stdin)


def _output(process: "subprocess.Popen[bytes]") -> IO[bytes]:
    return cast("IO[bytes]", process.stdout)


def _instructions(order: EngineOrder, cgroup: SlotCgroup, uplink: Uplink | None) -> dict[str, object]:
    folder = order.slot.run_folder
    config = folder / "daemon.json"
    config.write_text(json.dumps(_configuration(order, cgroup, uplink), indent=1))
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    own = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "TMPDIR": str(folder)}
    return {
        "link": PEER,
        "address": uplink.address if uplink else None,
        "gateway": uplink.gateway if uplink else "",
        "nameservers": nameservers() if uplink else [],
        "resolv_conf": str(folder / "resolv.conf"),
        "argv": ["dockerd", f"--config-file={config}"],
        "env": {**kept, **own},
    }


def _configuration(order: EngineOrder, cgroup: SlotCgroup, uplink: Uplink | None) -> dict[str, object]:
    """What dockerd is told (https://docs.docker.com/reference/cli/dockerd/). Firewall and bridge are its namespace's own."""
    folder = order.slot.run_folder
    network = {"bip": uplink.bridge, "mtu": uplink.mtu} if uplink else {"iptables": False, "ip-masq": False}
    return {
        **network,
        "hosts": [order.slot.host],
        "data-root": str(order.slot.data_root / "data"),
        "exec-root": str(folder / "exec"),
        "pidfile": str(folder / "dockerd.pid"),
        "log-level": "warn",
        # systemd would put builds where it likes; it does not see this namespace anyway.
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
        "cgroup-parent": cgroup.builds,
        "shutdown-timeout": 1,
        "builder": {
            "gc": {"enabled": True, "defaultKeepStorage": str(order.keep_bytes)},
            "entitlements": {"network-host": False, "security-insecure": False},
        },
    }


# ---- The command line -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 after a signal; 1, with one line on standard error, if the engine did not start or ended."""
    try:
        return run_engine(_order(arguments))
    except (EngineUnavailable, OSError, subprocess.CalledProcessError) as error:
        _say(_reason(error))
        return 1


def _order(arguments: Sequence[str] | None) -> EngineOrder:
    parser = argparse.ArgumentParser(description="Runs one builder slot's Docker engine.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--cpus", type=float, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--keep-bytes", type=int, required=True, help="how much layer cache to keep")
    parser.add_argument("--reach", action="append", default=[], help="HOST:PORT of the registry, and of the API")
    said = parser.parse_args(arguments)
    limits = SlotLimits(said.memory_bytes, said.cpus, said.processes)
    reach = {place for text in said.reach for place in _places(text)}
    return EngineOrder(Slot(said.home, said.slot), limits, said.keep_bytes, tuple(sorted(reach, key=str)))


def _places(text: str) -> list[Place]:
    """The IPv4 addresses of a service; none if its name says nothing now."""
    host, _, port = text.rpartition(":")
    try:
        found = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    return [Place("127.0.0.1" if address[0] == "0.0.0.0" else str(address[0]), int(port)) for *_, address in found]  # noqa: S104


def _is_loopback(place: Place) -> bool:
    return place.address.startswith(LOOPBACK)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{' '.join(error.cmd)}: {(error.stderr or 'it said nothing').strip()}"
    return str(error)


def _say(line: str) -> None:
    print(f"engine: {' '.join(line.split())}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
