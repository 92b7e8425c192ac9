"""Mutual information of bin and concept, compiled and in SQL, against scikit-learn on one row a value."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from neuronlens.bumps import Bumps
from neuronlens.information import information_of
from neuronlens.query import attach_rows, connect

LAYER = {"layer": 2, "hook_point": "mlp_post"}
Counts = dict[tuple[int, str], dict[int, int]]
"""Neuron and concept -> bin -> values."""


def _histograms(counts: Counts) -> pa.Table:
    rows = [
        LAYER | {"neuron": neuron, "concept": concept, "bin": b, "n": n}
        for (neuron, concept), bins in sorted(counts.items())
        for b, n in sorted(bins.items())
    ]
    schema = [("layer", pa.int16()), ("hook_point", pa.string()), ("neuron", pa.int32()), ("concept", pa.string())]
    return pa.Table.from_pylist(rows, pa.schema([*schema, ("bin", pa.int16()), ("n", pa.int64())]))


def _by_kernel(counts: Counts, n_threads: int = 1) -> pa.Table:
    moments = pa.Table.from_pylist(
        [{"neuron": n, "concept": c, "mean": 0.0, "std": 1.0, "min": -9e9, "max": 9e9} for n, c in counts]
    )
    bumps = Bumps.of(moments, **LAYER).with_counts(_histograms(counts))
    return information_of(bumps, n_threads=n_threads)


def _by_view(counts: Counts) -> pa.Table:
    with connect(threads=1) as con:
        attach_rows(con, "histograms", _histograms(counts))
        return con.sql("from concept_information").order("neuron, concept").to_arrow_table()


@pytest.fixture(params=[_by_kernel, _by_view], ids=["kernel", "sql"])
def information(request):
    return request.param


def _bits(counts: Counts, neuron: int, concept: str) -> float:
    """One row a value: its bin, and whether it is the concept's."""
    bins, own = [], []
    for (n, c), histogram in counts.items():
        if n == neuron:
            values = np.repeat(list(histogram), list(histogram.values()))
            bins += values.tolist()
            own += [c == concept] * len(values)
    return mutual_info_score(bins, own) / np.log(2)


def _random(seed: int, n_neurons: int = 4, concepts: str = "abc") -> Counts:
    rng = np.random.default_rng(seed)
    return {
        (neuron, concept): {int(b): int(rng.integers(1, 60)) for b in rng.choice(range(-208, 209), 8, replace=False)}
        | {0: 5 + k}
        for neuron in range(n_neurons)
        for k, concept in enumerate(concepts)
    }


def test_concept_information__is_the_mutual_information_of_bin_and_concept(information):
    counts = _random(0)
    rows = information(counts).to_pylist()
    assert [(row["neuron"], row["concept"]) for row in rows] == sorted(counts)
    for row in rows:
        assert row["bits"] == pytest.approx(_bits(counts, row["neuron"], row["concept"]), rel=1e-9)


def test_concept_information__of_concepts_that_never_meet_is_their_entropy(information):
    rows = information({(0, "a"): {3: 10}, (0, "b"): {-3: 30}}).to_pylist()
    entropy = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert [row["bits"] for row in rows] == [pytest.approx(entropy)] * 2


def test_concept_information__of_the_same_values_is_nothing(information):
    rows = information({(0, c): {3: 10 * k, 4: 20 * k} for k, c in enumerate("abc", 1)}).to_pylist()
    assert [row["bits"] for row in rows] == [pytest.approx(0, abs=1e-12)] * 3
    assert min(row["bits"] for row in rows) >= 0


def test_concept_information__without_another_concept_is_null(information):
    rows = information({(0, "a"): {3: 10, 4: 1}, (1, "a"): {3: 10}, (1, "b"): {3: 10}}).to_pylist()
    assert [row["bits"] for row in rows] == [None, pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12)]


def test_information_of__leaves_out_what_has_no_histogram_and_is_the_same_on_any_threads():
    counts = _random(1) | {(2, "b"): {}}
    one, three = _by_kernel(counts), _by_kernel(counts, n_threads=3)
    assert one.equals(three)
    assert [(row["neuron"], row["concept"]) for row in one.to_pylist()] == [
        key for key in sorted(counts) if counts[key]
    ]


histogram = st.dictionaries(st.integers(-208, 208), st.integers(1, 10**9), min_size=1, max_size=6)


@settings(deadline=None, max_examples=30)
@given(st.lists(histogram, min_size=1, max_size=4))
def test_information_of__equals_the_view(histograms):
    counts = {(0, concept): bins for concept, bins in zip("abcd", histograms, strict=False)}
    for row, other in zip(_by_kernel(counts).to_pylist(), _by_view(counts).to_pylist(), strict=True):
        assert row == pytest.approx(other, abs=1e-9)
