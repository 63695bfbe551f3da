"""How much a process's resident memory grows at its peak (proc(5): status, clear_refs)."""

import re
from pathlib import Path

RESET_PEAK = "5"
FIELD = re.compile(r"^(VmHWM|VmRSS):\s+(\d+) kB$", re.MULTILINE)


class PeakMemory:
    """Counts from its making on, of a process of this user."""

    def __init__(self, pid: int) -> None:
        self._proc = Path("/proc") / str(pid)
        (self._proc / "clear_refs").write_text(RESET_PEAK)
        self._began_bytes = self._bytes("VmRSS")

    def growth_bytes(self) -> int:
        """How much more memory the process had at its peak than at the beginning."""
        return self._bytes("VmHWM") - self._began_bytes

    def _bytes(self, name: str) -> int:
        fields = dict(FIELD.findall((self._proc / "status").read_text()))
        return int(fields[name]) * 1024
