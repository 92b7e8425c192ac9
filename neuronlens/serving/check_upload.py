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

    from neuronlens.ranges import RangeTable, TableHeader

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
            header = read_header(_content(header_file), max_rows)
            memory = _MEMORY_BYTES + header.rows * _MEMORY_BYTES_PER_ROW + _size(0) * _MEMORY_BYTES_PER_BYTE
            _limit(memory, cpu_seconds(header.rows))
            _accept(out, read_table(header, _content(0), max_rows))
        except Refused as refusal:
            _write(out, {"status": refusal.status, "code": refusal.code, "message": str(refusal)})
        except MemoryError:
            _write(out, _TOO_MUCH_MEMORY)


def read_header(text: bytes, max_rows: int) -> "TableHeader":
    """The header in a table.json. Raises Refused where it is none, or speaks of more rows than the server takes."""
    from neuronlens.errors import UsageError
    from neuronlens.ranges import parse_header

    try:
        header = parse_header(text.decode())
    except (ValueError, UsageError) as error:
        raise Refused(f"The part 'header' is no table.json: {str(error).rstrip('.')}.") from error
    _check_count(header.rows, "table.json says", max_rows)
    return header


def read_table(header: "TableHeader", content: bytes, max_rows: int) -> "RangeTable":
    """The table of a header and a Parquet file. Raises Refused where they are not right, or not each other's."""
    from neuronlens.errors import UsageError
    from neuronlens.ranges import RangeTable

    try:
        table = RangeTable.of(header, _read_rows(header, content, max_rows))
        table.header_json()
    except (UsageError, ValueError, RecursionError) as error:
        raise Refused(f"The range table is not right: {str(error).rstrip('.')}.") from error
    return table


def _accept(out: IO[bytes], table: "RangeTable") -> None:
    import pyarrow as pa

    _write(out, {"status": 200, "header": table.header.model_dump()})
    with pa.ipc.new_stream(out, table.rows.schema) as writer:
        writer.write_table(table.rows, max_chunksize=ROWS_PER_BATCH)


def _read_rows(header: "TableHeader", content: bytes, max_rows: int) -> "pa.Table":
    """The rows of a Parquet file, no more of them than the header says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(pa.BufferReader(content))
        n_rows = parquet.metadata.num_rows
        _check_count(n_rows, "its Parquet footer says", max_rows)
        if n_rows != header.rows:
            raise Refused(f"table.json says {header.rows} rows, the Parquet file has {n_rows}.")
        _check_types(parquet.schema_arrow, header.schema_of_rows)
        # As dictionaries, names take no memory for each row that bears them.
        names = ["hook_point", "concept"]
        parquet = pq.ParquetFile(pa.BufferReader(content), metadata=parquet.metadata, read_dictionary=names)
        batches, n_rows = [], 0
        for batch in parquet.iter_batches(batch_size=ROWS_PER_BATCH, use_threads=False):
            n_rows += batch.num_rows
            # The footer may lie: what counts is what comes out.
            if n_rows > header.rows:
                raise Refused(f"table.json says {header.rows} rows, the Parquet file holds more.")
            _check_names(batch)
            batches.append(batch)
        return pa.Table.from_batches(batches, parquet.schema_arrow)
    except MemoryError:
        raise
    except (OSError, pa.ArrowException, OverflowError) as error:
        raise Refused(f"The part 'rows' cannot be read as Parquet: {_first_line(error)}.") from error


def _check_count(n_rows: int, said_by: str, max_rows: int) -> None:
    if n_rows > max_rows:
        raise Refused(
            f"The range table is too large: {said_by} {n_rows:,} rows, this server takes {max_rows:,}. Make a smaller "
            "one with a lower top_fraction.",
            status=413,
            code="too_large",
        )


def _check_types(found: "pa.Schema", expected: "pa.Schema") -> None:
    """Raise Refused for other columns than expected, or of another kind: a number is not read from a text, nor a
    text from a list."""
    from neuronlens.errors import UsageError
    from neuronlens.ranges import check_columns

    try:
        check_columns(found.names, expected)
    except UsageError as error:
        raise Refused(str(error)) from error
    for field in expected:
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


def _size(file: int) -> int:
    return os.fstat(file).st_size


def _content(file: int) -> bytes:
    with open(file, "rb", closefd=False) as opened:
        return opened.read(_size(file))


def _write(out: IO[bytes], verdict: Mapping[str, Any]) -> None:
    out.write(json.dumps(verdict).encode() + b"\n")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(".")


if __name__ == "__main__":
    main()
