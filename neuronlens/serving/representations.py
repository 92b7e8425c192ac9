"""A selection of ranges as bytes, a piece at a time: Arrow IPC stream, Parquet or JSON, compressed or not.

Pieces are made when the last one is on its way, so a large table costs the memory of one. The same rows give the same
bytes on every replica that has the same packages: that is what a strong ETag promises, and VERSIONS goes into it.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROWS_PER_PIECE = 16_384
"""About 1.4 MB of Arrow: 3 ms to make, so that a piece holds up nothing, and large enough that its way through a thread
and the server's loop does not count."""
_ROWS_PER_ROW_GROUP = 131_072

VERSIONS = f"1 {version('neuronlens')} {pa.__version__} {zlib.ZLIB_RUNTIME_VERSION}"
"""Changes when the bytes of a representation may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to write ranges. `codings` are the content codings worth their time, best first."""

    name: str
    media_type: str
    write: Callable[[pa.Table, str], Iterator[bytes]]
    codings: tuple[str, ...]


def encoded(pieces: Iterator[bytes], coding: str) -> Iterator[bytes]:
    """The pieces in a content coding: identity, gzip or zstd."""
    if coding == "identity":
        return pieces
    return _gzipped(pieces) if coding == "gzip" else _zstandard(pieces)


def _arrow(rows: pa.Table, _: str) -> Iterator[bytes]:
    sink = _Sink()
    with pa.ipc.new_stream(sink.file, rows.schema) as writer:
        for part in _parts(rows, ROWS_PER_PIECE):
            writer.write_table(part)
            yield sink.taken()
    yield sink.taken()


def _parquet(rows: pa.Table, _: str) -> Iterator[bytes]:
    sink = _Sink()
    with pq.ParquetWriter(sink.file, rows.schema, compression="zstd") as writer:
        for part in _parts(rows, _ROWS_PER_ROW_GROUP):
            writer.write_table(part, row_group_size=_ROWS_PER_ROW_GROUP)
            yield sink.taken()
    yield sink.taken()


def _json(rows: pa.Table, table_id: str) -> Iterator[bytes]:
    yield f'{{"object":"list","table":"{table_id}","rows":{rows.num_rows},"data":['.encode()
    separator = ""
    for part in _parts(rows, ROWS_PER_PIECE):
        yield separator.encode() + _json_objects(part)
        separator = ",\n"
    yield b"]}"


def _json_objects(rows: pa.Table) -> bytes:
    """The rows as JSON objects with commas between them.

    Put together by Arrow, a column at a time: json.dumps takes seven times as long, and lets no other thread work.
    Arrow writes the shortest decimal that reads back as the same double. JSON has no infinity: it becomes null.
    """
    pieces: list[Any] = []
    for field in rows.schema:
        column = rows[field.name].combine_chunks()
        if pa.types.is_string(field.type):
            coded = column.dictionary_encode()
            values = pa.array(map(json.dumps, coded.dictionary.to_pylist()), pa.string()).take(coded.indices)
        else:
            values = column.cast(pa.string())
            if pa.types.is_floating(field.type):
                values = pc.if_else(pc.is_finite(column), values, "null")
        pieces += [f'{"," if pieces else "{"}"{field.name}":', values]
    objects = pc.binary_join_element_wise(*pieces, "}", "")
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(objects)], objects), ",\n")
    return str(joined[0].as_py()).encode()


def _gzipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    # Level 1: JSON becomes a quarter, at 130 MB/s. The header has no name and no time: the same bytes each time.
    compressor = zlib.compressobj(level=1, wbits=31)
    for piece in pieces:
        if compressed := compressor.compress(piece):
            yield compressed
    yield compressor.flush()


def _zstandard(pieces: Iterator[bytes]) -> Iterator[bytes]:
    sink = _Sink()
    with pa.CompressedOutputStream(sink.file, "zstd") as stream:
        for piece in pieces:
            stream.write(piece)
            if compressed := sink.taken():
                yield compressed
    yield sink.taken()


def _parts(rows: pa.Table, n_rows: int) -> Iterator[pa.Table]:
    for start in range(0, rows.num_rows, n_rows):
        yield rows.slice(start, n_rows).combine_chunks()


class _Sink:
    """What Arrow writes, to be taken piece by piece."""

    closed = False

    def __init__(self) -> None:
        self._written: list[bytes] = []
        self.file = pa.PythonFile(self, mode="w")

    def write(self, data: Any) -> int:
        self._written.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        """All that was written since the last time."""
        taken, self._written = b"".join(self._written), []
        return taken

    def flush(self) -> None:
        """Nothing lies anywhere else."""

    def close(self) -> None:
        """What was written can still be taken."""


FORMATS = (
    Format(name="json", media_type="application/json", write=_json, codings=("zstd", "gzip")),
    # zstd makes it 0.42 of its size at 400 MB/s. gzip would make it 0.57 at 40 MB/s, slower than most networks.
    Format(name="arrow", media_type="application/vnd.apache.arrow.stream", write=_arrow, codings=("zstd",)),
    # Its pages are zstd already: another round takes its time and gains a hundredth.
    Format(name="parquet", media_type="application/vnd.apache.parquet", write=_parquet, codings=()),
)
"""The first one is what a client gets that does not say what it wants."""
CODINGS = ("zstd", "gzip")
"""All that there are, for the client that refuses an answer without one."""
