"""How fast the API takes build contexts in, and in how much memory: beside nginx, and beside `gzip -dc | tar -t`."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.contexts import write_incompressible, write_text
from bench.figures import Figure, Result, Spread, unmeasured
from bench.nginx import nginx_program, running_nginx
from bench.pacing import rounds
from bench.place import running_stack
from bench.upload import KilnUploads, Upload, check_by_programs, put_to_nginx, settle
from cli.local_stack import API, REGISTRY, TEMPORAL, WORKER

DEFAULT_MEGABYTES = 500
# Below, an archive would be shorter than what it repeats.
LEAST_MEGABYTES = 20
ROUNDS = 5
SECONDS = 150.0
WARM_UP_BYTES = 8 * 1000**2
THROUGHPUT_GOAL = 0.7
GROWTH_GOAL_BYTES = 64 * 1024**2
MEGABYTE_BYTES = 1000**2
PARTS = (TEMPORAL, REGISTRY, WORKER, API)
# Cancelled builds are cleaned up after, and none is built.
WORKERS = (("control",),)
ARCHIVES = {"incompressible": write_incompressible, "text": write_text}
FORMS = {"multipart POST": "post", "signed PUT": "put"}
MEMORY_NAME = "an upload, the API's memory at its peak"


@dataclass
class Series:
    """The seconds of one archive's runs: each form of upload, and each reference by its name."""

    size_bytes: int
    kiln: dict[str, list[float]] = field(default_factory=dict)
    references: dict[str, list[float]] = field(default_factory=dict)

    def slower(self) -> tuple[str, list[float]]:
        """The reference that takes longer at the median, and of each run the longer time."""
        name = max(self.references, key=lambda name: median(self.references[name]))
        return name, [max(run) for run in zip(*self.references.values(), strict=True)]


def measure(size_bytes: int = DEFAULT_MEGABYTES * MEGABYTE_BYTES) -> Result:
    """Uploads of archives of this length, of which each build is cancelled at once. Raises MeasurementError."""
    names = [_name(kind, form) for kind in ARCHIVES for form in FORMS]
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="kiln-bench-")))
        stack = resources.enter_context(running_stack(PARTS, WORKERS, max_context_bytes=max(size_bytes, WARM_UP_BYTES)))
        if stack.containers.off:
            return unmeasured([*names, MEMORY_NAME], f"container builds are off: {stack.containers.off}")
        references = resources.enter_context(_references())
        kiln = resources.enter_context(KilnUploads(stack))
        series = _run(folder, size_bytes, kiln, references)
    figures = [_throughput(kind, form, each) for kind, each in series.items() for form in FORMS]
    return Result([*figures, _memory(kiln.growth_bytes)], _notes(series))


@contextmanager
def _references() -> Iterator[Mapping[str, Upload]]:
    """Those that this machine has."""
    with ExitStack() as resources:
        references: dict[str, Upload] = {"gzip -dc | tar -t": check_by_programs}
        program = nginx_program()
        if program is not None:
            references["nginx PUT"] = put_to_nginx(*resources.enter_context(running_nginx(program)))
        yield references


def _run(folder: Path, size_bytes: int, kiln: KilnUploads, references: Mapping[str, Upload]) -> dict[str, Series]:
    """Everything by turns, each run beginning with another."""
    forms: dict[str, Upload] = {form: getattr(kiln, method) for form, method in FORMS.items()}
    _warm_up(folder, forms.values())
    kiln.growth_bytes.clear()
    archives = {kind: folder / f"{kind}.tar.gz" for kind in ARCHIVES}
    for kind, path in archives.items():
        ARCHIVES[kind](path, size_bytes)
    series = {kind: Series(path.stat().st_size) for kind, path in archives.items()}
    for number in rounds(ROUNDS, SECONDS):
        for kind, path in archives.items():
            _round(path, _rotated({**forms, **references}, number), series[kind], forms)
    return series


def _round(path: Path, uploads: Mapping[str, Upload], series: Series, forms: Mapping[str, Upload]) -> None:
    for name, upload in uploads.items():
        settle()
        side = series.kiln if name in forms else series.references
        side.setdefault(name, []).append(upload(path))


def _warm_up(folder: Path, forms: Iterable[Upload]) -> None:
    """What is imported and allocated at first use is no matter of the archive's length."""
    small = folder / "small.tar.gz"
    write_text(small, WARM_UP_BYTES)
    for upload in forms:
        upload(small)


def _rotated(uploads: Mapping[str, Upload], number: int) -> dict[str, Upload]:
    names = list(uploads)
    first = number % len(names)
    return {name: uploads[name] for name in names[first:] + names[:first]}


def _name(kind: str, form: str) -> str:
    return f"an upload of {kind} data, {form}"


def _throughput(kind: str, form: str, series: Series) -> Figure:
    name, reference = series.slower()
    kiln = series.kiln[form]
    spread = Spread.of(other / one for one, other in zip(kiln, reference, strict=True))
    megabytes = series.size_bytes / MEGABYTE_BYTES
    return Figure(
        name=_name(kind, form),
        kiln=f"{megabytes / median(kiln):.0f} MB/s",
        reference=f"{megabytes / median(reference):.0f} MB/s {name}",
        compared=f"{spread.middle:.2f} times ({spread.low:.2f} to {spread.high:.2f})",
        goal=f">= {THROUGHPUT_GOAL} times",
        met=spread.middle >= THROUGHPUT_GOAL,
        runs=f"{len(kiln)} x {megabytes:.0f} MB",
    )


def _memory(growths: Sequence[int]) -> Figure:
    most = max(growths)
    return Figure(
        name=MEMORY_NAME,
        kiln=f"{most / 1024**2:+.0f} MiB at most",
        reference="-",
        compared=f"{median(growths) / 1024**2:+.0f} MiB at the median",
        goal=f"< +{GROWTH_GOAL_BYTES // 1024**2} MiB",
        met=most < GROWTH_GOAL_BYTES,
        runs=f"{len(growths)} x 1",
    )


def _notes(series: Mapping[str, Series]) -> list[str]:
    lines = ["Uploads and their references (medians):"]
    for kind, each in series.items():
        for name, seconds in {**each.kiln, **each.references}.items():
            rate = each.size_bytes / MEGABYTE_BYTES / median(seconds)
            lines.append(f"  {kind}, {name}: {median(seconds):.2f} s, {rate:.0f} MB/s")
    if nginx_program() is None:
        lines.append("nginx is not installed (apt-get install nginx-light): uploads are compared without it.")
    return lines
