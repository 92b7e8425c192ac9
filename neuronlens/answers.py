"""Answers to a person's SQL: printed as a table, or streamed as CSV, JSON or Parquet to stdout."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from neuronlens.errors import UsageError
from neuronlens.query import connect, questions, read_query
from neuronlens.store import Store

SHOWN_ROWS = 100
_BATCH_ROWS = 65_536


def answer(store: Store, query: str | None, form: str, params: Mapping[str, Any]) -> None:
    """Run a query, or a ready question by its name, over the store's views and print what comes out.

    Without a query, the views and the ready questions are listed. Raises UsageError with DuckDB's reason where the
    query is wrong.
    """
    if query is None:
        _list_questions(Console())
        return
    if form == "parquet" and sys.stdout.isatty():
        raise UsageError(
            "Parquet is not for a terminal. Send it to a file: neuronlens sql STORE QUERY --format parquet > "
            "answer.parquet"
        )
    text = read_query(query) if query in questions() else query
    with connect(store.file_lists(), fs=store.fs) as con:
        try:
            relation = con.sql(text, params=dict(params)) if params else con.sql(text)
            if relation is None:
                raise UsageError("That statement answers nothing. Ask with select, from, describe or summarize.")
            _print(relation.to_arrow_reader(_BATCH_ROWS), form)
        except duckdb.Error as error:
            raise UsageError(f"DuckDB cannot answer that: {_sentence(error)}") from error


def _sentence(error: duckdb.Error) -> str:
    """DuckDB's own words. Where its error began in Python (a remote file), only the last line of the traceback."""
    text = str(error).strip()
    return text.splitlines()[-1] if "Traceback (most recent call last)" in text else text


def _list_questions(console: Console) -> None:
    table = Table(
        "question", "what it answers", title="Ready questions: neuronlens sql STORE NAME [--param name=value]"
    )
    for name, first_line in questions().items():
        table.add_row(name, first_line)
    console.print(table)


def _print(reader: pa.RecordBatchReader, form: str) -> None:
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
        yield from batch.to_pylist()


def _print_json(rows: Iterator[dict[str, Any]]) -> None:
    """One array, a row a line, so that it streams and still is one JSON value."""
    sys.stdout.write("[")
    for number, row in enumerate(rows):
        sys.stdout.write((",\n" if number else "\n") + json.dumps(row, default=str))
    sys.stdout.write("\n]\n")


def _print_table(reader: pa.RecordBatchReader) -> None:
    table, n_rows = Table(*reader.schema.names), 0
    for row in _rows(reader):
        n_rows += 1
        if n_rows <= SHOWN_ROWS:
            table.add_row(*(_cell(value) for value in row.values()))
    console = Console()
    console.print(table)
    if n_rows > SHOWN_ROWS:
        Console(stderr=True).print(f"{SHOWN_ROWS} of {n_rows:,} rows shown; --format csv prints them all.")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
