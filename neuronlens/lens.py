"""A store opened for questions: SQL over its views, read only, without the model and without the texts' source.

import neuronlens

with neuronlens.open("STORE") as lens:
    lens.sql("select layer, median(kurtosis) from moments group by layer").to_arrow_table()
    lens.sql("from capture(3, 7, $concept, tau := 1.5)", concept="joy").df()
"""

import re
from typing import Any

import duckdb

from neuronlens.errors import UsageError
from neuronlens.query import VIEW_FILES, connect, questions, read_query, url_of
from neuronlens.store import Store

_WRITING = {"copy", "export", "attach"}
"""Statements that write files. DuckDB has a switch that hides all files but those that we name, none that makes these
read only."""
_DESCRIBE = re.compile(r'\s*desc(?:ribe)?\s+"?(\w+)"?\s*;?\s*', re.IGNORECASE)


class Lens:
    """The views and table macros of one store (docs/sql.md) on a connection of its own.

    A query sees the files that the store's receipts name and no others, on this machine or anywhere else, and writes
    none; tables and views that it creates live in memory until the lens is closed. Use one lens a thread.
    """

    def __init__(self, store: Store, *, memory_limit: str | None = None, threads: int | None = None) -> None:
        self.store = store
        self.description = store.describe()
        """What store.json says."""
        files = store.file_lists()
        self._con = connect(files, fs=store.fs, memory_limit=memory_limit, threads=threads, views="described")
        paths = [url_of(path, store.fs) for of_kind in files.values() for path in of_kind]
        for statement in duckdb.extract_statements(read_query("session/guard")):
            self._con.execute(statement, {"paths": paths} if statement.named_parameters else None)

    def sql(self, query: str, **params: Any) -> duckdb.DuckDBPyRelation:
        """The answer to a query, or to a ready question by its name (`neuronlens.query.questions`), as a relation:
        `to_arrow_table()`, `df()`, `pl()`, `fetchall()`.

        `params` are the $names in the query. `describe VIEW` says what each column means. Raises UsageError for a
        statement that writes files or answers nothing, duckdb.Error for what DuckDB cannot do.
        """
        refuse_writing(query)
        described = _DESCRIBE.fullmatch(query)
        if described and described[1] in self.views():
            query, params = read_query("session/columns"), {"view": described[1]}
        elif query in questions():
            query = read_query(query)
        answer = self._con.sql(query, params=params) if params else self._con.sql(query)
        if answer is None:
            raise UsageError("That statement answers nothing. Ask with select, from, describe or summarize.")
        return answer

    def views(self) -> dict[str, str]:
        """The views, and what each of them holds."""
        return self._named("view")

    def macros(self) -> dict[str, str]:
        """The table macros, and how each of them is called."""
        return self._named("macro")

    def keywords(self) -> list[str]:
        """The reserved words of DuckDB's SQL."""
        return list(self._named("keyword"))

    def columns(self, view: str) -> dict[str, str]:
        """The columns of a view, and what each of them means. Raises UsageError for an unknown view."""
        if view not in self.views():
            raise UsageError(f"There is no view {view!r}. Views: {', '.join(self.views())}.")
        return {name: comment for name, _, comment in self.sql(f"describe {view}").fetchall()}

    def register(self, name: str, rows: Any) -> None:
        """Let queries read `rows` (an Arrow table, a pandas or a polars frame) as a table of that name."""
        self._con.register(name, rows)

    def close(self) -> None:
        self._con.close()

    def __enter__(self) -> "Lens":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _named(self, kind: str) -> dict[str, str]:
        rows = self._con.execute(read_query("session/catalog")).fetchall()
        return {name: comment for of_kind, name, comment in rows if of_kind == kind}


def open(store: str | Store, *, memory_limit: str | None = None, threads: int | None = None) -> Lens:
    """Open a store (a path or an fsspec URL) for questions, read only.

    `memory_limit` is DuckDB's, as in "4GB". Raises UsageError where there is no store, or one of a newer format.
    """
    return Lens(store if isinstance(store, Store) else Store(store), memory_limit=memory_limit, threads=threads)


def view_script(store: Store) -> str:
    """SQL that makes the same views and macros in any DuckDB session: the shell, Python, R, DBeaver.

    It names the store's files of now: make it again after a run went on.
    """
    with connect(store.file_lists(), fs=store.fs) as con:
        files = [sql for (sql,) in con.execute(read_query("session/file_views")).fetchall()]
    head = (
        f"-- What may a person ask of {' '.join(store.root.split())}? Run this in any client of DuckDB 2.0 or newer.\n"
    )
    return "\n".join([head, read_query("macros"), *files, "", *map(read_query, VIEW_FILES)])


def refuse_writing(query: str) -> None:
    """Raise UsageError for a query with a statement that writes files."""
    text = query.encode()
    for offset, kind in duckdb.tokenize(query):
        word = re.match(rb"\w*", text[offset:])
        name = word[0].decode() if word else ""
        if kind.name == "keyword" and name.lower() in _WRITING:
            raise UsageError(
                f"The query holds {name.upper()}, and a store is only read: nothing may be written or attached. To "
                "keep an answer: neuronlens sql STORE QUERY --format parquet > answer.parquet. If "
                f"{name} is a name, put it in double quotes."
            )
