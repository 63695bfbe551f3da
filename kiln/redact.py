"""Masks secrets in text, in every form that tools are known to print them in.

Text that was decoded after it was masked (JSON, base64, Packer's machine-readable output) is masked again by whoever
decodes it: a form that this module does not know may come apart into one that it does.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from urllib.parse import quote, quote_plus

MASK = "***"

# Shorter values occur in innocent words: those are masked only where they stand alone.
MIN_ANYWHERE = 4
# A regular expression may compare this much at every position of a text, `str.find` is linear whatever the secret is.
MAX_REGEX_LITERAL = 128
MAX_AWS_VALUE = 8192
BASE64_LINES = (64, 76)

Span = tuple[int, int]

_ALPHANUMERIC = r"[^\W_]"
# AWS's own prefixes of key ids: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html
_AWS = re.compile(
    r"(?P<id>A(?:KIA|SIA)[0-9A-Z]{16})"
    r"|(?P<assignment>[Ss](?i:ecret[_-]?(?:access[_-]?)?key|ession[_-]?token|ecurity[_-]?token)"
    r"""\\{0,4}["']?\s{0,8}(?:=>?|:|>)\s{0,8}\\{0,4}["']?"""
    rf"""(?P<value>[^\s"'<>,;&\\]{{1,{MAX_AWS_VALUE}}}))"""
)
_AWS_ASSIGNMENT_LENGTH = MAX_AWS_VALUE + 64

_GO_JSON = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&"})
_PACKER = str.maketrans({",": "%!(PACKER_COMMA)", "\n": "\\n", "\r": "\\r"})
_URL_ESCAPE = re.compile("%[0-9A-F]{2}")
# What Go leaves as it is in a path, and in the user and password before a host.
_URL_SAFE_SETS = ("", "/", "$&+=:@", "$&+,/;=")


class Redactor:
    """Masks the given values wherever they stand in a text, whole or within something else.

    Besides each value: its JSON, HCL, shell, URL and base64 forms, and each line of a value that has several. Values of
    fewer than 4 characters are masked only between non-alphanumeric neighbours; blank ones are ignored. AWS key ids and
    what is assigned to AWS's secret variables are masked without being given.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        literals: set[str] = set()
        tokens: set[str] = set()
        for secret in {secret.strip() for secret in secrets} - {""}:
            if len(secret) < MIN_ANYWHERE:
                tokens.update(_escapes(secret))
            else:
                literals.update(form for form in _forms(secret) if len(form) >= MIN_ANYWHERE)
        short = {literal for literal in literals if len(literal) <= MAX_REGEX_LITERAL}
        self._pattern = _compile(short, tokens)
        self._long = tuple(literals - short)
        self._by_head: dict[str, list[str]] = {}
        for literal in literals:
            self._by_head.setdefault(literal[:MIN_ANYWHERE], []).append(literal)
        self._longest = max(map(len, literals | tokens), default=0)

    @property
    def longest(self) -> int:
        """The length in characters of the longest text that is recognised as one secret."""
        return max(self._longest, _AWS_ASSIGNMENT_LENGTH)

    def text(self, text: str) -> str:
        """The text with each secret replaced by `***`; secrets that touch or overlap become one mask."""
        spans = self._spans(text, "value")
        if not spans:
            return text
        kept_from = [0, *(end for _, end in spans)]
        kept_to = [*(start for start, _ in spans), len(text)]
        return MASK.join(text[start:end] for start, end in zip(kept_from, kept_to, strict=True))

    def cut(self, text: str, at: int) -> int:
        """Where to cut a text in two at or before `at` (> 0) so that no secret is cut, which neither half would show.

        If such a secret begins with the text, its end, beyond `at`. Right if the text goes on for `longest` characters
        after `at`, or ends before that.
        """
        for start, end in self._spans(text, "assignment"):
            if start < at < end:
                return start or end
        return at

    def begun(self, text: str) -> int:
        """How many characters at a text's end are the beginning of a given secret, in whichever form; 0 for fewer than 4."""
        for start in range(max(len(text) - self._longest, 0), len(text) - MIN_ANYWHERE + 1):
            for literal in self._by_head.get(text[start : start + MIN_ANYWHERE], ()):
                if len(literal) > len(text) - start and literal.startswith(text[start:]):
                    return len(text) - start
        return 0

    def _spans(self, text: str, aws_group: str) -> list[Span]:
        """Where secrets stand, in order, apart from each other; of AWS's, the `value` or the whole `assignment`."""
        found = [match.span("id" if match["id"] else aws_group) for match in _AWS.finditer(text)]
        if self._pattern is not None:
            found.extend(_overlapping(self._pattern, text))
        for literal in self._long:
            found.extend(_occurrences(literal, text))
        return _merged(found) if found else found


def _overlapping(pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    """All matches, also those that begin within another: two secrets may share an end and a beginning."""
    match = pattern.search(text)
    while match:
        yield match.span()
        match = pattern.search(text, match.start() + 1)


def _occurrences(literal: str, text: str) -> Iterator[Span]:
    start = text.find(literal)
    while start >= 0:
        yield start, start + len(literal)
        start = text.find(literal, start + len(literal))


def _merged(spans: list[Span]) -> list[Span]:
    spans.sort()
    merged = spans[:1]
    for start, end in spans[1:]:
        last_start, last_end = merged[-1]
        if start <= last_end:
            merged[-1] = (last_start, max(last_end, end))
        else:
            merged.append((start, end))
    return merged


def _compile(literals: set[str], tokens: set[str]) -> re.Pattern[str] | None:
    """One expression, its alternatives grouped by first character so that most positions cost one comparison."""
    groups: dict[str, list[str]] = {}
    for word in sorted(literals | tokens, key=lambda word: (-len(word), word)):
        rest = re.escape(word[1:])
        if word in tokens:
            rest = f"(?<!{_ALPHANUMERIC}{re.escape(word[0])}){rest}(?!{_ALPHANUMERIC})"
        groups.setdefault(word[0], []).append(rest)
    if not groups:
        return None
    return re.compile("|".join(f"{re.escape(first)}(?:{'|'.join(rests)})" for first, rests in groups.items()))


def _forms(secret: str) -> Iterator[str]:
    """All that a secret may look like in a tool's output."""
    yield from _escapes(secret)
    yield from _base64_forms(_bytes(secret))
    lines = [line.strip() for line in re.split(r"[\r\n]+", secret)]
    if len(lines) > 1:
        for line in lines:
            if len(line) >= MIN_ANYWHERE:
                yield from _escapes(line)


def _escapes(text: str) -> set[str]:
    """A text as JSON, HCL, a shell, a URL or Packer's machine-readable output writes it, and as it is."""
    ascii_json, json_text = (json.dumps(text, ensure_ascii=escaped)[1:-1] for escaped in (True, False))
    return {
        text,
        _bytes(text).decode(errors="backslashreplace"),
        ascii_json,
        json_text,
        json_text.translate(_GO_JSON),
        json_text.replace("${", "$${").replace("%{", "%%{"),
        text.replace("'", "'\\''"),
        text.replace("'", "'\"'\"'"),
        text.translate(_PACKER),
        *_url_escapes(_bytes(text)),
    }


def _url_escapes(data: bytes) -> Iterator[str]:
    for escaped in {quote_plus(data), *(quote(data, safe) for safe in _URL_SAFE_SETS)}:
        yield escaped
        yield _URL_ESCAPE.sub(lambda match: match[0].lower(), escaped)


def _base64_forms(data: bytes) -> Iterator[str]:
    """Base64 of the secret alone, also in lines, and its part of the base64 of something that it stands in."""
    alone = base64.b64encode(data).decode()
    wrapped = (alone[at : at + width] for width in BASE64_LINES for at in range(0, len(alone), width))
    within = (_base64_within(data, offset) for offset in range(3))
    for form in (alone, *wrapped, *within):
        yield form
        yield form.replace("+", "-").replace("/", "_")


def _base64_within(data: bytes, offset: int) -> str:
    """The characters that depend on the data only, if it begins `offset` bytes after a group of three."""
    encoded = base64.b64encode(bytes(offset) + data).decode()
    first = -(-offset * 8 // 6)
    return encoded[first : (offset + len(data)) * 8 // 6]


def _bytes(text: str) -> bytes:
    """The bytes behind a text, which may come from an environment (surrogates for what is not UTF-8) or from JSON."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


_CAMEL_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET_WORDS = frozenset({"auth", "authorization", "bearer", "cred", "creds", "jwt", "pass", "pat", "psk", "pwd"})
_SECRET_ENDINGS = re.compile(
    "(?:password|passwd|passphrase|passcode|secret|token|credential|apikey|accesskey|privatekey|secretkey)s?$"
)
_SECRET_KEY = re.compile("(?:access|account|api|deploy|encryption|host|master|private|secret|shared|signing|ssh) keys?")
_NOT_THE_SECRET = frozenset(
    {"count", "enabled", "expires", "expiry", "length", "lifetime", "limit", "limits", "name", "policy", "ttl", "type"}
)
_MEASURES = frozenset({"max", "min", "num", "total"})


def is_secret_name(name: str) -> bool:
    """Whether a variable's name says that its value is a secret (`DB_PASSWORD`, `apiKey`, `github-token`).

    Names of what is about a secret (`token_type`, `password_length`, `max_tokens`) are not; in other cases of doubt the
    answer is yes.
    """
    words = [word.lower() for word in _CAMEL_WORD.findall(name)]
    if not words or words[-1] in _NOT_THE_SECRET or words[0] in _MEASURES:
        return False
    if any(word in _SECRET_WORDS or _SECRET_ENDINGS.search(word) for word in words):
        return True
    return any(_SECRET_KEY.fullmatch(f"{first} {second}") for first, second in pairwise(words))
