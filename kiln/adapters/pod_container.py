r"""Stands for an agent that runs in a container: starts the container, is its terminal, and ends and removes it.

A program of its own, which a pod's shim runs as its agent, on the pod's terminal:
`python -I -S -X utf8 pod_container.py NAME GRACE_SECONDS`, with the engine's address in DOCKER_HOST. The container was
made by `sandbox_container.py`. SIGTERM is passed on to the agent, which is killed after the grace. Exits with the agent's
exit code; 125 if the engine failed, 127 if the container cannot be started. What it says itself stands in brackets.

The two terminals. The pod's own is the one that prompts are written for (`pod_shim_prompts.py`), but it is the
container's whose mode the agent sets, which nobody outside can ask for. So the pod's reads lines until the agent is seen
to take pastes (`ESC[?2004h`), which all agents do that read keys; from then on it passes each byte on as it is.

If it is killed, the container lives on until `ContainerSandboxes` removes it. Standard library only.
"""

import os
import re
import signal
import socket
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path

if not __package__:
    # Isolated Python knows the standard library alone; Kiln comes last, so that it hides nothing.
    sys.path.append(str(Path(__file__).parents[2]))

from kiln.adapters.pod_engine import EngineApi, EngineError, MissingError, engine_host

ENGINE_FAILED = 125
CANNOT_START = 127
KILLED = 128 + signal.SIGKILL
READ_BYTES = 64 * 1024
STOPPING_SECONDS = 30.0
MEGABYTE = 1024 * 1024
# A terminal that reads lines keeps at most 4095 bytes of one; its EOF character hands over what it has.
PUSHED_BYTES = 2048
PUSH = b"\x04"
PASTE_SWITCH = re.compile(rb"\x1b\[\?2004([hl])")
SWITCH_BYTES = 8


class Wrapper:
    """One container from its start to its removal."""

    def __init__(self, api: EngineApi, name: str, grace_seconds: int) -> None:
        self._api = api
        self._path = f"/containers/{name}"
        self._name = name
        self._grace = grace_seconds
        self._terminal = OwnTerminal()
        self._ending = False

    def run(self) -> int:
        """The exit code."""
        signal.signal(signal.SIGTERM, self._hear_end)
        try:
            with self._api.attach(self._name) as container:
                if not self._start():
                    return CANNOT_START
                threading.Thread(target=self._terminal.type_into, args=[container], daemon=True).start()
                self._terminal.show(container)
            return self._exit_code()
        except MissingError:
            self._terminal.say("the agent's container was removed")
            return ENGINE_FAILED
        except EngineError as error:
            self._terminal.say(f"the agent is lost: {error}")
            return ENGINE_FAILED
        finally:
            self._remove()

    def _start(self) -> bool:
        try:
            self._api.call("POST", f"{self._path}/start")
        except EngineError as error:
            if error.status is None:
                raise
            self._terminal.say(f"the agent's container cannot be started: {error}")
            return False
        # An agent that ends at once has no terminal any more.
        with suppress(EngineError):
            rows, columns = termios.tcgetwinsize(0)
            self._api.call("POST", f"{self._path}/resize", {"h": rows, "w": columns})
        if self._ending:
            self._stop()
        return True

    def _hear_end(self, _number: int, _frame: object) -> None:
        self._ending = True
        threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        with suppress(EngineError):
            self._api.call("POST", f"{self._path}/stop", {"t": self._grace}, seconds=self._grace + STOPPING_SECONDS)

    def _exit_code(self) -> int:
        self._api.call("POST", f"{self._path}/wait")
        found = self._api.call("GET", f"{self._path}/json")
        code = int(found["State"]["ExitCode"])
        if found["State"]["OOMKilled"]:
            limit = found["HostConfig"]["Memory"] // MEGABYTE
            whose = "the agent was" if code == KILLED else "processes of the agent's were"
            self._terminal.say(f"{whose} killed at the limit of {limit} MB of memory")
        return code

    def _remove(self) -> None:
        with suppress(EngineError):
            self._api.call("DELETE", self._path, {"force": 1, "v": 1})


class OwnTerminal:
    """The pod's terminal, which is this process's standard streams, and what goes through it either way."""

    def __init__(self) -> None:
        self._reads_lines = True
        self._tail = b""
        self._unpushed = 0
        self._at_line_start = True

    def show(self, container: socket.socket) -> None:
        """Prints what the container prints, until its end."""
        while True:
            try:
                data = container.recv(READ_BYTES)
            except OSError:
                return
            if not data:
                return
            self._look_for_switch(data)
            self._print(data)

    def type_into(self, container: socket.socket) -> None:
        """Passes on what is typed, for ever."""
        with suppress(OSError):
            while data := os.read(0, READ_BYTES):
                container.sendall(self._as_keys(data) if self._reads_lines else data)

    def say(self, text: str) -> None:
        """A line of the wrapper's own."""
        self._print(f"{'' if self._at_line_start else chr(10)}[{text}]\n".encode())

    def _print(self, data: bytes) -> None:
        self._at_line_start = data.endswith(b"\n")
        while data:
            data = data[os.write(1, data) :]

    def _as_keys(self, piece: bytes) -> bytes:
        """A line, or a piece of it that was pushed on, as keys: Return ends it."""
        push = PUSH if self._unpushed + len(piece) > PUSHED_BYTES and self._unpushed else b""
        begun = 0 if push else self._unpushed
        self._unpushed = 0 if piece.endswith(b"\n") else begun + len(piece)
        return push + piece.replace(b"\n", b"\r")

    def _look_for_switch(self, data: bytes) -> None:
        recent = self._tail + data
        switches = PASTE_SWITCH.findall(recent)
        self._tail = recent[-SWITCH_BYTES + 1 :]
        if switches:
            self._read_lines(wanted=switches[-1] == b"l")

    def _read_lines(self, *, wanted: bool) -> None:
        mode = termios.tcgetattr(0)
        lines = termios.ICANON | termios.ISIG
        mode[0] = mode[0] | termios.ICRNL if wanted else mode[0] & ~termios.ICRNL
        mode[3] = mode[3] | lines if wanted else mode[3] & ~lines
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(0, termios.TCSANOW, mode)
        self._reads_lines = wanted


def main() -> int:
    return Wrapper(EngineApi(engine_host("")), sys.argv[1], int(sys.argv[2])).run()


if __name__ == "__main__":
    sys.exit(main())
