"""What skopeo says on stderr when it fails: one line of logrus, `time="…" level=fatal msg="…"`."""

import json
import re
from collections.abc import Iterable

from kiln.errors import BuildError, SourceUnavailableError, ToolFailedError

LOGRUS = re.compile(r'level=(?:fatal|error) msg=("(?:[^"\\]|\\.)*")')
# What skopeo does with the source alone; writing to the destination has other words.
READING = re.compile(
    r"^(?:initializing source|(?:I|i)nvalid source name|reading manifest|(?:E|e)rror (?:reading|fetching)|reading blob"
    r"|fetching blob|determining manifest MIME type|parsing manifest|reading signatures"
    r"|copying image \d+/\d+ from manifest list: (?:initializing source|reading)"
    r"|writing blob: .*happened during read)"
)
MESSAGE_LENGTH = 1000


def failure(lines: Iterable[str]) -> BuildError:
    """SourceUnavailableError if the source could not be read, else ToolFailedError, with skopeo's last words."""
    message = _last_words(lines)
    kind = SourceUnavailableError if READING.match(message) else ToolFailedError
    return kind(message[:MESSAGE_LENGTH])


def _last_words(lines: Iterable[str]) -> str:
    last = ""
    fatal = ""
    for line in lines:
        told = LOGRUS.search(line)
        if told:
            fatal = _unquoted(told[1])
        last = line.strip() or last
    return fatal or last or "skopeo failed without saying why"


def _unquoted(text: str) -> str:
    """Go quotes as JSON does, but for escapes that hardly ever come."""
    try:
        return str(json.loads(text)).strip()
    except ValueError:
        return text[1:-1]
