"""Servers as processes of their own, on ports that they find themselves and print."""

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

START_SECONDS = 30.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02
PRINTED_BYTES = 65536


@contextmanager
def running_server(command: Sequence[str], listening: re.Pattern[str], output: BinaryIO) -> Iterator[str]:
    """The address of a server that prints to `output`, a file of its own, and runs until the block's end.

    It is the first group of what `listening` finds there. Raises RuntimeError with its output if it ends at once,
    TimeoutError if it does not listen in time.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield _address_of(process, listening, output)
    finally:
        _stop(process)


def _address_of(process: subprocess.Popen[bytes], listening: re.Pattern[str], output: BinaryIO) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        has_ended = process.poll() is not None
        printed = os.pread(output.fileno(), PRINTED_BYTES, 0).decode(errors="replace")
        if started := listening.search(printed):
            return started[1]
        if has_ended:
            raise RuntimeError(f"{process.args} ended: {printed}")
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"{process.args} does not listen within {START_SECONDS} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
