"""Streaming moments and histograms against a two-pass oracle in long double."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronlens.accumulate import Accumulator, CpuAccumulator, TorchAccumulator
from neuronlens.histograms import MAX_BIN, N_BINS

KINDS = ["cpu", "cpu on 3 threads", "torch"]


def make(kind: str, n_neurons: int, *, histogram: bool = False) -> Accumulator:
    if kind == "torch":
        return TorchAccumulator(n_neurons, histogram=histogram, device=torch.device("cpu"))
    return CpuAccumulator(n_neurons, histogram=histogram, n_threads=3 if "3" in kind else 1)


def feed(accumulator: Accumulator, x_RN: np.ndarray, n_batches: int = 1) -> None:
    for part in np.array_split(x_RN, n_batches):
        accumulator.add(torch.from_numpy(part), torch.arange(len(part)))


def oracle(x_R: np.ndarray) -> dict[str, float]:
    """Two passes in long double over the finite values of one neuron."""
    x = x_R[np.isfinite(x_R)].astype(np.longdouble)
    d = x - x.mean()
    return {
        "n": len(x),
        "n_nonfinite": len(x_R) - len(x),
        "mean": x.mean(),
        "m2": (d**2).sum(),
        "m3": (d**3).sum(),
        "m4": (d**4).sum(),
        "min": x.min(),
        "max": x.max(),
        "mean_abs": abs(x).mean(),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean_over_std", [0, 1e2, 1e4])
def test_accumulator__agrees_with_long_double_whatever_the_mean(kind, mean_over_std):
    rng = np.random.default_rng(0)
    x_RN = (rng.gamma(2.0, size=(3_000, 5)) + mean_over_std * np.sqrt(2)).astype(np.float32)
    accumulator = make(kind, 5)
    feed(accumulator, x_RN, n_batches=7)
    got = accumulator.moments()
    for j in range(5):
        want = oracle(x_RN[:, j])
        std = np.sqrt(want["m2"] / want["n"])
        assert got.n_N[j] == want["n"]
        np.testing.assert_allclose(got.mean_N[j], float(want["mean"]), rtol=1e-7, atol=1e-7 * float(std))
        np.testing.assert_allclose(got.std_N[j], float(std), rtol=1e-6)
        np.testing.assert_allclose(got.skewness_N[j], float(want["m3"] / want["n"] / std**3), rtol=2e-5)
        np.testing.assert_allclose(got.kurtosis_N[j], float(want["m4"] / want["n"] / std**4), rtol=2e-5)
        np.testing.assert_allclose(got.mean_abs_N[j], float(want["mean_abs"]), rtol=1e-6)
        assert (got.min_N[j], got.max_N[j]) == (want["min"], want["max"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_accumulator__is_right_for_a_handful_of_samples(kind, n):
    x_RN = np.array([[0.1, -5.0], [0.7, 3e4], [-2.5, 1e-6]], dtype=np.float32)[:n]
    accumulator = make(kind, 2)
    feed(accumulator, x_RN, n_batches=n)
    got = accumulator.moments()
    for j in range(2):
        want = oracle(x_RN[:, j])
        np.testing.assert_allclose(got.m2_N[j], float(want["m2"]), rtol=1e-6)
        np.testing.assert_allclose(got.m4_N[j], float(want["m4"]), rtol=1e-6)
        np.testing.assert_allclose(got.m3_N[j], float(want["m3"]), rtol=1e-6, atol=1e-6 * float(want["m2"]) ** 1.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.1, -7_001.3, 3e38])
def test_accumulator__gives_a_constant_no_spread_at_all(kind, value):
    x_RN = np.full((1_111, 3), value, dtype=np.float32)
    accumulator = make(kind, 3)
    feed(accumulator, x_RN, n_batches=4)
    got = accumulator.moments()
    np.testing.assert_array_equal(got.mean_N, x_RN[0].astype(np.float64))
    for sums in (got.m2_N, got.m3_N, got.m4_N):
        np.testing.assert_array_equal(sums, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulator__counts_values_that_are_not_finite_apart(kind):
    rng = np.random.default_rng(1)
    x_RN = rng.normal(size=(700, 4)).astype(np.float32)
    x_RN[5, 0], x_RN[6, 0], x_RN[600, 0] = np.nan, np.inf, -np.inf
    x_RN[:, 1] = np.nan
    accumulator = make(kind, 4, histogram=True)
    feed(accumulator, x_RN, n_batches=3)
    got, counts_NB = accumulator.moments(), accumulator.counts()
    np.testing.assert_array_equal(got.n_nonfinite_N, [3, 700, 0, 0])
    np.testing.assert_array_equal(got.n_N, [697, 0, 700, 700])
    np.testing.assert_array_equal(counts_NB.sum(axis=1), got.n_N)
    np.testing.assert_allclose(got.m4_N[0], float(oracle(x_RN[:, 0])["m4"]), rtol=1e-5)
    assert np.isnan(got.mean_N[1])
    assert np.isnan(got.min_N[1])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulator__does_not_overflow_near_the_largest_float(kind):
    x_RN = np.array([[3e38], [-3e38], [1e38], [0.0]], dtype=np.float32)
    accumulator = make(kind, 1)
    feed(accumulator, x_RN)
    got, want = accumulator.moments(), oracle(x_RN[:, 0])
    np.testing.assert_allclose(got.m4_N[0], float(want["m4"]), rtol=1e-5)
    np.testing.assert_allclose(got.mean_abs_N[0], float(want["mean_abs"]), rtol=1e-6)
    assert got.n_nonfinite_N[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_accumulator__counts_only_the_rows_named(kind):
    x_RN = torch.arange(20, dtype=torch.float32).reshape(10, 2)
    accumulator = make(kind, 2, histogram=True)
    accumulator.add(x_RN, torch.tensor([9, 0, 4]))
    got = accumulator.moments()
    np.testing.assert_array_equal(got.n_N, [3, 3])
    np.testing.assert_allclose(got.mean_N, [26 / 3, 29 / 3])
    assert accumulator.counts().sum() == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accumulator__widens_half_precision(kind, dtype):
    x_RN = torch.randn(300, 3, generator=torch.manual_seed(0)).to(dtype)
    accumulator = make(kind, 3)
    accumulator.add(x_RN, torch.arange(300))
    np.testing.assert_allclose(accumulator.moments().std_N, x_RN.double().numpy().std(axis=0), rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    kind=st.sampled_from(KINDS),
)
def test_accumulator__puts_every_value_in_the_bin_that_holds_it(values, kind):
    x_RN = np.array(values, dtype=np.float32)[:, None]
    accumulator = make(kind, 1, histogram=True)
    feed(accumulator, x_RN)
    want = np.zeros(N_BINS, np.int64)
    for x in x_RN[:, 0].tolist():
        want[_bin_by_comparison(x) + MAX_BIN] += 1
    np.testing.assert_array_equal(accumulator.counts()[0], want)


def _bin_by_comparison(x: float) -> int:
    """The bin by the definition in docs/store-format.md: a search among the lower edges, no bit patterns."""
    level = 0
    while level < 208 and abs(x) >= 2.0 ** (-14 + level // 8) * (1 + (level % 8) / 8):
        level += 1
    return -level if x < 0 else level
