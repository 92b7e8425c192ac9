"""One pass over activations in the CPU's cache: moments and histogram of every neuron, compiled by numba.

x is read from memory once. A block of rows and columns that fits the second-level cache is centred on its own mean,
summed in float32, merged into the running float64 moments by Pebay's formulas (2008, eqs. 2.1 and 3.1), and counted
into bins while it is still there. A chain of torch operations over the same block walks through the cache ten times
(docs/benchmarks.md).
"""

import numpy as np

from neuronlens.compiled import part
from neuronlens.histograms import MANTISSA_BITS, MAX_BIN, MIN_EXPONENT, N_BINS
from neuronlens.teams import Loop, loop, matrix, next_items, vector

BLOCK_ROWS = 256
BLOCK_COLUMNS = 256
COUNT_COLUMNS = 16

_SHIFT = 23 - MANTISSA_BITS
_FIRST_LEVEL = ((127 + MIN_EXPONENT) << MANTISSA_BITS) - 1

# Rows of the float64 state [N_STATE, N] that an accumulator carries from block to block.
MEAN, M2, M3, M4, SUM_ABS, LOW, HIGH = range(7)
N_STATE = 7


@loop
def _accumulate_columns(task):  # type: ignore[no-untyped-def]
    x_RN, rows_K = matrix(task, 0, np.float32), vector(task, 1, np.int64)
    n_N, n_nonfinite_N = vector(task, 2, np.int64), vector(task, 3, np.int64)
    state_SN, counts_NB = matrix(task, 4, np.float64), matrix(task, 5, np.int32)
    first, last = next_items(task)
    while first < last:
        _accumulate(x_RN, rows_K, first, last, n_N, n_nonfinite_N, state_SN, counts_NB)
        first, last = next_items(task)


ACCUMULATE = Loop(
    _accumulate_columns,
    ((np.float32, 2), (np.int64, 1), (np.int64, 1), (np.int64, 1), (np.float64, 2), (np.int32, 2)),
)
"""Its items are columns, its arrays x_RN, rows_K, n_N, n_nonfinite_N, state_SN and counts_NB of `_accumulate`."""


@part
def _accumulate(x_RN, rows_K, j_first, j_last, n_N, n_nonfinite_N, state_SN, counts_NB):  # type: ignore[no-untyped-def]
    """Add the rows `rows_K` of float32 x_RN to the running moments of columns j_first..j_last, and count their bins.

    n_N and n_nonfinite_N are int64; state_SN is float64 [N_STATE, N], starting at 0 with LOW = inf and HIGH = -inf;
    counts_NB is int32 [N, N_BINS], or of no rows where no histogram is wanted. All four are changed in place. Calls on
    disjoint column ranges may run in different threads.
    """
    centre_J = np.empty(BLOCK_COLUMNS, np.float32)
    sums_SJ = np.empty((N_STATE, BLOCK_COLUMNS), np.float32)
    bins_RJ = np.empty((BLOCK_ROWS, BLOCK_COLUMNS), np.int16)
    for j0 in range(j_first, j_last, BLOCK_COLUMNS):
        j1 = min(j0 + BLOCK_COLUMNS, j_last)
        for first in range(0, rows_K.shape[0], BLOCK_ROWS):
            block_K = rows_K[first : first + BLOCK_ROWS]
            _sum_powers(x_RN, block_K, j0, j1, centre_J, sums_SJ)
            if counts_NB.shape[0] > 0:
                _find_bins(x_RN, block_K, j0, j1, bins_RJ)
                _count_bins(bins_RJ, block_K.shape[0], j0, j1, counts_NB.reshape(-1))
            for j in range(j0, j1):
                if np.isfinite(sums_SJ[M4, j - j0]):
                    _merge_block(block_K.shape[0], centre_J[j - j0], sums_SJ[:, j - j0], j, n_N, state_SN)
                else:
                    _merge_column_exactly(x_RN, block_K, j, n_N, n_nonfinite_N, state_SN, counts_NB)


@part
def _sum_powers(x_RN, rows_K, j0, j1, centre_J, sums_SJ):  # type: ignore[no-untyped-def]
    """Four rows at a time, since the sums of a column are loaded and stored once for all four; in the order of the
    rows, so that the result is to the last bit that of row after row."""
    n_columns, n_rows = j1 - j0, rows_K.shape[0]
    n_in_fours = n_rows - n_rows % 4
    centre_J[:n_columns] = 0
    for k in range(0, n_in_fours, 4):
        a_J, b_J = x_RN[rows_K[k], j0:j1], x_RN[rows_K[k + 1], j0:j1]
        c_J, d_J = x_RN[rows_K[k + 2], j0:j1], x_RN[rows_K[k + 3], j0:j1]
        for j in range(n_columns):
            centre_J[j] = centre_J[j] + a_J[j] + b_J[j] + c_J[j] + d_J[j]
    for k in range(n_in_fours, n_rows):
        row_J = x_RN[rows_K[k], j0:j1]
        for j in range(n_columns):
            centre_J[j] += row_J[j]
    for j in range(n_columns):
        centre_J[j] /= np.float32(n_rows)
    sums_SJ[:LOW] = 0
    sums_SJ[LOW] = np.inf
    sums_SJ[HIGH] = -np.inf
    s1_J, s2_J, s3_J, s4_J = sums_SJ[MEAN], sums_SJ[M2], sums_SJ[M3], sums_SJ[M4]
    abs_J, low_J, high_J = sums_SJ[SUM_ABS], sums_SJ[LOW], sums_SJ[HIGH]
    for k in range(0, n_in_fours, 4):
        a_J, b_J = x_RN[rows_K[k], j0:j1], x_RN[rows_K[k + 1], j0:j1]
        c_J, d_J = x_RN[rows_K[k + 2], j0:j1], x_RN[rows_K[k + 3], j0:j1]
        for j in range(n_columns):
            a, b, c, d = a_J[j], b_J[j], c_J[j], d_J[j]
            a1, b1, c1, d1 = a - centre_J[j], b - centre_J[j], c - centre_J[j], d - centre_J[j]
            a2, b2, c2, d2 = a1 * a1, b1 * b1, c1 * c1, d1 * d1
            s1_J[j] = s1_J[j] + a1 + b1 + c1 + d1
            s2_J[j] = s2_J[j] + a2 + b2 + c2 + d2
            s3_J[j] = s3_J[j] + a2 * a1 + b2 * b1 + c2 * c1 + d2 * d1
            s4_J[j] = s4_J[j] + a2 * a2 + b2 * b2 + c2 * c2 + d2 * d2
            abs_J[j] = abs_J[j] + abs(a) + abs(b) + abs(c) + abs(d)
            low_J[j] = _lower(d, _lower(c, _lower(b, _lower(a, low_J[j]))))
            high_J[j] = _higher(d, _higher(c, _higher(b, _higher(a, high_J[j]))))
    for k in range(n_in_fours, n_rows):
        row_J = x_RN[rows_K[k], j0:j1]
        for j in range(n_columns):
            value = row_J[j]
            d1 = value - centre_J[j]
            d2 = d1 * d1
            s1_J[j] += d1
            s2_J[j] += d2
            s3_J[j] += d2 * d1
            s4_J[j] += d2 * d2
            abs_J[j] += abs(value)
            low_J[j] = _lower(value, low_J[j])
            high_J[j] = _higher(value, high_J[j])


@part
def _lower(value, low):  # type: ignore[no-untyped-def]
    return value if value < low else low


@part
def _higher(value, high):  # type: ignore[no-untyped-def]
    return value if value > high else high


@part
def _find_bins(x_RN, rows_K, j0, j1, bins_RJ):  # type: ignore[no-untyped-def]
    for k in range(rows_K.shape[0]):
        bits_J = x_RN[rows_K[k], j0:j1].view(np.int32)
        bins_J = bins_RJ[k]
        for j in range(j1 - j0):
            bits = bits_J[j]
            level = ((bits & np.int32(0x7FFFFFFF)) >> np.int32(_SHIFT)) - np.int32(_FIRST_LEVEL)
            level = min(max(level, np.int32(0)), np.int32(MAX_BIN))
            sign = bits >> np.int32(31)
            bins_J[j] = np.int16(((level ^ sign) - sign) + np.int32(MAX_BIN))


@part
def _count_bins(bins_RJ, n_rows, j0, j1, counts_X):  # type: ignore[no-untyped-def]
    """A few columns at a time, whose counts fit the first-level cache; so many that one's next increment does not wait
    for its last, and a number that the compiler knows."""
    n_in_tiles = (j1 - j0) - (j1 - j0) % COUNT_COLUMNS
    for c0 in range(0, n_in_tiles, COUNT_COLUMNS):
        base = np.uint64((j0 + c0) * N_BINS)
        for k in range(n_rows):
            bins_J = bins_RJ[k, c0 : c0 + COUNT_COLUMNS]
            for j in range(COUNT_COLUMNS):
                counts_X[base + np.uint64(j * N_BINS) + np.uint64(bins_J[j])] += 1
    for k in range(n_rows):
        for c in range(n_in_tiles, j1 - j0):
            counts_X[np.uint64((j0 + c) * N_BINS) + np.uint64(bins_RJ[k, c])] += 1


@part
def _merge_block(n_block, centre, sums_S, j, n_N, state_SN):  # type: ignore[no-untyped-def]
    """Shift one column's float32 sums from the rounded centre to the block's true mean, then merge them."""
    s1, s2, s3, s4 = np.float64(sums_S[MEAN]), np.float64(sums_S[M2]), np.float64(sums_S[M3]), np.float64(sums_S[M4])
    low, high = np.float64(sums_S[LOW]), np.float64(sums_S[HIGH])
    if low == high:
        _merge(n_block, low, 0.0, 0.0, 0.0, abs(low) * n_block, low, high, j, n_N, state_SN)
        return
    shift = s1 / n_block
    m2 = s2 - n_block * shift**2
    m3 = s3 - 3 * shift * s2 + 2 * n_block * shift**3
    m4 = s4 - 4 * shift * s3 + 6 * shift**2 * s2 - 3 * n_block * shift**4
    mean = np.float64(centre) + shift
    _merge(n_block, mean, max(m2, 0.0), m3, max(m4, 0.0), np.float64(sums_S[SUM_ABS]), low, high, j, n_N, state_SN)


@part
def _merge_column_exactly(x_RN, rows_K, j, n_N, n_nonfinite_N, state_SN, counts_NB):  # type: ignore[no-untyped-def]
    """The slow road for a column whose float32 sums overflowed or met a NaN: float64, finite values only."""
    n, total, total_abs, low, high = 0, 0.0, 0.0, np.inf, -np.inf
    for k in range(rows_K.shape[0]):
        value = np.float64(x_RN[rows_K[k], j])
        if np.isfinite(value):
            n += 1
            total += value
            total_abs += abs(value)
            low = min(low, value)
            high = max(high, value)
        elif counts_NB.shape[0] > 0:
            outermost = 0 if np.signbit(x_RN[rows_K[k], j]) else N_BINS - 1
            counts_NB[j, outermost] -= 1
    n_nonfinite_N[j] += rows_K.shape[0] - n
    if n == 0:
        return
    mean = low if low == high else total / n
    m2, m3, m4 = 0.0, 0.0, 0.0
    for k in range(rows_K.shape[0]):
        d = np.float64(x_RN[rows_K[k], j]) - mean
        if np.isfinite(d):
            m2 += d**2
            m3 += d**3
            m4 += d**4
    _merge(n, mean, m2, m3, m4, total_abs, low, high, j, n_N, state_SN)


@part
def _merge(n_b, mean_b, m2_b, m3_b, m4_b, sum_abs_b, low_b, high_b, j, n_N, state_SN):  # type: ignore[no-untyped-def]
    n_a = n_N[j]
    n = n_a + n_b
    d = mean_b - state_SN[MEAN, j]
    m2_a, m3_a = state_SN[M2, j], state_SN[M3, j]
    a, b = n_a / n, n_b / n
    state_SN[M4, j] += m4_b + d**4 * n_a * b * (a * a - a * b + b * b)
    state_SN[M4, j] += 6 * d * d * (a * a * m2_b + b * b * m2_a) + 4 * d * (a * m3_b - b * m3_a)
    state_SN[M3, j] += m3_b + d**3 * n_a * b * (a - b) + 3 * d * (a * m2_b - b * m2_a)
    state_SN[M2, j] += m2_b + d * d * n_a * b
    state_SN[MEAN, j] += d * b
    state_SN[SUM_ABS, j] += sum_abs_b
    state_SN[LOW, j] = min(state_SN[LOW, j], low_b)
    state_SN[HIGH, j] = max(state_SN[HIGH, j], high_b)
    n_N[j] = n
