"""Merging moments on the host, against a direct computation in long double."""

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from neuronlens.moments import Moments


@pytest.mark.parametrize("mean_over_std", [0, 1e2, 1e4])
def test_moments__keep_the_variance_within_a_batch(mean_over_std):
    x_BN = np.random.default_rng(0).gamma(3.0, size=(4_096, 8)) + mean_over_std * np.sqrt(3)
    got = reduce(Moments.merge, [Moments.of(part) for part in np.array_split(x_BN, 7)])
    d_BN = x_BN.astype(np.longdouble) - x_BN.astype(np.longdouble).mean(axis=0)
    std_N = np.sqrt((d_BN**2).mean(axis=0))
    np.testing.assert_allclose(got.std_N, std_N.astype(float), rtol=1e-11)
    np.testing.assert_allclose(got.skewness_N, ((d_BN**3).mean(axis=0) / std_N**3).astype(float), rtol=1e-8)
    np.testing.assert_allclose(got.kurtosis_N, ((d_BN**4).mean(axis=0) / std_N**4).astype(float), rtol=1e-8)


def test_moments__agree_with_scipy():
    x_BN = np.random.default_rng(1).normal(size=(500, 3)) ** 3
    got = Moments.of(x_BN)
    np.testing.assert_allclose(got.skewness_N, stats.skew(x_BN), rtol=1e-12)
    np.testing.assert_allclose(got.kurtosis_N, stats.kurtosis(x_BN, fisher=False), rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8), seed=st.integers(0, 2**16))
def test_moments__do_not_depend_on_the_order_of_merging(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [Moments.of(rng.normal(5, 2, size=(size, 2))) for size in sizes]
    forward, backward = reduce(Moments.merge, parts), reduce(Moments.merge, reversed(parts))
    for name in ("n", "n_nonfinite", "min", "max"):
        np.testing.assert_array_equal(getattr(forward, f"{name}_N"), getattr(backward, f"{name}_N"))
    for name in ("mean", "mean_abs", "m2", "m4"):
        np.testing.assert_allclose(
            getattr(forward, f"{name}_N"), getattr(backward, f"{name}_N"), rtol=1e-12, atol=1e-12
        )


def test_moments__of_nothing_are_unknown_and_merge_as_nothing():
    nothing, some = Moments.of(np.zeros((0, 2))), Moments.of(np.array([[1.0, 2.0], [3.0, 2.0]]))
    assert np.isnan(nothing.mean_N).all()
    for merged in (nothing.merge(some), some.merge(nothing)):
        np.testing.assert_array_equal(merged.mean_N, some.mean_N)
        np.testing.assert_array_equal(merged.m2_N, some.m2_N)
        np.testing.assert_array_equal(merged.max_N, some.max_N)


def test_moments__leave_values_that_are_not_finite_out():
    got = Moments.of(np.array([[1.0], [np.nan], [3.0], [np.inf]]))
    assert (got.n_N[0], got.n_nonfinite_N[0], got.mean_N[0], got.max_N[0]) == (2, 2, 2.0, 3.0)


def test_moments__have_no_skewness_where_there_is_no_spread():
    got = Moments.of(np.full((9, 1), 0.1))
    assert got.std_N[0] == 0
    assert np.isnan(got.skewness_N[0])
