"""A store as SQL: DuckDB over the files that the receipts name, and the queries of the sql/ folder.

    con = connect({"moments": [...], "overlap": [...]}, memory_limit="4GB", threads=2)
    con.sql("select * from moments where layer = 3 and neuron = 7")
    table = run_file(con, "gaussianity_by_layer")
    n_rows = run_to_parquet(con, "merge", "moments/mlp_post.003.parquet", hook_point="mlp_post", layer=3)

Every query is a file that opens with the question it answers and also runs in the plain DuckDB shell, where
`set variable layer = 3` gives it a parameter. DuckDB's errors come through as `Error`, with DuckDB's own message.
"""

import tempfile
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import duckdb
import pyarrow as pa

from neuronlens.errors import UsageError
from neuronlens.remote import SharedFiles

Error = duckdb.Error
KINDS = (
    *("plan", "samples", "commits", "partials", "shard_histograms", "raw", "predictions"),
    *("moments", "histograms", "distributions", "overlap", "salience", "ranges", "evaluations", "generations"),
)
"""The kinds of file that a store holds. Each has a view `KIND_files`, empty where it has none: sql/schema.sql."""

VIEW_FILES = ("views", "analysis", "functions", "comments")
"""The files of sql/ that make views and table macros over the `KIND_files` views, in this order, and say what they
mean."""

Views = Literal["stored", "derived", "described"]
_FILES_OF: Mapping[Views, tuple[str, ...]] = {
    "stored": VIEW_FILES[:1],
    "derived": VIEW_FILES[:3],
    "described": VIEW_FILES,
}

_FORMULAS = ("macros", "schema")
_SETUP = (*_FORMULAS, *VIEW_FILES)
_NAMED_BY_PATH = ("ranges", "partials", "shard_histograms")
"""Kinds whose rows belong to a table or shard that only their path names."""
_OF_SEVERAL_FORMATS = ("ranges",)
"""Kinds of which one store may hold files with different columns."""
_JSON_KINDS = ("commits", "evaluations", "generations")
_OPTIONS = "format parquet, parquet_version v2, compression zstd, compression_level 3, row_group_size 131072"
"""Version 2 writes floats as byte stream split where a dictionary does not pay."""


def connect(
    files: Mapping[str, Sequence[str]] | None = None,
    *,
    fs: Any = None,
    memory_limit: str | None = None,
    threads: int | None = None,
    temp_directory: str | None = None,
    views: Views = "derived",
) -> duckdb.DuckDBPyConnection:
    """A connection with views over a store and the table macros, as docs/sql.md describes them.

    `files` gives the paths or URLs of each kind (see KINDS), as the receipts name them; a kind left out or empty gives
    a view with its columns and no rows. `fs` is the fsspec filesystem of a store that is not local. `memory_limit` is
    DuckDB's, as in "4GB"; beyond it, a query spills below `temp_directory` (by default the system's), where the
    connection keeps a directory of its own until it is closed. `views` says how much is made: what the store's files
    hold (half the time), what is derived from it too, or also what every column means (twice the time). Nothing is ever
    downloaded, no extension either.

    The views belong to the connection's catalog, so `con.cursor()` sees them too: take one cursor a thread.

    Raises UsageError for an unknown kind, duckdb.Error for a file that cannot be read.
    """
    spill = Path(temp_directory or tempfile.gettempdir())
    spill.mkdir(parents=True, exist_ok=True)
    config: dict[str, str | bool | int | float | list[str]] = {
        "temp_directory": str(spill / f"neuronlens-sql-{uuid.uuid4().hex[:12]}"),
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    if memory_limit is not None:
        config["memory_limit"] = memory_limit
    if threads is not None:
        config["threads"] = threads
    con = duckdb.connect(config=config)
    con.execute("set enable_progress_bar = false")  # on by default where Python was not started with a file
    con.execute("set parquet_metadata_cache = true")  # merge.sql reads every file twice, and no file ever changes
    if fs is not None and not _is_local(fs):
        con.register_filesystem(SharedFiles(fs))
    for name in _FORMULAS:
        con.execute(read_query(name))
    for kind, paths in (files or {}).items():
        _read_from(con, kind, paths, fs)
    for name in _FILES_OF[views]:
        con.execute(read_query(name))
    return con


def attach(con: duckdb.DuckDBPyConnection, kind: str, paths: Sequence[str], *, fs: Any = None) -> None:
    """Let the view of `kind` read `paths` from now on; no paths leaves it as it is.

    So that a stage can read what the stage before it wrote, without another connection. Raises as `connect` does.
    """
    before = _columns_of(con, kind)
    _read_from(con, kind, paths, fs)
    if _columns_of(con, kind) != before:  # else the views over it hold, and making them takes longer than a small query
        con.execute(read_query("views"))


def _columns_of(con: duckdb.DuckDBPyConnection, kind: str) -> list[tuple[str, str]]:
    found = con.view(f"{kind}_files")
    return [(name, str(of_type)) for name, of_type in zip(found.columns, found.types, strict=True)]


def _read_from(con: duckdb.DuckDBPyConnection, kind: str, paths: Sequence[str], fs: Any) -> None:
    if kind not in KINDS:
        raise UsageError(f"A store has no files of kind {kind!r}. Kinds: {', '.join(KINDS)}.")
    if not paths:
        return
    urls = [url_of(path, fs) for path in paths]
    if kind in _JSON_KINDS:  # the files hold more than the columns that sql/schema.sql names
        empty = con.view(f"{kind}_files")
        columns = dict(zip(empty.columns, map(str, empty.types), strict=True))
        has_name = columns.pop("filename", None) is not None
        relation = con.read_json(urls, columns=cast(Any, columns), format="auto", filename=has_name)
    else:
        relation = con.read_parquet(
            urls,
            hive_partitioning=kind == "raw",
            filename=kind in _NAMED_BY_PATH,
            union_by_name=kind in _OF_SEVERAL_FORMATS,
        )
    relation.set_alias(kind).create_view(f"{kind}_files", replace=True)


def attach_rows(con: duckdb.DuckDBPyConnection, view: str, rows: pa.Table) -> None:
    """Let a view read rows in memory from now on: for what one query hands to the next and no file keeps."""
    con.from_arrow(rows).create_view(view, replace=True)


def rows_of(con: duckdb.DuckDBPyConnection, view: str, *columns: str) -> pa.Table:
    """All rows of a view, or of some of its columns, in no order."""
    rows = con.view(view)
    return (rows.select(*map(duckdb.ColumnExpression, columns)) if columns else rows).to_arrow_table()


def run_file(con: duckdb.DuckDBPyConnection, name: str, **params: Any) -> pa.Table:
    """The rows of sql/<name>.sql as an Arrow table. `params` are the $names in the file, all of them.

    Raises UsageError for an unknown query and for a missing or unknown parameter, duckdb.Error for what DuckDB refuses.
    """
    return con.sql(_checked(name, params), params=params).to_arrow_table()


def run_to_parquet(
    con: duckdb.DuckDBPyConnection,
    name: str,
    path: str,
    *,
    metadata: Mapping[str, str] | None = None,
    **params: Any,
) -> int:
    """Stream the rows of sql/<name>.sql into one Parquet file at `path` (or URL), zstd-compressed; returns how many.

    The rows are not held in memory at once, and keep the query's order. `metadata` becomes key-value metadata of the
    file; its keys are plain names. Raises as `run_file` does.
    """
    # Path and metadata are parameters too, so that no quoting is needed: no query may begin one of its own with
    # `target_`.
    own = {"target_path": path} | {f"target_{key}": value for key, value in (metadata or {}).items()}
    pairs = ", ".join(f"{key}: $target_{key}" for key in metadata or {})
    options = f"{_OPTIONS}, kv_metadata {{{pairs}}}" if pairs else _OPTIONS
    text = f"copy (\n{_checked(name, params)}\n) to $target_path ({options})"
    row = con.execute(text, {**params, **own}).fetchone()
    assert row is not None
    return int(row[0])


def questions() -> dict[str, str]:
    """Every query that `run_file` runs, with the question that its file opens with."""
    names = sorted(path.stem for path in sql_folder().glob("*.sql") if path.stem not in _SETUP)
    return {name: read_query(name).partition("\n")[0].removeprefix("-- ") for name in names}


@cache
def read_query(name: str) -> str:
    """The text of sql/<name>.sql. Raises UsageError, with the names there are, for an unknown one."""
    path = sql_folder() / f"{name}.sql"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in sql_folder().glob("*.sql")))
        raise UsageError(f"There is no query named {name!r}. Queries: {known}.")
    return path.read_text(encoding="utf-8")


@cache
def sql_folder() -> Path:
    """Where the queries lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "sql", package.parent / "sql"):
        if (folder / "views.sql").is_file():
            return folder
    raise UsageError(f"No queries found in {package / 'sql'} or {package.parent / 'sql'}. Install neuronlens again.")


def _checked(name: str, params: Mapping[str, object]) -> str:
    """The one statement of the file, once its parameters and `params` are known to be the same."""
    statements = duckdb.extract_statements(read_query(name))
    if len(statements) != 1:
        raise UsageError(
            f"sql/{name}.sql holds {len(statements)} statements. Only a file with one query can be run so."
        )
    wanted = set(statements[0].named_parameters)
    if wanted != set(params):
        given = ", ".join(sorted(params)) or "none"
        raise UsageError(f"Query {name!r} takes the parameters {', '.join(sorted(wanted)) or 'none'}; given: {given}.")
    return statements[0].query.strip().removesuffix(";")


def url_of(path: str, fs: Any) -> str:
    """The path as DuckDB must be given it: it finds a registered filesystem by the protocol, so a bare path of a remote
    filesystem gets its own."""
    if fs is None or _is_local(fs) or "://" in str(path):
        return str(path)
    return str(fs.unstrip_protocol(path))


def _is_local(fs: Any) -> bool:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "file" in protocols
