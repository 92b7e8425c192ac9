"""Answers to a person's SQL: printed as a table, or streamed as CSV, JSON or Parquet to stdout."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from neuronlens.errors import UsageError
from neuronlens.lens import Lens
from neuronlens.query import questions

SHOWN_ROWS = 100
_BATCH_ROWS = 65_536
_ON_THEIR_SIDE = 12
"""So many rows that are too wide for the terminal are shown as columns."""


def answer(lens: Lens, query: str, form: str, params: Mapping[str, Any]) -> None:
    """Run a query, or a ready question by its name, over the store's views and print what comes out.

    Raises UsageError with DuckDB's reason where the query is wrong.
    """
    if form == "parquet" and sys.stdout.isatty():
        raise UsageError(
            "Parquet is not for a terminal. Send it to a file: neuronlens sql STORE QUERY --format parquet > "
            "answer.parquet"
        )
    try:
        print_rows(lens.sql(query, **params).to_arrow_reader(_BATCH_ROWS), form)
    except duckdb.Error as error:
        raise UsageError(f"DuckDB cannot answer that: {_sentence(error)}") from error


def list_views(lens: Lens, console: Console) -> None:
    """What a query may name: views and table macros."""
    _list(console, "Views (describe NAME says what each column means)", lens.views())
    _list(console, "Macros (from NAME(...))", lens.macros())


def list_questions(console: Console) -> None:
    """The queries of sql/ that run by their names."""
    _list(console, "Ready questions (neuronlens sql STORE NAME [--param name=value])", questions())


def _list(console: Console, title: str, entries: Mapping[str, str]) -> None:
    table = Table("name", "what it answers", title=title, title_justify="left")
    for name, meaning in entries.items():
        table.add_row(Text(name), Text(meaning))
    console.print(table)


def _sentence(error: duckdb.Error) -> str:
    """DuckDB's own words. Where its error began in Python (a remote file), only the last line of the traceback."""
    text = str(error).strip()
    return text.splitlines()[-1] if "Traceback (most recent call last)" in text else text


def print_rows(reader: pa.RecordBatchReader, form: str) -> None:
    """All rows on stdout: `form` is csv, json, parquet or table."""
    if form == "parquet":
        with pq.ParquetWriter(pa.PythonFile(sys.stdout.buffer, mode="w"), reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)
    elif form == "csv":
        rows = csv.writer(sys.stdout)
        rows.writerow(reader.schema.names)
        rows.writerows(tuple(row.values()) for row in _rows(reader))
    elif form == "json":
        _print_json(_rows(reader))
    else:
        _print_table(reader)


def _rows(reader: pa.RecordBatchReader) -> Iterator[dict[str, Any]]:
    for batch in reader:
        columns = [_exact(column) for column in batch.columns]
        yield from pa.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()


def _exact(column: pa.Array) -> pa.Array:
    """0.1 of a FLOAT column as 0.1, not as the double next to it, 0.10000000149011612."""
    return column.cast(pa.string()).cast(pa.float64()) if pa.types.is_float32(column.type) else column


def _print_json(rows: Iterator[dict[str, Any]]) -> None:
    """One array, a row a line, so that it streams and still is one JSON value."""
    sys.stdout.write("[")
    for number, row in enumerate(rows):
        sys.stdout.write((",\n" if number else "\n") + json.dumps(finite(row), default=str))
    sys.stdout.write("\n]\n")


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become the words that DuckDB reads back."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value


def _print_table(reader: pa.RecordBatchReader) -> None:
    console, shown, n_rows = Console(), [], 0
    for row in _rows(reader):
        n_rows += 1
        if n_rows <= SHOWN_ROWS:
            shown.append([_cell(value) for value in row.values()])
    table = _table(reader.schema.names, shown)
    needed = console.measure(table, options=console.options.update(max_width=10_000)).minimum
    if len(shown) <= _ON_THEIR_SIDE and needed > console.width:
        table = _table(["column", *["row"] * len(shown)], list(zip(reader.schema.names, *shown, strict=True)))
    console.print(table)
    if n_rows > SHOWN_ROWS:
        Console(stderr=True).print(f"{SHOWN_ROWS} of {n_rows:,} rows shown; --format csv prints them all.")


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for name in names:
        table.add_column(escape(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
