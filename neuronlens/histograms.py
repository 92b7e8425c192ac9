"""Histograms whose bins are read from the bit pattern of a float32: mergeable by addition, with no range known in
advance.

The bin is sign, exponent and the first 3 bits of the mantissa, so that a bin is at most 1/8 of its lower edge wide
and any quantile is known to that relative error. Bins are numbered so that they sort as the values do;
docs/store-format.md, "bin".
"""

import numpy as np

MANTISSA_BITS = 3
STEPS = 1 << MANTISSA_BITS
MIN_EXPONENT = -14
"""|x| below 2^MIN_EXPONENT falls in bin 0."""
MAX_EXPONENT = 12
"""|x| from 2^MAX_EXPONENT on falls in the outermost bin."""
MAX_BIN = (MAX_EXPONENT - MIN_EXPONENT) * STEPS
N_BINS = 2 * MAX_BIN + 1


def bin_of(x: np.ndarray) -> np.ndarray:
    """The bin of every finite value of x (any shape, taken as float32): int16 in [-MAX_BIN, MAX_BIN]."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.int32)
    magnitude = (bits & 0x7FFFFFFF) >> (23 - MANTISSA_BITS)
    level = np.clip(magnitude - ((127 + MIN_EXPONENT) << MANTISSA_BITS) + 1, 0, MAX_BIN)
    return np.where(bits < 0, -level, level).astype(np.int16)


def bin_edges() -> np.ndarray:
    """The N_BINS + 1 edges of bins -MAX_BIN..MAX_BIN, ascending, float64. The outermost are nominal: clamped values
    lie beyond."""
    level = np.arange(MAX_BIN + 1)
    positive = np.ldexp(1 + (level % STEPS) / STEPS, MIN_EXPONENT + level // STEPS)
    return np.concatenate([-positive[::-1], positive])


def quantile(counts_B: np.ndarray, q: float, lowest: float, highest: float) -> float:
    """The q-quantile of one neuron's values from its dense counts [N_BINS], straight-line within the bin.

    `lowest` and `highest` are the neuron's min and max, which bound the clamped outermost bins.
    """
    total = int(counts_B.sum())
    if total == 0:
        return float("nan")
    edges = np.clip(bin_edges(), lowest, highest)
    edges[0], edges[-1] = min(edges[0], lowest), max(edges[-1], highest)
    return float(np.interp(q * total, np.concatenate([[0], np.cumsum(counts_B)]), edges))
