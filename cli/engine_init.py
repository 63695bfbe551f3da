"""The first process in a slot's namespaces: sets up the network's inner end, runs dockerd, and reaps what is orphaned.

`engine_main.py` starts it as `python -I -S engine_init.py NAME`, and holds the other ends of its standard input and output:

    main     {"address": "10.…/30" | null, "gateway": "10.…", "nameservers": [...], "link": "uplink",
              "resolv_conf": "…", "argv": [...], "env": {...}}              what to run, once it may
    init     here                                                           first
             ready                                                          before dockerd starts
    main     end of file                                                    stop

When it ends, the kernel kills all that is left in the namespaces (pid_namespaces(7)). Standard library only.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

# dockerd has unmounted and written everything within a tenth of it; the rest it waits for its containerd.
STOP_SECONDS = 1.0
POLL_SECONDS = 0.05
LONGEST_POLL_MILLISECONDS = 1000
LAST_DESCRIPTOR = 64
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RESOLV_CONF = "/etc/resolv.conf"
IPV6_OFF = ("/proc/sys/net/ipv6/conf/all/disable_ipv6", "/proc/sys/net/ipv6/conf/default/disable_ipv6")


def main() -> int:
    """The exit code of dockerd; 0 if it was told to stop."""
    wakeup = _wake_on_children()
    _say("here")
    order: dict[str, Any] = json.loads(sys.stdin.readline() or "null") or {}
    if not order:
        return 0
    _set_up_network(order)
    _set_up_names(order)
    _say("ready")
    daemon = _start(order["argv"], order["env"])
    code = _await_end(daemon, wakeup)
    return _stop(daemon) if code is None else code


def _wake_on_children() -> int:
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    # As the first process it hears no signal that it does not handle; its end is the end of its standard input.
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    return reading


def _set_up_network(order: dict[str, Any]) -> None:
    for file in IPV6_OFF:
        with suppress(OSError):  # a kernel without IPv6
            Path(file).write_text("1")
    _run("ip", "link", "set", "lo", "up")
    if order["address"]:
        _run("ip", "address", "add", order["address"], "dev", order["link"])
        _run("ip", "link", "set", order["link"], "up")
        _run("ip", "route", "add", "default", "via", order["gateway"])


def _set_up_names(order: dict[str, Any]) -> None:
    """The host's own resolv.conf may name a server on the host's loopback, which is not this one."""
    lines = "".join(f"nameserver {server}\n" for server in order["nameservers"])
    file = Path(order["resolv_conf"])
    file.write_text(lines)
    file.chmod(0o644)
    _run("mount", "--bind", str(file), RESOLV_CONF)


def _start(argv: list[str], env: dict[str, str]) -> int:
    """The daemon's pid. It gets nothing of this process: neither the lock nor the pipes nor ignored signals."""
    for descriptor in range(3, LAST_DESCRIPTOR):
        with suppress(OSError):
            os.set_inheritable(descriptor, False)
    actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, 2, 1)]
    return os.posix_spawnp(argv[0], argv, env, file_actions=actions, setsigdef=[*IGNORED, signal.SIGPIPE])


def _await_end(daemon: int, wakeup: int) -> int | None:
    """The daemon's exit code; None when it shall stop."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(wakeup, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll(LONGEST_POLL_MILLISECONDS)}
        with suppress(BlockingIOError):
            os.read(wakeup, 4096)
        code = _reap(daemon)
        if code is not None:
            return code or 1
        if 0 in ready and not os.read(0, 4096):
            return None


def _stop(daemon: int) -> int:
    with suppress(ProcessLookupError):
        os.kill(daemon, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while _reap(daemon) is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return 0


def _reap(daemon: int) -> int | None:
    """Buries every child that died. The daemon's exit code, if it was among them."""
    code = None
    with suppress(ChildProcessError):
        while (dead := os.waitpid(-1, os.WNOHANG))[0]:
            if dead[0] == daemon:
                code = os.waitstatus_to_exitcode(dead[1])
    return code


def _run(*command: str) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if finished.returncode != 0:
        sys.exit(f"{' '.join(command)}: {finished.stderr.strip()}")


def _say(word: str) -> None:
    os.write(1, f"{word}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
