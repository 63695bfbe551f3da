"""What Packer says while it makes a container image: its own words, and those of the `docker` commands that it runs."""

import re
from dataclasses import dataclass

from activities.buildkit_output import ENGINE_ERROR, REFUSED
from activities.container_attempt import RESOLVER
from activities.packer_output import PackerOutput
from kiln.errors import KilnError, SourceUnavailableError, ToolFailedError, UnavailableError

# Packer's own lines begin so; what a script prints is indented.
PULLING = re.compile(r"==> \S+: Pulling Docker image: (\S+)")
BUILDING = re.compile(r"==> \S+: Starting docker container")
PUSHING = re.compile(r"==> \S+: Running post-processor:.*docker-push|\s+\S+ \(docker-push\): Pushing")
# What Packer puts before the lines of a command that it runs.
PREFIX = re.compile(r"^(?:==>|\s) *\S+(?: \([\w-]+\))?: ")


@dataclass
class AgentOutput(PackerOutput):
    """Also remembers which step it is at: while it pulls and pushes, the engine's last line says what went wrong.

    `folder` is the run's own: where this host keeps it is nobody's business.
    """

    folder: str = ""
    base_image: str = ""
    step: str = ""
    last_line: str = ""

    def feed(self, line: str) -> list[str]:
        """The line as people read it: none, one or several."""
        lines = [self._without_places(text) for text in super().feed(line)]
        for text in lines:
            self._look_at(text)
        return lines

    def failure_of_image(self) -> KilnError:
        """The error that this output ends in; UnavailableError is worth another attempt."""
        if self.step in ("pull", "push") and ENGINE_ERROR.search(self.last_line):
            return UnavailableError(f"the Docker engine: {self.last_line}")
        if self.step == "pull":
            return SourceUnavailableError(f"{self.base_image}: {self.last_line}")
        if self.step == "push":
            kind = ToolFailedError if REFUSED.search(self.last_line) else UnavailableError
            return kind(f"the registry: {self.last_line}")
        # AWS's codes mean nothing here.
        return ToolFailedError(str(self.failure()))

    def _without_places(self, text: str) -> str:
        text = RESOLVER.sub(r"\1", text)
        return text.replace(f"{self.folder}/", "") if self.folder else text

    def _look_at(self, text: str) -> None:
        pulling = PULLING.match(text)
        if pulling:
            self.base_image, self.step, self.last_line = pulling[1], "pull", ""
        elif BUILDING.match(text):
            self.step = "build"
        elif PUSHING.match(text):
            self.step, self.last_line = "push", ""
        elif self.error is None or not self.last_line:
            self.last_line = PREFIX.sub("", text).removeprefix("Error response from daemon: ").strip()
