"""The shape of a neuron's values under each concept, from their histogram: quantiles, and how far they are from the
Gaussian of the same mean and std. Compiled by numba; table `distributions` of docs/store-format.md.
"""

import numpy as np
import pyarrow as pa

from neuronlens.bumps import KEYS, Bumps, clipped, dictionary_column, in_threads, normal_cdf, outer_edges
from neuronlens.compiled import jit, part
from neuronlens.histograms import MAX_BIN

QUANTILES = {"p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
COLUMNS = ("ks", "ks_bound", *QUANTILES)
DISTRIBUTIONS_SCHEMA = pa.schema([*KEYS, *((name, pa.float32()) for name in COLUMNS)])


def distributions_of(bumps: Bumps, *, n_threads: int = 1) -> pa.Table:
    """One row per neuron and concept that have moments, in the order of neurons, then concepts; NULL without a
    histogram.

    ks is the largest distance of the values' cumulative distribution F from the Gaussian's at the edges of the used
    bins, where F is known; in between, it can be no larger than ks_bound. So ks <= the exact distance <= ks_bound, up
    to the rounding to FLOAT. The bins are cut off at the neuron's min and max. Both are NULL where std is 0: a point
    has no Gaussian. Quantiles are straight-line within a bin, as `histograms.quantile` has them.
    """
    row_R, code_R = np.nonzero(bumps.is_known_NC)
    values_QR = np.full((len(COLUMNS), len(row_R)), np.nan, np.float32)
    edges_E, q_Q = outer_edges(), np.array(list(QUANTILES.values()))
    moments = (bumps.mean_NC, bumps.std_NC, bumps.min_NC, bumps.max_NC)
    counts = (bumps.start_NC, bumps.stop_NC, bumps.bin_X, bumps.n_X)

    def work(first: int, last: int) -> None:
        _describe(first, last, row_R, code_R, moments, counts, edges_E, q_Q, values_QR)

    in_threads(work, len(row_R), n_threads)
    columns = [
        pa.array(np.full(len(row_R), bumps.layer, np.int16)),
        dictionary_column(np.zeros(len(row_R), np.int8), [bumps.hook_point]),
        pa.array(bumps.neuron_N[row_R]),
        dictionary_column(code_R.astype(np.int32), bumps.concepts),
        *(pa.array(values_R, from_pandas=True) for values_R in values_QR),
    ]
    return pa.Table.from_arrays(columns, schema=DISTRIBUTIONS_SCHEMA)


@jit
def _describe(first, last, row_R, code_R, moments, counts, edges_E, q_Q, values_QR):  # type: ignore[no-untyped-def]
    mean_NC, std_NC, min_NC, max_NC = moments
    start_NC, stop_NC, bin_X, n_X = counts
    for r in range(first, last):
        i, c = row_R[r], code_R[r]
        start, stop = start_NC[i, c], stop_NC[i, c]
        if stop <= start:
            continue
        lowest, highest = min_NC[i, c], max_NC[i, c]
        if std_NC[i, c] > 0:
            values_QR[0, r], values_QR[1, r] = _distances(
                bin_X, n_X, start, stop, mean_NC[i, c], std_NC[i, c], lowest, highest, edges_E
            )
        _quantiles(bin_X, n_X, start, stop, lowest, highest, edges_E, q_Q, r, values_QR)


@part
def _distances(bin_X, n_X, start, stop, mean, std, lowest, highest, edges_E):  # type: ignore[no-untyped-def]
    """The Kolmogorov-Smirnov distance of a histogram to a Gaussian: at least, at most.

    Within a bin F and the Gaussian's cdf both lie between their values at its two edges. Between two used bins F stands
    still, so that the distance is largest at an edge of one of them.
    """
    total = n_X[start:stop].sum()
    below, known, bound, top, cdf_top = 0, 0.0, 0.0, -np.inf, 0.0
    for x in range(start, stop):
        k = bin_X[x] + MAX_BIN
        bottom = clipped(edges_E[k], lowest, highest)
        cdf_bottom = cdf_top if bottom == top else normal_cdf((bottom - mean) / std)
        top = clipped(edges_E[k + 1], lowest, highest)
        cdf_top = normal_cdf((top - mean) / std)
        share_below = below / total
        below += n_X[x]
        share = below / total
        known = max(known, abs(share_below - cdf_bottom), abs(share - cdf_top))
        bound = max(bound, share - cdf_bottom, cdf_top - share_below)
    return known, bound


@part
def _quantiles(bin_X, n_X, start, stop, lowest, highest, edges_E, q_Q, r, values_QR):  # type: ignore[no-untyped-def]
    total = n_X[start:stop].sum()
    x, below = start, 0
    for j in range(q_Q.shape[0]):
        target = q_Q[j] * total
        while x < stop - 1 and below + n_X[x] <= target:
            below += n_X[x]
            x += 1
        k = bin_X[x] + MAX_BIN
        bottom, top = clipped(edges_E[k], lowest, highest), clipped(edges_E[k + 1], lowest, highest)
        values_QR[2 + j, r] = bottom + (top - bottom) * ((target - below) / n_X[x])
