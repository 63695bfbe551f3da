"""Prints what Kiln costs, beside what it is built on. `--check` makes a missed goal the exit code's business."""

import argparse
import signal
import sys
from collections.abc import Callable

from bench import build_time, containers, log_stream, organization, pods, submissions, uploads
from bench.figures import Figure, MeasurementError, Result, print_figures
from bench.machine import MachineLoad
from bench.place import forget_settings
from kiln.errors import KilnError

PARTS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "builds": lambda _: build_time.measure(),
    "submissions": lambda _: submissions.measure(),
    "logs": lambda _: log_stream.measure(),
    "containers": lambda _: containers.measure(),
    "organization": lambda _: organization.measure(),
    "pods": lambda _: pods.measure(),
    "uploads": lambda options: uploads.measure(options.upload_megabytes * uploads.MEGABYTE_BYTES),
}
MISSED = 1
FAILED = 2
TERMINATED = 128 + signal.SIGTERM


def main() -> int:
    """Exit 0; 1 with `--check` if a goal is missed; 2 with one line if something could not be measured."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    forget_settings()
    try:
        figures = _measure(arguments)
    except (KilnError, MeasurementError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return MISSED if arguments.check and any(figure.missed for figure in figures) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="What Kiln costs, on this machine.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    megabytes = f"how long the archives of uploads are (MB, {uploads.DEFAULT_MEGABYTES} by default)"
    parser.add_argument("--upload-megabytes", type=int, default=uploads.DEFAULT_MEGABYTES, metavar="N", help=megabytes)
    arguments = parser.parse_args()
    if arguments.upload_megabytes < uploads.LEAST_MEGABYTES:
        parser.error(f"--upload-megabytes: at least {uploads.LEAST_MEGABYTES}")
    unknown = set(arguments.parts) - PARTS.keys()
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    return arguments


def _measure(arguments: argparse.Namespace) -> list[Figure]:
    """Each part's notes as soon as it is done, the table of all at the end."""
    load, figures = MachineLoad(), list[Figure]()
    for name in arguments.parts or PARTS:
        print(f"Measuring {name} …", file=sys.stderr, flush=True)
        result = PARTS[name](arguments)
        figures += result.figures
        print(*result.notes, sep="\n", end="\n\n" if result.notes else "", flush=True)
    print_figures(figures)
    print(f"\nMedians, and the quartiles of what was compared run by run.\n{load.summary()}")
    return figures


if __name__ == "__main__":
    sys.exit(main())
