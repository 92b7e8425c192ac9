"""One neuron's bumps, held to the values from which they were counted."""

import math
import statistics

import numpy as np
import pytest

from neuronlens.cards import Bump, read_card
from neuronlens.errors import UsageError
from neuronlens.query import connect
from tests.cards_by_hand import NOTHING, bump_of, card_of, histogram_of
from tests.report_stores import arrays, write_report_store
from tests.synthetic_store import bins_of


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).normal(0.3, 1.2, 4000).astype(np.float32)


def test_histogram__its_cdf_is_exact_at_the_bins_edges(x):
    histogram = histogram_of(x)
    got = histogram.cdf(histogram.upper_K)
    np.testing.assert_allclose(got[:-1], [(x < edge).mean() for edge in histogram.upper_K[:-1]], atol=1e-12)
    assert got[-1] == pytest.approx(1)
    assert histogram.cdf(np.array([x.min() - 1, x.max() + 1])).tolist() == [0, pytest.approx(1)]


def test_histogram__its_quantiles_are_right_within_a_bin(x):
    for q in (0.01, 0.25, 0.5, 0.99):
        exact = float(np.quantile(x, q))
        assert histogram_of(x).quantile(q) == pytest.approx(exact, abs=abs(exact) / 8 + 1e-3)


def test_bump__shares_sum_to_what_lies_between_the_edges(x):
    edges = np.linspace(-1, 2, 31)
    shares = bump_of(x).shares(edges)
    assert shares.sum() == pytest.approx(((x >= -1) & (x < 2)).mean(), abs=0.02)
    np.testing.assert_allclose(shares, np.histogram(x, edges)[0] / len(x), atol=0.012)


def test_bump__without_a_histogram_its_shares_are_those_of_the_gaussian(x):
    edges = np.linspace(-3, 3, 13)
    gauss = statistics.NormalDist(float(x.mean(dtype=float)), float(x.std(dtype=float)))
    np.testing.assert_allclose(
        bump_of(x, histogram=False).shares(edges), np.diff([gauss.cdf(edge) for edge in edges]), atol=1e-12
    )


def test_bump__counts_the_share_inside_its_range(x):
    bump = bump_of(x, tau=1)
    inside = ((x >= bump.lower) & (x <= bump.upper)).mean()
    assert bump.share_in_range() == pytest.approx(inside, abs=0.01)
    assert bump_of(x, tau=1, histogram=False).share_in_range() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=1e-9)


@pytest.mark.parametrize("histogram", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.5, -3e4])
def test_bump__of_one_value_lies_in_one_step_and_inside_its_range(histogram, value):
    bump = bump_of(np.full(50, value, np.float32), histogram=histogram)
    low, high = card_of(bump).limits()
    assert low < value < high
    shares = bump.shares(np.linspace(low, high, 98))
    assert sorted(shares)[-1] == pytest.approx(1)
    assert np.count_nonzero(shares > 1e-9) == 1
    assert bump.share_in_range() == pytest.approx(1)


def test_bump__takes_a_bin_of_equal_values_for_a_step():
    """Values that all equal the maximum fill a bin that, drawn in to it, has no length."""
    x = np.array([0.25] * 10 + [1.0] * 30, np.float32)
    shares = bump_of(x).shares(np.array([0.2, 0.5, 0.99, 1.01]))
    np.testing.assert_allclose(shares, [0.25, 0, 0.75], atol=1e-9)


def test_card__its_axis_holds_every_range_and_all_but_the_outermost_hundredth(x):
    other = x * 3 + 10
    card = card_of(bump_of(x), bump_of(other, "law"))
    low, high = card.limits()
    assert low <= min(bump.lower for bump in card.bumps)
    assert high >= max(bump.upper for bump in card.bumps)
    assert low <= np.quantile(x, 0.011)
    assert high >= np.quantile(other, 0.989)
    assert high - low < 1.2 * (max(b.upper for b in card.bumps) - min(b.lower for b in card.bumps))


def test_card__an_infinite_range_does_not_stretch_the_axis(x):
    low, high = card_of(bump_of(x, tau=math.inf)).limits()
    assert math.isfinite(low)
    assert high < 2 * x.max()


def test_card__without_any_value_still_has_an_axis():
    empty = Bump(
        concept="joy",
        n=0,
        **dict.fromkeys(("mean", "std", "lower", "upper", "min", "max"), math.nan),
        histogram=None,
        **NOTHING,
    )
    low, high = card_of(empty).limits()
    assert low < high
    assert empty.shares(np.linspace(low, high, 5)).tolist() == [0, 0, 0, 0]


def test_card__keeps_the_concepts_for_which_the_neuron_ranks_highest(x):
    ranks = {"a": 5, "b": 1, "c": None, "d": 2}
    card = card_of(*(bump_of(x, concept, rank=rank) for concept, rank in ranks.items()))
    assert [bump.concept for bump in card.of_most_salient(2).bumps] == ["b", "d"]
    assert card.of_most_salient(2).n_concepts == 4
    assert [bump.concept for bump in card.of(["d", "a", "d"]).bumps] == ["d", "a"]
    with pytest.raises(UsageError, match=r"'joy' in this store. Concepts: a, b, c, d"):
        card.of(["joy"])


def test_read_card__says_what_the_values_were(tmp_path):
    values = arrays(["joy", "it's", "law"])
    store = write_report_store(tmp_path / "store", values)
    with connect(store.file_lists()) as con:
        card = read_card(con, hook_point="mlp_post", layer=1, neuron=4, tau=2.0)
        with pytest.raises(UsageError, match="no statistics of mlp_post, layer 9"):
            read_card(con, hook_point="mlp_post", layer=9, neuron=4, tau=2.0)
    assert [bump.concept for bump in card.bumps] == ["it's", "joy", "law"]
    for bump in card.bumps:
        x = values[bump.concept][1, :, 4]
        assert bump.mean == pytest.approx(x.mean(dtype=float), rel=1e-9)
        assert (bump.lower, bump.upper) == pytest.approx((bump.mean - 2 * bump.std, bump.mean + 2 * bump.std))
        assert bump.histogram is not None
        expected = histogram_of(x)
        np.testing.assert_allclose(bump.histogram.share_K, expected.share_K)
        np.testing.assert_allclose(bump.histogram.lower_K, expected.lower_K)
        others = {c: _ovl(x, values[c][1, :, 4]) for c in values if c != bump.concept}
        assert bump.nearest == max(others, key=others.__getitem__)
        assert bump.nearest_ovl == pytest.approx(max(others.values()), abs=1e-6)
        order = np.argsort(-np.abs(values[bump.concept][1].astype(float)).mean(axis=0), kind="stable")
        assert bump.rank == order.tolist().index(4) + 1


def _ovl(x: np.ndarray, y: np.ndarray) -> float:
    p, q = bins_of(x), bins_of(y)
    return sum(min(p.get(b, 0) / len(x), q.get(b, 0) / len(y)) for b in p)
