"""What is known of the neurons of a layer under every concept, as arrays for compiled code: moments and sparse
histograms.

    bumps = Bumps.of(moments, hook_point="mlp_post", layer=3)
    for block in bumps.blocks(1024):
        block = block.with_counts(read_counts(merged_file, block.first, block.last))
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from neuronlens.compiled import jit, part
from neuronlens.errors import RunFailed
from neuronlens.histograms import bin_edges

KEYS = (
    pa.field("layer", pa.int16(), nullable=False),
    pa.field("hook_point", pa.dictionary(pa.int8(), pa.string()), nullable=False),
    pa.field("neuron", pa.int32(), nullable=False),
    pa.field("concept", pa.dictionary(pa.int32(), pa.string()), nullable=False),
)
"""Never NULL, and said so: half the time of reading a column in which NULLs could be."""
COUNTS_SCHEMA = pa.schema(
    [*KEYS, pa.field("bin", pa.int16(), nullable=False), pa.field("n", pa.int64(), nullable=False)]
)
"""Of a merged histogram file, whose rows are sorted by neuron, concept and bin."""
COUNT_COLUMNS = ["neuron", "concept", "bin", "n"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bumps:
    """N neurons, ascending, under C concepts, sorted by name, at one hook point of one layer.

    Shapes: every array with suffix _NC is [N, C]. `is_known_NC` says where there are moments; mean, std, min and max
    are float64, NaN where there is no finite value. The histogram of (i, c) are the rows start_NC[i, c] to
    stop_NC[i, c] of bin_X (int16, ascending) and n_X (int64); no rows where there is none.
    """

    hook_point: str
    layer: int
    concepts: tuple[str, ...]
    neuron_N: np.ndarray
    is_known_NC: np.ndarray
    mean_NC: np.ndarray
    std_NC: np.ndarray
    min_NC: np.ndarray
    max_NC: np.ndarray
    start_NC: np.ndarray
    stop_NC: np.ndarray
    bin_X: np.ndarray
    n_X: np.ndarray

    @classmethod
    def of(cls, moments: pa.Table, *, hook_point: str, layer: int) -> "Bumps":
        """From rows of `moments` (neuron, concept, mean, std, min, max) of that hook point and layer, in any order;
        no histograms yet."""
        names, code_R = _encoded(moments["concept"])
        neuron_N, row_R = np.unique(moments["neuron"].to_numpy(), return_inverse=True)
        shape = (len(neuron_N), len(names))

        def spread(name: str) -> np.ndarray:
            values_NC = np.full(shape, np.nan)
            values_NC[row_R, code_R] = moments[name].to_numpy()
            return values_NC

        is_known_NC = np.zeros(shape, bool)
        is_known_NC[row_R, code_R] = True
        return cls(
            hook_point=hook_point,
            layer=layer,
            concepts=names,
            neuron_N=neuron_N.astype(np.int32),
            is_known_NC=is_known_NC,
            mean_NC=spread("mean"),
            std_NC=spread("std"),
            min_NC=spread("min"),
            max_NC=spread("max"),
            start_NC=np.zeros(shape, np.int64),
            stop_NC=np.zeros(shape, np.int64),
            bin_X=_read_only(np.zeros(0, np.int16)),
            n_X=_read_only(np.zeros(0, np.int64)),
        )

    @property
    def first(self) -> int:
        """The lowest neuron; there is one."""
        return int(self.neuron_N[0])

    @property
    def last(self) -> int:
        return int(self.neuron_N[-1])

    def blocks(self, n_neurons: int) -> Iterator["Bumps"]:
        """The same in blocks of so many neurons, as views of the arrays."""
        for first in range(0, len(self.neuron_N), n_neurons):
            part = slice(first, first + n_neurons)
            yield replace(
                self,
                neuron_N=self.neuron_N[part],
                is_known_NC=self.is_known_NC[part],
                mean_NC=self.mean_NC[part],
                std_NC=self.std_NC[part],
                min_NC=self.min_NC[part],
                max_NC=self.max_NC[part],
                start_NC=self.start_NC[part],
                stop_NC=self.stop_NC[part],
            )

    def with_counts(self, rows: pa.Table, *, n_threads: int = 1) -> "Bumps":
        """With the histograms in `rows` (neuron, concept, bin, n), summed over shards, of each neuron and concept the
        bins together and ascending. Rows of other neurons and concepts are left out.

        Raises RunFailed where the rows are not in such an order.
        """
        names, code_X = _encoded(rows["concept"])
        code_X = _read_only(code_X)
        own = {name: code for code, name in enumerate(self.concepts)}
        code_of_C = np.array([own.get(name, -1) for name in names], np.int32)
        row_of_K = np.full(self.last - self.first + 1, -1, np.int32)
        row_of_K[self.neuron_N - self.first] = np.arange(len(self.neuron_N))
        neuron_X, bin_X, n_X = (_read_only(rows[name].to_numpy()) for name in ("neuron", "bin", "n"))
        start_NC = np.full(self.is_known_NC.shape, -1, np.int64)
        stop_NC = np.full(self.is_known_NC.shape, -1, np.int64)
        find = partial(_find_runs, neuron_X, code_X, bin_X, self.first, row_of_K, code_of_C, start_NC, stop_NC)
        if not all(in_threads(find, len(neuron_X), n_threads)):
            raise RunFailed(
                f"The histograms of {self.hook_point}, layer {self.layer}, are not in order. Expected one row a bin, "
                "the bins of a neuron and concept together and ascending, as merged_histograms.sql leaves them."
            )
        return replace(self, start_NC=start_NC, stop_NC=stop_NC, bin_X=bin_X, n_X=n_X)


def read_counts(file: pq.ParquetFile, first: int, last: int, *, n_threads: int = 1) -> pa.Table:
    """The row groups of a merged histogram file that may hold neurons first..last: neuron, concept, bin and n.

    Open the file with `open_counts`.
    """
    return file.read_row_groups(_row_groups(file.metadata, first, last), COUNT_COLUMNS, use_threads=n_threads > 1)


def open_counts(source: Any) -> pq.ParquetFile:
    return pq.ParquetFile(source, read_dictionary=["concept"])


def outer_edges() -> np.ndarray:
    """The N_BINS + 1 edges of the bins, ascending; the outermost are infinite, since those bins take what lies
    beyond."""
    edges_E = bin_edges()
    edges_E[0], edges_E[-1] = -np.inf, np.inf
    return edges_E


def in_threads(work: Callable[[int, int], Any], n: int, n_threads: int) -> list[Any]:
    """`work(first, last)` on about equal parts of range(n), side by side; what each returned."""
    cuts = np.linspace(0, n, max(1, n_threads) + 1).astype(int).tolist()
    spans = [(first, last) for first, last in itertools.pairwise(cuts) if last > first]
    if len(spans) < 2:
        return [work(first, last) for first, last in spans]
    with ThreadPoolExecutor(len(spans)) as pool:
        return list(pool.map(lambda span: work(*span), spans))


def dictionary_column(codes: np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names, pa.string()))


def _encoded(column: pa.ChunkedArray) -> tuple[tuple[str, ...], np.ndarray]:
    """The names in a column, sorted, and the number of each row's name."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        return (), np.zeros(0, np.int32)
    found = whole.dictionary.to_pylist()
    names = sorted(set(found))
    if names == found:
        return tuple(names), whole.indices.to_numpy()
    code_of = {name: code for code, name in enumerate(names)}
    return tuple(names), np.array([code_of[name] for name in found], np.int32)[whole.indices.to_numpy()]


def _read_only(values: np.ndarray) -> np.ndarray:
    """As arrow gives most columns away, but not those of several chunks: compiled code is compiled for one of both."""
    values.flags.writeable = False
    return values


def _row_groups(metadata: Any, first: int, last: int) -> list[int]:
    [column] = [c for c in range(metadata.num_columns) if metadata.schema.column(c).path == "neuron"]
    found = []
    for group in range(metadata.num_row_groups):
        span = metadata.row_group(group).column(column).statistics
        if span is None or not span.has_min_max or (span.min <= last and span.max >= first):
            found.append(group)
    return found


@jit
def _find_runs(  # type: ignore[no-untyped-def]
    neuron_X, code_X, bin_X, first_neuron, row_of_K, code_of_C, start_NC, stop_NC, first, last
):
    """Where the rows of each neuron and concept begin and end, of those that begin in first..last. False where they are
    out of order."""
    n_rows, x = neuron_X.shape[0], first
    while 0 < x < last and neuron_X[x - 1] == neuron_X[x] and code_X[x - 1] == code_X[x]:
        x += 1
    while x < last:
        neuron, code, end = neuron_X[x], code_X[x], np.uint64(x + 1)
        is_ascending = True
        while end < n_rows and neuron_X[end] == neuron and code_X[end] == code:
            is_ascending &= bin_X[end - np.uint64(1)] < bin_X[end]
            end += np.uint64(1)
        k, c = neuron - first_neuron, code_of_C[code]
        if 0 <= k < row_of_K.shape[0] and row_of_K[k] >= 0 and c >= 0:
            if not is_ascending or start_NC[row_of_K[k], c] >= 0:
                return False
            start_NC[row_of_K[k], c], stop_NC[row_of_K[k], c] = x, end
        x = np.int64(end)
    return True


@part
def clipped(edge, lowest, highest):  # type: ignore[no-untyped-def]
    """An edge of a bin, no further out than the values reach; NaN bounds do not bound."""
    if edge < lowest:
        return lowest
    if edge > highest:
        return highest
    return edge


@part
def normal_cdf(x):  # type: ignore[no-untyped-def]
    return 0.5 * math.erfc(-x * math.sqrt(0.5))
