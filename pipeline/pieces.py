"""Ranges by other methods than the paper's: what each layer's histograms say of its salient neurons.

The salient neurons and their moments come from sql/ranges.sql, as for every table; a layer at a time, their ranges are
replaced by the intervals that `neuronlens.intervals` finds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from neuronlens import intervals
from neuronlens.bumps import Bumps, open_counts, read_counts
from neuronlens.errors import UsageError
from neuronlens.intervals import Frontier, Intervals
from neuronlens.query import run_file
from neuronlens.ranges import PIECES_SCHEMA
from neuronlens.store import Store, files_of
from pipeline.statistics import neurons_a_block

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How ranges are chosen, and the one option of each method; `neuronlens.intervals` says what they mean."""

    name: str
    options: Mapping[str, float]

    @property
    def n_passes(self) -> int:
        """How often the histograms are read."""
        return 2 if self.name == "budget" else 1


def with_pieces(
    con: duckdb.DuckDBPyConnection, store: Store, salient: pa.Table, method: Method, n_threads: int, advance: Advance
) -> pa.Table:
    """The rows of PIECES_SCHEMA for the rows of `salient` (of sql/ranges.sql), those of them that get a range.

    `con` sees the store's views. `advance` is called once a layer and pass. Raises UsageError where the store has no
    merged histograms.
    """
    layers = _Layers(con, store, salient, n_threads)
    penalty_of: dict[str, float] = {}
    if method.name == "budget":
        penalty_of = layers.penalties(method.options["budget"], advance)
    parts = [layers.rows(site, method, penalty_of, advance) for site in layers.sites]
    rows = pa.concat_tables(parts)
    if method.name == "budget":
        rows = _within(rows, salient, method.options["budget"])
    return rows.select(PIECES_SCHEMA.names)


@dataclass(frozen=True, slots=True)
class _Layers:
    con: duckdb.DuckDBPyConnection
    store: Store
    salient: pa.Table
    n_threads: int

    @property
    def sites(self) -> list[tuple[str, int]]:
        pairs = self.salient.select(["hook_point", "layer"]).group_by(["hook_point", "layer"]).aggregate([])
        return sorted(zip(pairs["hook_point"].to_pylist(), pairs["layer"].to_pylist(), strict=True))

    def penalties(self, budget: float, advance: Advance) -> dict[str, float]:
        """Concept -> the penalty at which its budget over the salient neurons of all layers is spent."""
        concepts: tuple[str, ...] = ()
        frontier = Frontier.of(0)
        for site in self.sites:
            layer = self._layer(site)
            if not concepts:
                concepts, frontier = layer.bumps.concepts, Frontier.of(len(layer.bumps.concepts))
            for first, block in layer.blocks():
                part = slice(first, first + len(block.neuron_N))
                frontier.add(block, layer.place_NC[part] >= 0, n_threads=self.n_threads)
            advance(1)
        return dict(zip(concepts, frontier.penalty_for(budget).tolist(), strict=True))

    def rows(
        self, site: tuple[str, int], method: Method, penalty_of: Mapping[str, float], advance: Advance
    ) -> pa.Table:
        layer = self._layer(site)
        penalty_C = np.array([penalty_of.get(concept, np.nan) for concept in layer.bumps.concepts])
        parts = []
        for first, block in layer.blocks():
            found = _choose(block, method, penalty_C, self.n_threads)
            parts.append(layer.rows_of(found, first))
        advance(1)
        return pa.concat_tables(parts)

    def _layer(self, site: tuple[str, int]) -> "_Layer":
        hook_point, layer = site
        moments = run_file(self.con, "layer_moments", hook_point=hook_point, layer=layer)
        chosen = pc.and_(pc.equal(self.salient["hook_point"], hook_point), pc.equal(self.salient["layer"], layer))
        return _Layer.of(
            Bumps.of(moments, hook_point=hook_point, layer=layer),
            moments,
            self.salient.filter(chosen),
            self._histograms(hook_point, layer),
            self.n_threads,
        )

    def _histograms(self, hook_point: str, layer: int) -> Any:
        for receipt in self.store.receipts("statistics"):
            if (receipt["hook_point"], receipt["layer"]) == (hook_point, layer):
                for file in files_of(receipt):
                    if file.kind == "merged_histograms":
                        return self.store.fs.open(self.store.path(file.path))
        raise UsageError(
            f"{self.store.root} has no merged histograms of {hook_point}, layer {layer}, and every method but paper "
            "reads them. Collect with collect.histograms true; of an older store, make the statistics again: python -m "
            f"jobs.statistics {self.store.root}"
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's neurons: place_NC is the row of `salient` of each neuron and concept, -1 where it has none."""

    bumps: Bumps
    salient: pa.Table
    place_NC: np.ndarray
    mean_others_NC: np.ndarray
    histograms: Any
    n_threads: int

    @classmethod
    def of(cls, bumps: Bumps, moments: pa.Table, salient: pa.Table, histograms: Any, n_threads: int) -> "_Layer":
        place_NC = np.full(bumps.start_NC.shape, -1, np.int64)
        place_NC[_where(bumps, salient)] = np.arange(salient.num_rows)
        mean_others_NC = np.zeros(bumps.start_NC.shape)
        mean_others_NC[_where(bumps, moments)] = pc.fill_null(moments["mean_others"], 0.0).to_numpy()
        return cls(bumps, salient, place_NC, mean_others_NC, histograms, n_threads)

    def blocks(self) -> Iterator[tuple[int, Bumps]]:
        """Blocks of neurons with their histograms, and the number of the first neuron's row. Once: the file is closed
        at the end."""
        with self.histograms as file:
            counts, first = open_counts(file), 0
            for block in self.bumps.blocks(neurons_a_block(len(self.bumps.concepts))):
                rows = read_counts(counts, block.first, block.last, n_threads=self.n_threads)
                yield first, block.with_counts(rows, n_threads=self.n_threads)
                first += len(block.neuron_N)

    def rows_of(self, found: Intervals, first: int) -> pa.Table:
        """The rows of the salient neurons among those of a block that begins at row `first`; with `target` and
        `others`, the shares of the concept's and of the others' values inside."""
        part = slice(first, first + found.lower_NCK.shape[0])
        keep_NCK = found.is_there_NCK & (self.place_NC[part] >= 0)[:, :, None]
        i, c, k = np.nonzero(keep_NCK)
        piece = (np.cumsum(keep_NCK, axis=2) - 1)[i, c, k]
        rows = self.salient.take(self.place_NC[part][i, c])
        columns = {
            "lower": found.lower_NCK[i, c, k],
            "upper": found.upper_NCK[i, c, k],
            "piece": piece.astype(np.int16),
            "posterior": found.posterior_NCK[i, c, k],
            "mean_others": self.mean_others_NC[part][i, c],
            "target": found.target_NCK[i, c, k],
            "others": found.others_NCK[i, c, k],
        }
        rows = rows.drop_columns(["lower", "upper"])
        for name, values in columns.items():
            rows = rows.append_column(name, pa.array(values))
        return rows


def _choose(block: Bumps, method: Method, penalty_C: np.ndarray, n_threads: int) -> Intervals:
    options = method.options
    if method.name == "hpd":
        return intervals.hpd(block, mass=options["mass"], n_threads=n_threads)
    if method.name == "likelihood_ratio":
        return intervals.likelihood_ratio(block, penalty=options["penalty"], n_threads=n_threads)
    if method.name == "budget":
        return intervals.likelihood_ratio(block, penalty=penalty_C, n_threads=n_threads)
    return intervals.posterior(block, n_threads=n_threads)


def _where(bumps: Bumps, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, its neuron's and its concept's place in the arrays of `bumps`."""
    return np.searchsorted(bumps.neuron_N, rows["neuron"].to_numpy()), _codes(rows["concept"], bumps.concepts)


def _codes(column: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """The place of each row's concept among `names`."""
    encoded = column.combine_chunks().cast(pa.string()).dictionary_encode()
    place_of = {name: place for place, name in enumerate(names)}
    places = np.array([place_of[name] for name in encoded.dictionary.to_pylist()], dtype=np.int64)
    return places[encoded.indices.to_numpy()]


def _within(rows: pa.Table, salient: pa.Table, budget: float) -> pa.Table:
    """The rows without the neurons that give least for what they cost, where two intervals a neuron came to more than
    the budget: the penalty was found without that limit."""
    names = sorted(pc.unique(salient["concept"]).to_pylist())
    n_salient_C = np.bincount(_codes(salient["concept"], names), minlength=len(names))
    # The pieces of a neuron follow each other in the rows, and stand or fall together.
    is_first_R = rows["piece"].to_numpy() == 0
    neuron_R = np.cumsum(is_first_R) - 1
    gained_Q, spent_Q = (np.bincount(neuron_R, rows[name].to_numpy()) for name in ("target", "others"))
    with np.errstate(divide="ignore"):
        order_Q = np.argsort(-gained_Q / spent_Q, kind="stable")
    code_Q, keep_Q = _codes(rows["concept"], names)[is_first_R], np.zeros(len(spent_Q), bool)
    for c in range(len(names)):
        best_first = order_Q[code_Q[order_Q] == c]
        keep_Q[best_first] = np.cumsum(spent_Q[best_first]) <= budget * n_salient_C[c]
    return rows.filter(pa.array(keep_Q[neuron_R]))
