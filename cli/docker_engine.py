"""A Docker engine to build agent images with: one that answers already, or a private one for the time of a `with` block.

The private engine changes nothing that another engine uses: it has its own directories, socket, bridge and firewall
rules, and all of them go when the block ends. Its parts stand below in the order in which they are needed.

    EngineUnavailable   no engine can be had here; its text is one line that says why
    BaseImageError      the base image could not be made; its text is one line with the tool's own reason
"""

import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from cli.engine_network import forward_packets, free_subnet, run, stop_forwarding

BASE_IMAGE = "kiln/minbase:bookworm"
BASE_SUITE = "bookworm"

DEFAULT_HOST = "unix:///var/run/docker.sock"
DEBIAN_PACKAGES = {
    "docker": "docker.io",
    "dockerd": "docker.io",
    "mmdebstrap": "mmdebstrap",
    "packer": "packer",
}

ANSWER_TIMEOUT = timedelta(seconds=10)
START_TIMEOUT = timedelta(seconds=60)
STOP_TIMEOUT = timedelta(seconds=30)
CONTAINER_STOP_TIMEOUT = timedelta(seconds=5)


class EngineUnavailable(RuntimeError):  # noqa: N818  reads as what it says: `except EngineUnavailable`
    """No Docker engine, or a tool beside it, can be had here. The text is one line that says why."""


class BaseImageError(RuntimeError):
    """mmdebstrap or `docker import` failed. The text is one line with the tool's own reason."""


# ---- The engine -------------------------------------------------------------------------------------------------------


@contextmanager
def docker_engine(data_root: Path | None = None) -> Iterator[str]:
    """Yields the DOCKER_HOST URL of a working engine.

    It is the one at $DOCKER_HOST or at the default socket, if one answers there; else a private one, which ends with
    the block. `data_root` keeps the private engine's images from one run to the next; without it they go with it.

    Raises EngineUnavailable: no engine answers, and none can be started here.
    """
    require_tools("docker")
    running = _running_engine()
    if running is not None:
        yield running
        return
    with _private_engine(data_root) as host:
        yield host


def require_tools(*tools: str) -> None:
    """Raises EngineUnavailable, with the Debian package to install, for the first of these programs that is missing."""
    for tool in tools:
        if shutil.which(tool) is None:
            package = DEBIAN_PACKAGES.get(tool, tool)
            raise EngineUnavailable(f"{tool} is not installed: apt-get install {package}")


def container_network(host: str) -> str:
    """The network for a build's containers in the engine at `host`: "bridge", or "host" where it has no bridge."""
    names = docker(host, "network", "ls", "--format", "{{.Name}}").stdout.split()
    return "bridge" if "bridge" in names else "host"


def docker(host: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the docker command against the engine at `host` to its end, and returns its output whatever its exit code."""
    command = ["docker", "--host", host, *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def _running_engine() -> str | None:
    for host in (os.environ.get("DOCKER_HOST"), DEFAULT_HOST):
        if host and _answers(host):
            return host
    return None


def _answers(host: str) -> bool:
    command = ["docker", "--host", host, "version", "--format", "{{.Server.Version}}"]
    try:
        finished = subprocess.run(command, capture_output=True, check=False, timeout=ANSWER_TIMEOUT.total_seconds())
    except subprocess.TimeoutExpired:
        return False
    return finished.returncode == 0


@contextmanager
def _private_engine(data_root: Path | None) -> Iterator[str]:
    _require_private_engine()
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(_temporary_folder())
        data = data_root or folder / "data"
        cleanup.enter_context(_exclusive(data))
        cleanup.callback(_unmount_below, folder, data)
        network = cleanup.enter_context(_bridge())
        yield cleanup.enter_context(_daemon(folder, data, network))


def _require_private_engine() -> None:
    if shutil.which("dockerd") is None:
        raise EngineUnavailable("no Docker engine answers, and dockerd is not installed: apt-get install docker.io")
    if os.geteuid() != 0:
        raise EngineUnavailable("no Docker engine answers, and only root can start one")


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    # A short path, because a socket's has 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="kiln-docker-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def _exclusive(data_root: Path) -> Iterator[None]:
    data_root.mkdir(parents=True, exist_ok=True)
    with (data_root / "kiln.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EngineUnavailable(f"another private Docker engine runs on {data_root}") from None
        yield


# ---- Its process ------------------------------------------------------------------------------------------------------


@contextmanager
def _daemon(folder: Path, data_root: Path, network: list[str]) -> Iterator[str]:
    host = f"unix://{folder}/docker.sock"
    command = [
        *_dies_with_its_parent(),
        "dockerd",
        f"--host={host}",
        f"--data-root={data_root}",
        f"--exec-root={folder}/exec",
        f"--pidfile={folder}/dockerd.pid",
        f"--shutdown-timeout={int(CONTAINER_STOP_TIMEOUT.total_seconds())}",
        *network,
    ]
    log = folder / "dockerd.log"
    with log.open("wb") as output:
        # A session of its own, so that Ctrl-C reaches the builds and not the engine that they clean up in.
        process = subprocess.Popen(
            command,
            env=os.environ | {"TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(host, process, log)
        yield host
    finally:
        _kill_containers(host)
        _stop(process, folder)


def _dies_with_its_parent() -> list[str]:
    return ["setpriv", "--pdeathsig=TERM", "--"] if shutil.which("setpriv") else []


def _wait_until_it_answers(host: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    while not _answers(host):
        if process.poll() is not None:
            raise EngineUnavailable(f"dockerd did not start: {_last_error(log)}")
        if time.monotonic() > deadline:
            raise EngineUnavailable(f"dockerd did not answer within {START_TIMEOUT.seconds} s: {_last_error(log)}")
        time.sleep(0.1)


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "level=" not in line or "level=error" in line or "level=fatal" in line]
    return (errors or lines or ["it said nothing"])[-1]


def _kill_containers(host: str) -> None:
    # dockerd asks each of them to stop first, and waits for those that don't: a shell is one.
    containers = docker(host, "ps", "--quiet").stdout.split() if _answers(host) else []
    if containers:
        docker(host, "kill", *containers)


def _stop(process: subprocess.Popen[bytes], folder: Path) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT.total_seconds())
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _kill_what_is_left(folder)


def _kill_what_is_left(folder: Path) -> None:
    """Kills what runs below this engine still: its containerd and shims name its folder, and containers are theirs."""
    deadline = time.monotonic() + STOP_TIMEOUT.total_seconds()
    while (pids := _processes_of(folder)) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _processes_of(folder: Path) -> set[int]:
    """The processes with `folder` in their command line, and all their descendants, but this one."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    found = {pid for pid in pids if os.fsencode(f"{folder}/") in _command_line(pid)}
    parents = {pid: _parent(pid) for pid in pids}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])


def _unmount_below(*folders: Path) -> None:
    roots = tuple(f"{folder.resolve()}" for folder in folders)
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    ours = [mount for mount in mounts if mount in roots or mount.startswith(tuple(f"{root}/" for root in roots))]
    for mount in sorted(ours, key=len, reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)


# ---- Its network ------------------------------------------------------------------------------------------------------


@contextmanager
def _bridge() -> Iterator[list[str]]:
    """Makes a bridge with a way out, and yields dockerd's options for it; where none can be made, those for no bridge.

    dockerd's own bridge and firewall chains have fixed names: two engines would share them, and they outlive both.
    """
    with ExitStack() as cleanup:
        try:
            options = _set_up_bridge(cleanup)
        except (OSError, subprocess.CalledProcessError):
            cleanup.close()
            options = ["--bridge=none"]
        yield [*options, "--iptables=false", "--ip-forward=false", "--ip-masq=false"]


def _set_up_bridge(cleanup: ExitStack) -> list[str]:
    name = f"kiln{os.getpid():x}{secrets.token_hex(1)}"
    subnet = free_subnet()
    # Undone last: other engines' bridges and links may need it.
    cleanup.callback(stop_forwarding)
    forward_packets()
    run("ip", "link", "add", name, "type", "bridge")
    cleanup.callback(run, "ip", "link", "delete", name)
    run("ip", "address", "add", f"{subnet[1]}/{subnet.prefixlen}", "dev", name)
    run("ip", "link", "set", name, "up")
    _add_rule(cleanup, "nat", "POSTROUTING", "-s", str(subnet), "!", "-o", name, "-j", "MASQUERADE")
    _add_rule(cleanup, "filter", "FORWARD", "-i", name, "-j", "ACCEPT")
    _add_rule(cleanup, "filter", "FORWARD", "-o", name, "-j", "ACCEPT")
    return [f"--bridge={name}"]


def _add_rule(cleanup: ExitStack, table: str, chain: str, *rule: str) -> None:
    run("iptables", "--wait", "-t", table, "-I", chain, *rule)
    cleanup.callback(run, "iptables", "--wait", "-t", table, "-D", chain, *rule)


# ---- The base image ---------------------------------------------------------------------------------------------------


def make_base_image(host: str, tag: str = BASE_IMAGE, suite: str = BASE_SUITE) -> str:
    """Makes a minimal Debian image in the engine at `host`, unless one has that tag already, and returns its tag.

    Raises EngineUnavailable: mmdebstrap is missing. BaseImageError: mmdebstrap or the import failed.
    """
    if docker(host, "image", "inspect", tag).returncode != 0:
        require_tools("mmdebstrap")
        image_id = _import_root(host, suite)
        docker(host, "tag", image_id, tag)
    return tag


def _import_root(host: str, suite: str) -> str:
    # The tag follows a success: a root that broke off half-way is an image as well.
    with tempfile.TemporaryFile() as errors:
        bootstrap = subprocess.Popen(
            ["mmdebstrap", "--variant=minbase", "--format=tar", suite, "-"], stdout=subprocess.PIPE, stderr=errors
        )
        with bootstrap:
            command = ["docker", "--host", host, "import", "-"]
            imported = subprocess.run(command, stdin=bootstrap.stdout, capture_output=True, text=True, check=False)
        errors.seek(0)
        reason = _last_line(errors.read().decode(errors="replace"))
    image_id = imported.stdout.strip()
    if bootstrap.returncode != 0:
        docker(host, "image", "rm", image_id)
        raise BaseImageError(f"mmdebstrap --variant=minbase {suite} failed: {reason}")
    if imported.returncode != 0:
        raise BaseImageError(f"docker import failed: {_last_line(imported.stderr)}")
    return image_id


def _last_line(text: str) -> str:
    return (text.strip() or "it said nothing").splitlines()[-1]
