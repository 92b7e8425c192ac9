"""Looks at a range table that a stranger sent, in a process of its own that may be lost.

    python -m neuronlens.serving.check_upload MAX_ROWS 3 3<table.json <ranges.parquet >verdict

It puts limits on its own memory and time. `uploads` starts it and reads the verdict: a line of JSON, and where the
table is right its rows as an Arrow stream, so that the server itself never opens a stranger's Parquet.
"""

import json
import os
import resource
import sys
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from neuronlens.ranges import TableHeader

ROWS_PER_BATCH = 65_536
MAX_NAME_BYTES = 256
"""Of a concept or a hook point."""

_MEMORY_BYTES = 768 << 20
_MEMORY_BYTES_PER_ROW = 600
_MEMORY_BYTES_PER_BYTE = 3
"""A process with Arrow takes 250 MB of addresses, a table of a million rows another 450 MB while it is sorted."""
_CPU_SECONDS = 20
_ROWS_PER_CPU_SECOND = 50_000
"""A tenth of what one core of 2020 checks."""
_MAX_FILES = 64
_MAX_WRITTEN_BYTES = 65_536
"""To files, such as the one that stands behind stderr."""


class Refused(Exception):
    """The table is not right. `status` and `code` are those of the HTTP answer."""

    def __init__(self, message: str, *, status: int = 400, code: str = "bad_table") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def cpu_seconds(n_rows: int) -> int:
    """How long a table of so many rows may take."""
    return _CPU_SECONDS + n_rows // _ROWS_PER_CPU_SECOND


def main() -> None:
    """Write the verdict to stdout."""
    # What Arrow or C++ prints must not end up in the verdict.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        try:
            max_rows, header_file = int(sys.argv[1]), int(sys.argv[2])
            _limit(_MEMORY_BYTES, _CPU_SECONDS)
            header = _read_header(header_file, max_rows)
            n_bytes = os.fstat(0).st_size
            memory = _MEMORY_BYTES + header.rows * _MEMORY_BYTES_PER_ROW + n_bytes * _MEMORY_BYTES_PER_BYTE
            _limit(memory, cpu_seconds(header.rows))
            _accept(out, header, n_bytes, max_rows)
        except Refused as refusal:
            _write(out, {"status": refusal.status, "code": refusal.code, "message": str(refusal)})
        except MemoryError:
            _write(out, _TOO_MUCH_MEMORY)


def _accept(out: IO[bytes], header: "TableHeader", n_bytes: int, max_rows: int) -> None:
    import pyarrow as pa

    from neuronlens.errors import UsageError
    from neuronlens.ranges import RangeTable

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    try:
        table = RangeTable.of(header, _read_rows(header, n_bytes, max_rows))
        table.header_json()
    except (UsageError, ValueError, RecursionError) as error:
        raise Refused(f"The range table is not right: {error}{'' if str(error).endswith('.') else '.'}") from error
    _write(out, {"status": 200, "header": table.header.model_dump()})
    with pa.ipc.new_stream(out, table.rows.schema) as writer:
        writer.write_table(table.rows, max_chunksize=ROWS_PER_BATCH)


def _read_header(file: int, max_rows: int) -> "TableHeader":
    from neuronlens.errors import UsageError
    from neuronlens.ranges import parse_header

    with os.fdopen(file, "rb") as opened:
        text = opened.read()
    try:
        header = parse_header(text.decode())
    except (ValueError, UsageError) as error:
        raise Refused(f"The part 'header' is no table.json: {str(error).rstrip('.')}.") from error
    _check_count(header.rows, "table.json says", max_rows)
    return header


def _read_rows(header: "TableHeader", n_bytes: int, max_rows: int) -> "pa.Table":
    """The rows of the Parquet file on stdin, no more of them than the header says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(0, "rb", buffering=0, closefd=False) as file:
            content = file.read(n_bytes)
        parquet = pq.ParquetFile(pa.BufferReader(content), read_dictionary=["hook_point", "concept"])
        _check_count(parquet.metadata.num_rows, "its Parquet footer says", max_rows)
        if parquet.metadata.num_rows != header.rows:
            raise Refused(f"table.json says {header.rows} rows, the Parquet file has {parquet.metadata.num_rows}.")
        _check_types(parquet.schema_arrow)
        batches, n_rows = [], 0
        for batch in parquet.iter_batches(batch_size=ROWS_PER_BATCH, use_threads=False):
            n_rows += batch.num_rows
            # The footer may lie: what counts is what comes out.
            if n_rows > header.rows:
                raise Refused(f"table.json says {header.rows} rows, the Parquet file holds more.")
            _check_names(batch)
            batches.append(batch)
        return pa.Table.from_batches(batches, parquet.schema_arrow)
    except (OSError, pa.ArrowException, OverflowError) as error:
        if isinstance(error, MemoryError):
            raise
        raise Refused(f"The part 'rows' cannot be read as Parquet: {_first_line(error)}.") from error


def _check_count(n_rows: int, said_by: str, max_rows: int) -> None:
    if n_rows > max_rows:
        raise Refused(
            f"The range table is too large: {said_by} {n_rows:,} rows, this server takes {max_rows:,}. Make a smaller "
            "one with a lower top_fraction.",
            status=413,
            code="too_large",
        )


def _check_types(found: "pa.Schema") -> None:
    """Raise Refused for other columns than the format's, or of another kind: a number is not read from a text, nor a
    text from a list."""
    from neuronlens.errors import UsageError
    from neuronlens.ranges import SCHEMA, check_columns

    try:
        check_columns(found.names)
    except UsageError as error:
        raise Refused(str(error)) from error
    for field in SCHEMA:
        kind = _kind(found.field(field.name).type)
        if kind != _kind(field.type):
            raise Refused(f"The column {field.name} is of type {kind}; expected {field.type}.")


def _kind(type_: "pa.DataType") -> str:
    import pyarrow as pa

    if pa.types.is_dictionary(type_):
        return _kind(type_.value_type)
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "string"
    if pa.types.is_integer(type_):
        return "integer"
    return "floating" if pa.types.is_floating(type_) else str(type_)[:80]


def _check_names(batch: "pa.RecordBatch") -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in ("hook_point", "concept"):
        column = batch.column(name)
        names = column.dictionary if pa.types.is_dictionary(column.type) else column
        longest = pc.max(pc.binary_length(names)).as_py() or 0
        if longest > MAX_NAME_BYTES:
            raise Refused(f"A {name} has {longest:,} bytes, expected at most {MAX_NAME_BYTES:,}.")


def _limit(memory_bytes: int, seconds: int) -> None:
    """From now on so much memory and CPU time, few files, no core dump."""
    if sys.platform != "linux":  # macOS has no limit on addresses
        return
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, _MAX_WRITTEN_BYTES),
        (resource.RLIMIT_NOFILE, _MAX_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(kind)
        resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


_TOO_MUCH_MEMORY = {
    "status": 413,
    "code": "too_large",
    "message": "The range table takes more memory than one of its number of rows may. Write its Parquet file anew, "
    "with pyarrow or neuronlens, and send that.",
}


def _write(out: IO[bytes], verdict: Mapping[str, Any]) -> None:
    out.write(json.dumps(verdict).encode() + b"\n")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(".")


if __name__ == "__main__":
    main()
