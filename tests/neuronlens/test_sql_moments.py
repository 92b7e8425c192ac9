"""sql/merge.sql and sql/moments_from_raw.sql against two passes over the values in longdouble."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuronlens.query import connect, run_file
from tests.synthetic_store import Shard, moments_of, write_store

LAYER_0 = {"hook_point": "mlp_post", "layer": 0}
BOTH_WAYS = pytest.mark.parametrize("query", ["merge", "moments_from_raw"])


def _shards(values_by_concept: dict[str, Sequence[np.ndarray]]) -> list[Shard]:
    """One shard per array; an array [samples] is one neuron, [samples, neurons] several, of layer 0."""
    return [
        Shard(concept=concept, x_LSN=np.asarray(x, dtype=np.float32).reshape(1, len(x), -1))
        for concept, parts in values_by_concept.items()
        for x in parts
    ]


def _run(query: str, shards: Sequence[Shard], root: Path) -> list[dict]:
    with connect(write_store(root, shards, histograms=False), threads=1) as con:
        return run_file(con, query, **LAYER_0).to_pylist()


def _assert_same(row: dict, x_S: np.ndarray, rtol: float = 1e-12) -> None:
    expected = moments_of(x_S)
    assert {name: row[name] for name in ("n", "n_nonfinite", "min", "max")} == {
        name: expected[name] for name in ("n", "n_nonfinite", "min", "max")
    }
    for name in ("mean", "std", "skewness", "kurtosis", "mean_abs"):
        if expected[name] is None:
            assert row[name] is None, name
        else:
            # A skewness near 0 is a difference of large sums: its error is in proportion to 1, not to itself.
            atol = rtol if name == "skewness" else 1e-300
            np.testing.assert_allclose(row[name], expected[name], rtol=rtol, atol=atol, err_msg=name)


@BOTH_WAYS
@pytest.mark.parametrize("n_parts", [1, 2, 20])
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_moments__equal_the_longdouble_computation(query, mean, n_parts, tmp_path):
    rng = np.random.default_rng(n_parts)
    parts = [
        (mean + rng.gamma(2.0, size=(int(n), 5)) * rng.choice([-1, 1], 5)).astype(np.float32)
        for n in rng.integers(1, 400, n_parts)
    ]
    rows = _run(query, _shards({"joy": parts}), tmp_path)
    assert [row["neuron"] for row in rows] == [0, 1, 2, 3, 4]
    for row, x_S in zip(rows, np.concatenate(parts).T, strict=True):
        _assert_same(row, x_S)


@BOTH_WAYS
def test_moments__stand_where_shards_lie_far_apart(query, tmp_path):
    rng = np.random.default_rng(3)
    parts = [rng.normal(center, 0.1, 300) for center in (-1000.0, 0.0, 0.5, 4000.0)]
    [row] = _run(query, _shards({"joy": parts}), tmp_path)
    _assert_same(row, np.concatenate(parts).astype(np.float32))


@BOTH_WAYS
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8).map(np.float32), min_size=1, max_size=6
    ),
    extremes=st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0]), max_size=4).map(np.float32),
)
def test_moments__equal_the_longdouble_computation_for_any_values(query, parts, extremes, tmp_path_factory):
    parts = [*parts, extremes] if len(extremes) else parts
    [row] = _run(query, _shards({"joy": parts}), tmp_path_factory.mktemp("store"))
    # Parts at 1e6 may differ by one float32: mean / std is then 3e7, and a partial's mean is rounded to 1e-16 of it.
    _assert_same(row, np.concatenate(parts), rtol=3e-8)


@BOTH_WAYS
@pytest.mark.parametrize("n", [1, 2, 3])
def test_moments__of_one_two_and_three_values(query, n, tmp_path):
    x = np.array([0.1, -7.25, 3.0], dtype=np.float32)[:n]
    [row] = _run(query, _shards({"joy": [[value] for value in x]}), tmp_path)
    _assert_same(row, x)


@BOTH_WAYS
@pytest.mark.parametrize("value", [0.1, 1e4 / 3, -1e-30])
def test_moments__of_a_constant_have_no_spread_and_no_shape(query, value, tmp_path):
    [row] = _run(query, _shards({"joy": [np.full(n, value) for n in (3, 7, 11)]}), tmp_path)
    assert row["std"] == 0
    assert row["mean"] == np.float32(value)
    assert row["skewness"] is None
    assert row["kurtosis"] is None


def test_merge__takes_a_constant_for_one_whatever_the_rounding_of_its_partials(tmp_path):
    """A collector's mean of equal values may be one rounding off, and its m2 not quite 0."""
    third = np.float32(1 / 3)
    files = write_store(tmp_path, _shards({"joy": [np.full(n, third) for n in (3, 7)]}), histograms=False)
    for path in files["partials"]:
        table = pq.read_table(path)
        mean = np.nextafter(table["mean"].to_numpy(), 1.0)
        table = table.set_column(table.schema.get_field_index("mean"), "mean", pa.array(mean))
        table = table.set_column(table.schema.get_field_index("m2"), "m2", pa.array(np.full(len(mean), 1e-31)))
        pq.write_table(table, path)
    with connect(files, threads=1) as con:
        [row] = run_file(con, "merge", **LAYER_0).to_pylist()
    assert (row["mean"], row["std"], row["skewness"], row["kurtosis"]) == (third, 0.0, None, None)


@BOTH_WAYS
def test_moments__count_nonfinite_values_apart(query, tmp_path):
    rng = np.random.default_rng(5)
    x = rng.normal(1e3, 1.0, 500).astype(np.float32)
    x[[3, 99, 400, 401]] = [np.nan, np.inf, -np.inf, np.nan]
    [row] = _run(query, _shards({"joy": np.array_split(x, 4)}), tmp_path)
    assert row["n_nonfinite"] == 4
    _assert_same(row, x)


@BOTH_WAYS
def test_moments__without_any_finite_value_are_null(query, tmp_path):
    shards = _shards({"joy": [[np.nan, np.nan], [np.inf]], "fear": [[1.0, 2.0]]})
    fear, joy = _run(query, shards, tmp_path)
    assert fear["n"] == 2
    assert (joy["n"], joy["n_nonfinite"]) == (0, 3)
    names = ("mean", "std", "skewness", "kurtosis", "min", "max", "mean_abs")
    assert [joy[name] for name in names] == [None] * len(names)


@BOTH_WAYS
def test_moments__skip_shards_without_finite_values(query, tmp_path):
    shards = _shards({"joy": [[np.nan], [1.0, 2.0, 4.0], [np.inf, -np.inf]]})
    [row] = _run(query, shards, tmp_path)
    _assert_same(row, np.array([1.0, 2.0, 4.0, np.nan, np.inf, np.inf]))


@BOTH_WAYS
def test_moments__keep_concepts_and_neurons_apart(query, tmp_path):
    rng = np.random.default_rng(6)
    values = {concept: [rng.normal(k, 1, (40, 3)) for k in range(3)] for concept in ("joy", "anger", "fear")}
    rows = _run(query, _shards(values), tmp_path)
    assert [(row["neuron"], row["concept"]) for row in rows] == [
        (neuron, concept) for neuron in range(3) for concept in ("anger", "fear", "joy")
    ]
    for row in rows:
        _assert_same(row, np.concatenate(values[row["concept"]]).astype(np.float32)[:, row["neuron"]])


@BOTH_WAYS
def test_moments__take_the_asked_layer_and_hook_point_only(query, tmp_path):
    rng = np.random.default_rng(7)
    x_LSN = rng.normal(size=(3, 20, 2)).astype(np.float32)
    files = write_store(tmp_path / "a", [Shard(concept="joy", x_LSN=x_LSN)])
    other = write_store(tmp_path / "b", [Shard(concept="joy", x_LSN=x_LSN + 5)], hook_point="resid_post")
    with connect({kind: files[kind] + other[kind] for kind in ("partials", "raw")}, threads=1) as con:
        rows = run_file(con, query, hook_point="mlp_post", layer=2).to_pylist()
        assert run_file(con, query, hook_point="mlp_out", layer=2).num_rows == 0
    assert [(row["hook_point"], row["layer"], row["neuron"]) for row in rows] == [
        ("mlp_post", 2, 0),
        ("mlp_post", 2, 1),
    ]
    for row in rows:
        _assert_same(row, x_LSN[2, :, row["neuron"]])


def test_merge__does_not_depend_on_the_order_of_shards(tmp_path):
    rng = np.random.default_rng(8)
    parts = [rng.normal(rng.normal(50, 2), 1, (int(n), 20)) for n in rng.integers(1, 90, 12)]
    files = write_store(tmp_path, _shards({"joy": parts}), histograms=False, raw=False)
    tables = []
    for order in (files["partials"], files["partials"][::-1], sorted(files["partials"], key=hash)):
        with connect({"partials": order}, threads=2) as con:
            tables.append(run_file(con, "merge", **LAYER_0))
    for table in tables[1:]:
        for name in ("n", "min", "max"):
            assert table[name] == tables[0][name]
        for name in ("mean", "std", "skewness", "kurtosis", "mean_abs"):
            np.testing.assert_allclose(table[name], tables[0][name], rtol=1e-12, atol=1e-13)


def test_merge__agrees_with_the_values_themselves(tmp_path):
    rng = np.random.default_rng(9)
    values = {c: [rng.gamma(1.5, size=(int(n), 30)) for n in rng.integers(5, 80, 4)] for c in ("joy", "fear")}
    with connect(write_store(tmp_path, _shards(values)), threads=1) as con:
        merged, direct = run_file(con, "merge", **LAYER_0), run_file(con, "moments_from_raw", **LAYER_0)
    assert merged.schema == direct.schema
    assert merged.drop(["mean", "std", "skewness", "kurtosis", "mean_abs"]) == direct.drop(
        ["mean", "std", "skewness", "kurtosis", "mean_abs"]
    )
    for name in ("mean", "std", "skewness", "kurtosis", "mean_abs"):
        np.testing.assert_allclose(merged[name], direct[name], rtol=1e-12, atol=1e-13)


@BOTH_WAYS
def test_moments__have_the_columns_of_the_format(query, tmp_path):
    with connect(write_store(tmp_path, _shards({"joy": [[1.0, 2.0]]})), threads=1) as con:
        schema = run_file(con, query, **LAYER_0).schema
    integers = {"layer": pa.int16(), "neuron": pa.int32(), "n": pa.int64(), "n_nonfinite": pa.int64()}
    texts = dict.fromkeys(("hook_point", "concept"), pa.string())
    floats = dict.fromkeys(("mean", "std", "skewness", "kurtosis", "mean_abs"), pa.float64())
    expected = integers | texts | floats | dict.fromkeys(("min", "max"), pa.float32())
    assert {field.name: field.type for field in schema} == expected
