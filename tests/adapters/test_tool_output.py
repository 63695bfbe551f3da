"""How bytes become lines."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiln.adapters.tool_output import LineFramer
from kiln.redact import Redactor

SECRET = "correct-horse"
PIECE = 10_000


def lines_of(data: bytes, *, step: int | None = None, secrets: tuple[str, ...] = ()) -> list[str]:
    framer = LineFramer(Redactor(secrets), PIECE)
    chunks = [data[at : at + (step or len(data))] for at in range(0, len(data), step or len(data))] if data else []
    return [line for chunk in chunks for line in framer.feed(chunk)] + list(framer.finish())


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        pytest.param(b"one\ntwo\n", ["one", "two"], id="lf"),
        pytest.param(b"one\r\ntwo\r\n", ["one", "two"], id="cr-lf"),
        pytest.param(b"one\n\n\ntwo", ["one", "", "", "two"], id="empty-lines"),
        pytest.param(b"one\r\n\r\ntwo\r\n", ["one", "", "two"], id="empty-cr-lf-line"),
        pytest.param(b"one\ntwo", ["one", "two"], id="no-last-end"),
        pytest.param(b"10%\r20%\r30%\n", ["10%", "20%", "30%"], id="progress"),
        pytest.param(b"\r10%\r20%\n", ["10%", "20%"], id="progress-begins-with-cr"),
        pytest.param(b"10%\r\r\n", ["10%"], id="doubled-cr"),
        pytest.param(b"10%\r", ["10%"], id="last-end-is-cr"),
        pytest.param(b"", [], id="nothing"),
        pytest.param("é€😀".encode(), ["é€😀"], id="utf-8"),
        pytest.param(b"caf\xe9 \xff\xfe\nnext", ["caf\\xe9 \\xff\\xfe", "next"], id="not-utf-8"),
        pytest.param("€".encode()[:2], ["\\xe2\\x82"], id="cut-character"),
    ],
)
def test_lines(data: bytes, lines: list[str]):
    """Bytes become the lines that a reader expects, in one read or a byte at a time."""
    assert (lines_of(data), lines_of(data, step=1)) == (lines, lines)


@settings(database=None, deadline=None)
@given(
    data=st.lists(st.sampled_from([b"ab", b"\n", b"\r", b"\r\n", b"\xff", b"\xe2\x82\xac", b"correct-horse"])).map(
        b"".join
    ),
    step=st.integers(1, 9),
)
def test_reads_do_not_matter(data: bytes, step: int):
    """Lines are the same however the bytes are divided into reads."""
    assert lines_of(data, step=step, secrets=(SECRET,)) == lines_of(data, secrets=(SECRET,))


def test_progress_is_not_held_back():
    """A state of a progress bar is a line at once, without waiting for the next."""
    assert list(LineFramer(Redactor()).feed(b"10%\r")) == ["10%"]


def test_long_line_in_pieces():
    """A line above the limit comes in pieces that are the line together."""
    text = "".join(chr(97 + index % 26) for index in range(3 * PIECE + 5))
    pieces = lines_of(text.encode() + b"\nnext\n", step=4096)
    assert ([len(piece) for piece in pieces], "".join(pieces)) == ([PIECE, PIECE, PIECE, 5, 4], text + "next")


def test_long_line_comes_before_its_end():
    """A line without end does not collect in memory."""
    framer = LineFramer(Redactor(), PIECE)
    assert sum(len(piece) for _ in range(20) for piece in framer.feed(b"x" * PIECE)) >= 18 * PIECE


@pytest.mark.parametrize("step", [None, 1000])
@pytest.mark.parametrize("inside", range(1, len(SECRET)))
def test_secret_across_a_cut(inside: int, step: int | None):
    """A secret that a cut would go through is masked whole, whatever part of it lies before the cut."""
    filler = "." * (PIECE - inside)
    data = f"{filler}{SECRET}{'.' * 2 * PIECE}".encode()
    assert "".join(lines_of(data, step=step, secrets=(SECRET,))) == f"{filler}***{'.' * 2 * PIECE}"


@pytest.mark.parametrize("inside", [5, 12, 25, 30])
def test_aws_secret_across_a_cut(inside: int):
    """An AWS secret is masked also if a cut would part it from its name."""
    filler = "." * (PIECE - inside)
    text = "".join(lines_of(f"{filler} aws_secret_access_key=wJalrXUtnFEMI {'.' * PIECE * 2}".encode(), step=999))
    assert text == f"{filler} aws_secret_access_key=*** {'.' * PIECE * 2}"


def test_secret_longer_than_a_piece():
    """A secret longer than a piece is masked whole."""
    secret = "".join(chr(33 + index * 7 % 90) for index in range(3 * PIECE))
    assert "".join(lines_of(f"<{secret}>".encode(), step=4096, secrets=(secret,))) == "<***>"
