"""How far two concepts share a neuron's values: every pair of concepts of a block of neurons, compiled by numba.

sql/overlap.sql is the definition and the way in the plain DuckDB shell; this gives the same rows at many times its
speed (docs/benchmarks.md). The histograms of one neuron are spread into dense rows, a concept each, so that the
overlapping coefficient of a pair is one sum over the bins that both can have, and the mass inside a range is a
difference of two cumulative counts and at most two bins that the range cuts.
"""

import math

import numba
import numpy as np
import pyarrow as pa

from neuronlens.bumps import KEYS, Bumps, clipped, dictionary_column, in_threads, normal_cdf, outer_edges
from neuronlens.compiled import PART, is_on_disk, jit, part
from neuronlens.histograms import MANTISSA_BITS, MAX_BIN, MIN_EXPONENT, N_BINS

SCORES = ("ovl", "ovl_gaussian", "bhattacharyya", "range_jaccard", "b_in_a", "a_in_b")
PAIRS_SCHEMA = pa.schema(
    [
        *KEYS[:3],
        KEYS[3].with_name("concept_a"),
        KEYS[3].with_name("concept_b"),
        ("tau", pa.float32()),
        *((name, pa.float32()) for name in SCORES),
    ]
)

OVL, OVL_GAUSSIAN, BHATTACHARYYA, RANGE_JACCARD, B_IN_A, A_IN_B = range(len(SCORES))

_SHIFT = 52 - MANTISSA_BITS
_FIRST_LEVEL = ((1023 + MIN_EXPONENT) << MANTISSA_BITS) - 1

# The compiler may add in any order, which lets it add 8 bins at a time.
_part_sum = numba.njit(**PART, fastmath={"reassoc", "nsz"})


def is_compiled() -> bool:
    """Whether `pairs_of` has its compiled code, from this process or another."""
    return is_on_disk(_score_neurons)


def pairs_of(bumps: Bumps, *, tau: float, n_threads: int = 1) -> pa.Table:
    """One row per neuron and unordered pair of concepts, as table `overlap` of docs/store-format.md, in its order.

    The values and the NULLs are those of sql/overlap.sql. The neurons are shared out over `n_threads` threads.
    """
    row_P, a_P, b_P = _pairs(bumps.is_known_NC)
    n_pairs = len(row_P)
    first_pair_N = np.searchsorted(row_P, np.arange(len(bumps.neuron_N) + 1))
    lower_NC, upper_NC = _ranges(bumps, tau)
    moments = (bumps.mean_NC, bumps.std_NC, bumps.min_NC, bumps.max_NC, lower_NC, upper_NC)
    counts = (bumps.start_NC, bumps.stop_NC, bumps.bin_X, bumps.n_X)
    score_SP, edges_E = np.empty((len(SCORES), n_pairs), np.float32), outer_edges()

    def work(first: int, last: int) -> None:
        _score_neurons(first, last, first_pair_N, a_P, b_P, moments, counts, edges_E, score_SP)

    in_threads(work, len(bumps.neuron_N), n_threads)
    columns = [
        np.full(n_pairs, bumps.layer, np.int16),
        dictionary_column(np.zeros(n_pairs, np.int8), [bumps.hook_point]),
        bumps.neuron_N[row_P],
        dictionary_column(a_P, bumps.concepts),
        dictionary_column(b_P, bumps.concepts),
        np.full(n_pairs, tau, np.float32),
        *(pa.array(score_P, from_pandas=True) for score_P in score_SP),
    ]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=PAIRS_SCHEMA)


def kept_of(pairs: pa.Table, *, top: int | None = None, threshold: float | None = None) -> pa.Table:
    """Of every neuron, the rows of `pairs_of` that sql/kept_pairs.sql keeps, in their order; None is no limit."""
    score_P = _shared_P(pairs)
    keep_P = np.ones(len(score_P), bool)
    if threshold is not None:
        keep_P &= score_P >= np.float32(threshold)
    if top is not None:
        first_N = np.append(_first_of_neuron(pairs), len(score_P))
        _drop_all_but_top(first_N, np.where(np.isnan(score_P), -1, score_P), top, keep_P)
    return pairs.filter(pa.array(keep_P))


def concept_overlap_of(pairs: pa.Table) -> pa.Table:
    """How far a neuron's values under one concept are shared with the others, by the rows of `pairs_of`: layer,
    hook_point, neuron, concept, n_pairs, mean_ovl, as the view `concept_overlap` has them."""
    concepts = pairs["concept_a"].combine_chunks().dictionary
    first_N, n_concepts = _first_of_neuron(pairs), len(concepts)
    row_P = np.repeat(np.arange(len(first_N)), np.diff(first_N, append=pairs.num_rows))
    slot_Q = np.concatenate([row_P * n_concepts + _codes(pairs[name]) for name in ("concept_a", "concept_b")])
    score_Q = np.tile(_shared_P(pairs).astype(float), 2)
    is_known_Q, n_slots = ~np.isnan(score_Q), len(first_N) * n_concepts
    n_pairs = np.bincount(slot_Q, minlength=n_slots)
    total = np.bincount(slot_Q[is_known_Q], score_Q[is_known_Q], minlength=n_slots)
    n_known = np.bincount(slot_Q[is_known_Q], minlength=n_slots)
    [slot_R] = np.nonzero(n_pairs)
    with np.errstate(invalid="ignore"):
        mean_ovl_R = total[slot_R] / n_known[slot_R]
    rows = pairs.take(first_N[slot_R // max(1, n_concepts)]).select(["layer", "hook_point", "neuron"])
    rows = rows.append_column("concept", dictionary_column((slot_R % max(1, n_concepts)).astype(np.int32), concepts))
    rows = rows.append_column("n_pairs", pa.array(n_pairs[slot_R]))
    return rows.append_column("mean_ovl", pa.array(mean_ovl_R, from_pandas=True))


def _shared_P(pairs: pa.Table) -> np.ndarray:
    """ovl, or ovl_gaussian where there is none; float32, NaN without either."""
    ovl_P, gaussian_P = (pairs[name].to_numpy() for name in ("ovl", "ovl_gaussian"))
    return np.where(np.isnan(ovl_P), gaussian_P, ovl_P)


def _first_of_neuron(pairs: pa.Table) -> np.ndarray:
    """The row at which each neuron's pairs begin."""
    neuron_P = pairs["neuron"].to_numpy()
    return np.flatnonzero(np.diff(neuron_P, prepend=neuron_P[:1] - 1))


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().indices.to_numpy()


def _pairs(is_known_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every pair: the neuron's row and the two concepts, neuron by neuron."""
    a_Q, b_Q = np.triu_indices(is_known_NC.shape[1], 1)
    row_P, pair_P = np.nonzero(is_known_NC[:, a_Q] & is_known_NC[:, b_Q])
    return row_P, a_Q.astype(np.int32)[pair_P], b_Q.astype(np.int32)[pair_P]


def _ranges(bumps: Bumps, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """mean -+ tau * std; a tau of infinity takes the whole line, also where std is 0."""
    half_NC = np.where(np.isnan(bumps.std_NC), np.nan, np.inf) if math.isinf(tau) else tau * bumps.std_NC
    return bumps.mean_NC - half_NC, bumps.mean_NC + half_NC


# What loops over pairs reads the dense rows of all concepts by two indices and calls no function with an array: that
# would count its owners up and down, which takes longer than a look-up. Unsigned indices need no test for being
# negative, which lets the compiler see through the loops.


@jit
def _score_neurons(first, last, first_pair_N, a_P, b_P, moments, counts, edges_E, score_SP):  # type: ignore[no-untyped-def]
    mean_NC, std_NC, min_NC, max_NC, lower_NC, upper_NC = moments
    start_NC, stop_NC, bin_X, n_X = counts
    n_concepts = mean_NC.shape[1]
    share_CB, below_CB = np.zeros((n_concepts, N_BINS)), np.zeros((n_concepts, N_BINS + 1), np.int64)
    span_C2, total_C = np.zeros((n_concepts, 2), np.int64), np.zeros(n_concepts, np.int64)
    cut_C2 = np.zeros((n_concepts, 2), np.int64)
    for i in range(first, last):
        first_pair, end_pair = first_pair_N[i], first_pair_N[i + 1]
        for c in range(n_concepts):
            _spread(bin_X, n_X, start_NC[i, c], stop_NC[i, c], c, share_CB, below_CB, total_C, span_C2)
            cut_C2[c, 0], cut_C2[c, 1] = bin_index(lower_NC[i, c]), bin_index(upper_NC[i, c])
        for p in range(first_pair, end_pair):
            a, b = a_P[p], b_P[p]
            score_SP[OVL_GAUSSIAN, p] = gaussian_overlap(mean_NC[i, a], std_NC[i, a], mean_NC[i, b], std_NC[i, b])
            score_SP[BHATTACHARYYA, p] = bhattacharyya(mean_NC[i, a], std_NC[i, a], mean_NC[i, b], std_NC[i, b])
            score_SP[RANGE_JACCARD, p] = range_jaccard(lower_NC[i, a], upper_NC[i, a], lower_NC[i, b], upper_NC[i, b])
        _score_shared(first_pair, end_pair, a_P, b_P, share_CB, span_C2, score_SP)
        _score_inside(
            i,
            (first_pair, end_pair),
            (a_P, b_P),
            (lower_NC, upper_NC, min_NC, max_NC, cut_C2),
            (share_CB, below_CB, total_C, span_C2),
            edges_E,
            score_SP,
        )
        for c in range(n_concepts):
            for k in range(np.uint64(span_C2[c, 0]), np.uint64(span_C2[c, 1])):
                share_CB[c, k] = 0


@part
def _spread(bin_X, n_X, start, stop, c, share_CB, below_CB, total_C, span_C2):  # type: ignore[no-untyped-def]
    """One histogram into a dense row of shares, and of the counts below each bin. Both hold within the span only, which
    is empty where there is no histogram; outside it the shares are 0."""
    total = 0
    for x in range(np.uint64(max(start, 0)), np.uint64(max(stop, 0))):
        total += n_X[x]
    span_C2[c, 0], span_C2[c, 1], total_C[c] = 0, 0, total
    if total == 0:
        return
    first, end = bin_X[start] + MAX_BIN, bin_X[stop - 1] + MAX_BIN + 1
    span_C2[c, 0], span_C2[c, 1] = first, end
    for k in range(np.uint64(first), np.uint64(end)):
        below_CB[c, k + np.uint64(1)] = 0
    scale = 1.0 / total
    for x in range(np.uint64(start), np.uint64(stop)):
        used = np.uint64(bin_X[x] + MAX_BIN)
        share_CB[c, used] = n_X[x] * scale
        below_CB[c, used + np.uint64(1)] = n_X[x]
    below = 0
    below_CB[c, first] = 0
    for k in range(np.uint64(first), np.uint64(end)):
        below += below_CB[c, k + np.uint64(1)]
        below_CB[c, k + np.uint64(1)] = below


@_part_sum
def _score_shared(first_pair, end_pair, a_P, b_P, share_CB, span_C2, score_SP):  # type: ignore[no-untyped-def]
    """The overlapping coefficient: the sum of the smaller shares. NaN without one of the histograms."""
    for p in range(first_pair, end_pair):
        a, b = a_P[p], b_P[p]
        first, end = max(span_C2[a, 0], span_C2[b, 0]), min(span_C2[a, 1], span_C2[b, 1])
        total = 0.0
        for k in range(np.uint64(first), np.uint64(max(first, end))):
            total += min(share_CB[a, k], share_CB[b, k])
        has_both = span_C2[a, 1] > 0 and span_C2[b, 1] > 0
        score_SP[OVL, p] = total if has_both else np.nan


@part
def _score_inside(i, pairs, concepts, bounds, dense, edges_E, score_SP):  # type: ignore[no-untyped-def]
    """The share of one concept's values inside the other's range: whole bins by their counts, and of the two bins
    `cut_C2` that hold the range's ends the part that is inside. NaN without a histogram or a range."""
    a_P, b_P = concepts
    lower_NC, upper_NC, lowest_NC, highest_NC, cut_C2 = bounds
    share_CB, below_CB, total_C, span_C2 = dense
    for p in range(pairs[0], pairs[1]):
        for score, owner, other in ((B_IN_A, a_P[p], b_P[p]), (A_IN_B, b_P[p], a_P[p])):
            lower, upper = lower_NC[i, owner], upper_NC[i, owner]
            if span_C2[other, 1] == 0 or np.isnan(lower):
                score_SP[score, p] = np.nan
                continue
            first_cut, last_cut = cut_C2[owner, 0], cut_C2[owner, 1]
            first, end = max(first_cut + 1, span_C2[other, 0]), min(last_cut, span_C2[other, 1])
            inside = (below_CB[other, end] - below_CB[other, first]) / total_C[other] if first < end else 0.0
            for k in range(first_cut, last_cut + 1, max(1, last_cut - first_cut)):
                if share_CB[other, k] > 0:
                    bottom = clipped(edges_E[k], lowest_NC[i, other], highest_NC[i, other])
                    top = clipped(edges_E[k + 1], lowest_NC[i, other], highest_NC[i, other])
                    inside += share_CB[other, k] * part_inside(bottom, top, lower, upper)
            score_SP[score, p] = min(1.0, inside)


@part
def part_inside(bottom, top, lower, upper):  # type: ignore[no-untyped-def]
    """How much of the bin [bottom, top] lies inside [lower, upper]: a share of its length, or 1 or 0 for a point."""
    if top > bottom:
        return max(0.0, min(top, upper) - max(bottom, lower)) / (top - bottom)
    return 1.0 if lower <= bottom <= upper else 0.0


@part
def bin_index(x):  # type: ignore[no-untyped-def]
    """The bin of a float64 as an index into the N_BINS bins, lowest first: `histograms.bin_of` without its rounding to
    float32. Any bin for NaN."""
    bits = int(np.float64(x).view(np.int64))
    level = ((bits & 0x7FFFFFFFFFFFFFFF) >> _SHIFT) - _FIRST_LEVEL
    level = min(max(level, 0), MAX_BIN)
    return MAX_BIN - level if bits < 0 else MAX_BIN + level


@part
def gaussian_overlap(mean_a, std_a, mean_b, std_b):  # type: ignore[no-untyped-def]
    """The integral of the smaller of two Gaussian densities; a std of 0 is a point, which only an equal point overlaps.

    In the unit of the narrower Gaussian and from its mean, the other one is N(gap, ratio), gap >= 0, ratio >= 1. Their
    densities cross at x1 and x2 (x1 at -infinity for equal widths), and the narrower is the larger between them.
    """
    if np.isnan(std_a) or np.isnan(std_b):
        return np.nan
    if std_a == 0 or std_b == 0:
        return 1.0 if std_a == std_b and mean_a == mean_b else 0.0
    narrow, wide = min(std_a, std_b), max(std_a, std_b)
    gap, ratio = abs(mean_a - mean_b) / narrow, wide / narrow
    if gap == 0 and ratio == 1:
        return 1.0
    log_ratio, excess = math.log(ratio), ratio * ratio - 1
    root = ratio * math.sqrt(gap * gap + 2 * excess * log_ratio)
    x1, x2 = -(gap + root) / excess, (gap * gap + 2 * ratio * ratio * log_ratio) / (gap + root)
    z1, z2 = (x1 - gap) / ratio, (x2 - gap) / ratio
    return min(1.0, max(0.0, normal_cdf(x1) + normal_cdf(z2) - normal_cdf(z1) + 1 - normal_cdf(x2)))


@part
def bhattacharyya(mean_a, std_a, mean_b, std_b):  # type: ignore[no-untyped-def]
    """The Bhattacharyya coefficient of two Gaussians; points as in `gaussian_overlap`."""
    if std_a == 0 and std_b == 0:
        return 1.0 if mean_a == mean_b else 0.0
    variance = std_a * std_a + std_b * std_b
    return math.sqrt(2 * std_a * std_b / variance) * math.exp(-((mean_a - mean_b) ** 2) / (4 * variance))


@part
def range_jaccard(lower_a, upper_a, lower_b, upper_b):  # type: ignore[no-untyped-def]
    """Length of the intersection over length of the union of two closed ranges; two equal points count as 1."""
    if np.isnan(lower_a) or np.isnan(lower_b):
        return np.nan
    if lower_a == lower_b and upper_a == upper_b:
        return 1.0
    length = min(upper_a, upper_b) - max(lower_a, lower_b)
    return length / (max(upper_a, upper_b) - min(lower_a, lower_b)) if length > 0 else 0.0


@jit
def _drop_all_but_top(first_N, score_P, top, keep_P):  # type: ignore[no-untyped-def]
    """Of the rows first_N[i] to first_N[i + 1], unmark all but the `top` with the largest score; among equals the first
    ones stay."""
    for i in range(first_N.shape[0] - 1):
        first, end = first_N[i], first_N[i + 1]
        if end - first <= top:
            continue
        least = np.partition(score_P[first:end], end - first - top)[end - first - top]
        n_equal = top
        for p in range(first, end):
            if score_P[p] > least:
                n_equal -= 1
        for p in range(first, end):
            if score_P[p] == least and n_equal > 0:
                n_equal -= 1
            elif score_P[p] <= least:
                keep_P[p] = False
