"""The names of one builder slot's engine: its files, its cgroup, its network link. Standard library only."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

# Short, since a socket's path has 107 bytes at most (unix(7)), and the same in every mount namespace.
RUN_FOLDER = Path("/run/kiln-engines")
LINK_PREFIX = "kiln"
MARK_LENGTH = 6


@dataclass(frozen=True)
class SlotLimits:
    """What the builds of a slot may use together. `cpus` counts the engine's own work too."""

    memory_bytes: int
    cpus: float
    processes: int


@dataclass(frozen=True)
class Slot:
    """One engine of the stack on `home` (an absolute path). `number` counts from 1."""

    home: Path
    number: int

    @property
    def name(self) -> str:
        """Of its cgroup and its run folder: the same at every start of this home, and no other home's."""
        mark = hashlib.sha256(str(self.home).encode()).hexdigest()[:MARK_LENGTH]
        return f"{mark}-{self.number}"

    @property
    def link(self) -> str:
        """Of its network link and its firewall chains; an interface's name has 15 characters at most."""
        return f"{LINK_PREFIX}{self.name}"

    @property
    def cgroup(self) -> str:
        return f"kiln-{self.name}"

    @property
    def data_root(self) -> Path:
        """Images and layer cache, which stay from one start to the next."""
        return self.home / "engines" / f"slot-{self.number}"

    @property
    def run_folder(self) -> Path:
        """What goes with the engine: its sockets and its configuration."""
        return RUN_FOLDER / self.name

    @property
    def host(self) -> str:
        """The engine's DOCKER_HOST."""
        return f"unix://{self.run_folder}/docker.sock"
