"""Runs one pod's agent, and outlives the worker that started it.

A program of its own, which `shims.py` starts as `python -I -S -X utf8 pod_shim.py DIR LOCK`, with the order (`Order`,
JSON) on its standard input and a descriptor LOCK that holds the lock of DIR/alive. It leaves its parent at once and
becomes two processes in a session of their own:

    keeper     waits for the shim. If that dies, kills what it guarded and says so in `result.json`
    └─ shim    has the agent's terminal, clock, lease and spool, and answers at the control socket
       └─ agent, on a terminal and in a session of its own, and all that it starts

In DIR (mode 0700), which the worker made for it:

    order.json     the order, less what may be secret          spool-….jsonl   what the agent printed (pod_shim_spool.py)
    alive          locked (flock) while keeper or shim live    control         the socket (pod_shim_control.py)
    starting       there until the agent runs                  cgroups.json    the pod's control groups
    result.json    {"exit_code", "signal", "reason", "problem", "oom_kills", "lost", "last", "ended_at"}, last of all

Both are subreapers (prctl(2)): what leaves the agent's session or is orphaned is still found below them. Signals that end
others (SIGTERM, SIGINT, SIGHUP, SIGQUIT) are ignored: a service manager that stops the worker must not end its pods. It
must not send SIGKILL to all in the worker's control group either (systemd: `KillMode=process`).
Standard library only, and those modules of Kiln's that need no more.
"""

import json
import os
import selectors
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from traceback import extract_tb
from typing import Any

if not __package__:
    # Isolated Python knows the standard library alone; Kiln comes last, so that it hides nothing.
    sys.path.append(str(Path(__file__).parents[2]))

from kiln.adapters.guard import LONGEST_POLL_SECONDS, TERMINAL_SIGNALS
from kiln.adapters.pod_shim_account import Failure
from kiln.adapters.pod_shim_agent import Limits, Order, Terminal, end_of, problem_of, start_agent
from kiln.adapters.pod_shim_cgroups import Cgroups, make
from kiln.adapters.pod_shim_control import Control, Message
from kiln.adapters.pod_shim_prompts import PromptWriter
from kiln.adapters.pod_shim_spool import OWN_WORD, TERMINAL, Spool, TerminalLines
from kiln.adapters.pod_shim_tree import Tree, now, reserve_json, write_json

READ_BYTES = 64 * 1024
FLUSH_SECONDS = 0.5
CONTROL = Path("control")
STARTING = Path("starting")
RESULT = Path("result.json")
CGROUPS = Path("cgroups.json")
CRASH = Path("crash.txt")


class EndReason(StrEnum):
    """Why an agent ended: by itself, by order, past its time, without a worker, for want of memory, or not even begun."""

    EXITED = "exited"
    TERMINATED = "terminated"
    TIMED_OUT = "timed_out"
    LEASE_ENDED = "lease_ended"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_STARTED = "not_started"
    SHIM_LOST = "shim_lost"


class Shim:
    """One agent from its start to the end of its last descendant. The working directory is the pod's."""

    def __init__(self, order: Order, cgroups: Cgroups) -> None:
        self._order = order
        self._cgroups = cgroups
        self._tree = Tree()
        self._terminal = Terminal()
        self._lines = TerminalLines(order.secrets)
        self._spool = Spool(Path(), order.spool_bytes)
        self._limits = Limits(order.memory_mb, order.processes, frozenset(cgroups.paths))
        self._agent = 0
        self._prompted = order.prompted
        self._started = now()
        self._lease_end = self._started + order.lease_seconds
        self._flush_at: float | None = None
        self._kill_at: float | None = None
        self._verdict: EndReason | None = None

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        control = Control(CONTROL, selector, self._answer)
        problem = self._begin()
        try:
            if not problem:
                self._watch(selector, control)
        finally:
            self._cgroups.forbid_forks()
            self._tree.kill(keep=self._agent)
        while self._read():
            control.tell(self._spool.last)
        self._finish(problem)

    def _begin(self) -> str | None:
        """Starts the agent; returns why not, if so."""
        for remark in self._limits.remarks():
            self._spool.add(OWN_WORD, remark)
        try:
            self._cgroups.limit(self._order.memory_mb, self._order.processes)
            self._agent = start_agent(self._order, self._terminal, self._limits, self._cgroups)
        except Failure as failure:
            return str(failure)
        except OSError as error:
            return f"shim: {problem_of(error)}"
        finally:
            self._prompts = PromptWriter(self._terminal.control)
            STARTING.unlink(missing_ok=True)
            _let_go_of_streams()
        return None

    def _watch(self, selector: selectors.BaseSelector, control: Control) -> None:
        """Returns once the agent has ended, or its grace is over."""
        selector.register(self._tree.woken, selectors.EVENT_READ, lambda _: self._tree.settle())
        selector.register(self._terminal.control, selectors.EVENT_READ, self._attend_terminal)
        while not self._is_over():
            for key, events in selector.select(self._patience()):
                handler: Callable[[int], None] = key.data
                handler(events)
            self._flush_when_due()
            self._prompts.write()
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._prompts.writing else 0)
            selector.modify(self._terminal.control, wanted, self._attend_terminal)
            control.tell(self._spool.last)

    def _is_over(self) -> bool:
        left = self._tree.reap(self._agent)
        if self._verdict is None:
            if self._tree.status(self._agent) is not None:
                self._verdict = EndReason.EXITED
                return True
            self._look_at_the_clock()
        return not left or (self._kill_at is not None and now() >= self._kill_at)

    def _look_at_the_clock(self) -> None:
        """A lease that is over stays over: a worker that was stopped may renew it the moment it goes on."""
        limit = self._order.limit_seconds
        if limit is not None and now() >= self._started + limit:
            self._end(EndReason.TIMED_OUT)
        elif now() >= self._lease_end:
            self._end(EndReason.LEASE_ENDED)

    def _end(self, reason: EndReason) -> None:
        """SIGTERM to the tree; what is left after the grace is killed. Only the first reason counts."""
        if self._verdict is None:
            self._verdict = reason
            self._kill_at = now() + self._order.grace_seconds
            self._tree.signal(signal.SIGTERM)
            # What is stopped would not hear.
            self._tree.signal(signal.SIGCONT)

    def _patience(self) -> float:
        limit = self._order.limit_seconds
        moments = [self._lease_end, self._flush_at, self._kill_at, None if limit is None else self._started + limit]
        waits = [moment - now() for moment in moments if moment is not None and moment > now()]
        return max(min([*waits, self._prompts.patience(), LONGEST_POLL_SECONDS]), 0) + 0.001

    def _attend_terminal(self, _: int) -> None:
        self._read()

    def _read(self) -> bool:
        """Spools what the agent has printed; whether there was anything."""
        data = self._terminal.read(READ_BYTES)
        if data:
            self._prompts.heard(data)
            for line in self._lines.feed(data):
                self._spool.add(TERMINAL, line)
            self._flush_at = now() + FLUSH_SECONDS if self._lines.waiting else None
        return bool(data)

    def _flush_when_due(self) -> None:
        if self._flush_at is not None and now() >= self._flush_at:
            self._flush_at = None
            for line in self._lines.flush():
                self._spool.add(TERMINAL, line)

    def _answer(self, request: Message) -> Message:
        match request["do"]:
            case "prompt":
                return self._take_prompt(str(request["text"]), request.get("number"))
            case "terminate":
                self._end(EndReason.TERMINATED)
            case "renew":
                self._lease_end = now() + float(request["seconds"])
            case "ack":
                self._spool.acknowledge(int(request["number"]))
            case "status":
                return {"ok": True, **self._status()}
            case "follow":
                return {"ok": True, "last": self._spool.last}
            case _:
                return {"ok": False, "error": "no such request"}
        return {"ok": True}

    def _take_prompt(self, text: str, number: int | None) -> Message:
        """A number that is not above those that came before is a worker's repetition."""
        if number is None or number > self._prompted:
            if not self._prompts.add(text):
                return {"ok": False, "error": "too many prompts wait for the agent to read them"}
            self._prompted = number or self._prompted
        return {"ok": True}

    def _status(self) -> Message:
        return {
            "shim": self._order.shim,
            "agent": self._agent,
            "seconds": now() - self._started,
            "lease_seconds": self._lease_end - now(),
            "ending": self._verdict,
            "prompted": self._prompted,
            "last": self._spool.last,
            "acknowledged": self._spool.acknowledged,
            "lost": self._spool.lost,
            "limits": self._limits.report(),
        }

    def _finish(self, problem: str | None) -> None:
        for line in self._lines.finish():
            self._spool.add(TERMINAL, line)
        end = end_of(self._tree.status(self._agent))
        oom_kills = self._cgroups.oom_kills()
        verdict = EndReason.NOT_STARTED if problem else self._verdict
        if verdict == EndReason.EXITED and oom_kills and end["signal"] == signal.SIGKILL:
            verdict = EndReason.OUT_OF_MEMORY
        remark = f"[processes killed at the limit of {self._order.memory_mb} MB of memory: {oom_kills}]"
        self._spool.close(*([remark] if oom_kills else []))
        write_result(
            {
                **end,
                "reason": verdict,
                "problem": problem,
                "oom_kills": oom_kills,
                "lost": self._spool.lost,
                "last": self._spool.last,
            }
        )


def keep(order: Order) -> None:
    """The keeper's life: makes the pod's control groups, starts the shim, and clears up after it."""
    cgroups = make(f"kiln-{Path.cwd().parent.name}-{os.getpid()}")
    write_json(CGROUPS, cgroups.paths)
    reserve_json(RESULT)
    tree = Tree()
    shim = os.fork()
    if not shim:
        _be_shim(order, cgroups)
    _let_go_of_streams()
    _, status = os.waitpid(shim, 0)
    cgroups.forbid_forks()
    tree.kill()
    oom_kills = cgroups.oom_kills()
    cgroups.remove()
    if not RESULT.exists():
        problem = CRASH.read_text() if CRASH.exists() else f"its status was {os.waitstatus_to_exitcode(status)}"
        write_result({**end_of(None), "reason": EndReason.SHIM_LOST, "problem": problem, "oom_kills": oom_kills})


def _be_shim(order: Order, cgroups: Cgroups) -> None:
    try:
        reserve_json(RESULT)
        Shim(order, cgroups).run()
        # The keeper removes them, unless it is dead.
        cgroups.remove()
        os._exit(0)
    except BaseException as error:  # noqa: BLE001  this is a copy of the keeper: nothing may escape from it
        frames = [frame for frame in extract_tb(error.__traceback__) if "pod_shim" in frame.filename]
        # Without the error's text, which may quote what the agent was given.
        CRASH.write_text(f"{problem_of(error)} at {Path(frames[-1].filename).name}:{frames[-1].lineno}")
    os._exit(1)


def write_result(result: dict[str, Any]) -> None:
    write_json(RESULT, {**result, "ended_at": datetime.now(UTC).isoformat()})


def _let_go_of_streams() -> None:
    """The worker waits for the end of its pipe."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)


def main() -> None:
    """Returns in the keeper, at the pod's end."""
    # Held until both processes are gone, and by nobody else.
    os.set_inheritable(int(sys.argv[2]), False)
    order = Order(**json.load(sys.stdin))
    for number in TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.chdir(sys.argv[1])
    os.umask(0o077)
    if os.fork():
        os._exit(0)
    keep(order)


if __name__ == "__main__":
    main()
