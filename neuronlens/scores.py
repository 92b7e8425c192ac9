"""How sure is a share, a drop or a selectivity? Intervals for numbers that come from a few hundred texts.

A drop is what an intervention takes away, text by text: the bare model's number less the edited one's. Selectivity is
the target's mean drop less the complement's. Their intervals are percentiles over paired bootstrap resamples (Efron and
Tibshirani 1993, chapters 8 and 13): each resample draws, within every concept, as many of its texts as it has, with
replacement, and every case is scored on the same draws, so that what is the same for all cases cancels between them.
"""

import math

import numpy as np

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: 95 % lie between the two."""

RESAMPLES = 1_000
WEIGHTS_AT_ONCE = 1 << 23
"""Weights of texts in resamples that are held at a time, as float64."""

_N_LENGTH_BINS = 10


def wilson(k: int, n: int) -> tuple[float, float]:
    """The Wilson 95 % score interval of a proportion, k of n (Wilson 1927); (0, 1) where n is 0: nothing is known."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At k = 0 the lower end is 0, at k = n the upper is 1; rounding would leave them beside it.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def draws(concept_X: np.ndarray, *, n_resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each resample draws each text, uint16 [n_resamples, X]; every concept keeps its number of texts.

    concept_X: what each text is labelled with. Fewer resamples are the first of more.
    """
    counts_SX = np.zeros((n_resamples, len(concept_X)), dtype=np.uint16)
    strata = [np.flatnonzero(concept_X == concept) for concept in dict.fromkeys(concept_X.tolist())]
    for s in range(n_resamples):
        rng = np.random.default_rng([seed, s])
        for place_K in strata:
            drawn_K = rng.integers(len(place_K), size=len(place_K))
            counts_SX[s, place_K] = np.bincount(drawn_K, minlength=len(place_K))
    return counts_SX


def resampled_means(counts_SX: np.ndarray, values_CX: np.ndarray, weight_X: np.ndarray) -> np.ndarray:
    """The weighted mean of each of C cases' values in each resample, float64 [S, C]; NaN where nothing has a weight."""
    counted = np.flatnonzero(weight_X)
    values_KC = np.asarray(values_CX, dtype=np.float64).T[counted]
    mean_SC = np.full((len(counts_SX), len(values_CX)), np.nan)
    at_once = max(1, WEIGHTS_AT_ONCE // max(1, len(counted)))
    for first in range(0, len(counts_SX) if len(counted) else 0, at_once):
        some = slice(first, first + at_once)
        weight_SK = counts_SX[some, counted] * weight_X[counted]
        with np.errstate(invalid="ignore"):  # a resample without any text that has a weight
            mean_SC[some] = (weight_SK @ values_KC) / weight_SK.sum(axis=1, keepdims=True)
    return mean_SC


def interval_95(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5 and 97.5 % quantiles over the resamples, the first axis; NaN where a resample gave none."""
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return low, high


def length_matched(length_X: np.ndarray, is_target_X: np.ndarray) -> np.ndarray:
    """Weights of the complement's texts, float64 [X], that give them the target's distribution of lengths: the target's
    deciles are the bins, and within a bin all texts weigh the same. 0 for the target's own texts, for lengths that it
    has not, and for a bin in which the complement has none (the others then stand for it)."""
    weight_X = np.zeros(len(length_X))
    if not is_target_X.any():
        return weight_X
    edges = np.unique(np.quantile(length_X[is_target_X], np.linspace(0, 1, _N_LENGTH_BINS + 1)))
    bin_X = np.searchsorted(edges, length_X, side="left")  # (edge, next edge]
    bin_X[length_X == edges[0]] = 1
    inside_X = (length_X >= edges[0]) & (length_X <= edges[-1])
    for number in np.unique(bin_X[is_target_X]):
        others_X = inside_X & ~is_target_X & (bin_X == number)
        if others_X.any():
            weight_X[others_X] = (is_target_X & (bin_X == number)).sum() / others_X.sum()
    return weight_X / weight_X.sum() if weight_X.any() else weight_X
