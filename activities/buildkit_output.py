"""What BuildKit says with `--progress=rawjson`: JSON objects, indented over many lines, and plain lines between them.

An object's fields are `vertexes` (the steps), `statuses` (progress within a step), `logs` (a step's output, base64) and
`warnings`: https://pkg.go.dev/github.com/moby/buildkit/client#SolveStatus
"""

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from activities.buildkit_steps import CANCELED, LogLine, Step, decoded, plain
from kiln.errors import BuildError, SourceUnavailableError, ToolFailedError, UnavailableError
from kiln.redact import Redactor

OBJECT_LIMIT = 8 * 1024 * 1024
PLAIN_LINES = 20
MESSAGE_LENGTH = 2000

UPLOADING = "uploading the context"
EXPORTING = "exporting the image"
PUSHING = "pushing"
CONTEXT_STEP = re.compile(
    r"\[internal\] load (?:remote )?build (?:context|definition)|copy /context /|\[internal\] load \."
)
SOURCE_STEP = re.compile(
    r"(?:\[internal\] load metadata for |resolve image config for |(?:\[[^\]]*\] )?FROM )(?:docker-image://)?(\S+)"
)
CACHE_STEP = re.compile(r"importing cache manifest from |inferred cache manifest type|exporting cache")
# What goes on beside the build.
BESIDES = re.compile(rf"\[auth\] |{CACHE_STEP.pattern}")
EXPORT_STEP = re.compile(r"exporting ")
PUSH_STEP = re.compile(r"pushing ")

# The last, because the command stands before it.
EXIT_CODE = re.compile(r".*exit code: (\d+)", re.DOTALL)
PUSH_ERROR = re.compile(r"failed to push")
REFUSED = re.compile(r"unauthorized|denied|authentication required|authorization failed|no basic auth", re.IGNORECASE)
# What no Dockerfile can cause: the engine went away, or its disk is full.
ENGINE_ERROR = re.compile(
    r"Cannot connect to the Docker daemon|code = Unavailable|error reading from server|transport is closing"
    r"|error during connect|no space left on device|failed to receive status"
)
# Who handed an error to whom says nothing to whoever wrote the Dockerfile.
WRAPPING = re.compile(
    r"^(?:ERROR: |failed to solve: |failed to build: |rpc error: code = \w+ desc = "
    r"|failed to solve with frontend [\w.]+: |failed to create LLB definition: "
    r"|failed to compute cache key: |failed to load cache key: |failed to calculate checksum of ref \S+: )+"
)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
REPEATED = re.compile(r"not found(?:: not found)+")
UNRESOLVED = re.compile(r"failed to resolve source metadata|pull access denied|failed to load metadata")
# The engine's own directories.
MOUNT_PATH = re.compile(r"/\S*?/buildkit-mount\d+/")


class BuildkitOutput:
    """Reads the tool's lines one by one, gives them as people know them, and remembers what matters.

    All that leaves it for people is masked: what came in base64, in pieces or escaped, too. Give it the tool's lines as
    they are: a mask put into JSON before would damage that, and could hide what a build reads. `sources` are the names
    of the images that BuildKit reads, and `digests` theirs, for comparison only: they are not masked.
    """

    def __init__(self, redactor: Redactor | None = None) -> None:
        self._redactor = redactor or Redactor()
        self._objects: dict[str, ObjectLines] = {}
        self._steps: dict[str, Step] = {}
        self._running: dict[str, Step] = {}
        self._count = 0
        self._failed: Step | None = None
        self._plain: deque[str] = deque(maxlen=PLAIN_LINES)
        self._error = ""
        self.phase = UPLOADING
        self.sources: set[str] = set()
        self.digests: set[str] = set()

    def feed(self, stream: str, text: str) -> list[LogLine]:
        """The lines, each with its stream, that this line of the tool's completes."""
        lines = self._objects.setdefault(stream, ObjectLines())
        found: list[LogLine] = []
        for item in lines.feed(text):
            if isinstance(item, str):
                found.append((stream, self._plain_line(item)))
            else:
                found.extend(self._status(stream, item))
        return found

    def finish(self) -> list[LogLine]:
        """What steps printed without ending the line. For the end of the tool, however that came."""
        return [line for step in self._steps.values() for line in step.flush()]

    def failure(self) -> BuildError:
        """The error that this output ends in: an image that cannot be read, or the tool's own."""
        step = self._failed
        if step is None:
            return self._failure_without_step()
        if step.source and not ENGINE_ERROR.search(step.error):
            return SourceUnavailableError(_about(step.source, _unwrapped(step.error)))
        return ToolFailedError(_told(step))

    def outage(self) -> UnavailableError | None:
        """Why this failure is not the build's own, and may not come again: the engine or Kiln's registry went away."""
        error = self._failed.error if self._failed else self._error
        if EXIT_CODE.match(error):
            return None
        if ENGINE_ERROR.search(error) or ENGINE_ERROR.search(self._error):
            return UnavailableError(f"the Docker engine: {_unwrapped(self._error or error)}")
        pushed = PUSH_ERROR.search(error) or (self._failed is not None and PUSH_STEP.match(self._failed.name))
        if pushed and not REFUSED.search(error):
            return UnavailableError(f"the registry: {_unwrapped(error)}")
        return None

    def _failure_without_step(self) -> BuildError:
        message = _unwrapped(self._error) or next((line for line in reversed(self._plain) if line.strip()), "")
        kind = SourceUnavailableError if UNRESOLVED.search(message) else ToolFailedError
        return kind(message[:MESSAGE_LENGTH] or "BuildKit failed without saying why")

    def _plain_line(self, text: str) -> str:
        line = self._redactor.text(plain(text))
        if line.startswith("ERROR: "):
            self._error = line
        elif self._error and len(self._error) < MESSAGE_LENGTH:
            self._error += f"\n{line}"
        self._plain.append(line[:MESSAGE_LENGTH])
        return line

    def _status(self, stream: str, status: Mapping[str, Any]) -> Iterator[LogLine]:
        news = {str(item.get("vertex")) for field in ("statuses", "logs") for item in _items(status, field)}
        ending = []
        for vertex in _items(status, "vertexes"):
            yield from self._begin(stream, vertex)
            if vertex.get("completed") and str(vertex.get("digest")) in news:
                ending.append(vertex)  # its last words come first
            elif vertex.get("completed"):
                yield from self._end(stream, vertex)
        for item in _items(status, "statuses"):
            step = self._step(item.get("vertex"))
            yield from ((stream, line) for line in step.progress(item))
            self._note_phase(step, str(item.get("id")))
        for log in _items(status, "logs"):
            yield from self._step(log.get("vertex")).output(log)
        for vertex in ending:
            yield from self._end(stream, vertex)
        for warning in _items(status, "warnings"):
            yield stream, self._warning(warning)

    def _step(self, digest: object) -> Step:
        step = self._steps.get(str(digest))
        if step is None:
            step = self._steps[str(digest)] = Step(self._redactor)
        return step

    def _name(self, step: Step, name: str) -> None:
        """Names the step. What it reads is told by its true name: whoever chooses the secrets must not hide it."""
        step.name = self._redactor.text(name)
        source = _source_of(name)
        if source:
            self.sources.add(source)
            self.digests.update(DIGEST.findall(name))
            step.source = self._redactor.text(source)

    def _begin(self, stream: str, vertex: Mapping[str, Any]) -> Iterator[LogLine]:
        step = self._step(vertex.get("digest"))
        if not step.name:
            self._name(step, plain(str(vertex.get("name") or "")))
        if not vertex.get("started"):
            return
        step.started(vertex)
        self._running[str(vertex.get("digest"))] = step
        self._note_phase(step)
        if not step.number:
            self._count += 1
            step.number = self._count
            yield stream, f"#{step.number} {' '.join(step.name.split())}"

    def _end(self, stream: str, vertex: Mapping[str, Any]) -> Iterator[LogLine]:
        step = self._step(vertex.get("digest"))
        self._running.pop(str(vertex.get("digest")), None)
        step.error = self._redactor.text(plain(str(vertex.get("error") or "")))
        self._note_failure(step)
        yield from step.flush()
        yield from ((stream, line) for line in step.ended(vertex, is_cache=bool(CACHE_STEP.match(step.name))))
        if self._running:
            self._note_phase(next(reversed(self._running.values())))

    def _note_failure(self, step: Step) -> None:
        """The first step that failed, not those that were given up because of it."""
        if not step.error or CACHE_STEP.match(step.name):
            return
        if self._failed is None or (CANCELED.search(self._failed.error) and not CANCELED.search(step.error)):
            self._failed = step

    def _note_phase(self, step: Step, status: str = "") -> None:
        if CONTEXT_STEP.match(step.name):
            self.phase = UPLOADING
        elif PUSH_STEP.match(step.name) or PUSH_STEP.match(status):
            self.phase = PUSHING
        elif EXPORT_STEP.match(step.name):
            self.phase = EXPORTING
        elif step.source:
            self.phase = f"reading {step.source}"
        elif not BESIDES.match(step.name):
            self.phase = f"building: {' '.join(step.name.split())}"

    def _warning(self, warning: Mapping[str, Any]) -> str:
        text = decoded(str(warning.get("short") or "")).decode(errors="replace")
        line = next((place["start"]["line"] for place in _items(warning, "range") if _has_line(place)), None)
        where = "" if line is None else f" (line {line})"
        return f"WARN: {self._redactor.text(plain(text))}{where}"


class ObjectLines:
    """Puts JSON objects together again out of the lines of one stream."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._size = 0

    def feed(self, line: str) -> Iterator[str | Mapping[str, Any]]:
        """The objects that end with this line, and the line itself if it belongs to none."""
        if self._lines and not line.startswith((" ", "}")):
            yield self._lost()
        if self._lines:
            self._add(line)
            if line.startswith("}"):
                yield self._object()
            elif self._size > OBJECT_LIMIT:
                yield self._lost()
        elif line == "{":
            self._add(line)
        else:
            yield _object_of(line) or line

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._size += len(line)

    def _object(self) -> str | Mapping[str, Any]:
        found = _object_of("\n".join(self._lines))
        if found is None:
            return self._lost()
        self._lines, self._size = [], 0
        return found

    def _lost(self) -> str:
        count = len(self._lines)
        self._lines, self._size = [], 0
        return f"[kiln] {count} lines of BuildKit's progress could not be read"


def _object_of(text: str) -> Mapping[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _items(status: Mapping[str, Any], field: str) -> Iterator[Mapping[str, Any]]:
    items = status.get(field)
    return (item for item in items if isinstance(item, dict)) if isinstance(items, list) else iter(())


def _has_line(place: Mapping[str, Any]) -> bool:
    start = place.get("start")
    return isinstance(start, dict) and "line" in start


def _source_of(step_name: str) -> str:
    """The image that a step reads, as the Dockerfile names it; "" if it reads none."""
    found = SOURCE_STEP.match(step_name)
    if found is None:
        return ""
    name, _, _ = found[1].partition("@")
    return name if ":" in name.rpartition("/")[2] else found[1]


def _told(step: Step) -> str:
    """The step with its command, what became of it, and the last that it printed."""
    code = EXIT_CODE.match(step.error)
    why = f"exit code {code[1]}" if code else _unwrapped(step.error)
    name = " ".join(step.name.split())
    if PUSH_STEP.match(name):
        why = f"the registry refused it: {why}" if REFUSED.search(why) else why
    message = f"{name[: MESSAGE_LENGTH // 4]}: {why}"
    return "\n".join([message[:MESSAGE_LENGTH], *step.last_lines])


def _unwrapped(error: str) -> str:
    text = MOUNT_PATH.sub("", WRAPPING.sub("", error.strip()))
    return REPEATED.sub("not found", text)


def _about(reference: str, error: str) -> str:
    return error if error.startswith(reference) else f"{reference}: {error}"
