"""sql/salience.sql against scores worked out from the values of all other concepts put together."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from sklearn.metrics import mutual_info_score

from neuronlens.query import connect, run_file
from tests.synthetic_store import Shard, bins_of, moments_of, write, write_moments, write_store

AT = {"hook_point": "mlp_post", "layer": 0}
METHODS = ("mean_abs", "mean", "probeless", "cohens_d", "f_ratio")
"""Those that moments suffice for."""


def _salience(path: Path, rows: list[dict], overlap: list[dict] | None = None) -> dict[tuple[str, str, int], dict]:
    """Rows of salience by method, concept and neuron."""
    files = {"moments": [write_moments(path / "moments.parquet", rows)]}
    if overlap is not None:
        files["overlap"] = [_write_overlap(path / "overlap.parquet", overlap)]
    with connect(files, threads=1) as con:
        got = run_file(con, "salience", **AT).to_pylist()
    return {(row["method"], row["concept"], row["neuron"]): row for row in got}


def _write_overlap(path: Path, rows: list[dict]) -> str:
    scores = ("tau", "ovl", "ovl_gaussian", "bhattacharyya", "range_jaccard", "b_in_a", "a_in_b")
    schema = pa.schema(
        [("layer", pa.int16()), ("hook_point", pa.string()), ("neuron", pa.int32())]
        + [("concept_a", pa.string()), ("concept_b", pa.string())]
        + [(name, pa.float32()) for name in scores]
    )
    return write(path, [pa.Table.from_pylist([{"layer": 0, "hook_point": "mlp_post", **row} for row in rows], schema)])


def _moment_rows(values: dict[str, np.ndarray]) -> list[dict]:
    return [
        {"neuron": neuron, "concept": concept} | moments_of(x_S)
        for concept, x_SN in values.items()
        for neuron, x_S in enumerate(x_SN.T)
    ]


def _pair(neuron: int, a: str, b: str, ovl: float | None, gaussian: float | None = 0.5) -> dict:
    return {"neuron": neuron, "concept_a": a, "concept_b": b, "ovl": ovl, "ovl_gaussian": gaussian}


def test_salience__ranks_by_mean_abs_and_breaks_ties_by_neuron(tmp_path):
    rows = [
        {"neuron": neuron, "concept": concept, "mean": 0.0, "std": 1.0, "mean_abs": mean_abs}
        for concept, scores in (("a", [0.5, 2.0, 2.0, 9.0]), ("b", [4.0, 3.0, 2.0, 1.0]))
        for neuron, mean_abs in enumerate(scores)
    ]
    got = _salience(tmp_path, rows)
    assert [got["mean_abs", "a", neuron]["rank"] for neuron in range(4)] == [4, 2, 3, 1]
    assert [got["mean_abs", "b", neuron]["rank"] for neuron in range(4)] == [1, 2, 3, 4]
    assert got["mean_abs", "a", 3]["score"] == 9.0


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_salience__cohens_d_is_against_all_other_concepts_together(mean, tmp_path):
    rng = np.random.default_rng(0)
    values = {
        concept: (mean + rng.normal(rng.normal(size=5), 0.7, (n, 5))).astype(np.float32)
        for concept, n in (("a", 30), ("b", 200), ("c", 7), ("d", 90))
    }
    got = _salience(tmp_path, _moment_rows(values))
    for concept, own in values.items():
        scores = []
        for neuron in range(5):
            x = own[:, neuron].astype(np.longdouble)
            rest = np.concatenate([v[:, neuron] for c, v in values.items() if c != concept]).astype(np.longdouble)
            m2 = ((x - x.mean()) ** 2).sum() + ((rest - rest.mean()) ** 2).sum()
            scores.append(float(abs(x.mean() - rest.mean()) / np.sqrt(m2 / (len(x) + len(rest) - 2))))
        mine = [got["cohens_d", concept, neuron] for neuron in range(5)]
        np.testing.assert_allclose([row["score"] for row in mine], scores, rtol=1e-9)
        assert [row["rank"] for row in mine] == (np.argsort(np.argsort(-np.array(scores))) + 1).tolist()


def test_salience__cohens_d_keeps_a_narrow_concept_beside_a_far_one(tmp_path):
    rng = np.random.default_rng(1)
    values = {
        c: rng.normal(m, s, (50, 1)).astype(np.float32)
        for c, m, s in (("a", 0, 1e-3), ("b", 1e-3, 1e-3), ("c", 50, 1e-3))
    }
    got = _salience(tmp_path, _moment_rows(values))
    x, rest = values["c"].astype(np.longdouble), np.concatenate([values["a"], values["b"]]).astype(np.longdouble)
    pooled = np.sqrt((((x - x.mean()) ** 2).sum() + ((rest - rest.mean()) ** 2).sum()) / 148)
    assert got["cohens_d", "c", 0]["score"] == pytest.approx(float(abs(x.mean() - rest.mean()) / pooled), rel=1e-6)


def test_salience__cohens_d_of_constants(tmp_path):
    third = np.float32(1 / 3)
    values = {c: np.array([[third, third]] * n) for c, n in (("a", 3), ("b", 5), ("c", 11))}
    values["c"][:, 1] = 2.0
    got = _salience(tmp_path, _moment_rows(values))
    assert [got["cohens_d", concept, 0]["score"] for concept in "abc"] == [0.0, 0.0, 0.0]
    assert got["cohens_d", "c", 1]["score"] == float("inf")
    assert got["cohens_d", "c", 1]["rank"] == 1


def test_salience__cohens_d_of_different_constants_is_infinite_whatever_the_rounding(tmp_path):
    rest_N, own_N = np.random.default_rng(2).normal(size=(2, 40)).astype(np.float32)
    values = {c: np.tile(rest_N, (n, 1)) for c, n in (("a", 101), ("b", 57), ("c", 33))} | {"d": np.tile(own_N, (7, 1))}
    got = _salience(tmp_path, _moment_rows(values))
    assert {got["cohens_d", "d", neuron]["score"] for neuron in range(40)} == {float("inf")}


def test_salience__without_values_or_company_has_no_score_and_ranks_last(tmp_path):
    rows = [
        {"neuron": 0, "concept": "a", "n": 0, "mean": None, "std": None, "mean_abs": None},
        {"neuron": 1, "concept": "a", "mean": 1.0, "std": 1.0, "mean_abs": 0.25},
    ]
    got = _salience(tmp_path, rows)
    assert set(got) == {(method, "a", neuron) for method in METHODS for neuron in (0, 1)}
    assert (got["mean_abs", "a", 0]["score"], got["mean_abs", "a", 0]["rank"]) == (None, 2)
    assert got["mean_abs", "a", 1]["rank"] == 1
    assert (got["cohens_d", "a", 1]["score"], got["cohens_d", "a", 1]["rank"]) == (None, 2)


def test_salience__skips_empty_concepts_in_the_rest(tmp_path):
    values = {"a": np.array([[1.0], [3.0]]), "b": np.array([[6.0], [8.0]]), "c": np.array([[np.nan]])}
    got = _salience(tmp_path, _moment_rows(values))
    assert got["cohens_d", "a", 0]["score"] == pytest.approx(5 / np.sqrt(2))
    assert got["cohens_d", "c", 0]["score"] is None


def test_salience__selectivity_is_one_minus_the_mean_overlap_with_the_others(tmp_path):
    rows = [
        {"neuron": neuron, "concept": c, "mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
        for c in "abc"
        for neuron in (0, 1)
    ]
    overlap = [_pair(0, "a", "b", 0.5), _pair(0, "a", "c", 0.25), _pair(0, "b", "c", 0.125)]
    overlap += [_pair(1, "a", "b", None, 0.75), _pair(1, "a", "c", 0.5), _pair(1, "b", "c", None, None)]
    got = _salience(tmp_path, rows, overlap)
    scores = {key[1:]: row["score"] for key, row in got.items() if key[0] == "selectivity"}
    assert scores == {
        ("a", 0): 1 - 0.375,
        ("b", 0): 1 - 0.3125,
        ("c", 0): 1 - 0.1875,
        ("a", 1): 1 - 0.625,  # the Gaussian overlap where there is no histogram
        ("b", 1): 1 - 0.75,  # a pair without any score counts for nothing
        ("c", 1): 1 - 0.5,
    }
    assert got["selectivity", "a", 0]["rank"] == 1
    assert got["selectivity", "a", 1]["rank"] == 2


def test_salience__selectivity_is_null_where_pairs_were_dropped(tmp_path):
    rows = [{"neuron": 0, "concept": c, "mean": 0.0, "std": 1.0} for c in "abc"]
    got = _salience(tmp_path, rows, [_pair(0, "a", "b", 0.5), _pair(0, "a", "c", 0.25)])
    assert {c: got["selectivity", c, 0]["score"] for c in "abc"} == {"a": 1 - 0.375, "b": None, "c": None}


def test_salience__has_the_columns_of_the_format(tmp_path):
    rows = [{"neuron": 0, "concept": "a", "mean": 0.0, "std": 1.0}]
    with connect({"moments": [write_moments(tmp_path / "moments.parquet", rows)]}, threads=1) as con:
        schema = run_file(con, "salience", **AT).schema
        assert run_file(con, "salience", hook_point="mlp_post", layer=1).num_rows == 0
    expected = {"layer": pa.int16(), "hook_point": pa.string(), "neuron": pa.int32(), "concept": pa.string()}
    assert {f.name: f.type for f in schema} == expected | {
        "method": pa.string(),
        "score": pa.float64(),
        "rank": pa.int32(),
    }


def _values(rng: np.random.Generator, mean: float = 0.0) -> dict[str, np.ndarray]:
    return {
        concept: (mean + rng.normal(rng.normal(size=5), rng.uniform(0.2, 2), (n, 5))).astype(np.float32)
        for concept, n in (("a", 30), ("b", 200), ("c", 7), ("d", 90))
    }


def test_salience__mean_ranks_what_a_concept_drives_up(tmp_path):
    rows = [
        {"neuron": neuron, "concept": "a", "mean": mean, "std": 1.0, "mean_abs": abs(mean)}
        for neuron, mean in enumerate([-9.0, 0.5, 3.0])
    ]
    got = _salience(tmp_path, rows)
    assert [got["mean", "a", neuron]["rank"] for neuron in range(3)] == [3, 2, 1]
    assert got["mean", "a", 0]["score"] == -9.0


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_salience__probeless_is_the_mean_distance_to_the_other_means(mean, tmp_path):
    values = _values(np.random.default_rng(3), mean)
    got = _salience(tmp_path, _moment_rows(values))
    for concept, own in values.items():
        for neuron in range(5):
            others = [v[:, neuron].astype(np.longdouble).mean() for c, v in values.items() if c != concept]
            expected = float(np.mean([abs(own[:, neuron].astype(np.longdouble).mean() - other) for other in others]))
            assert got["probeless", concept, neuron]["score"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_salience__f_ratio_is_the_one_way_anova(mean, tmp_path):
    values = _values(np.random.default_rng(4), mean)
    got = _salience(tmp_path, _moment_rows(values))
    for neuron in range(5):
        expected = stats.f_oneway(*(v[:, neuron].astype(np.float64) for v in values.values())).statistic
        for concept in values:
            assert got["f_ratio", concept, neuron]["score"] == pytest.approx(expected, rel=1e-7)


def test_salience__f_ratio_of_constants_is_infinite_or_nothing(tmp_path):
    values = {"a": np.array([[1, 5]] * 3, np.float32), "b": np.array([[1, 7]] * 4, np.float32)}
    got = _salience(tmp_path, _moment_rows(values))
    assert [got["f_ratio", "a", neuron]["score"] for neuron in (0, 1)] == [0, np.inf]


def test_salience__mutual_information_is_of_bin_and_concept(tmp_path):
    """Against scikit-learn, which gives nats; the shards of one concept are added up first."""
    values = _values(np.random.default_rng(5))
    values["e"] = np.full((11, 5), 900, np.float32)  # in bins of its own: all of H(concept e)
    parts = [(c, part) for c, v in values.items() for part in np.array_split(v, 2)]
    shards = [Shard(concept=concept, x_LSN=part[None]) for concept, part in parts]
    files = write_store(tmp_path, shards, raw=False)
    moments = write_moments(tmp_path / "moments.parquet", _moment_rows(values))
    with connect({"moments": [moments], "histograms": files["histograms"]}, threads=1) as con:
        got = {
            (row["concept"], row["neuron"]): row["score"]
            for row in run_file(con, "salience", **AT).to_pylist()
            if row["method"] == "mutual_information"
        }
    labels = np.concatenate([[concept] * len(v) for concept, v in values.items()])
    for neuron in range(5):
        x = np.concatenate([v[:, neuron] for v in values.values()])
        bins = np.array([next(iter(bins_of(np.array([value])))) for value in x])
        for concept in values:
            expected = mutual_info_score(bins, labels == concept) / np.log(2)
            assert got[concept, neuron] == pytest.approx(expected, abs=1e-12)


def test_salience__has_no_mutual_information_without_histograms_or_company(tmp_path):
    assert not [
        key for key in _salience(tmp_path, _moment_rows(_values(np.random.default_rng(6)))) if "mutual" in key[0]
    ]
    shards = [Shard(concept="only", x_LSN=np.ones((1, 4, 2), np.float32))]
    files = write_store(tmp_path, shards, raw=False)
    moments = write_moments(tmp_path / "m.parquet", _moment_rows({"only": shards[0].x_LSN[0]}))
    with connect({"moments": [moments], "histograms": files["histograms"]}, threads=1) as con:
        scores = {row["score"] for row in run_file(con, "salience", **AT).to_pylist() if "mutual" in row["method"]}
    assert scores == {None}
