"""Bins and quantiles against exact ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronlens.histograms import MAX_BIN, N_BINS, bin_edges, bin_of, quantile

floats = st.floats(min_value=2.0**-14, max_value=4095, width=32)


@settings(max_examples=200, deadline=None)
@given(x=floats, sign=st.sampled_from([-1, 1]))
def test_bin_of__names_the_bin_whose_edges_hold_the_value(x, sign):
    edges = bin_edges()
    index = int(bin_of(np.array([sign * x]))[0]) + MAX_BIN
    low, high = sorted((edges[index], edges[index + 1]))
    assert low <= sign * x <= high
    assert (high - low) <= min(abs(low), abs(high)) / 8


def test_bin_of__sorts_as_values_do():
    x = np.sort(np.random.default_rng(0).standard_cauchy(5_000).astype(np.float32))
    assert (np.diff(bin_of(x).astype(int)) >= 0).all()


def test_bin_of__clamps_what_lies_beyond():
    assert bin_of(np.array([1e30, -1e30, 1e-30, -0.0])).tolist() == [MAX_BIN, -MAX_BIN, 0, 0]


@pytest.mark.parametrize("q", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("shape", ["normal", "lognormal", "relu"])
def test_quantile__lies_within_a_bin_of_the_exact_one(q, shape):
    rng = np.random.default_rng(2)
    x = {"normal": rng.normal(3, 2, 20_000), "lognormal": rng.lognormal(size=20_000), "relu": rng.normal(size=20_000)}[
        shape
    ]
    x = np.maximum(x, 0).astype(np.float32) if shape == "relu" else x.astype(np.float32)
    counts = np.bincount(bin_of(x).astype(int) + MAX_BIN, minlength=N_BINS)
    exact = float(np.quantile(x, q))
    assert abs(quantile(counts, q, float(x.min()), float(x.max())) - exact) <= abs(exact) / 8 + 2.0**-14


def test_quantile__of_nothing_is_unknown():
    assert np.isnan(quantile(np.zeros(N_BINS, np.int64), 0.5, 0.0, 0.0))
