"""Intervals from histograms, against every interval there is: small histograms have few enough to try them all."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronlens import intervals
from neuronlens.bumps import Bumps
from neuronlens.histograms import MAX_BIN, bin_edges, bin_of
from neuronlens.intervals import Frontier, Intervals, bin_bounds

SITE = {"layer": 0, "hook_point": "mlp_post"}
EDGES = bin_edges()
histograms = st.dictionaries(st.integers(-4, 4), st.integers(1, 9), min_size=1, max_size=7)


def bumps_of(*neurons: dict[str, dict[int, int]]) -> Bumps:
    """Of each neuron: concept -> bin -> values."""
    keys = [(i, concept) for i, neuron in enumerate(neurons) for concept in sorted(neuron)]
    moments = [{"neuron": i, "concept": c, "mean": 0.0, "std": 1.0, "min": -9e9, "max": 9e9} for i, c in keys]
    counts = [{"neuron": i, "concept": c, "bin": b, "n": n} for i, c in keys for b, n in sorted(neurons[i][c].items())]
    schema = [("neuron", pa.int32()), ("concept", pa.string()), ("bin", pa.int16()), ("n", pa.int64())]
    rows = pa.Table.from_pylist(counts, pa.schema(schema))
    return Bumps.of(pa.Table.from_pylist(moments), **SITE).with_counts(rows)


def shares(neuron: dict[str, dict[int, int]], concept: str) -> tuple[dict[int, float], dict[int, float]]:
    own = neuron[concept]
    others: dict[int, int] = {}
    for name, histogram in neuron.items():
        for b, n in histogram.items() if name != concept else ():
            others[b] = others.get(b, 0) + n
    n_own, n_others = sum(own.values()), max(1, sum(others.values()))
    return {b: n / n_own for b, n in own.items()}, {b: n / n_others for b, n in others.items()}


def mass(share: dict[int, float], runs: list[tuple[int, int]]) -> float:
    return sum(p for b, p in share.items() if any(first <= b <= last for first, last in runs))


def runs_of(found: Intervals, i: int, c: int) -> list[tuple[int, int]]:
    """The bins that each interval begins and ends in."""
    is_there_K = found.is_there_NCK[i, c]
    ends = (bin_of(bound_NCK[i, c][is_there_K]).tolist() for bound_NCK in (found.lower_NCK, found.upper_NCK))
    return list(zip(*ends, strict=True))


@settings(max_examples=60, deadline=None)
@given(own=histograms, others=histograms, penalty=st.sampled_from([0.3, 1.0, 2.0, 5.0]))
def test_likelihood_ratio__is_the_best_of_all_pairs_of_intervals(own, others, penalty):
    neuron = {"joy": own, "rest": others}
    target, rest = shares(neuron, "joy")
    singles = [(first, last) for first in range(-4, 5) for last in range(first, 5)]
    pairs = [[a, b] for a, b in itertools.product(singles, singles) if a[1] < b[0]]
    candidates = [[], *([a] for a in singles), *pairs]
    best = max(mass(target, runs) - penalty * mass(rest, runs) for runs in candidates)

    found = intervals.likelihood_ratio(bumps_of(neuron), penalty=penalty)
    runs = runs_of(found, 0, 0)
    assert mass(target, runs) - penalty * mass(rest, runs) == pytest.approx(best, abs=1e-12)
    assert np.nansum(found.target_NCK[0, 0]) == pytest.approx(mass(target, runs))
    assert np.nansum(found.others_NCK[0, 0]) == pytest.approx(mass(rest, runs))
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs)), "ascending, and sharing no bin"


@settings(max_examples=60, deadline=None)
@given(own=histograms, share=st.sampled_from([0.2, 0.5, 0.9, 1.0]))
def test_hpd__is_the_shortest_of_all_intervals_that_hold_the_mass(own, share):
    neuron = {"joy": own, "rest": {0: 1}}
    target, _ = shares(neuron, "joy")

    def width(first: int, last: int) -> float:
        return EDGES[last + MAX_BIN + 1] - EDGES[first + MAX_BIN]

    full = [
        (first, last)
        for first in range(-4, 5)
        for last in range(first, 5)
        if mass(target, [(first, last)]) >= share - 1e-9
    ]
    [run] = runs_of(intervals.hpd(bumps_of(neuron), mass=share), 0, 0)
    assert run in full
    assert width(*run) == min(width(*other) for other in full)


@settings(max_examples=40, deadline=None)
@given(own=histograms, others=histograms)
def test_posterior__keeps_the_cells_where_the_concept_is_the_more_probable(own, others):
    neuron = {"joy": own, "rest": others}
    target, rest = shares(neuron, "joy")
    found = intervals.posterior(bumps_of(neuron))
    runs = runs_of(found, 0, 0)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))
    for run, p in zip(runs, found.posterior_NCK[0, 0][found.is_there_NCK[0, 0]], strict=True):
        t, o = mass(target, [run]), mass(rest, [run])
        assert p == pytest.approx(t / (t + o))
        assert p > 0.5


def test_posterior__of_bins_with_more_than_a_cells_mass_is_that_of_each_bin():
    neuron = {"joy": {1: 50, 2: 30, 3: 20}, "rest": {1: 20, 2: 60, 3: 20}}
    found = intervals.posterior(bumps_of(neuron))
    assert runs_of(found, 0, 0) == [(1, 1)]
    assert found.posterior_NCK[0, 0, found.is_there_NCK[0, 0]] == pytest.approx([50 / 70])
    assert runs_of(found, 0, 1) == [(2, 2)]


def test_budget__takes_the_bins_in_the_order_of_what_they_give_for_what_they_cost():
    """Two neurons with bins of known ratios: the budget ends within the third best."""
    one = {"joy": {1: 60, 2: 30, 3: 10}, "rest": {1: 10, 2: 20, 3: 70}}  # ratios 6, 1.5, 1/7
    two = {"joy": {1: 40, 2: 60}, "rest": {1: 5, 2: 95}}  # ratios 8, 0.63
    frontier = Frontier.of(2)
    bumps = bumps_of(one, two)
    frontier.add(bumps, np.ones((2, 2), bool))
    joy = 0  # spends (0.05), (0.05 + 0.10), (... + 0.20) over two neurons, by falling ratio
    for budget, expected in ((0.02, 8.0), (0.03, 6.0), (0.08, 1.5), (0.18, 12 / 19)):
        penalty = float(frontier.penalty_for(budget)[joy])
        assert expected <= penalty * 1.006, "what costs more than it gives at this price is left out"
        found = intervals.likelihood_ratio(bumps, penalty=penalty)
        assert np.nansum(found.others_NCK[:, joy]) / 2 <= budget
    assert frontier.penalty_for(1.0)[joy] == 0


def test_frontier__of_candidates_alone_spends_on_them_alone():
    neurons = [{"joy": {1: 5, 2: 5}, "rest": {1: 1, 2: 9}}, {"joy": {1: 5}, "rest": {1: 5}}]
    whole, part = Frontier.of(2), Frontier.of(2)
    whole.add(bumps_of(neurons[0]), np.ones((1, 2), bool))
    part.add(bumps_of(*neurons), np.array([[True, True], [False, False]]))
    np.testing.assert_array_equal(part.penalty_for(0.05), whole.penalty_for(0.05))


def test_intervals__hold_the_very_values_that_were_counted_in_their_bins():
    lower_B, upper_B = (bound.astype(np.float32) for bound in bin_bounds())
    every = np.arange(-MAX_BIN, MAX_BIN + 1)
    finite = slice(1, -1)
    np.testing.assert_array_equal(bin_of(lower_B[finite]), every[finite])
    np.testing.assert_array_equal(bin_of(upper_B[finite]), every[finite])
    np.testing.assert_array_equal(
        np.nextafter(upper_B[:-1], np.float32(np.inf)), lower_B[1:], "and no value is between"
    )
    assert (lower_B[0], upper_B[-1]) == (-np.inf, np.inf)


def test_intervals__are_the_same_by_any_number_of_threads():
    rng = np.random.default_rng(3)
    neurons = [
        {c: {int(b): int(n) for b, n in zip(range(-9, 9), rng.integers(0, 9, 18), strict=True) if n} for c in "abc"}
        for _ in range(20)
    ]
    bumps = bumps_of(*neurons)
    one, three = (intervals.likelihood_ratio(bumps, penalty=1.5, n_threads=n) for n in (1, 3))
    np.testing.assert_array_equal(one.lower_NCK, three.lower_NCK)
    np.testing.assert_array_equal(one.others_NCK, three.others_NCK)
    assert one.is_there_NCK[:, :, 1].any()


def test_intervals__of_a_concept_without_values_are_not_there():
    bumps = bumps_of({"joy": {1: 3}, "none": {}, "rest": {1: 1}})
    for found in (
        intervals.hpd(bumps, mass=0.5),
        intervals.likelihood_ratio(bumps, penalty=0.1),
        intervals.posterior(bumps),
    ):
        assert not found.is_there_NCK[0, 1].any()
        assert np.isnan(found.posterior_NCK[0, 1]).all()
