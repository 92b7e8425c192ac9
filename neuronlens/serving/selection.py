"""Which rows of a range table a request asks for, found without a look at every row.

    index = TableIndex.of(table)
    index.select(Filters(concepts=("joy",), layers=(4, 5)))     # an Arrow table, mostly views of the table's own memory

A table lies sorted, so a (hook point, layer, concept) is one run of rows, most salient neuron first: most filters pick
runs, or the first rows of each. One concept of a million rows takes a millisecond, where comparing the column of
strings takes 30.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from neuronlens.ranges import RangeTable, salient_count
from neuronlens.serving.errors import ApiError

_N_NAMED = 50
"""How many of the values that there are an error names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What is asked for of a table; None asks for all. A row must fit every filter, and one of each filter's values."""

    hook_points: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    concepts: tuple[str, ...] | None = None
    neurons: tuple[int, ...] | None = None
    top_fraction: float | None = None
    limit: int | None = None

    def digest(self) -> str:
        """The same for filters that ask for the same, in whatever order their values came."""
        plain = [sorted(set(part)) if isinstance(part, tuple) else part for part in astuple(self)]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Run:
    """The rows [start, stop) of a table: those of one hook point, layer and concept."""

    hook_point: str
    layer: int
    concept: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptRanges:
    """How much a table holds of one concept. A range that is several pieces counts once."""

    concept: str
    ranges: int
    layers: tuple[int, ...]
    hook_points: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TableIndex:
    """A table and its runs, in the order of its rows."""

    table: RangeTable
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, table: RangeTable) -> "TableIndex":
        rows = table.rows
        starts = np.zeros(rows.num_rows, dtype=bool)
        starts[0] = True
        for name in ("hook_point", "layer", "concept"):
            column = rows[name].combine_chunks()
            codes = (column.dictionary_encode().indices if pa.types.is_string(column.type) else column).to_numpy()
            starts[1:] |= codes[1:] != codes[:-1]
        first_I = np.flatnonzero(starts)
        last_I = np.append(first_I[1:], rows.num_rows)
        names = rows.select(["hook_point", "layer", "concept"]).take(first_I)
        columns = [names[i].to_pylist() for i in range(3)]
        return cls(table, tuple(map(Run, *columns, first_I.tolist(), last_I.tolist())))

    @cached_property
    def hook_points(self) -> tuple[str, ...]:
        return tuple(sorted({run.hook_point for run in self.runs}))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({run.layer for run in self.runs}))

    @cached_property
    def concepts(self) -> tuple[str, ...]:
        return tuple(sorted({run.concept for run in self.runs}))

    def by_concept(self) -> list[ConceptRanges]:
        """Sorted by name."""
        runs_of: dict[str, list[Run]] = {}
        for run in self.runs:
            runs_of.setdefault(run.concept, []).append(run)
        return [
            ConceptRanges(
                concept=concept,
                ranges=sum(map(self._n_ranges, runs)),
                layers=tuple(sorted({run.layer for run in runs})),
                hook_points=tuple(sorted({run.hook_point for run in runs})),
            )
            for concept, runs in sorted(runs_of.items())
        ]

    def _n_ranges(self, run: Run) -> int:
        if not self.table.has_pieces:
            return run.stop - run.start
        return int(np.count_nonzero(self.table.rows["piece"].slice(run.start, run.stop - run.start).to_numpy() == 0))

    def select(self, filters: Filters) -> pa.Table:
        """The rows that fit, in the table's order. None may fit: a neuron that is salient for nothing has no range.

        Raises ApiError 400, naming what there is, for a hook point, layer or concept that the table does not hold, a
        neuron beyond every width, and a top_fraction above the table's own.
        """
        self._check(filters)
        runs = [run for run in self.runs if _fits(run, filters)]
        rows = self._rows_of(runs, filters)
        if filters.neurons is not None:
            rows = rows.filter(pa.array(np.isin(rows["neuron"].to_numpy(), filters.neurons)))
        return rows if filters.limit is None else rows.slice(0, min(filters.limit, rows.num_rows))

    def _rows_of(self, runs: Sequence[Run], filters: Filters) -> pa.Table:
        """The salient rows of these runs: views, joined where one ends at the next one's start."""
        spans: list[tuple[int, int]] = []
        for run in runs:
            start, stop = run.start, self._salient_end(run, filters.top_fraction)
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, stop))
        rows = self.table.rows
        return pa.concat_tables([rows.slice(start, stop - start) for start, stop in spans] or [rows.slice(0, 0)])

    def _salient_end(self, run: Run, top_fraction: float | None) -> int:
        if top_fraction is None or top_fraction == self.table.header.top_fraction:
            return run.stop
        count = salient_count(top_fraction, self.table.header.widths[run.hook_point])
        ranks = self.table.rows["rank"].slice(run.start, run.stop - run.start).to_numpy()
        return run.start + int(np.searchsorted(ranks, count, side="right"))

    def _check(self, filters: Filters) -> None:
        self._demand("hook_point", filters.hook_points, self.hook_points)
        self._demand("layer", filters.layers, self.layers)
        self._demand("concept", filters.concepts, self.concepts)
        header = self.table.header
        width = max(header.widths[hook_point] for hook_point in filters.hook_points or self.hook_points)
        if filters.neurons is not None and max(filters.neurons, default=0) >= width:
            raise ApiError(
                400,
                f"Range table {header.id} has no neuron {max(filters.neurons)}. Expected 0 to {width - 1}.",
                code="unknown_neuron",
                param="neuron",
            )
        if filters.top_fraction is not None and not 0 < filters.top_fraction <= header.top_fraction:
            raise ApiError(
                400,
                f"top_fraction is {filters.top_fraction}; expected above 0 and at most {header.top_fraction}, the "
                f"share that range table {header.id} holds.",
                code="invalid_field",
                param="top_fraction",
            )

    def _demand(self, param: str, asked: Iterable[str | int] | None, there: Sequence[str | int]) -> None:
        unknown = [str(value)[:80] for value in asked or () if value not in there]
        if unknown:
            named = ", ".join(map(str, there[:_N_NAMED]))
            more = f" and {len(there) - _N_NAMED} more" if len(there) > _N_NAMED else ""
            raise ApiError(
                400,
                f"Range table {self.table.id} has no {param.replace('_', ' ')} {', '.join(unknown[:_N_NAMED])}. "
                f"It has: {named}{more}.",
                code=f"unknown_{param}",
                param=param,
            )


def _fits(run: Run, filters: Filters) -> bool:
    return (
        (filters.hook_points is None or run.hook_point in filters.hook_points)
        and (filters.layers is None or run.layer in filters.layers)
        and (filters.concepts is None or run.concept in filters.concepts)
    )
