"""What skopeo 1.9 prints when it fails, as it was printed, and what Kiln makes of it."""

import pytest

from activities.skopeo_output import failure
from kiln.errors import SourceUnavailableError, ToolFailedError

BLOB = "sha256:cfadb6c9436cad13d293cce1019de7b760075f8917f101fb63547fc22df71db0"


def _fatal(message: str) -> list[str]:
    return ["Getting image source signatures", f'time="2026-11-22T07:35:23Z" level=fatal msg="{message}"']


@pytest.mark.parametrize(
    "message",
    [
        "initializing source docker://docker.io/acme/app:gone: reading manifest gone in docker.io/acme/app: manifest unknown",
        "initializing source docker://ghcr.io/acme/app:1: reading manifest 1 in ghcr.io/acme/app: unauthorized: denied",
        "initializing source docker://quay.io/a/b:1: pinging container registry quay.io: dial tcp: no such host",
        f"reading blob {BLOB}: Error fetching blob: invalid status code from registry 404 (Not Found)",
        "Invalid source name docker://Bad_Name: invalid reference format: repository name must be lowercase",
    ],
)
def test_source(message: str) -> None:
    """A source that cannot be read is told in skopeo's own words."""
    error = failure(_fatal(message))
    assert (type(error), str(error)) == (SourceUnavailableError, message)


@pytest.mark.parametrize(
    "message",
    [
        f"trying to reuse blob {BLOB} at destination: pinging container registry 127.0.0.1:9: connection refused",
        "writing blob: initiating layer upload to /v2/a/blobs/uploads/ in 127.0.0.1:5000: unauthorized",
        "writing manifest: uploading manifest attempt-1 to 127.0.0.1:5000/a: denied",
    ],
)
def test_destination(message: str) -> None:
    """What went wrong at Kiln's own registry is not the source's fault."""
    error = failure(_fatal(message))
    assert (type(error), str(error)) == (ToolFailedError, message)


def test_quotes() -> None:
    """Go's quoting is undone."""
    assert str(failure(_fatal(r"Get \"https://quay.io/v2/\": EOF"))) == 'Get "https://quay.io/v2/": EOF'


def test_other_last_line() -> None:
    """Without a fatal line, the last one that says something is the error."""
    assert str(failure(["Usage:", "skopeo: killed", ""])) == "skopeo: killed"


def test_nothing_said() -> None:
    """A tool that failed without a word still leaves a sentence."""
    assert str(failure([])) == "skopeo failed without saying why"
