"""Faults of single requests: refused, lost, delayed or held. All methods may be called from any thread."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from string import Template
from types import MappingProxyType
from typing import NamedTuple

from support.ec2_message import Reply, Request
from support.ec2_xml import error_reply


class Refusal(NamedTuple):
    """An error of EC2, with its HTTP status."""

    code: str
    message: str
    status: int


NO_CAPACITY_MESSAGE = (
    "We currently do not have sufficient $InstanceType capacity in the Availability Zone you requested "
    "(us-east-1a). Our system will be working on provisioning additional capacity."
)
THROTTLED = Refusal("RequestLimitExceeded", "Request limit exceeded.", 503)
NO_CAPACITY = Refusal("InsufficientInstanceCapacity", NO_CAPACITY_MESSAGE, 500)


@dataclass(frozen=True)
class Call:
    """One request. `time` is its arrival, in seconds since the epoch; `status` is that of its answer, lost or
    not (None: there was none); `fault` names what met it (None: nothing did)."""

    time: float
    action: str
    params: Mapping[str, str]
    status: int | None
    fault: str | None


class Effect(Enum):
    REFUSE = "refuse"
    DROP_REQUEST = "drop_request"
    DROP_REPLY = "drop_reply"
    DELAY = "delay"


@dataclass
class Fault:
    """A fault that meets the next `times` (None: all) requests of `action` (None: any action of EC2)."""

    name: str
    effect: Effect
    action: str | None
    times: int | None
    seconds: float = 0.0
    refusal: Refusal | None = None

    def meets(self, request: Request) -> bool:
        return request.is_ec2 if self.action is None else request.action == self.action

    def refuse(self, request: Request) -> Reply | None:
        if self.refusal is None:
            return None
        code, message, status = self.refusal
        return error_reply(code, Template(message).safe_substitute(request.params), status, self.name)


class Gate:
    """Holds requests of one action, before or after their execution, until `release()`."""

    def __init__(self, action: str, *, after_execution: bool) -> None:
        self.action = action
        self.after_execution = after_execution
        self._changed = threading.Condition()
        self._held = 0
        self._is_open = False

    def wait_for_request(self, timeout: float, count: int = 1) -> None:
        """Wait until `count` requests have been held here. Raises TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._held >= count, timeout):
                raise TimeoutError(f"{self._held} of {count} {self.action} requests came within {timeout} s")

    def release(self) -> None:
        """Let the held requests and all later ones go on, whether or not their sender still lives."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def meets(self, request: Request, *, after_execution: bool) -> bool:
        return request.action == self.action and self.after_execution == after_execution

    def pass_through(self) -> None:
        """Called by a request's thread: stand here until the gate opens."""
        with self._changed:
            self._held += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_open)


class RequestFaults:
    """What meets single requests, and the log of all of them. The oldest fault that fits comes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._faults: list[Fault] = []
        self._gates: list[Gate] = []
        self._arrived: list[tuple[str, Mapping[str, str]]] = []
        self._calls: list[Call] = []
        self._is_closing = False

    # For tests

    def throttle(self, action: str | None = None, times: int = 1) -> None:
        """Answer RequestLimitExceeded (503) without executing; without `action`, to any call of EC2."""
        self._add(Fault("throttle", Effect.REFUSE, action, times, refusal=THROTTLED))

    def no_capacity(self, times: int = 1) -> None:
        """Answer RunInstances with InsufficientInstanceCapacity (500) without executing it."""
        self._add(Fault("no_capacity", Effect.REFUSE, "RunInstances", times, refusal=NO_CAPACITY))

    def fail(self, action: str, code: str, message: str, status: int = 400, times: int = 1) -> None:
        """Answer with an EC2 error without executing. `$Name` in `message` is a parameter of the request."""
        self._add(Fault("fail", Effect.REFUSE, action, times, refusal=Refusal(code, message, status)))

    def drop_request(self, action: str, times: int = 1) -> None:
        """Close the connection without executing the request."""
        self._add(Fault("drop_request", Effect.DROP_REQUEST, action, times))

    def drop_reply(self, action: str, times: int = 1) -> None:
        """Execute the request, then close the connection without an answer."""
        self._add(Fault("drop_reply", Effect.DROP_REPLY, action, times))

    def delay(self, action: str, seconds: float, times: int | None = None) -> None:
        """Wait `seconds` before executing; every time, unless `times` is given. Adds to other faults."""
        self._add(Fault("delay", Effect.DELAY, action, times, seconds))

    def blocked(self, action: str) -> AbstractContextManager[Gate]:
        """Hold requests of `action` before their execution, until the gate's `release()` or the end.

        A held request is executed then even if its sender has died, as EC2 would; `drop_request` prevents it.
        """
        return self._gated(Gate(action, after_execution=False))

    def reply_blocked(self, action: str) -> AbstractContextManager[Gate]:
        """Execute requests of `action`, but hold the answers until the gate's `release()` or the end."""
        return self._gated(Gate(action, after_execution=True))

    def wait_for(self, action: str, timeout: float, count: int = 1) -> Mapping[str, str]:
        """Parameters of the `count`-th request of `action` since the proxy's start, as soon as it is here.

        Raises TimeoutError after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._arrivals_of(action)) >= count, timeout):
                seen = ", ".join(sorted({name for name, _ in self._arrived})) or "none"
                raise TimeoutError(f"no {action} number {count} within {timeout} s; seen: {seen}")
            return self._arrivals_of(action)[count - 1]

    def clear(self) -> None:
        """Forget the faults that are still due. Gates, the log and what lags stay as they are."""
        with self._changed:
            self._faults.clear()

    @property
    def calls(self) -> tuple[Call, ...]:
        """Finished requests, the first to finish first; a request is in it before its answer is sent."""
        with self._changed:
            return tuple(self._calls)

    def calls_of(self, action: str) -> tuple[Call, ...]:
        return tuple(call for call in self.calls if call.action == action)

    # For the proxy

    def admit(self, request: Request) -> Fault | None:
        """Note the arrival, wait out gates and delays, and return the fault that meets the request."""
        with self._changed:
            self._arrived.append((request.action, MappingProxyType(dict(request.params))))
            self._changed.notify_all()
        self._pass_gates(request, after_execution=False)
        with self._changed:
            pause = sum(fault.seconds for fault in self._take(request, {Effect.DELAY}))
            self._changed.wait_for(lambda: self._is_closing, pause)
            return next(iter(self._take(request, set(Effect) - {Effect.DELAY}, limit=1)), None)

    def hold_reply(self, request: Request) -> None:
        self._pass_gates(request, after_execution=True)

    def note(self, request: Request, arrived: float, status: int | None, fault: str | None) -> None:
        params = MappingProxyType(dict(request.params))
        with self._changed:
            self._calls.append(Call(arrived, request.action, params, status, fault))

    def stop_waiting(self) -> None:
        """Wake every request that is held or delayed, for the proxy's end."""
        with self._changed:
            self._is_closing = True
            gates = list(self._gates)
            self._changed.notify_all()
        for gate in gates:
            gate.release()

    def _add(self, fault: Fault) -> None:
        with self._changed:
            self._faults.append(fault)

    def _take(self, request: Request, effects: set[Effect], limit: int | None = None) -> list[Fault]:
        taken = [fault for fault in self._faults if fault.effect in effects and fault.meets(request)][:limit]
        for fault in taken:
            if fault.times is not None:
                fault.times -= 1
        self._faults = [fault for fault in self._faults if fault.times is None or fault.times > 0]
        return taken

    @contextmanager
    def _gated(self, gate: Gate) -> Iterator[Gate]:
        with self._changed:
            self._gates.append(gate)
        try:
            yield gate
        finally:
            with self._changed:
                self._gates.remove(gate)
            gate.release()

    def _pass_gates(self, request: Request, *, after_execution: bool) -> None:
        with self._changed:
            held_at = [gate for gate in self._gates if gate.meets(request, after_execution=after_execution)]
        for gate in held_at:
            gate.pass_through()

    def _arrivals_of(self, action: str) -> list[Mapping[str, str]]:
        return [params for name, params in self._arrived if name == action]
