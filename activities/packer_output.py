"""What Packer says with `-machine-readable`: `timestamp,target,type,data…`, commas and line ends escaped."""

import re
from dataclasses import dataclass, field

from kiln.errors import BuildError, CapacityError, ToolFailedError

RESOURCE_ID = re.compile(r"\b(?:ami|i|snap|vol|sg|key|eni)-[0-9a-f]{8,17}\b")
# EC2's codes for "not now": https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
CAPACITY_CODE = re.compile(
    r"\b(?:InsufficientInstanceCapacity|InsufficientHostCapacity|InstanceLimitExceeded|VcpuLimitExceeded"
    r"|MaxSpotInstanceCountExceeded|RequestLimitExceeded|Throttling)\b"
)
# The AMI that a build starts from: its log names it, and yet it is not the build's to show or to clean up.
SOURCE_IMAGE = "Found Image ID:"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
ARTIFACT_ID_FIELD = "id"
PREFIX = re.compile(r"^(?:==>|-->) \S+: *\t?")
# What a provisioning script says before it gives up (packer/scripts/lib.sh); Packer adds only its exit status.
SCRIPT_FAILED = "Script exited with non-zero exit status"
SCRIPT_ERROR = re.compile(r"^\s*(?:==>)?\s*\S+: error: (.+)$", re.MULTILINE)
SDK_TRAILER = "status code: "
MESSAGE_LENGTH = 1000


@dataclass
class PackerOutput:
    """Reads Packer's lines one by one and remembers what matters: the artifact, the last error, resources by id."""

    artifact: str | None = None
    error: str | None = None
    script_error: str | None = None
    ids: set[str] = field(default_factory=set)

    def feed(self, line: str) -> list[str]:
        """The line as people read it: none, one or several. What does not look machine-readable passes as it is."""
        fields = line.split(",")
        if len(fields) < 3 or not fields[0].isdigit():
            return self._plain(line)
        kind, data = fields[2], [_unescape(part) for part in fields[3:]]
        if kind == "ui" and len(data) >= 2:
            return self._said(data[0], ",".join(data[1:]))
        if kind == "artifact" and len(data) >= 3 and data[1] == ARTIFACT_ID_FIELD:
            self.artifact = data[2]
        if kind == "error" and data:
            self._failed(data[0])
        return []

    def new_ids(self, known: frozenset[str]) -> frozenset[str]:
        """Resource ids that were named and are not in `known`."""
        return frozenset(self.ids) - known

    def image(self) -> tuple[str, str] | None:
        """Region and AMI id of the artifact (`region:ami-…`), if there is one."""
        if self.artifact is None:
            return None
        region, _, image_id = self.artifact.split(",")[0].partition(":")
        return (region, image_id) if image_id else None

    def failure(self) -> BuildError:
        """The error that this output ends in."""
        message = self.error or "Packer failed without saying why"
        if self.script_error and message.startswith(SCRIPT_FAILED):
            message = f"{message.rstrip('.')}: {self.script_error}"
        return CapacityError(message) if CAPACITY_CODE.search(message) else ToolFailedError(message)

    def _said(self, level: str, text: str) -> list[str]:
        text = ANSI.sub("", text)
        if SOURCE_IMAGE not in text:
            self.ids.update(RESOURCE_ID.findall(text))
        told = SCRIPT_ERROR.search(text)
        if told:
            self.script_error = told[1].strip()[:MESSAGE_LENGTH]
        lines = [part for part in text.replace("\r\n", "\n").split("\n") if part.strip()]
        if level == "error" and lines and not self.error:
            self._failed("\n".join(lines))
        return lines

    def _plain(self, line: str) -> list[str]:
        line = ANSI.sub("", line)
        if line.startswith("Error: "):
            self._failed(line)
        return [line]

    def _failed(self, text: str) -> None:
        lines = [part.strip() for part in ANSI.sub("", text).split("\n")]
        # AWS's SDK puts "status code: 400, request id: …" on a line of its own, which says nothing to the users.
        lines = [PREFIX.sub("", part) for part in lines]
        told = " ".join(part for part in lines if part and not part.startswith(SDK_TRAILER)).removeprefix("Error: ")
        self.error = told[:MESSAGE_LENGTH] or self.error


def _unescape(text: str) -> str:
    return text.replace("%!(PACKER_COMMA)", ",").replace("\\n", "\n").replace("\\r", "\r")
