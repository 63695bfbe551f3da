r"""Writes prompts to an agent's terminal, each whole and each submitted once.

How, depends on what the agent has made of its terminal when the prompt is written:

- It reads lines (ICANON, as `read` and `input()` do): a line end would submit the half before it, so line ends within
  the prompt become spaces. The kernel keeps at most 4095 bytes of a line that has not ended: longer ones are pushed on
  in pieces by the EOF character, which a reader of lines does not notice.
- It takes pastes (it has printed `ESC[?2004h`): the prompt as a bracketed paste, then, as a key of its own, Return.
- It reads keys: line ends as Ctrl-J, which agents take for a new line in the same prompt, then Return.

Control characters other than tab and line end are left out: they would act as keys (Ctrl-C, or the end of a paste).

The first prompt waits until the agent has printed something and paused, or has begun to read keys, at most 3 s.
"""

import os
import re
import termios
from collections import deque

from kiln.adapters.pod_shim_tree import now

SETTLED_SECONDS = 0.2
LONGEST_SETTLING_SECONDS = 3.0
# Agents that get Return together with a paste take it for a part of that.
RETURN_PAUSE_SECONDS = 0.2
PUSHED_CHARS = 500
WRITE_BYTES = 2048
MAX_QUEUED_CHARS = 32 * 1024 * 1024
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PASTE_SWITCH = re.compile(rb"\x1b\[\?2004([hl])")
_SWITCH_BYTES = 8

Piece = tuple[float, bytes]


class PromptWriter:
    """Prompts that wait for a terminal, in order. `terminal` is its controlling side, which does not block."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._prompts: deque[str] = deque()
        self._pieces: deque[Piece] = deque()
        self._not_before = 0.0
        self._started = self._heard = now()
        self._silent = True
        self._settled = False
        self._takes_pastes = False
        self._tail = b""

    def add(self, prompt: str) -> bool:
        """Takes a prompt; False if too much is waiting already."""
        if sum(map(len, self._prompts)) + len(prompt) > MAX_QUEUED_CHARS:
            return False
        self._prompts.append(prompt)
        return True

    def heard(self, output: bytes) -> None:
        """The agent printed this."""
        self._silent = False
        self._heard = now()
        recent = self._tail + output
        for switch in _PASTE_SWITCH.finditer(recent):
            self._takes_pastes = switch[1] == b"h"
        self._tail = recent[-_SWITCH_BYTES + 1 :]

    @property
    def writing(self) -> bool:
        """Whether something is to be written as soon as the terminal takes it."""
        return bool(self._pieces) and self._not_before <= now()

    def patience(self) -> float:
        """Seconds until `write` may have something to do."""
        if self._pieces and not self.writing:
            return max(self._not_before - now(), 0) + 0.001
        return SETTLED_SECONDS / 4 if self._prompts and not self._pieces else LONGEST_SETTLING_SECONDS

    def write(self) -> None:
        """Writes what the terminal takes."""
        if not self._pieces and self._prompts and self._is_settled():
            mode = termios.tcgetattr(self._terminal)
            self._pieces.extend(encoded(self._prompts.popleft(), mode, takes_pastes=self._takes_pastes))
            self._wait()
        while self.writing:
            pause, data = self._pieces.popleft()
            try:
                written = os.write(self._terminal, data[:WRITE_BYTES])
            except BlockingIOError:
                written = 0
            if written < len(data):
                self._pieces.appendleft((pause, data[written:]))
            else:
                self._wait()
            if written < min(len(data), WRITE_BYTES):
                return

    def _wait(self) -> None:
        self._not_before = now() + (self._pieces[0][0] if self._pieces else 0)

    def _is_settled(self) -> bool:
        at = now()
        self._settled = (
            self._settled
            or not _reads_lines(termios.tcgetattr(self._terminal))
            or (not self._silent and at - self._heard >= SETTLED_SECONDS)
            or at - self._started >= LONGEST_SETTLING_SECONDS
        )
        return self._settled


def encoded(prompt: str, mode: list[int | list[bytes | int]], *, takes_pastes: bool) -> list[Piece]:
    """What to write, each piece with the seconds to wait before it."""
    lines = re.sub("\r\n?", "\n", prompt).rstrip("\n")
    text = _CONTROL.sub("", lines)
    if _reads_lines(mode):
        return [(0, data) for data in _pushed(text.replace("\n", " "), _eof_character(mode))]
    if takes_pastes:
        paste = "\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~"
        return [(0, paste.encode(errors="replace")), (RETURN_PAUSE_SECONDS, b"\r")]
    return [(0, text.encode(errors="replace")), (RETURN_PAUSE_SECONDS, b"\r")]


def _pushed(line: str, eof: bytes) -> list[bytes]:
    pieces = [line[at : at + PUSHED_CHARS].encode(errors="replace") for at in range(0, len(line), PUSHED_CHARS)]
    return [*(piece + eof for piece in pieces[:-1]), (pieces[-1] if pieces else b"") + b"\n"]


def _reads_lines(mode: list[int | list[bytes | int]]) -> bool:
    flags = mode[3]
    return isinstance(flags, int) and bool(flags & termios.ICANON)


def _eof_character(mode: list[int | list[bytes | int]]) -> bytes:
    characters = mode[6]
    found = characters[termios.VEOF] if isinstance(characters, list) else b"\x04"
    return found if isinstance(found, bytes) else bytes([found])
