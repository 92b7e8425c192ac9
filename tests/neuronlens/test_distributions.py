"""Quantiles and Kolmogorov-Smirnov distances from histograms against numpy and scipy on the values themselves."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from neuronlens.bumps import Bumps
from neuronlens.distributions import QUANTILES, distributions_of
from tests.synthetic_store import bin_span, bins_of, moments_of


def _bumps(values: dict[tuple[int, str], np.ndarray], without_histogram: tuple = ()) -> Bumps:
    """Moments and histograms from the values of each neuron and concept."""
    moments, histograms = [], []
    for (neuron, concept), x in values.items():
        x_S = np.asarray(x, np.float32)
        key = {"neuron": neuron, "concept": concept}
        moments.append(key | {name: moments_of(x_S)[name] for name in ("mean", "std", "min", "max")})
        if concept not in without_histogram:
            histograms += [key | {"bin": b, "n": n} for b, n in sorted(bins_of(x_S).items())]
    keys = [("neuron", pa.int32()), ("concept", pa.string())]
    floats = [(name, pa.float64()) for name in ("mean", "std", "min", "max")]
    bumps = Bumps.of(pa.Table.from_pylist(moments, pa.schema([*keys, *floats])), hook_point="mlp_post", layer=3)
    counts = pa.Table.from_pylist(histograms, pa.schema([*keys, ("bin", pa.int16()), ("n", pa.int64())]))
    return bumps.with_counts(counts)


def _describe(x: np.ndarray) -> dict:
    [row] = distributions_of(_bumps({(0, "a"): x})).to_pylist()
    return row


def _exact_distance(x: np.ndarray) -> float:
    x_S = np.asarray(x, np.float32).astype(np.longdouble)
    return float(stats.kstest(x_S.astype(float), stats.norm(float(x_S.mean()), float(x_S.std())).cdf).statistic)


def _step_distance(x: np.ndarray) -> tuple[float, float]:
    """ks and ks_bound as the format says, from sorted values: one bin after the other, cut off at min and max."""
    x_S = np.sort(np.asarray(x, np.float32).astype(float))
    gaussian, n, at, within = stats.norm(x_S.mean(), x_S.std()), len(x_S), [], []
    seen = 0
    for b, count in sorted(bins_of(x_S.astype(np.float32)).items()):
        low, high = (np.clip(edge, x_S[0], x_S[-1]) for edge in bin_span(b))
        before, after = seen / n, (seen + count) / n
        at += [abs(before - gaussian.cdf(low)), abs(after - gaussian.cdf(high))]
        within += [after - gaussian.cdf(low), gaussian.cdf(high) - before]
        seen += count
    return max(at), max(within)


RNG = np.random.default_rng(0)
SAMPLES = {
    "gaussian": RNG.normal(0.3, 1, 5000),
    "far from zero": RNG.normal(1000, 1, 500),
    "heavy tails": RNG.standard_t(2, 3000),
    "one side": RNG.gamma(2, size=2000),
    "two bumps": np.concatenate([RNG.normal(-3, 0.1, 700), RNG.normal(4, 0.2, 300)]),
    "small": RNG.normal(0, 1e-6, 400),
    "beyond the last edge": RNG.normal(0, 20_000, 900),
    "two values": np.array([1.0, 2.0]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_distributions__enclose_the_exact_distance_from_the_gaussian(name):
    row = _describe(SAMPLES[name])
    assert row["ks"] - 1e-6 <= _exact_distance(SAMPLES[name]) <= row["ks_bound"] + 1e-6
    assert (row["ks"], row["ks_bound"]) == pytest.approx(_step_distance(SAMPLES[name]), abs=1e-6)


def test_distributions__are_tight_where_there_are_many_bins():
    row = _describe(SAMPLES["gaussian"])
    assert row["ks_bound"] - row["ks"] < 0.05
    assert row["ks"] < 0.02
    assert _describe(SAMPLES["two bumps"])["ks"] > 0.3


@pytest.mark.parametrize("name", SAMPLES)
def test_distributions__quantiles_lie_in_the_bin_of_the_true_one(name):
    x_S, row = np.asarray(SAMPLES[name], np.float32), _describe(SAMPLES[name])
    for column, q in QUANTILES.items():
        lower, higher = (np.quantile(x_S, q, method=method) for method in ("inverted_cdf", "higher"))
        [low], [high] = bins_of(np.array([lower])), bins_of(np.array([higher]))
        span = np.clip([bin_span(low)[0], bin_span(high)[1]], x_S.min(), x_S.max())
        assert span[0] * (1 - 1e-6 * np.sign(span[0])) <= row[column] <= span[1] * (1 + 1e-6 * np.sign(span[1])), column


def test_distributions__quantiles_are_straight_lines_within_a_bin():
    """256 values that fill bin [1, 1.125) evenly, beside as many in [2, 2.25)."""
    x = np.concatenate([np.linspace(1, 1.125, 256, endpoint=False), np.linspace(2, 2.25, 256)[:-1], [2.2499]])
    row = _describe(x)
    highest = np.float32(x).max()
    assert row["p25"] == pytest.approx(1.0625)
    assert row["p50"] == pytest.approx(2)
    assert row["p75"] == pytest.approx(2 + (highest - 2) / 2)
    assert row["p01"] == pytest.approx(1 + 0.125 * 0.02)
    assert row["p99"] == pytest.approx(2 + (highest - 2) * 0.98)


def test_distributions__of_a_point_have_quantiles_and_no_distance():
    row = _describe(np.full(40, 3.25))
    assert [row[name] for name in QUANTILES] == [3.25] * len(QUANTILES)
    assert (row["ks"], row["ks_bound"]) == (None, None)


def test_distributions__without_values_or_histogram_are_null():
    values = {(0, "a"): [1.0, 2.0], (0, "b"): [], (0, "c"): [1.0, 3.0], (4, "a"): [np.nan]}
    got = distributions_of(_bumps(values, without_histogram=("c",))).to_pylist()
    assert [(row["layer"], row["hook_point"], row["neuron"], row["concept"]) for row in got] == [
        (3, "mlp_post", *key) for key in values
    ]
    scores = [{row[name] for name in ("ks", "ks_bound", *QUANTILES)} for row in got]
    assert [None in score for score in scores] == [False, True, True, True]
    assert scores[1:] == [{None}] * 3


def test_distributions__are_the_same_on_any_number_of_threads():
    bumps = _bumps({(neuron, c): RNG.normal(neuron, 1, 50) for neuron in range(5) for c in "ab"})
    assert distributions_of(bumps, n_threads=3).equals(distributions_of(bumps))


def test_distributions__have_the_columns_of_the_format():
    schema = distributions_of(_bumps({(0, "a"): [1.0, 2.0]})).schema
    plain = [f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in schema]
    keys = [("layer", pa.int16()), ("hook_point", pa.string()), ("neuron", pa.int32()), ("concept", pa.string())]
    names = ("ks", "ks_bound", "p01", "p05", "p25", "p50", "p75", "p95", "p99")
    assert list(zip(schema.names, plain, strict=True)) == [*keys, *((name, pa.float32()) for name in names)]


some_value = st.one_of(
    st.sampled_from([s * x for s in (-1, 1) for x in (0, 2**-14, 1, 1.125, 3840, 4096, 1e5)]),
    st.floats(-1e6, 1e6, width=32),
)


@settings(deadline=None)
@given(st.lists(some_value, min_size=1, max_size=20))
def test_distributions__hold_for_any_values(values):
    x_S, row = np.array(values, np.float32), _describe(np.array(values))
    quantiles = [row[name] for name in QUANTILES]
    assert quantiles == sorted(quantiles)
    assert x_S.min() <= quantiles[0]
    assert quantiles[-1] <= x_S.max()
    if moments_of(x_S)["std"] == 0:
        assert row["ks"] is None
    else:
        assert row["ks"] - 1e-6 <= _exact_distance(x_S) <= row["ks_bound"] + 1e-6
