"""`kiln up`: the embedded stack in the foreground, until Ctrl-C or SIGTERM."""

import signal
import sys
import time
from contextlib import suppress
from types import FrameType

from cli.home import FirstKey
from cli.local_stack import ALL_PARTS, EC2, TEMPORAL, LocalStack
from cli.supervisor import InterruptedStartError
from kiln import __version__
from kiln.settings import Ec2Mode, Settings

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.1


def up(settings: Settings) -> int:
    """Runs the stack until it is told to stop; returns the exit code. Raises KilnError if it cannot start."""
    stack = LocalStack(settings, parts=ALL_PARTS, say=say)
    switch = Switch(stack)
    stack.check()
    with suppress(InterruptedStartError):
        stack.start()
        say(*_welcome(stack))
        switch.wait()
        say("Unfinished builds go on at the next start. Ctrl-C again stops without waiting for anything.")
    stack.stop()
    say("Stopped")
    return 0


class Switch:
    """Turns signals into the stack's end: the first ends it in order, the second at once."""

    def __init__(self, stack: LocalStack) -> None:
        self._stack = stack
        self._off = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._turn)

    def wait(self) -> None:
        """Returns after the first signal."""
        while not self._off:
            time.sleep(POLL_SECONDS)

    def _turn(self, _number: int, _frame: FrameType | None) -> None:
        if self._off:
            self._stack.hurry()
        self._off = True
        self._stack.interrupt()


def say(*lines: str) -> None:
    """Prints lines at once. That nobody reads them any more stops nothing."""
    with suppress(BrokenPipeError):
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()


def _welcome(stack: LocalStack) -> list[str]:
    """Where everything is. The key itself is shown once, when it is new."""
    settings = stack.settings
    rows = {
        "API": stack.api_url,
        "API docs": f"{stack.api_url}/docs",
        "Temporal UI": settings.ui_url,
        "EC2": _ec2(settings),
        "Registry": _registry(stack),
        "Containers": _containers(stack),
        "Runner": _runner(stack),
        "API key": _key(stack.key),
        "Logs": f"{settings.home_dir / 'logs'}",
    }
    elsewhere = _elsewhere(stack)
    lines = [f"  {name:<12} {value}" for name, value in rows.items()]
    return [*lines, *elsewhere, f"Ready: Kiln {__version__}. Ctrl-C stops everything."]


def _ec2(settings: Settings) -> str:
    if settings.ec2 is Ec2Mode.AWS:
        return f"AWS ({', '.join(settings.regions)})"
    return f"{settings.simulated_endpoint} (simulated: its AMIs live as long as it runs)"


def _registry(stack: LocalStack) -> str:
    settings = stack.settings
    if settings.registry:
        return f"{settings.registry} (KILN_REGISTRY); none was started"
    return settings.registry_host if stack.containers.own_registry else "none; it serves container builds only"


def _containers(stack: LocalStack) -> str:
    plan = stack.containers
    if plan.off:
        return f"off: {plan.off}"
    engines = (
        f"{plan.private_slots} engines of its own" if plan.private_slots else f"engines at {', '.join(plan.hosts)}"
    )
    return f"{engines}{f'; no transfers: {plan.no_transfers}' if plan.no_transfers else ''}"


def _runner(stack: LocalStack) -> str:
    settings = stack.settings
    name = stack.runner.name if stack.runner else ""
    return f"{name}, {settings.runner_places} pods at once in {settings.pods_dir}"


def _key(key: FirstKey) -> str:
    return f"{key.plain} (shown once; kept in {key.file})" if key.made else f"in {key.file}"


def _elsewhere(stack: LocalStack) -> list[str]:
    """What was not started because the settings say that it is somewhere else."""
    lines = []
    if TEMPORAL not in stack.parts:
        lines.append(f"Temporal is at {stack.temporal_place.address} (TEMPORAL_ADDRESS); none was started")
    if stack.settings.simulated and EC2 not in stack.parts:
        lines.append(f"EC2 is simulated at {stack.settings.ec2_endpoint} (KILN_EC2_ENDPOINT); none was started")
    return lines
