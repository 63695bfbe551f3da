"""What else the machine did while the bench ran: a figure is worth as much as the quiet it was measured in."""

import os
from pathlib import Path
from typing import Self

PROC_STAT = Path("/proc/stat")
# proc(5): user nice system idle iowait irq softirq steal; guest time is in user already.
IDLE_FIELDS = (3, 4)
STEAL_FIELD = 7
FIELDS = 8


class MachineLoad:
    """Counts from its making on. The bench's processes count as its own once they have ended."""

    def __init__(self) -> None:
        self._began = _clock()
        self._busy, self._steal = _cpu_seconds()
        self._own = _own_cpu_seconds()
        self._load = os.getloadavg()[0]

    @classmethod
    def begin(cls) -> Self:
        return cls()

    def summary(self) -> str:
        """One line for people."""
        elapsed = _clock() - self._began
        busy, steal = _cpu_seconds()
        own = _own_cpu_seconds() - self._own
        others = max(0.0, busy - self._busy - own)
        return (
            f"{elapsed:.0f} s on {os.cpu_count()} CPUs: the bench used {own / elapsed:.2f} of them, "
            f"other processes {others / elapsed:.2f}, the host's other guests {(steal - self._steal) / elapsed:.2f}; "
            f"load average {self._load:.1f} before, {os.getloadavg()[0]:.1f} after"
        )


def _clock() -> float:
    return os.times().elapsed


def _own_cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _cpu_seconds() -> tuple[float, float]:
    """Busy and stolen time of all CPUs since the machine's start."""
    ticks = [int(field) for field in PROC_STAT.read_text().splitlines()[0].split()[1 : FIELDS + 1]]
    a_second = os.sysconf("SC_CLK_TCK")
    idle = sum(ticks[number] for number in IDLE_FIELDS)
    steal = ticks[STEAL_FIELD]
    return (sum(ticks) - idle - steal) / a_second, steal / a_second
