"""Which values of a neuron are a concept's, judged by its histograms: at most two intervals of whole bins.

    found = likelihood_ratio(bumps, penalty=3.0)      # bumps with counts, of one hook point and layer
    found.lower_NCK, found.upper_NCK, found.posterior_NCK

For a region I of a neuron's values, T(I) is the share of the concept's values inside, O(I) that of all other concepts'
values together. docs/method.md has the definitions and the reasons; in short:

    hpd               the shortest interval with T(I) >= mass (Box and Tiao 1973)
    likelihood_ratio  max T(I) - penalty * O(I): the most of the concept for the least of the others. Without the limit
                      of two intervals it is { x : p(x | concept) > penalty * p(x | others) } (Neyman and Pearson 1933)
    budget            likelihood_ratio with one penalty for all neurons, found by `penalty_for_budget`
    posterior         N_CELLS cells of equal mass under half concept, half others; kept are those where the concept is
                      the more probable
"""

from dataclasses import dataclass

import numpy as np

from neuronlens.bumps import Bumps, in_threads
from neuronlens.compiled import jit, part
from neuronlens.histograms import MAX_BIN, N_BINS, bin_edges

N_PIECES = 2
N_CELLS = 8
"""Pieces of a neuron's range by method posterior, at most."""

_SHORTEST, _MOST_WORTH, _CELLS = range(3)

_LEVELS = 4096
_LEVELS_AN_OCTAVE = 128
"""Likelihood ratios from 2^-16 to 2^16, in steps of half a percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """The K intervals of N neurons under C concepts, ascending.

    Shapes [N, C, K], float64: lower and upper are float32 numbers and inclusive; an interval that is not there has NaN
    in both. target and others are T and O of the interval; posterior is T / (T + O), the probability of the concept
    were it as frequent as all others together.
    """

    lower_NCK: np.ndarray
    upper_NCK: np.ndarray
    target_NCK: np.ndarray
    others_NCK: np.ndarray

    @property
    def is_there_NCK(self) -> np.ndarray:
        return ~np.isnan(self.lower_NCK)

    @property
    def posterior_NCK(self) -> np.ndarray:
        """NaN where there is no interval."""
        with np.errstate(invalid="ignore"):
            return self.target_NCK / (self.target_NCK + self.others_NCK)


def hpd(bumps: Bumps, *, mass: float, n_threads: int = 1) -> Intervals:
    """The shortest interval of each neuron that holds `mass` of the concept's values (0 to 1]; the first of equals."""
    return _found(bumps, 1, _SHORTEST, mass, n_threads)


def likelihood_ratio(bumps: Bumps, *, penalty: float | np.ndarray, n_threads: int = 1) -> Intervals:
    """At most two intervals that together maximise T - penalty * O; none where no bin is worth its penalty, one
    number, or a number for each concept [C]."""
    return _found(bumps, N_PIECES, _MOST_WORTH, penalty, n_threads)


def posterior(bumps: Bumps, *, n_threads: int = 1) -> Intervals:
    """The cells in which the concept is more probable than the others."""
    return _found(bumps, N_CELLS, _CELLS, 0.5, n_threads)


@dataclass(slots=True)
class Frontier:
    """What a budget buys: the mass of the others by likelihood ratio, [levels, C], and the number of neurons [C], over
    all that were added."""

    others_LC: np.ndarray
    n_neurons_C: np.ndarray

    @classmethod
    def of(cls, n_concepts: int) -> "Frontier":
        return cls(np.zeros((_LEVELS, n_concepts)), np.zeros(n_concepts, np.int64))

    def add(self, bumps: Bumps, is_candidate_NC: np.ndarray, *, n_threads: int = 1) -> None:
        """Take up the neurons of a block that are candidates for each concept."""

        def work(first: int, last: int) -> np.ndarray:
            others_LC = np.zeros_like(self.others_LC)
            _spread_by_ratio(first, last, *_counts(bumps), is_candidate_NC, others_LC)
            return others_LC

        self.others_LC += np.sum(in_threads(work, len(bumps.neuron_N), n_threads), axis=0)
        self.n_neurons_C += is_candidate_NC.sum(axis=0)

    def penalty_for(self, budget: float) -> np.ndarray:
        """float64 [C]: the lowest penalty at which the values of the others that are hit are at most `budget` of all
        their values, the mean over neurons.

        The knapsack by ratio: with bins for items, T for their value and O for their weight, filling it in the order of
        T / O is best (Dantzig 1957), and the ratio at which it is full is the penalty.
        """
        spent_LC = np.cumsum(self.others_LC[::-1], axis=0)[::-1] / np.maximum(1, self.n_neurons_C)
        lowest_C = (spent_LC > budget).sum(axis=0)  # spent_LC falls from level to level
        return _ratio_at(lowest_C)


def bin_bounds() -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest float32 of each bin, float64 [N_BINS]; the outermost reach to infinity."""
    edges_E = bin_edges().astype(np.float32)
    lower_B, upper_B = edges_E[:-1].copy(), edges_E[1:].copy()
    # A positive bin begins at its lower edge, a negative one, its mirror image, ends at its upper edge.
    lower_B[: MAX_BIN + 1] = np.nextafter(lower_B[: MAX_BIN + 1], np.float32(np.inf))
    upper_B[MAX_BIN:] = np.nextafter(upper_B[MAX_BIN:], np.float32(-np.inf))
    lower_B[0], upper_B[-1] = -np.inf, np.inf
    return lower_B.astype(np.float64), upper_B.astype(np.float64)


def _found(bumps: Bumps, n_pieces: int, rule: int, parameter: float | np.ndarray, n_threads: int) -> Intervals:
    shape = (*bumps.start_NC.shape, n_pieces)
    first_NCK, last_NCK = np.full(shape, -1, np.int16), np.full(shape, -1, np.int16)
    target_NCK, others_NCK = np.zeros(shape), np.zeros(shape)
    parameter_C = np.broadcast_to(np.asarray(parameter, np.float64), shape[1:2])
    edges_E = bin_edges()

    def work(first: int, last: int) -> None:
        _choose(first, last, *_counts(bumps), rule, parameter_C, edges_E, first_NCK, last_NCK, target_NCK, others_NCK)

    in_threads(work, shape[0], n_threads)
    lower_B, upper_B = bin_bounds()
    is_there_NCK = first_NCK >= 0
    return Intervals(
        lower_NCK=np.where(is_there_NCK, lower_B[first_NCK], np.nan),
        upper_NCK=np.where(is_there_NCK, upper_B[last_NCK], np.nan),
        target_NCK=target_NCK,
        others_NCK=others_NCK,
    )


def _counts(bumps: Bumps) -> tuple[np.ndarray, ...]:
    return bumps.start_NC, bumps.stop_NC, bumps.bin_X, bumps.n_X


def _ratio_at(level: np.ndarray) -> np.ndarray:
    """The lower end of a level of likelihood ratios; level 0 holds all that are lower."""
    return np.where(level <= 0, 0.0, 2.0 ** ((level - _LEVELS // 2) / _LEVELS_AN_OCTAVE))


@part
def _level_of(ratio):  # type: ignore[no-untyped-def]
    if ratio <= 0:
        return 0
    level = int(np.floor(np.log2(ratio) * _LEVELS_AN_OCTAVE)) + _LEVELS // 2
    return min(max(level, 0), _LEVELS - 1)


@part
def _share_out(i, c, start_NC, stop_NC, bin_X, n_X, target_B, others_B):  # type: ignore[no-untyped-def]
    """Fill the shares of the concept's and of the others' values in each bin. False where the concept has none."""
    target_B[:] = 0
    others_B[:] = 0
    n_target, n_others = 0, 0
    for k in range(start_NC.shape[1]):
        for x in range(start_NC[i, k], stop_NC[i, k]):
            if k == c:
                target_B[bin_X[x] + MAX_BIN] = n_X[x]
                n_target += n_X[x]
            else:
                others_B[bin_X[x] + MAX_BIN] += n_X[x]
                n_others += n_X[x]
    if n_target == 0:
        return False
    target_B /= n_target
    if n_others > 0:
        others_B /= n_others
    return True


@jit
def _spread_by_ratio(first, last, start_NC, stop_NC, bin_X, n_X, is_candidate_NC, others_LC):  # type: ignore[no-untyped-def]
    target_B, others_B = np.empty(N_BINS), np.empty(N_BINS)
    for i in range(first, last):
        for c in range(start_NC.shape[1]):
            if is_candidate_NC[i, c] and _share_out(i, c, start_NC, stop_NC, bin_X, n_X, target_B, others_B):
                for b in range(N_BINS):
                    if target_B[b] > 0 and others_B[b] > 0:
                        others_LC[_level_of(target_B[b] / others_B[b]), c] += others_B[b]


@jit
def _choose(  # type: ignore[no-untyped-def]
    first, last, start_NC, stop_NC, bin_X, n_X, rule, parameter_C, edges_E, first_NCK, last_NCK, target_NCK, others_NCK
):
    target_B, others_B = np.empty(N_BINS), np.empty(N_BINS)
    for i in range(first, last):
        for c in range(start_NC.shape[1]):
            if not _share_out(i, c, start_NC, stop_NC, bin_X, n_X, target_B, others_B):
                continue
            first_K, last_K = first_NCK[i, c], last_NCK[i, c]
            if rule == _SHORTEST:
                _shortest(target_B, parameter_C[c], edges_E, first_K, last_K)
            elif rule == _MOST_WORTH:
                _most_worth(target_B, others_B, parameter_C[c], first_K, last_K)
            else:
                _cells(target_B, others_B, parameter_C[c], first_K, last_K)
            for k in range(first_K.shape[0]):
                if first_K[k] >= 0:
                    inside = slice(first_K[k], last_K[k] + 1)
                    target_NCK[i, c, k], others_NCK[i, c, k] = target_B[inside].sum(), others_B[inside].sum()


@part
def _shortest(target_B, mass, edges_E, first_K, last_K):  # type: ignore[no-untyped-def]
    """Two ends that move up together: for every first bin, the nearest last one that makes the mass full."""
    held, best_width, last = 0.0, np.inf, -1
    for first in range(N_BINS):
        if target_B[first] == 0:
            continue
        while held < mass - 1e-12 and last < N_BINS - 1:
            last += 1
            held += target_B[last]
        if held < mass - 1e-12:
            return
        width = edges_E[last + 1] - edges_E[first]
        if width < best_width:
            best_width = width
            first_K[0], last_K[0] = first, last
        held -= target_B[first]


@part
def _most_worth(target_B, others_B, penalty, first_K, last_K):  # type: ignore[no-untyped-def]
    """The best sum of gains over at most two runs of bins, in one pass over the bins (Kadane's rule, twice over).

    one and two are the best runs that end at this bin or before; open_one and open_two those that end here.
    """
    one, two, open_one, open_two = 0.0, 0.0, -np.inf, -np.inf
    one_first, one_last, open_first = -1, -1, -1
    two_runs = np.full(4, -1, np.int16)
    open_runs = np.full(3, -1, np.int16)
    for b in range(N_BINS):
        gain = target_B[b] - penalty * others_B[b]
        if open_two < one and one_first >= 0:
            open_two = one
            open_runs[0], open_runs[1], open_runs[2] = one_first, one_last, b
        open_two += gain
        if open_two > two:
            two = open_two
            two_runs[0], two_runs[1], two_runs[2], two_runs[3] = open_runs[0], open_runs[1], open_runs[2], b
        if open_one <= 0:
            open_one, open_first = 0.0, b
        open_one += gain
        if open_one > one:
            one, one_first, one_last = open_one, open_first, b
    if one_first < 0:
        return
    if two > one:
        first_K[0], last_K[0], first_K[1], last_K[1] = two_runs[0], two_runs[1], two_runs[2], two_runs[3]
    else:
        first_K[0], last_K[0] = one_first, one_last


@part
def _cells(target_B, others_B, least, first_K, last_K):  # type: ignore[no-untyped-def]
    """Whole bins, so that the cells' masses are about equal; a bin with more than its share is a cell of its own."""
    half = 0.5 if others_B.sum() > 0 else 1.0
    first, k, passed, target, others = -1, 0, 0.0, 0.0, 0.0
    for b in range(N_BINS):
        if target_B[b] + others_B[b] == 0:
            continue
        if first < 0:
            first, target, others = b, 0.0, 0.0
        target += target_B[b]
        others += others_B[b]
        passed += half * (target_B[b] + others_B[b])
        if passed * N_CELLS >= k + 1 - 1e-9:
            last_K[k], first_K[k] = b, first
            if target <= least * (target + others):
                last_K[k], first_K[k] = -1, -1
            k = min(int(passed * N_CELLS + 1e-9), N_CELLS - 1)
            first = -1
