"""How lines are kept: many in one chunk, as JSON, compressed where that pays, with a checksum."""

import json
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

CHUNK_LINES = 1000
CHUNK_BYTES = 256 * 1024
# Below this, compression saves less than it costs.
COMPRESSED_FROM_BYTES = 512
COMPRESSION_LEVEL = 1
CHECKSUM_BYTES = 4

PLAIN, COMPRESSED = b"J", b"Z"
# The place of a stream's name is what is stored: append only.
STREAMS = ("stdout", "stderr", "kiln")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

Entry = tuple[datetime, str, str]


class CorruptPayloadError(ValueError):
    """A chunk's bytes are not what was written."""


def encode(entries: Sequence[Entry]) -> bytes:
    """Lines (time, stream, text) as one payload. Raises ValueError for an unknown stream."""
    rows = [((time - EPOCH) // MICROSECOND, STREAMS.index(stream), text) for time, stream, text in entries]
    # Lone surrogates are no UTF-8, but a text may hold them.
    body = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
    if len(body) < COMPRESSED_FROM_BYTES:
        return PLAIN + _checksum(PLAIN + body) + body
    body = zlib.compress(body, COMPRESSION_LEVEL)
    return COMPRESSED + _checksum(COMPRESSED + body) + body


def decode(payload: bytes, count: int) -> list[Entry]:
    """The lines of a payload. Raises CorruptPayloadError if it is damaged or does not hold `count` lines."""
    form, checksum, body = payload[:1], payload[1 : 1 + CHECKSUM_BYTES], payload[1 + CHECKSUM_BYTES :]
    try:
        if checksum != _checksum(form + body):
            raise CorruptPayloadError("wrong checksum")
        text = (zlib.decompress(body) if form == COMPRESSED else body).decode(errors="surrogatepass")
        entries = [(EPOCH + time * MICROSECOND, STREAMS[stream], text) for time, stream, text in json.loads(text)]
    except (ValueError, TypeError, LookupError, OverflowError, zlib.error) as error:
        raise CorruptPayloadError(str(error)) from error
    if len(entries) != count:
        raise CorruptPayloadError(f"{len(entries)} lines instead of {count}")
    return entries


def in_chunks(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """The lines in order, in groups that bound what reading one of them costs; a longer line is a group of its own."""
    start, size = 0, 0
    for index, (_, _, text) in enumerate(entries):
        if index > start and (size + len(text) > CHUNK_BYTES or index - start >= CHUNK_LINES):
            yield entries[start:index]
            start, size = index, 0
        size += len(text)
    if entries:
        yield entries[start:]


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(CHECKSUM_BYTES)
