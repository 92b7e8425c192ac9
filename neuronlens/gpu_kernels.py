"""Moments and histograms of a batch on a GPU, in two or three launches.

A program takes a tile of rows and neurons, reads it for its centre and bounds, and once more, from a cache, for its
sums of powers. Tiles are merged in float64, neuron by neuron. Torch operations walk over x some forty times instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuronlens import kernels
from neuronlens.histograms import MANTISSA_BITS, MAX_BIN, MIN_EXPONENT, N_BINS

TILE_ROWS = 256
MAX_ROWS = 8192
"""Rows of one launch: bounds what tiles and bins take between launches."""
ROWS_TO_SORT_OUT = 1024
"""From so many rows on, bins are written down and counted neuron by neuron; fewer are added one by one to the counts
in memory, where the adding waits its turn."""

N_STATE = kernels.N_STATE + 2
"""Rows of the float64 state [N_STATE, N]: those of `kernels`, then n and n_nonfinite, exact up to 2^53."""

_NEURONS = 64
_ROWS = 16
_BINNED_ROWS = 1024
_N_SUMS = tl.constexpr(10)
_NO_BINS, _ADD_BINS, _WRITE_BINS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LARGEST = tl.constexpr(float(torch.finfo(torch.float32).max))
_MAX_BIN, _N_BINS = tl.constexpr(MAX_BIN), tl.constexpr(N_BINS)
_SHIFT = tl.constexpr(23 - MANTISSA_BITS)
_FIRST_LEVEL = tl.constexpr(((127 + MIN_EXPONENT) << MANTISSA_BITS) - 1)
_ALL_BINS = tl.constexpr(triton.next_power_of_2(N_BINS + 1))
_NOT_COUNTED = tl.constexpr(_ALL_BINS.value - 1)


def new_state(n_neurons: int, device: torch.device) -> Tensor:
    state_SN = torch.zeros(N_STATE, n_neurons, dtype=torch.float64, device=device)
    state_SN[kernels.LOW] = torch.inf
    state_SN[kernels.HIGH] = -torch.inf
    return state_SN


def accumulate(x_RN: Tensor, rows_K: Tensor, state_SN: Tensor, counts_NB: Tensor | None) -> None:
    """Add the rows `rows_K` of x_RN to the running moments, and to the counts [N, N_BINS] int32 where there are any.
    The device is not waited for."""
    if x_RN.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        x_RN = x_RN.float()
    if x_RN.stride(1) != 1:
        x_RN = x_RN.contiguous()
    with torch.cuda.device_of(x_RN):
        for part_K in rows_K.contiguous().split(MAX_ROWS):
            if len(part_K):
                _accumulate_part(x_RN, part_K, state_SN, counts_NB)


def _accumulate_part(x_RN: Tensor, rows_K: Tensor, state_SN: Tensor, counts_NB: Tensor | None) -> None:
    n_rows, n_neurons = len(rows_K), x_RN.shape[1]
    n_tiles, n_blocks = triton.cdiv(n_rows, TILE_ROWS), triton.cdiv(n_neurons, _NEURONS)
    sums_TSN = torch.empty(n_tiles, _N_SUMS.value, n_neurons, dtype=torch.float32, device=x_RN.device)
    n_columns = triton.cdiv(n_rows, _ROWS) * _ROWS
    if counts_NB is None:
        bins_NX, how = sums_TSN, _NO_BINS
    elif n_rows < ROWS_TO_SORT_OUT:
        bins_NX, how = counts_NB, _ADD_BINS
    else:
        bins_NX, how = torch.empty(n_neurons, n_columns, dtype=torch.int16, device=x_RN.device), _WRITE_BINS
    _sum_tile[(n_blocks, n_tiles)](
        x_RN,
        x_RN.stride(0),
        n_neurons,
        rows_K,
        n_rows,
        sums_TSN,
        bins_NX,
        bins_NX.stride(0),
        TILE=TILE_ROWS,
        ROWS=_ROWS,
        NEURONS=_NEURONS,
        BINS=how.value,
        num_warps=4,
        maxnreg=128,
    )
    _merge_tiles[(n_blocks,)](sums_TSN, n_tiles, n_rows, state_SN, n_neurons, NEURONS=_NEURONS, num_warps=2)
    if how.value == _WRITE_BINS.value:
        _count_bins[(n_neurons,)](bins_NX, n_columns, counts_NB, ROWS=_BINNED_ROWS, num_warps=2)


@triton.jit(do_not_specialize=["n_rows"])
def _sum_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    x_stride,
    n_neurons,
    rows_ptr,
    n_rows,
    sums_ptr,
    bins_ptr,
    bins_stride,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    NEURONS: tl.constexpr,
    BINS: tl.constexpr,
):
    """TILE rows of NEURONS neurons: their number, centre and bounds, and sums of powers of the distance to it."""
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    tile = tl.program_id(1)
    last = tl.minimum((tile + 1) * TILE, n_rows)
    n = tl.zeros([ROWS, NEURONS], dtype=tl.int32)
    total = tl.zeros([ROWS, NEURONS], dtype=tl.float32)
    low = tl.full([ROWS, NEURONS], float("inf"), dtype=tl.float32)
    high = tl.full([ROWS, NEURONS], -float("inf"), dtype=tl.float32)
    for first in tl.range(tile * TILE, last, ROWS, loop_unroll_factor=4):
        k = first + tl.arange(0, ROWS)
        x, finite = _load_values(x_ptr, x_stride, rows_ptr, k, last, neuron, n_neurons)
        n += finite.to(tl.int32)
        total += tl.where(finite, x, 0.0)
        low = tl.minimum(low, tl.where(finite, x, float("inf")))
        high = tl.maximum(high, tl.where(finite, x, -float("inf")))
    n_N, total_N, low_N, high_N = tl.sum(n, axis=0), tl.sum(total, axis=0), tl.min(low, axis=0), tl.max(high, axis=0)
    # The middle of the bounds is a safe centre where the sum overflowed. A constant is its own centre, to the last bit.
    centre_N = total_N / tl.maximum(n_N, 1).to(tl.float32)
    centre_N = tl.where(tl.abs(centre_N) <= _LARGEST, centre_N, low_N / 2 + high_N / 2)
    centre_N = tl.where(low_N < high_N, centre_N, low_N)
    centre_N = tl.where(n_N > 0, centre_N, 0.0)
    # Values are scaled by the power of two, which is exact, that takes the largest to 2..4: fourth powers of distances
    # stay within float32, and even those of a difference in the last bit do not vanish.
    largest_N = tl.where(n_N > 0, tl.maximum(tl.abs(low_N), tl.abs(high_N)), 0.0)
    exponent_N = tl.maximum(largest_N.to(tl.int32, bitcast=True) >> 23, 1)
    scale_N = ((255 - exponent_N) << 23).to(tl.float32, bitcast=True)
    scaled_centre_N = centre_N * scale_N

    s1 = tl.zeros([ROWS, NEURONS], dtype=tl.float32)
    s2 = tl.zeros([ROWS, NEURONS], dtype=tl.float32)
    s3 = tl.zeros([ROWS, NEURONS], dtype=tl.float32)
    s4 = tl.zeros([ROWS, NEURONS], dtype=tl.float32)
    sum_abs = tl.zeros([ROWS, NEURONS], dtype=tl.float32)
    for first in tl.range(tile * TILE, last, ROWS, loop_unroll_factor=2):
        k = first + tl.arange(0, ROWS)
        x, finite = _load_values(x_ptr, x_stride, rows_ptr, k, last, neuron, n_neurons)
        scaled = x * scale_N[None, :]
        d = tl.where(finite, scaled - scaled_centre_N[None, :], 0.0)
        d2 = d * d
        s1 += d
        s2 += d2
        s3 += d2 * d
        s4 += d2 * d2
        sum_abs += tl.where(finite, tl.abs(scaled), 0.0)
        if BINS == _ADD_BINS:
            place = bins_ptr + neuron.to(tl.int64)[None, :] * bins_stride + _bin_of(x)
            tl.atomic_add(place, finite.to(tl.int32), mask=finite, sem="relaxed")
        elif BINS == _WRITE_BINS:
            place = bins_ptr + neuron.to(tl.int64)[None, :] * bins_stride + k[:, None]
            # Rows past the last are written too: whole vectors of bins can then be read.
            tl.store(place, tl.where(finite, _bin_of(x), _NOT_COUNTED).to(tl.int16), mask=(neuron < n_neurons)[None, :])

    sums = sums_ptr + tile * (_N_SUMS * n_neurons) + neuron
    here_N = neuron < n_neurons
    tl.store(sums, n_N.to(tl.float32), mask=here_N)
    tl.store(sums + n_neurons, centre_N, mask=here_N)
    tl.store(sums + 2 * n_neurons, scale_N, mask=here_N)
    tl.store(sums + 3 * n_neurons, tl.sum(s1, axis=0), mask=here_N)
    tl.store(sums + 4 * n_neurons, tl.sum(s2, axis=0), mask=here_N)
    tl.store(sums + 5 * n_neurons, tl.sum(s3, axis=0), mask=here_N)
    tl.store(sums + 6 * n_neurons, tl.sum(s4, axis=0), mask=here_N)
    tl.store(sums + 7 * n_neurons, tl.sum(sum_abs, axis=0), mask=here_N)
    tl.store(sums + 8 * n_neurons, low_N, mask=here_N)
    tl.store(sums + 9 * n_neurons, high_N, mask=here_N)


@triton.jit
def _load_values(x_ptr, x_stride, rows_ptr, k, last, neuron, n_neurons):  # type: ignore[no-untyped-def]
    """Values as float32, and which of them are there and finite."""
    row = tl.load(rows_ptr + k, mask=k < last, other=0)
    here = (k < last)[:, None] & (neuron < n_neurons)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + neuron[None, :], mask=here, other=0.0).to(tl.float32)
    return x, here & (tl.abs(x) <= _LARGEST)


@triton.jit
def _bin_of(x):  # type: ignore[no-untyped-def]
    bits = x.to(tl.int32, bitcast=True)
    level = ((bits & 0x7FFFFFFF) >> _SHIFT) - _FIRST_LEVEL
    level = tl.minimum(tl.maximum(level, 0), _MAX_BIN)
    return tl.where(bits < 0, -level, level) + _MAX_BIN


@triton.jit(do_not_specialize=["n_tiles", "n_rows"])
def _merge_tiles(sums_ptr, n_tiles, n_rows, state_ptr, n_neurons, NEURONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Shift each tile's sums from the rounded centre to its true mean, then merge them into the state."""
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    here = neuron < n_neurons
    state = state_ptr + neuron
    mean = tl.load(state, mask=here, other=0.0)
    m2 = tl.load(state + n_neurons, mask=here, other=0.0)
    m3 = tl.load(state + 2 * n_neurons, mask=here, other=0.0)
    m4 = tl.load(state + 3 * n_neurons, mask=here, other=0.0)
    sum_abs = tl.load(state + 4 * n_neurons, mask=here, other=0.0)
    low = tl.load(state + 5 * n_neurons, mask=here, other=0.0)
    high = tl.load(state + 6 * n_neurons, mask=here, other=0.0)
    n_before = tl.load(state + 7 * n_neurons, mask=here, other=0.0)
    n_nonfinite = tl.load(state + 8 * n_neurons, mask=here, other=0.0)
    n = n_before
    for tile in range(n_tiles):
        sums = sums_ptr + tile * (_N_SUMS * n_neurons) + neuron
        n_b = tl.load(sums, mask=here, other=0.0).to(tl.float64)
        centre = tl.load(sums + n_neurons, mask=here, other=0.0).to(tl.float64)
        # A power of two: its inverse is exact.
        unit = 1.0 / tl.load(sums + 2 * n_neurons, mask=here, other=1.0).to(tl.float64)
        unit2 = unit * unit
        s1 = tl.load(sums + 3 * n_neurons, mask=here, other=0.0).to(tl.float64) * unit
        s2 = tl.load(sums + 4 * n_neurons, mask=here, other=0.0).to(tl.float64) * unit2
        s3 = tl.load(sums + 5 * n_neurons, mask=here, other=0.0).to(tl.float64) * (unit2 * unit)
        s4 = tl.load(sums + 6 * n_neurons, mask=here, other=0.0).to(tl.float64) * (unit2 * unit2)
        sum_abs += tl.load(sums + 7 * n_neurons, mask=here, other=0.0).to(tl.float64) * unit
        low = tl.minimum(low, tl.load(sums + 8 * n_neurons, mask=here, other=0.0).to(tl.float64))
        high = tl.maximum(high, tl.load(sums + 9 * n_neurons, mask=here, other=0.0).to(tl.float64))

        shift = s1 / tl.maximum(n_b, 1.0)
        shift2 = shift * shift
        m2_b = tl.maximum(s2 - n_b * shift2, 0.0)
        m3_b = s3 - 3 * shift * s2 + 2 * n_b * shift2 * shift
        m4_b = tl.maximum(s4 - 4 * shift * s3 + 6 * shift2 * s2 - 3 * n_b * shift2 * shift2, 0.0)

        n_both = n + n_b
        a, b = n / tl.maximum(n_both, 1.0), n_b / tl.maximum(n_both, 1.0)
        d = centre + shift - mean
        d2 = d * d
        m4 += m4_b + d2 * d2 * n * b * (a * a - a * b + b * b)
        m4 += 6 * d2 * (a * a * m2_b + b * b * m2) + 4 * d * (a * m3_b - b * m3)
        m3 += m3_b + d2 * d * n * b * (a - b) + 3 * d * (a * m2_b - b * m2)
        m2 += m2_b + d2 * n * b
        mean += d * b
        n = n_both
    tl.store(state, mean, mask=here)
    tl.store(state + n_neurons, m2, mask=here)
    tl.store(state + 2 * n_neurons, m3, mask=here)
    tl.store(state + 3 * n_neurons, m4, mask=here)
    tl.store(state + 4 * n_neurons, sum_abs, mask=here)
    tl.store(state + 5 * n_neurons, low, mask=here)
    tl.store(state + 6 * n_neurons, high, mask=here)
    tl.store(state + 7 * n_neurons, n, mask=here)
    tl.store(state + 8 * n_neurons, n_nonfinite + n_rows - (n - n_before), mask=here)


@triton.jit
def _count_bins(bins_ptr, n_columns, counts_ptr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One neuron: nothing else adds to its counts, so nothing has to wait."""
    neuron = tl.program_id(0).to(tl.int64)
    counted = tl.zeros([_ALL_BINS], dtype=tl.int32)
    for first in range(0, n_columns, ROWS):
        k = first + tl.arange(0, ROWS)
        found = tl.load(bins_ptr + neuron * n_columns + k, mask=k < n_columns, other=_NOT_COUNTED)
        counted += tl.histogram(found.to(tl.int32), _ALL_BINS)
    number = tl.arange(0, _ALL_BINS)
    place = counts_ptr + neuron * _N_BINS + number
    here = (number < _N_BINS) & (counted > 0)
    tl.store(place, tl.load(place, mask=here, other=0) + counted, mask=here)
