"""Intervals and weights against scipy, and against loops."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from neuronlens import scores
from neuronlens.scores import draws, interval_95, length_matched, resampled_means, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 17), (17, 17), (3, 17), (841, 1000), (99_999, 100_000)])
def test_wilson__equals_scipys(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson__knows_nothing_without_trials() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0


def test_draws__keep_each_concepts_number_of_texts_and_repeat() -> None:
    concept_X = np.array(["joy"] * 5 + ["fear"] * 3 + ["joy"] * 2, dtype=object)
    counts_SX = draws(concept_X, n_resamples=400)
    for concept, n in (("joy", 7), ("fear", 3)):
        assert set(counts_SX[:, concept_X == concept].sum(axis=1).tolist()) == {n}
    np.testing.assert_array_equal(counts_SX[:50], draws(concept_X, n_resamples=50))
    assert (draws(concept_X, n_resamples=50, seed=1) != counts_SX[:50]).any()
    # Each text is drawn once on average, and is missing from (1 - 1/7)^7 of the resamples.
    np.testing.assert_allclose(counts_SX.mean(axis=0), 1, atol=0.2)
    assert (counts_SX[:, 0] == 0).mean() == pytest.approx((6 / 7) ** 7, abs=0.08)


@settings(deadline=None)
@given(st.data())
def test_resampled_means__are_those_of_a_loop(data: st.DataObject) -> None:
    n_texts = data.draw(st.integers(1, 12))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    concept_X = rng.choice(["a", "b"], n_texts)
    counts_SX = draws(concept_X, n_resamples=7)
    values_CX, weight_X = rng.normal(size=(3, n_texts)), rng.choice([0.0, 0.5, 1.0], n_texts)
    got_SC = resampled_means(counts_SX, values_CX, weight_X)
    for s, counts_X in enumerate(counts_SX.tolist()):
        total = sum(n * w for n, w in zip(counts_X, weight_X, strict=True))
        for c in range(3):
            expected = sum(n * w * v for n, w, v in zip(counts_X, weight_X, values_CX[c], strict=True))
            assert got_SC[s, c] == pytest.approx(expected / total if total else np.nan, nan_ok=True)


def test_resampled_means__do_not_depend_on_how_many_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    counts_SX = draws(rng.choice(["a", "b"], 20), n_resamples=11)
    values_CX, weight_X = rng.normal(size=(2, 20)), rng.random(20)
    whole = resampled_means(counts_SX, values_CX, weight_X)
    monkeypatch.setattr(scores, "WEIGHTS_AT_ONCE", 40)
    np.testing.assert_allclose(resampled_means(counts_SX, values_CX, weight_X), whole, rtol=1e-12)


def test_interval_95__is_close_to_scipys_percentile_bootstrap() -> None:
    x_X = np.random.default_rng(0).normal(size=300)
    counts_SX = draws(np.zeros(300), n_resamples=4000)
    low, high = interval_95(resampled_means(counts_SX, x_X[None], np.ones(300)))
    expected = bootstrap((x_X,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=0.01)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
)
def test_length_matched__gives_the_complement_the_targets_share_of_each_bin(
    target: list[int], others: list[int]
) -> None:
    length_X = np.array(target + others)
    is_target_X = np.arange(len(length_X)) < len(target)
    weight_X = length_matched(length_X, is_target_X)
    assert (weight_X[is_target_X] == 0).all()
    edges = sorted(set(np.quantile(target, np.linspace(0, 1, 11)).tolist()))
    bins = [(edges[0], edges[0])] if len(edges) == 1 else list(itertools.pairwise(edges))
    share = []
    for i, (low, high) in enumerate(bins):

        def holds(length: int, low: float = low, high: float = high, first: bool = i == 0) -> bool:
            return low < length <= high or (first and length == low)

        mine = sum(map(holds, target))
        weights = [w for n, w in zip(others, weight_X[~is_target_X].tolist(), strict=True) if holds(n)]
        assert len(set(weights)) <= 1
        share.append((mine if weights else 0, sum(weights)))
    total = sum(mine for mine, _ in share)
    assert weight_X.sum() == pytest.approx(1.0 if total else 0.0)
    for mine, weight in share:
        assert weight == pytest.approx(mine / total if total else 0.0)


def test_length_matched__weighs_nothing_without_a_target() -> None:
    assert not length_matched(np.array([1, 2]), np.array([False, False])).any()
