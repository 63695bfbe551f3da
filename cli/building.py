"""`kiln build` and `kiln builds logs`: requests from options, and logs as they come."""

from collections.abc import Sequence

from cli.client import KilnClient
from cli.render import event_text, print_build, print_event_json
from kiln.errors import KilnError


class OptionError(KilnError):
    """An option is not of the form that its help says."""


def pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` options as a mapping. Raises OptionError."""
    found = {}
    for value in values:
        name, sign, content = value.partition("=")
        if not (name and sign):
            raise OptionError(f"{option} {value}: must be NAME=VALUE")
        found[name] = content
    return found


def print_events(client: KilnClient, build_id: str, after: int, *, as_json: bool) -> None:
    """The log after a line, until the build's end. Raises ApiCallError."""
    for event in client.follow(build_id, after):
        if as_json:
            print_event_json(event)
        elif event.name != "end":
            print(event_text(event), flush=True)  # noqa: T201


def follow_to_end(client: KilnClient, build_id: str, *, as_json: bool) -> int:
    """The log, then the build; returns 0 if it succeeded, else 1. Raises ApiCallError."""
    print_events(client, build_id, 0, as_json=as_json)
    build = client.build(build_id)
    if not as_json:
        print_build(build)
    return 0 if build["status"] == "succeeded" else 1
