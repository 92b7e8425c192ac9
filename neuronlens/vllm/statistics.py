"""The statistics of one shard on their way from vLLM's workers to whoever writes them: two Arrow streams a rank.

One holds the moments, the other the cells of the histograms that are not 0; each has a record batch a site. Dense
counts of an 8B model would be 760 MB a shard, nearly all of them 0.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from neuronlens.accumulate import Accumulator
from neuronlens.errors import RunFailed
from neuronlens.histograms import N_BINS
from neuronlens.moments import Moments
from neuronlens.vllm.sites import RankSite

_TYPES = {"n_N": pa.int64(), "n_nonfinite_N": pa.int64(), "min_N": pa.float32(), "max_N": pa.float32()}
_MOMENTS = pa.schema([(field.name, _TYPES.get(field.name, pa.float64())) for field in fields(Moments)])
_CELLS = pa.schema([("cell", pa.int64()), ("n", pa.int32())])
"""cell: neuron * N_BINS + bin, counted from the rank's first neuron."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatistics:
    """One hook point of one layer after a shard, all its neurons, in the form of an accumulator that is full."""

    hook_point: str
    layer: int
    width: int
    found: Moments
    cell_X: np.ndarray | None
    n_X: np.ndarray | None

    def moments(self) -> Moments:
        return self.found

    def counts(self) -> np.ndarray | None:
        """Dense counts [width, N_BINS] int32; None where no histogram was asked for."""
        if self.cell_X is None or self.n_X is None:
            return None
        counts_NB = np.zeros((self.width, N_BINS), np.int32)
        counts_NB.reshape(-1)[self.cell_X] = self.n_X
        return counts_NB


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatistics:
    """What a shard left in the workers. `seconds` went into the statistics, in the worker where it was most; on a GPU,
    where kernels run behind the caller's back, that is the time to launch them."""

    sites: tuple[SiteStatistics, ...]
    seconds: float


def pack(sites: Sequence[RankSite], accumulators: Sequence[Accumulator], seconds: float) -> tuple[bytes, bytes]:
    """One rank's moments, and the cells of its histograms. Waits for the device."""
    whose = {
        "sites": json.dumps([[site.hook_point, site.layer, site.full_width, site.first] for site in sites]),
        "seconds": json.dumps(seconds),
    }
    moments = [accumulator.moments() for accumulator in accumulators]
    parts = [[getattr(part, name) for name in _MOMENTS.names] for part in moments]
    cells: list[list[np.ndarray]] = []
    for accumulator in accumulators:
        counts_NB = accumulator.counts()
        if counts_NB is not None:
            cell_X = np.flatnonzero(counts_NB)
            cells.append([cell_X.astype(np.int64), counts_NB.reshape(-1)[cell_X].astype(np.int32)])
    return _stream(_MOMENTS.with_metadata(whose), parts), _stream(_CELLS, cells)


def join(packed: Sequence[tuple[bytes, bytes]]) -> ShardStatistics:
    """All ranks' parts together, sites in forward order. Raises RunFailed where neurons are missing or double."""
    found: dict[tuple[str, int, int], list[tuple[int, Moments, np.ndarray | None, np.ndarray | None]]] = {}
    seconds = 0.0
    for moments, cells in packed:
        metadata, parts = _batches(moments)
        _, counted = _batches(cells)
        seconds = max(seconds, json.loads(metadata[b"seconds"]))
        for number, (hook_point, layer, width, first) in enumerate(json.loads(metadata[b"sites"])):
            part = Moments(**{name: parts[number][name].to_numpy(zero_copy_only=False) for name in _MOMENTS.names})
            cell_X = counted[number]["cell"].to_numpy() + first * N_BINS if counted else None
            n_X = counted[number]["n"].to_numpy() if counted else None
            found.setdefault((hook_point, layer, width), []).append((first, part, cell_X, n_X))
    return ShardStatistics(sites=tuple(_joined(*key, ranks) for key, ranks in found.items()), seconds=seconds)


def _joined(
    hook_point: str,
    layer: int,
    width: int,
    ranks: list[tuple[int, Moments, np.ndarray | None, np.ndarray | None]],
) -> SiteStatistics:
    ranks.sort(key=lambda rank: rank[0])
    edges = np.cumsum([0, *(len(part.n_N) for _, part, _, _ in ranks)]).tolist()
    if [first for first, *_ in ranks] != edges[:-1] or edges[-1] != width:
        raise RunFailed(
            f"{hook_point} of layer {layer} has {width} neurons; vLLM's workers sent those from "
            f"{', '.join(str(first) for first, *_ in ranks)} on, {edges[-1]} in all. Expected each of them once."
        )
    _, parts, cells, counts = zip(*ranks, strict=True)
    return SiteStatistics(
        hook_point=hook_point,
        layer=layer,
        width=width,
        found=Moments(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _MOMENTS.names}),
        cell_X=None if cells[0] is None else np.concatenate(cells),
        n_X=None if counts[0] is None else np.concatenate(counts),
    )


def _stream(schema: pa.Schema, batches: Sequence[list[np.ndarray]]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for columns in batches:
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return sink.getvalue().to_pybytes()


def _batches(data: bytes) -> tuple[dict[bytes, bytes], list[pa.RecordBatch]]:
    reader = pa.ipc.open_stream(data)
    return reader.schema.metadata or {}, list(reader)
