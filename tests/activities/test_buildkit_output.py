"""What BuildKit prints with `--progress=rawjson`, as docker 20.10 with buildx 0.13 printed it, and what Kiln makes of it.

In `data/buildkit` each JSON object is one line; the tool indents it over many, and so do these tests.
"""

import base64
import json
from pathlib import Path

import pytest

from activities.buildkit_output import BuildkitOutput
from activities.buildkit_steps import LINE_LENGTH
from kiln.errors import SourceUnavailableError, ToolFailedError
from kiln.redact import Redactor

DATA = Path(__file__).parent / "data" / "buildkit"
RECORDINGS = sorted(path.stem for path in DATA.iterdir())
STEP = "sha256:" + "5" * 64
TIME = "2026-11-22T07:25:10.5Z"
SECRET = "correct-horse-battery"


def _indented(line: str) -> list[str]:
    return json.dumps(json.loads(line), indent=2).split("\n") if line.startswith("{") else [line]


def _printed(recording: str) -> list[str]:
    text = (DATA / f"{recording}.jsonl").read_text()
    return [line for raw in text.splitlines() for line in _indented(raw)]


def _read(recording: str) -> tuple[BuildkitOutput, list[str]]:
    output = BuildkitOutput()
    return output, [text for line in _printed(recording) for _, text in output.feed("stderr", line)]


class Build:
    """A build of one step, whose pieces of output a test chooses."""

    def __init__(self, *secrets: str) -> None:
        self.output = BuildkitOutput(Redactor(secrets))
        self.feed({"vertexes": [{"digest": STEP, "name": "[1/1] RUN make", "started": "2026-11-22T07:25:10Z"}]})

    def feed(self, status: dict) -> list[tuple[str, str]]:
        lines = json.dumps(status, indent=2).split("\n")
        return [found for line in lines for found in self.output.feed("stderr", line)]

    def data(self, data: str, stream: int = 1) -> list[str]:
        log = {"vertex": STEP, "stream": stream, "data": data, "timestamp": TIME}
        return [text.removeprefix("#1 0.500 ") for _, text in self.feed({"logs": [log]})]

    def says(self, *pieces: bytes, stream: int = 1) -> list[str]:
        """The step's output lines that these pieces complete."""
        return [line for piece in pieces for line in self.data(base64.b64encode(piece).decode(), stream)]


# The log


def test_success() -> None:
    """A build's log reads as BuildKit's plain progress does, and each layer that is pushed is one line."""
    _, lines = _read("success")
    assert [line for line in lines if "sha256:" not in line] == [
        "#1 [internal] load remote build context",
        "#1 DONE 0.0s",
        "#2 copy /context /",
        "#2 DONE 0.1s",
        "#3 [1/4] COPY busybox /bin/sh",
        "#3 DONE 0.0s",
        "#4 [2/4] COPY busybox /bin/busybox",
        "#4 DONE 0.0s",
        '#5 [3/4] RUN ["/bin/busybox","env"]',
        "#5 0.153 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "#5 0.153 HOME=/",
        "#5 DONE 0.2s",
        (
            r"#6 [4/4] RUN /bin/busybox printf 'a\nb\rc\033[31mred\033[0m' ; /bin/busybox sleep 1; "
            r"/bin/busybox printf 'rest\n\377 bad\n' >&2"
        ),
        "#6 0.139 a",
        "#6 0.139 b",
        "#6 1.141 rest",
        "#6 1.141 \ufffd bad",
        "#6 1.141 cred",
        "#6 DONE 1.2s",
        "#7 exporting to image",
        "#7 exporting layers 0.0s done",
        "#8 pushing 127.0.0.1:5000/kiln-staging/ok:attempt-1 with docker",
        "#7 naming to 127.0.0.1:5000/kiln-staging/ok:attempt-1 0.0s done",
        "#7 DONE 0.0s",
        "#8 pushing layer 38e3b7f01188 3.07kB 0.1s done",
        "#8 pushing layer bac6ed9117dc 1.98MB 0.1s done",
        "#8 pushing layer 596e1e51e57c 1.54kB 0.1s done",
        "#8 pushing layer 8c1d37481f9c 1.98MB 0.1s done",
        "#8 DONE 0.1s",
    ]


def test_cached() -> None:
    """Each step that was taken from the cache says so right after its name."""
    _, lines = _read("cached")
    assert [lines[lines.index(line) - 1][:8] for line in lines if line.endswith(" CACHED")] == [
        "#3 [1/4]",
        "#4 [2/4]",
        "#5 [3/4]",
        "#6 [4/4]",
    ]


def test_no_cache() -> None:
    """A cache that is not there is no error."""
    _, lines = _read("no-cache")
    assert "#3 no cache to use: 127.0.0.1:5000/acme/nothing:v1: not found" in lines
    assert not [line for line in lines if "ERROR" in line]


def test_cancelled() -> None:
    """A cancelled step says so, after all that it printed."""
    _, lines = _read("cancelled")
    assert lines[-3:] == ["#5 3.194 tick 3", "#5 CANCELED", "ERROR: failed to solve: Canceled: context canceled"]


def test_streams() -> None:
    """A step's lines come with the stream that it wrote them to."""
    build = Build()
    logs = [{"vertex": STEP, "stream": n, "data": base64.b64encode(b"x\n").decode(), "timestamp": TIME} for n in (1, 2)]
    assert build.feed({"logs": logs}) == [("stdout", "#1 0.500 x"), ("stderr", "#1 0.500 x")]


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        ([b"one, ", b"still one\n"], ["one, still one"]),
        ([b"caf\xc3", b"\xa9\n"], ["caf\N{LATIN SMALL LETTER E WITH ACUTE}"]),
        ([b"\xff\n"], ["\ufffd"]),
        ([b"one\r", b"\ntwo\r\n"], ["one", "two"]),
        ([b"\r10%\r20%\r", b"done\n"], ["10%", "20%", "done"]),
        ([b"\n\nthree\n"], ["", "", "three"]),
        ([b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07\x00end\n"], ["red end"]),
    ],
    ids=["joined", "character", "not UTF-8", "CR LF", "progress", "empty lines", "escapes"],
)
def test_lines(pieces: list[bytes], lines: list[str]) -> None:
    """A step's output becomes lines, however it was cut into pieces."""
    assert Build().says(*pieces) == lines


def test_line_without_end() -> None:
    """What a step printed last is shown at the end of the tool, also if no line end followed."""
    build = Build()
    build.says(b"almost")
    assert build.output.finish() == [("stdout", "#1 0.500 almost")]


def test_long_line() -> None:
    """A line without an end comes in parts, nothing of it missing."""
    lines = Build().says(*[b"x" * 1000] * 300, b"\n")
    assert len(lines) > 1
    assert max(map(len, lines)) < 2 * LINE_LENGTH
    assert sum(map(len, lines)) == 300_000


def test_warning() -> None:
    """A warning is a line, with the Dockerfile's line."""
    warning = {"vertex": STEP, "level": 1, "short": base64.b64encode(b"JSON arguments recommended").decode()}
    warning["range"] = [{"start": {"line": 3, "character": 0}, "end": {"line": 3, "character": 0}}]
    assert Build().feed({"warnings": [warning]}) == [("stderr", "WARN: JSON arguments recommended (line 3)")]


# Secrets


def test_secret_in_pieces() -> None:
    """A secret is masked also where BuildKit cut it in two."""
    data = f"key={SECRET}!\n".encode()
    for at in range(len(data)):
        assert Build(SECRET).says(data[:at], data[at:]) == ["key=***!"]


@pytest.mark.parametrize("before", ["", "a", "ab", "abc"])
@pytest.mark.parametrize("after", ["\n", "x\n", "xy\n"])
def test_masked_base64(before: str, after: str) -> None:
    """What the process adapter masked in base64 already stays readable around the mask."""
    encoded = base64.b64encode(f"{before}{SECRET}{after}".encode()).decode()
    masked = Redactor([SECRET]).text(encoded)
    assert "***" in masked
    assert Build().data(masked) == [f"{before}***{after.strip()}"]


def test_secret_in_a_name() -> None:
    """A secret that BuildKit put into a step's name or error is masked there."""
    build = Build(SECRET)
    vertex = {"digest": "sha256:6", "name": f"COPY {SECRET} /", "started": TIME, "completed": TIME}
    lines = build.feed({"vertexes": [vertex | {"error": f'"/{SECRET}" not found'}]})
    assert SECRET not in f"{lines} {build.output.failure()} {build.output.phase}"


# Failures


@pytest.mark.parametrize(
    ("recording", "kind", "message"),
    [
        (
            "failed-run",
            ToolFailedError,
            (
                r"[3/3] RUN /bin/busybox printf 'cc -c main.c\nmain.c:3: error: '; /bin/busybox printf 'expected ;\n' >&2; "
                "exit 7: exit code 7\ncc -c main.c\nexpected ;\nmain.c:3: error: "
            ),
        ),
        ("failed-copy", ToolFailedError, '[2/2] COPY nowhere.txt /x: "/nowhere.txt" not found'),
        ("syntax-error", ToolFailedError, "dockerfile parse error line 3: unknown instruction: RUNN"),
        (
            "missing-dockerfile",
            ToolFailedError,
            "failed to read dockerfile: open other/Dockerfile: no such file or directory",
        ),
        ("missing-base", SourceUnavailableError, "127.0.0.1:5000/kiln-staging/none:attempt-1: not found"),
        (
            "unknown-base",
            SourceUnavailableError,
            (
                'nowhere.invalid/acme/base:1: failed to do request: Head "https://nowhere.invalid/v2/acme/base/manifests/1": '
                "dial tcp: lookup nowhere.invalid on 192.0.2.53:53: no such host"
            ),
        ),
        (
            "push-refused",
            ToolFailedError,
            (
                "pushing 127.0.0.1:5000/kiln-staging/a2:attempt-1 with docker: "
                "the registry refused it: unauthorized: authentication required"
            ),
        ),
    ],
)
def test_failure(recording: str, kind: type, message: str) -> None:
    """A failed build's error is BuildKit's own: the step, what became of it, and the last that it printed."""
    output, _ = _read(recording)
    failure = output.failure()
    assert (type(failure), str(failure)) == (kind, message)


def test_last_lines() -> None:
    """Of a step's output, the error has the last five lines, and no more than a kilobyte."""
    build = Build()
    build.says(*(f"{number} {'x' * 300}\n".encode() for number in range(9)))
    build.feed({"vertexes": [{"digest": STEP, "started": TIME, "completed": TIME, "error": "process: exit code: 2"}]})
    first, *last = str(build.output.failure()).split("\n")
    assert first == "[1/1] RUN make: exit code 2"
    assert [line[0] for line in last if not line.startswith("x")] == ["6", "7", "8"]
    assert sum(map(len, last)) <= 1024


@pytest.mark.parametrize(
    ("recording", "part"), [("registry-gone", "the registry"), ("engine-killed", "the Docker engine")]
)
def test_outage(recording: str, part: str) -> None:
    """A registry or an engine that went away is told apart from what the build itself did wrong."""
    output, _ = _read(recording)
    assert str(output.outage()).startswith(f"{part}: ")


@pytest.mark.parametrize("recording", ["failed-run", "failed-copy", "push-refused", "unknown-base", "syntax-error"])
def test_no_outage(recording: str) -> None:
    """What another try would not cure is no outage."""
    output, _ = _read(recording)
    assert output.outage() is None


def test_command_that_sounds_like_an_outage() -> None:
    """A failed command is the build's own failure, whatever words stand in it."""
    build = Build()
    error = 'executor failed running [/bin/sh -c echo "exit code: 9: no space left on device"; exit 3]: exit code: 3'
    build.feed({"vertexes": [{"digest": STEP, "started": TIME, "completed": TIME, "error": error}]})
    assert build.output.outage() is None
    assert str(build.output.failure()) == "[1/1] RUN make: exit code 3"


def test_nothing_said() -> None:
    """A tool that failed without a word still leaves a sentence."""
    assert str(BuildkitOutput().failure()) == "BuildKit failed without saying why"


# What it remembers


def test_sources() -> None:
    """The images that a build reads are known by the names that its Dockerfile gave them."""
    assert _read("unknown-base")[0].sources == {"nowhere.invalid/acme/base:1"}


def test_frontend_is_a_source() -> None:
    """A Dockerfile's `# syntax=` is an image as well, and so is one that only a COPY names."""
    build = Build()
    names = ["resolve image config for docker-image://docker.io/docker/dockerfile:1", "FROM host:5000/acme/tools:v1"]
    build.feed({"vertexes": [{"digest": name, "name": name} for name in names]})
    assert build.output.sources == {"docker.io/docker/dockerfile:1", "host:5000/acme/tools:v1"}


def test_secrets_do_not_hide_sources() -> None:
    """Whoever calls a part of BuildKit's own words a secret does not hide which images a build reads."""
    build = Build("[internal] load metadata for", "acme/private")
    name = "[internal] load metadata for host:5000/acme/private:v1"
    lines = build.feed({"vertexes": [{"digest": "sha256:7", "name": name, "started": TIME}]})
    assert build.output.sources == {"host:5000/acme/private:v1"}
    assert lines == [("stderr", "#2 *** host:5000/***:v1")]


def test_phases() -> None:
    """The phase says what is going on: the upload, each step, the export, the push."""
    output = BuildkitOutput()
    phases = [output.phase]
    for line in _printed("success"):
        output.feed("stderr", line)
        if output.phase != phases[-1]:
            phases.append(output.phase)
    assert [phases[0], phases[1], phases[-2], phases[-1]] == [
        "uploading the context",
        "building: [1/4] COPY busybox /bin/sh",
        "exporting the image",
        "pushing",
    ]


# Streams that are not as they should be


def test_plain_lines() -> None:
    """A line that is no JSON is kept as it is, in its stream."""
    output = BuildkitOutput()
    assert output.feed("stdout", "[+] Building") == [("stdout", "[+] Building")]
    assert output.feed("stderr", "{ not JSON") == [("stderr", "{ not JSON")]


def test_compact_objects() -> None:
    """An object that stands in one line is read as well."""
    output = BuildkitOutput()
    status = {"vertexes": [{"digest": STEP, "name": "[1/1] RUN make", "started": TIME}]}
    assert output.feed("stderr", json.dumps(status)) == [("stderr", "#1 [1/1] RUN make")]


@pytest.mark.parametrize("recording", RECORDINGS)
def test_lost_line(recording: str) -> None:
    """A stream that lost a line, wherever, is read on: at most that object is missing."""
    lines = _printed(recording)
    whole = _read(recording)[1]
    for lost in range(0, len(lines), 7):
        output = BuildkitOutput()
        read = [text for n, line in enumerate(lines) if n != lost for _, text in output.feed("stderr", line)]
        assert len(read) > len(whole) - 15
        assert str(output.failure())


def test_endless_object() -> None:
    """An object that does not end is given up, and what follows is read."""
    output = BuildkitOutput()
    output.feed("stderr", "{")
    lost = [found for _ in range(9) for found in output.feed("stderr", " " * 1_000_000)]
    assert lost == [("stderr", "[kiln] 10 lines of BuildKit's progress could not be read")]
    assert output.feed("stderr", "ERROR: no luck") == [("stderr", "ERROR: no luck")]


@pytest.mark.parametrize(
    "status",
    [
        {"vertexes": None, "statuses": 1, "logs": [None, {}], "warnings": [{}]},
        {"vertexes": [{"digest": 1, "name": None, "started": 5, "completed": "never", "error": []}]},
        {"statuses": [{"vertex": STEP, "id": "x", "current": "y", "completed": True}]},
        {"logs": [{"vertex": STEP, "data": "!", "timestamp": None}, {"vertex": "unknown", "data": 7}]},
        {"warnings": [{"short": 3, "range": {"start": 1}}, {"range": [{"start": None}]}]},
    ],
)
def test_strange_objects(status: dict) -> None:
    """Fields of the wrong kind end neither the reading nor the build."""
    build = Build()
    build.feed(status)
    assert build.says(b"and on\n")[-1].endswith("and on")
