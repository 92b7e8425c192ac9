"""The histograms of a layer, summed over its shards, in one file in the order of neurons, so that what one neuron has
under all concepts is one short read.

DuckDB sums concept by concept: memory holds the counts of one. The sums lie in scratch files, which are then taken
together, a block of neurons at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from neuronlens.bumps import COUNTS_SCHEMA, dictionary_column

ROW_GROUP_ROWS = 131_072
BLOCK_CONCEPTS = 16_384
"""Neurons times concepts that are put in order at once: about a million rows."""
OPTIONS: dict[str, Any] = {"compression": "lz4"}
"""A fifth more bytes than zstd, read in three quarters of the time: overlap and salience read the whole file."""


def write_merged(
    summed: Mapping[str, str], path: str, *, hook_point: str, layer: int, width: int, metadata: Mapping[str, str]
) -> None:
    """Put what `summed` holds, concept -> Parquet file as merged_histograms.sql leaves it, into one file, sorted by
    neuron, concept and bin."""
    concepts = sorted(summed)
    readers = [_InOrder(summed[concept]) for concept in concepts]
    step = max(1, BLOCK_CONCEPTS // len(concepts))
    with pq.ParquetWriter(path, COUNTS_SCHEMA.with_metadata(dict(metadata)), **OPTIONS) as writer:
        for first in range(0, width, step):
            parts = [reader.up_to(first + step - 1) for reader in readers]
            rows = _by_neuron(parts, concepts, first, hook_point=hook_point, layer=layer)
            if rows.num_rows:
                n_groups = max(1, round(rows.num_rows / ROW_GROUP_ROWS))
                writer.write_table(rows.cast(writer.schema), row_group_size=-(-rows.num_rows // n_groups))


def _by_neuron(
    parts: Sequence[pa.Table], concepts: Sequence[str], first: int, *, hook_point: str, layer: int
) -> pa.Table:
    """The rows of each concept, of the neurons from `first` on, as rows of COUNTS_SCHEMA."""
    rows = pa.concat_tables(parts)
    # A stable sort of 16-bit numbers is a radix sort, and keeps the order of concepts and bins.
    order = np.argsort((rows["neuron"].to_numpy() - first).astype(np.uint16), kind="stable")
    code_X = np.repeat(np.arange(len(parts), dtype=np.int32), [part.num_rows for part in parts])
    neuron_X, bin_X, n_X = (rows[name].to_numpy()[order] for name in ("neuron", "bin", "n"))
    columns = [
        pa.array(np.full(len(order), layer, np.int16)),
        dictionary_column(np.zeros(len(order), np.int8), [hook_point]),
        pa.array(neuron_X),
        dictionary_column(code_X[order], concepts),
        pa.array(bin_X),
        pa.array(n_X),
    ]
    return pa.Table.from_arrays(columns, schema=COUNTS_SCHEMA)


class _InOrder:
    """Neuron, bin and n of a file that is sorted by neuron, handed out in that order; memory holds one row group."""

    _SCHEMA = pa.schema([COUNTS_SCHEMA.field(name) for name in ("neuron", "bin", "n")])

    def __init__(self, path: str) -> None:
        self._file = pq.ParquetFile(path)
        self._next_group = 0
        self._rest = self._SCHEMA.empty_table()

    def up_to(self, neuron: int) -> pa.Table:
        """The next rows, through those of this neuron."""
        parts = []
        while True:
            end = int(np.searchsorted(self._rest["neuron"].to_numpy(), neuron, side="right"))
            parts.append(self._rest.slice(0, end))
            self._rest = self._rest.slice(end)
            if self._rest.num_rows or self._next_group == self._file.num_row_groups:
                return pa.concat_tables(parts)
            self._rest = self._file.read_row_group(self._next_group, self._SCHEMA.names).cast(self._SCHEMA)
            self._next_group += 1
