"""Small range tables for tests, built from numbers that a test can see."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from neuronlens.ranges import SCHEMA, RangeTable, TableModel

TAU = 2.5
HEADER = {
    "tau": TAU,
    "top_fraction": 0.5,
    "salience": "mean_abs",
    "store_hash": "5" * 16,
    "model": TableModel(id="tiny", revision=None, config_hash="c" * 16),
    "unit": "last_token",
    "coverage": {"shards": 3, "committed": 3},
    "created_with": {"pyarrow": "26"},
}


def row(concept: str, neuron: int, mean: float, std: float, **fields: Any) -> dict[str, Any]:
    """A row of a range table: by default of mlp_post in layer 0, most salient, with bounds mean -+ 2.5 std."""
    given = {
        "hook_point": "mlp_post",
        "layer": 0,
        "neuron": neuron,
        "concept": concept,
        "n": 10,
        "mean": mean,
        "std": std,
    }
    derived = {
        "mean_abs": abs(mean),
        "salience": abs(mean),
        "rank": 1,
        "lower": mean - TAU * std,
        "upper": mean + TAU * std,
    }
    return {**given, **derived, **fields}


def table_of(rows: Sequence[dict[str, Any]], *, widths: dict[str, int] | None = None, **header: Any) -> RangeTable:
    """The range table of these rows; `header` overrides the header's fields."""
    fields = {**HEADER, "widths": widths or {"mlp_post": 4}, **header}
    return RangeTable.make(pa.Table.from_pylist(list(rows), schema=SCHEMA), **fields)


def large_table(n_rows: int, concept: str = "joy") -> RangeTable:
    """A table of one concept in one layer, with a range of every neuron."""
    number = pa.array(range(n_rows), pa.int32())
    alike = row(concept, 0, 0.1, 0.3)
    columns = {field.name: pa.repeat(pa.scalar(alike[field.name], field.type), n_rows) for field in SCHEMA}
    columns |= {"neuron": number, "rank": pc.add(number, 1)}
    return RangeTable.make(
        pa.table(columns, schema=SCHEMA), **{**HEADER, "top_fraction": 1.0, "widths": {"mlp_post": n_rows}}
    )
