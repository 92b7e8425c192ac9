"""What a store says of its neurons, read a block of neurons at a time.

    blocks = StoreBlocks(Store("STORE"))
    files = blocks.files("mlp_post", 3)                  # None: that layer has no statistics yet
    block = blocks.read(files, number=0)
    block.cards[7], block.pairs[7]                       # the rows of neuron 7

DuckDB takes 10 ms and more to plan the question for one neuron, prepared or not, and answers it for two thousand
neurons in a tenth of a second: so a card is cut out of a block that was read before.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from neuronlens.query import attach, connect, run_file
from neuronlens.store import Store, files_of

ROWS_A_BLOCK = 32_768
"""Neurons times concepts: 17 MB with all pairs of 14 concepts, a tenth of a second."""

_KINDS = ("moments", "distributions", "overlap", "salience")
_MEMORY_LIMIT = "1GB"
_N_THREADS = 2


@dataclass(frozen=True, slots=True)
class ByNeuron:
    """Rows in the order of their neurons; `rows[neuron]` are those of one."""

    rows: pa.Table
    neuron_X: np.ndarray

    @classmethod
    def of(cls, rows: pa.Table) -> "ByNeuron":
        whole = rows.combine_chunks()
        return cls(whole, whole["neuron"].to_numpy())

    def __getitem__(self, neuron: int) -> list[dict[str, Any]]:
        first, end = np.searchsorted(self.neuron_X, [neuron, neuron + 1]).tolist()
        return list(self.rows.slice(first, end - first).to_pylist())

    @property
    def n_bytes(self) -> int:
        return int(self.rows.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Neurons that lie side by side: `cards` has a row per concept (sql/neuron_cards.sql), `pairs` one per pair of
    concepts that the store keeps (sql/neuron_pairs.sql)."""

    cards: ByNeuron
    pairs: ByNeuron

    @property
    def n_bytes(self) -> int:
        return self.cards.n_bytes + self.pairs.n_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFiles:
    """The files of one layer's statistics, as its receipt named them: (kind, full path). Statistics made again have
    other names."""

    hook_point: str
    layer: int
    paths: tuple[tuple[str, str], ...]


class Unreadable(Exception):
    """DuckDB could not read a store's files: they went away, or are damaged. The message is for the log."""


class StoreBlocks:
    """One store, seen by any number of threads; they read one after the other."""

    def __init__(self, store: Store) -> None:
        self.store = store
        description = store.describe()
        self.store_hash: str = description["store_hash"]
        self.config_hash: str | None = description["model"].get("config_hash")
        self.concepts = frozenset(description["concepts"])
        self.layers: tuple[int, ...] = tuple(description["layers"])
        self.widths: dict[str, int] = {name: description["widths"][name] for name in description["hook_points"]}
        self.neurons_a_block = max(1, ROWS_A_BLOCK // max(1, len(self.concepts)))
        self._lock = threading.Lock()
        self._con: duckdb.DuckDBPyConnection | None = None
        self._attached: dict[str, str] = {}

    def files(self, hook_point: str, layer: int) -> SiteFiles | None:
        """What the receipt of a layer names now; None where the layer was not merged yet, or is being merged again."""
        try:
            receipt = self.store.read_json(f"statistics/{hook_point}.{layer:03d}.json")
        except FileNotFoundError:
            return None
        paths = tuple((file.kind, self.store.path(file.path)) for file in files_of(receipt) if file.kind in _KINDS)
        return SiteFiles(hook_point=hook_point, layer=layer, paths=paths)

    def n_blocks(self, hook_point: str) -> int:
        return -(-self.widths[hook_point] // self.neurons_a_block)

    def read(self, files: SiteFiles, number: int) -> Block:
        """Block `number` of a site. Raises Unreadable."""
        first = number * self.neurons_a_block
        neurons = {"first_neuron": first, "last_neuron": first + self.neurons_a_block - 1}
        params: dict[str, Any] = {"hook_point": files.hook_point, "layer": files.layer, **neurons}
        with self._lock, self._reading(dict(files.paths)) as con:
            return Block(
                cards=ByNeuron.of(run_file(con, "neuron_cards", **params)),
                pairs=ByNeuron.of(run_file(con, "neuron_pairs", **params)),
            )

    def close(self) -> None:
        with self._lock:
            self._disconnect()

    @contextlib.contextmanager
    def _reading(self, paths: Mapping[str, str]) -> Iterator[duckdb.DuckDBPyConnection]:
        try:
            if self._con is None or not self._attached.keys() <= paths.keys():
                self._disconnect()
                self._con = connect(fs=self.store.fs, memory_limit=_MEMORY_LIMIT, threads=_N_THREADS)
            for kind, path in paths.items():
                if self._attached.get(kind) != path:
                    attach(self._con, kind, [path], fs=self.store.fs)
                    self._attached[kind] = path
            yield self._con
        except (duckdb.Error, OSError) as error:
            # An internal error of DuckDB's leaves the connection unusable.
            self._disconnect()
            raise Unreadable(f"{self.store.root}: {error}") from error

    def _disconnect(self) -> None:
        self._attached = {}
        if self._con is not None:
            self._con.close()
            self._con = None
