"""Range tables: which values of which neurons belong to a concept. Immutable, and named by what is in them.

A table holds the salient neurons of every concept at every (hook point, layer), each with its moments and its range
[lower, upper]; by any other method than the paper's, the range is a union of such intervals, its pieces, with a row
each. It stands alone: the moments let a request choose another tau, the ranks let it choose a smaller top_fraction, and
the header says for which model the numbers hold. docs/store-format.md, `ranges`, is normative.
"""

import hashlib
import json
import math
import os
import posixpath
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from neuronlens.errors import RunFailed, UsageError
from neuronlens.retry import retried

FORMAT_VERSION = 2
"""The newest. Tables of method paper are of format 1, whichever version makes them, and so keep their ids."""
PAPER = "paper"
"""The method of the paper: one interval a neuron, mean -+ tau * std."""

SCHEMA = pa.schema(
    [
        pa.field("hook_point", pa.string(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("concept", pa.string(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("std", pa.float64(), nullable=False),
        pa.field("mean_abs", pa.float64(), nullable=False),
        pa.field("salience", pa.float64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("lower", pa.float64(), nullable=False),
        pa.field("upper", pa.float64(), nullable=False),
    ]
)
"""The columns of a range table of method paper, in order. Rows are sorted by ROW_ORDER."""

PIECES_SCHEMA = pa.schema(
    [
        *SCHEMA,
        pa.field("piece", pa.int16(), nullable=False),
        pa.field("posterior", pa.float64(), nullable=False),
        pa.field("mean_others", pa.float64(), nullable=False),
    ]
)
"""The columns of any other table: `piece` counts the intervals of one neuron from 0, ascending; `posterior` is the
probability of the concept given that the neuron's value lies in the piece, were the concept as frequent as all others
together; `mean_others` is the mean over the values of all other concepts. The other columns but the bounds are the same
for all pieces of a neuron. Rows are sorted by ROW_ORDER, then piece."""

ROW_ORDER = ("hook_point", "layer", "concept", "rank", "neuron")
"""Strings by their code points, so that a layer lies together and within it a concept, most salient neuron first."""

MAX_PIECES = 64
"""Of one neuron: each costs a program a row of arrays as wide as the layer."""
_OF_THE_NEURON = ("n", "mean", "std", "mean_abs", "salience", "mean_others")
"""What the pieces of a neuron have in common, besides its place and rank."""

_N_LISTED = 40
"""So many names an error lists."""


class TableModel(BaseModel):
    """The model that a table's numbers hold for: config_hash decides whether a table fits; the rest is a name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    revision: str | None = None
    config_hash: str


class TableHeader(BaseModel):
    """What table.json says: see docs/store-format.md. `widths` is the number of neurons of each hook point.

    `method` says how the ranges were chosen, with which `options`. Neither is written for method paper, which has no
    options: its tables are of format 1, from before there were others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^tbl_[0-9a-f]{16}$")
    format_version: int = Field(default=1, ge=1, le=FORMAT_VERSION)
    method: str = Field(default=PAPER, pattern=r"^[a-z][a-z0-9_]{0,63}$", exclude_if=lambda method: method == PAPER)
    options: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict, exclude_if=lambda options: not options
    )
    tau: float = Field(gt=0, allow_inf_nan=False)
    top_fraction: float = Field(gt=0, le=1)
    salience: str
    store_hash: str
    model: TableModel
    unit: str
    widths: dict[str, Annotated[int, Field(ge=1, lt=2**31)]]
    coverage: dict[str, Any]
    rows: int = Field(ge=0)
    created_with: dict[str, str]

    @model_validator(mode="after")
    def _format_fits_the_method(self) -> "TableHeader":
        expected = _format_of(self.method)
        if self.format_version != expected:
            raise ValueError(
                f"format_version is {self.format_version}, and a table of method {self.method} has {expected}"
            )
        if self.method == PAPER and self.options:
            raise ValueError(f"method {PAPER} has no options, found {', '.join(self.options)}")
        return self

    @field_validator("options")
    @classmethod
    def _sorted(cls, options: dict[str, float]) -> dict[str, float]:
        return dict(sorted(options.items()))

    @property
    def schema_of_rows(self) -> pa.Schema:
        """The columns of ranges.parquet."""
        return SCHEMA if self.method == PAPER else PIECES_SCHEMA

    def content(self) -> dict[str, Any]:
        """The keys that decide the content and so the id: not the id itself, the package versions or the model's name.

        A model's path differs from machine to machine; its config_hash and the store_hash, which covers the weights,
        do not.
        """
        content = self.model_dump(exclude={"id", "created_with", "model"})
        return {**content, "model": {"config_hash": self.model.config_hash}}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RangeTable:
    """A header and its rows (an Arrow table of its columns, in ROW_ORDER). Build one with `make` or `load`."""

    header: TableHeader
    rows: pa.Table

    @classmethod
    def make(
        cls,
        rows: pa.Table,
        *,
        tau: float,
        top_fraction: float,
        salience: str,
        store_hash: str,
        model: TableModel,
        unit: str,
        widths: Mapping[str, int],
        coverage: Mapping[str, Any] | None = None,
        created_with: Mapping[str, str] | None = None,
        method: str = PAPER,
        options: Mapping[str, float] | None = None,
    ) -> "RangeTable":
        """The table of these rows, in any order and with any Arrow encoding of the columns of SCHEMA, or of
        PIECES_SCHEMA where the method is another than paper.

        The id depends on the content alone: the same rows and header give the same id on every machine. Raises
        UsageError where a column is missing or a row cannot be right (a bound that is NaN, a neuron beyond the width,
        a neuron twice, pieces that overlap).
        """
        try:
            draft = TableHeader(
                id=f"tbl_{'0' * 16}",
                format_version=_format_of(method),
                method=method,
                options=dict(options or {}),
                tau=tau,
                top_fraction=top_fraction,
                salience=salience,
                store_hash=store_hash,
                model=model,
                unit=unit,
                widths=dict(widths),
                coverage=dict(coverage or {}),
                rows=rows.num_rows,
                created_with=dict(created_with if created_with is not None else package_versions()),
            )
        except ValidationError as error:
            raise UsageError(f"The header of a range table is not right: {_first_fault(error)}.") from error
        canonical_rows = _canonical(rows, draft.schema_of_rows)
        _check_rows(canonical_rows, draft.widths)
        header = draft.model_copy(update={"id": content_id(draft.content(), canonical_rows)})
        return cls(header=header, rows=canonical_rows)

    @classmethod
    def of(cls, header: TableHeader, rows: pa.Table) -> "RangeTable":
        """The table that has this header and these rows, in any order and encoding. Raises UsageError where the two do
        not belong together: the header's id is not that of the content, or a row cannot be right."""
        if header.rows != rows.num_rows:
            raise UsageError(f"table.json says {header.rows} rows, there are {rows.num_rows}")
        canonical_rows = _canonical(rows, header.schema_of_rows)
        _check_rows(canonical_rows, header.widths)
        try:
            found = content_id(header.content(), canonical_rows)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"table.json cannot be written as JSON ({error})") from error
        if found != header.id:
            raise UsageError(f"table.json says {header.id}, but the content has the id {found}")
        return cls(header=header, rows=canonical_rows)

    @property
    def id(self) -> str:
        return self.header.id

    @property
    def has_pieces(self) -> bool:
        """Whether the rows are of PIECES_SCHEMA: a neuron may have several, each with a posterior."""
        return self.header.method != PAPER

    @property
    def concepts(self) -> tuple[str, ...]:
        """Sorted by name."""
        return tuple(sorted(pc.unique(self.rows["concept"]).to_pylist()))

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Sorted by name."""
        return tuple(sorted(pc.unique(self.rows["hook_point"]).to_pylist()))

    @property
    def layers(self) -> tuple[int, ...]:
        """Ascending, over all hook points."""
        return tuple(sorted(pc.unique(self.rows["layer"]).to_pylist()))

    def select(
        self,
        concept: str | None = None,
        *,
        hook_points: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        neurons: Sequence[int] | None = None,
        top_fraction: float | None = None,
    ) -> pa.Table:
        """The rows of one concept (None: of all), at these hook points, layers and neurons, of the most salient ones.

        Raises UsageError, naming what there is, for a concept, hook point, layer or neuron that the table does not
        hold (of several layers, one at least has to have the neuron), and for a top_fraction above the table's own: the
        neurons beyond it are in the store, not in the table.
        """
        rows = self.rows
        if concept is not None:
            self._demand("concept", [concept], rows["concept"])
            rows = rows.filter(pc.equal(rows["concept"], concept))
        if hook_points is not None:
            self._demand("hook point", hook_points, rows["hook_point"], concept)
            rows = rows.filter(pc.is_in(rows["hook_point"], value_set=pa.array(hook_points, pa.string())))
        if layers is not None:
            self._demand("layer", layers, rows["layer"], concept, *(hook_points or ()))
            rows = rows.filter(pc.is_in(rows["layer"], value_set=pa.array(layers, pa.int16())))
        if neurons is not None:
            self._demand("neuron", neurons, rows["neuron"], concept, *(hook_points or ()))
            rows = rows.filter(pc.is_in(rows["neuron"], value_set=pa.array(neurons, pa.int32())))
        if top_fraction is None or top_fraction == self.header.top_fraction:
            return rows
        return self._most_salient(rows, top_fraction)

    def _demand(self, word: str, asked: Sequence[Any], column: pa.ChunkedArray, *within: str | None) -> None:
        """Raise UsageError where a value asked for is not in the column; `within` says what was chosen before."""
        there = sorted(pc.unique(column).to_pylist())
        known = set(there)
        unknown = [str(value) for value in asked if value not in known]
        if unknown:
            chosen = " and ".join(name for name in within if name is not None)
            raise UsageError(
                f"Range table {self.id} has no {word} {_listed(unknown)}{' for ' if chosen else ''}{chosen}. "
                f"It has: {_listed(there)}."
            )

    def _most_salient(self, rows: pa.Table, top_fraction: float) -> pa.Table:
        if not 0 < top_fraction <= self.header.top_fraction:
            raise UsageError(
                f"top_fraction is {top_fraction}; expected above 0 and at most {self.header.top_fraction}, the share "
                f"that range table {self.id} holds. Ask for less, or make a larger table with neuronlens ranges."
            )
        keep = pa.nulls(rows.num_rows, pa.bool_()).fill_null(False)
        for hook_point, width in self.header.widths.items():
            salient = pc.less_equal(rows["rank"], salient_count(top_fraction, width))
            keep = pc.or_(keep, pc.and_(pc.equal(rows["hook_point"], hook_point), salient))
        return rows.filter(keep)

    def save(self, root: str | os.PathLike[str], fs: Any | None = None) -> str:
        """Write ranges/<id>/ranges.parquet, then table.json, under the store `root`; the folder's path comes back.

        `root` is a local path or any fsspec URL, or a path within `fs` (an fsspec filesystem). A whole table of this id
        that is there already is left alone; a damaged one is written anew.
        """
        fs, root_path = (fs, os.fspath(root)) if fs is not None else fsspec.core.url_to_fs(os.fspath(root))
        folder = posixpath.join(root_path, "ranges", self.id)
        if not _holds_table(fs, folder):
            fs.makedirs(folder, exist_ok=True)
            _write(fs, posixpath.join(folder, "ranges.parquet"), self.rows_parquet())
            _write(fs, posixpath.join(folder, "table.json"), self.header_json())
        return folder

    def rows_parquet(self) -> bytes:
        """What ranges.parquet holds."""
        buffer = pa.BufferOutputStream()
        pq.write_table(self.rows, buffer, compression="zstd", row_group_size=131_072)
        return bytes(buffer.getvalue().to_pybytes())

    def header_json(self) -> bytes:
        """What table.json holds."""
        header = json.dumps(self.header.model_dump(), indent=2, ensure_ascii=False, allow_nan=False)
        return (header + "\n").encode()

    @classmethod
    def load(cls, path: str | os.PathLike[str], fs: Any | None = None) -> "RangeTable":
        """The table in the folder `path` (local, an fsspec URL, or within `fs`), checked against its own id.

        Raises UsageError where there is no table, RunFailed where there is one that is damaged.
        """
        fs, folder = (fs, os.fspath(path)) if fs is not None else fsspec.core.url_to_fs(os.fspath(path))
        try:
            text = retried(f"read {path}", lambda: fs.cat_file(posixpath.join(folder, "table.json")))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(
                f"There is no range table at {path}: it has no table.json. Expected the folder STORE/ranges/<table id> "
                "that neuronlens run and neuronlens ranges print."
            ) from error
        header = _read_header(text, path)
        try:
            content = retried(f"read {path}", lambda: fs.cat_file(posixpath.join(folder, "ranges.parquet")))
            rows = pq.read_table(pa.BufferReader(content))
        except (OSError, pa.ArrowException) as error:
            raise RunFailed(_damaged(path, f"its ranges.parquet cannot be read ({error})")) from error
        try:
            return cls.of(header, rows)
        except UsageError as error:
            raise RunFailed(_damaged(path, str(error))) from error


def _listed(values: Sequence[Any]) -> str:
    """All of them, or the first ones and how many there are."""
    shown = ", ".join(map(str, values[:_N_LISTED]))
    return shown if len(values) <= _N_LISTED else f"{shown} ... ({len(values):,} in all)"


def salient_count(top_fraction: float, width: int) -> int:
    """How many of `width` neurons are salient: top_fraction of them rounded down, but one at least."""
    return max(1, math.floor(top_fraction * width))


def content_id(content: Mapping[str, Any], rows: pa.Table) -> str:
    """`tbl_` + 16 hex digits of the SHA-256 over the header's content and the rows (canonical, so in ROW_ORDER).

    What is hashed, so that it can be made again without this code or Arrow: the header as JSON with sorted keys, no
    spaces and ASCII escapes, and a newline; then for each column `name:type` and a newline, and its values as
    little-endian bytes. A column of strings is the JSON list of its distinct values, sorted, a newline, and each row's
    index in that list as int32.
    """
    digest = hashlib.sha256(_json(content))
    for field in rows.schema:
        digest.update(f"{field.name}:{field.type}\n".encode())
        if pa.types.is_string(field.type):
            names, codes = _encoded(rows[field.name])
            digest.update(_json(names))
            digest.update(codes.astype("<i4").tobytes())
        else:
            values = rows[field.name].to_numpy()
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return f"tbl_{digest.hexdigest()[:16]}"


def package_versions() -> dict[str, str]:
    """The versions that a table is stamped with; they do not enter its id."""
    return {"python": sys.version.split()[0], "pyarrow": pa.__version__, "numpy": np.__version__}


def _json(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _encoded(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """The distinct strings, sorted, and each row's index among them (int64)."""
    encoded = column.combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    names = sorted(found)
    place = {name: i for i, name in enumerate(names)}
    return names, np.array([place[name] for name in found], dtype=np.int64)[encoded.indices.to_numpy()]


def _format_of(method: str) -> int:
    return 1 if method == PAPER else 2


def check_columns(names: Sequence[str], schema: pa.Schema) -> None:
    """Raise UsageError where these are not the columns of a range table of this schema, each once and in any order."""
    missing = [name for name in schema.names if name not in names]
    surplus = [name for name in names if name not in schema.names]
    repeated = [name for name in schema.names if names.count(name) > 1]
    if missing or surplus or repeated:
        raise UsageError(
            f"This range table has the columns {', '.join(schema.names)}. Missing: {', '.join(missing) or 'none'}; not "
            f"among them: {', '.join(surplus)[:200] or 'none'}{'; there twice: ' if repeated else ''}"
            f"{', '.join(repeated)}."
        )


def _canonical(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with these columns and types, in ROW_ORDER, and with no negative zero."""
    check_columns(rows.column_names, schema)
    columns = []
    for field in schema:
        if rows[field.name].null_count:
            raise UsageError(f"{rows[field.name].null_count} rows of the range table have no {field.name}; expected 0.")
        try:
            column = rows[field.name].cast(field.type)
        except pa.ArrowException as error:
            raise UsageError(f"The column {field.name} cannot be read as {field.type}: {error}.") from error
        # 0 + -0 is 0: the two compare equal, so they may not give two ids.
        columns.append(pc.add(column, 0.0) if pa.types.is_floating(field.type) else column)
    table = pa.table(columns, schema=schema)
    order = [(name, "ascending") for name in (*ROW_ORDER, "piece") if name in schema.names]
    return table.sort_by(order).combine_chunks()


def _check_rows(rows: pa.Table, widths: Mapping[str, int]) -> None:
    """Raise UsageError for rows (canonical) that no statistics can give."""
    if rows.num_rows == 0:
        raise UsageError("A range table needs at least one row, none was given. Has any concept statistics?")
    hook_points, hook_codes = _encoded(rows["hook_point"])
    unknown = [name for name in hook_points if name not in widths]
    if unknown:
        raise UsageError(f"No width is given for the hook points {', '.join(unknown)}; widths has {', '.join(widths)}.")
    number = {name: rows[name].to_numpy() for name in rows.column_names if name not in ("hook_point", "concept")}
    width_of_row = np.array([widths[name] for name in hook_points])[hook_codes]
    outside = (number["neuron"] < 0) | (number["neuron"] >= width_of_row)
    _refuse(number, outside, "neuron", f"0 or more and below the width, {dict(widths)}")
    _refuse(number, number["layer"] < 0, "layer", "0 or more")
    for name in ("n", "rank"):
        _refuse(number, number[name] < 1, name, "1 or more")
    for name in ("mean", "mean_abs", "salience"):
        _refuse(number, ~np.isfinite(number[name]), name, "finite")
    _refuse(number, ~(np.isfinite(number["std"]) & (number["std"] >= 0)), "std", "finite, 0 or more")
    _refuse(number, ~(number["lower"] <= number["upper"]), "lower", "at most upper")
    _refuse(number, number["lower"] == np.inf, "lower", "below infinity")
    _refuse(number, number["upper"] == -np.inf, "upper", "above minus infinity")

    _, concept_codes = _encoded(rows["concept"])
    # Rows of one group lie together (ROW_ORDER), and within it those of one neuron.
    is_first_of_group = _is_first(hook_codes, number["layer"], concept_codes)
    named = np.cumsum(is_first_of_group) * max(widths.values()) + number["neuron"]
    if "piece" in number:
        is_first_piece = is_first_of_group | _is_first(number["rank"], number["neuron"])
        _check_pieces(number, is_first_piece)
        named = named[is_first_piece]
    # np.sort takes a fiftieth of the time of np.unique, which hashes.
    named = np.sort(named)
    n_repeated = int((named[1:] == named[:-1]).sum())
    if n_repeated:
        raise UsageError(
            f"{n_repeated} rows name a neuron that their hook point, layer and concept already has; expected one rank "
            "and range a neuron."
        )


def _check_pieces(number: Mapping[str, np.ndarray], is_first_piece: np.ndarray) -> None:
    """Raise UsageError for pieces of a neuron that do not make one range. is_first_piece: where a neuron begins."""
    place = np.arange(len(is_first_piece))
    first_place = np.maximum.accumulate(np.where(is_first_piece, place, 0))
    _refuse(number, number["piece"] != place - first_place, "piece", "0, 1 and so on within each neuron and rank")
    _refuse(number, number["piece"] >= MAX_PIECES, "piece", f"below {MAX_PIECES}: a range has at most so many pieces")
    for name in _OF_THE_NEURON:
        differs = _is_first(number[name]) & ~is_first_piece
        _refuse(number, differs, name, "what the neuron's other pieces have")
    touches = np.zeros(len(place), dtype=bool)
    touches[1:] = number["lower"][1:] <= number["upper"][:-1]
    _refuse(number, touches & ~is_first_piece, "lower", "above the upper bound of the neuron's piece before it")
    is_probability = (number["posterior"] >= 0) & (number["posterior"] <= 1)
    _refuse(number, ~is_probability, "posterior", "0 to 1")
    _refuse(number, ~np.isfinite(number["mean_others"]), "mean_others", "finite")


def _is_first(*columns: np.ndarray) -> np.ndarray:
    """bool: where a row differs from the one before it, and in the first row."""
    is_first = np.zeros(len(columns[0]), dtype=bool)
    is_first[0] = True
    for column in columns:
        is_first[1:] |= column[1:] != column[:-1]
    return is_first


def _refuse(number: Mapping[str, np.ndarray], wrong: np.ndarray, column: str, expected: str) -> None:
    if wrong.any():
        i = int(wrong.argmax())
        raise UsageError(
            f"{int(wrong.sum())} rows of a range table have a wrong {column}: {number[column][i]} for neuron "
            f"{number['neuron'][i]} of layer {number['layer'][i]}; expected {expected}."
        )


def _read_header(text: bytes, path: str | os.PathLike[str]) -> TableHeader:
    try:
        return parse_header(text)
    except ValueError as error:
        raise RunFailed(_damaged(path, f"its table.json cannot be read ({error})")) from error
    except UsageError as error:
        raise UsageError(f"The range table at {path} cannot be read: {error}") from error


def parse_header(text: bytes | str) -> TableHeader:
    """A table.json. Raises ValueError, in a few words, where it is none, and UsageError for a later format."""
    try:
        fields = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UsageError(f"it has format version {version}, this neuronlens reads {FORMAT_VERSION}. Update neuronlens.")
    try:
        return TableHeader.model_validate(fields)
    except ValidationError as error:
        raise ValueError(_first_fault(error)) from error


def _damaged(path: str | os.PathLike[str], found: str) -> str:
    return f"The range table at {path} is damaged: {found}. Make it again: neuronlens ranges STORE"


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'table.json'}: {fault['msg']}"


def _holds_table(fs: Any, folder: str) -> bool:
    try:
        RangeTable.load(folder, fs)
    except (UsageError, RunFailed):
        return False
    return True


def _write(fs: Any, path: str, content: bytes) -> None:
    """One file, whole or not at all: object stores put whole objects, a local file gets its name once complete."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, content)
        return
    unfinished = Path(f"{path}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
