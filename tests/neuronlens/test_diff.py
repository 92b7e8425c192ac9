"""Two stores beside each other: drift against scipy and by hand, calibration by simulation, terms and refusals."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from neuronlens.diff import BEYOND_2, BEYOND_3, MEDIAN_Z, compared, diff, verdict
from neuronlens.errors import UsageError
from neuronlens.query import sql_folder
from neuronlens.store import Store, receipt_of

OLD = Path(__file__).parents[1] / "stores" / "version-1"
ODD = ("it's", '"quoted"', "läs/怒り", "a;b--", "[red]x", " ")
KEYS = [("layer", pa.int16()), ("hook_point", pa.string()), ("neuron", pa.int32()), ("concept", pa.string())]
MOMENTS = pa.schema(
    [
        *KEYS,
        *((name, pa.int64()) for name in ("n", "n_nonfinite")),
        *((name, pa.float64()) for name in ("mean", "std", "skewness", "kurtosis")),
        *((name, pa.float32()) for name in ("min", "max")),
        ("mean_abs", pa.float64()),
    ]
)
SALIENCE = pa.schema([*KEYS, ("method", pa.string()), ("score", pa.float64()), ("rank", pa.int32())])
SAMPLES = pa.schema(
    [
        ("sample", pa.int64()),
        *((name, pa.int32()) for name in ("shard", "batch")),
        ("concept", pa.string()),
        ("row", pa.int64()),
        ("n_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
    ]
)
Values = Mapping[tuple[str, int], Mapping[str, np.ndarray]]
"""(hook point, layer) -> concept -> x_SN."""


def write_store(root, values: Values, *, scores=None, texts="t", coverage=(4, 4), tau=2.5, **changes) -> Store:
    """A store with the statistics of these values, by code of its own. `scores` replaces the sum of |x| as salience:
    (hook point, layer) -> concept -> method -> score of each neuron, NaN for none. `changes` go into store.json, those
    of a section by SECTION__KEY."""
    store = Store(str(root))
    concepts = sorted({concept for of in values.values() for concept in of})
    for (hook_point, layer), of in values.items():
        name = f"{hook_point}.{layer:03d}"
        moments = pa.concat_tables([_moments(hook_point, layer, concept, x) for concept, x in of.items()])
        given = (scores or {}).get((hook_point, layer)) or {c: {"mean_abs": abs(x).sum(0)} for c, x in of.items()}
        salience = pa.concat_tables(
            [_salience(hook_point, layer, c, m, score) for c, by in given.items() for m, score in by.items()]
        )
        files = [
            store.write_parquet("moments", f"moments/{name}.parquet", MOMENTS, lambda table=moments: [table]),
            store.write_parquet("salience", f"salience/{name}.parquet", SALIENCE, lambda table=salience: [table]),
        ]
        of_plan = dict(zip(("n_shards", "n_planned_shards"), coverage, strict=True)) | {
            "n_samples": 10 * coverage[0],
            "n_planned_samples": 10 * coverage[1],
        }
        fields = {"hook_point": hook_point, "layer": layer, "tau": tau, "coverage": of_plan}
        store.create_json(f"statistics/{name}.json", receipt_of(files, **fields))
    rows = [
        {"sample": i, "shard": 0, "batch": 0, "concept": c, "row": i, "n_tokens": 1, "truncated": False}
        | {"text": f"{texts} {i}", "token_ids": [1]}
        for i, c in enumerate(concepts)
    ]
    table = pa.Table.from_pylist(rows, schema=SAMPLES)
    samples = store.write_parquet("samples", "samples/part-00000.parquet", SAMPLES, lambda: [table])
    description = {
        "format_version": 1,
        "store_hash": str(root),
        "model": {"id": "m", "config_hash": "c", "weights_fingerprint": "w", "architecture": "GPT", "dtype": "float32"},
        "tokenizer_hash": "t",
        "unit": "last_token",
        "only_correct": False,
        "dataset": {"source": "d", "fingerprint": texts, "prompt": "{text}"},
        "files": [asdict(samples)],
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            description[section] = description[section] | {name: value}
        else:
            description[key] = value
    store.create_json("store.json", description)
    return store


def _moments(hook_point: str, layer: int, concept: str, x_SN: np.ndarray) -> pa.Table:
    n, width = x_SN.shape
    columns = {"layer": [layer] * width, "hook_point": [hook_point] * width, "neuron": np.arange(width)}
    columns |= {"concept": [concept] * width, "n": [n] * width, "n_nonfinite": [0] * width}
    if n == 0:
        return pa.table(columns | {name: [None] * width for name in MOMENTS.names[6:]}, schema=MOMENTS)
    d = x_SN - x_SN.mean(0)
    std = np.where(x_SN.min(0) == x_SN.max(0), 0, np.sqrt((d**2).mean(0)))
    with np.errstate(all="ignore"):
        shapes = {name: (d**p).mean(0) / std**p for name, p in (("skewness", 3), ("kurtosis", 4))}
    columns |= {name: pa.array(v, mask=std == 0) for name, v in shapes.items()}
    columns |= {"mean": x_SN.mean(0), "std": std, "mean_abs": abs(x_SN).mean(0)}
    columns |= {"min": x_SN.min(0).astype("f4"), "max": x_SN.max(0).astype("f4")}
    return pa.table({name: columns[name] for name in MOMENTS.names}, schema=MOMENTS)


def _salience(hook_point: str, layer: int, concept: str, method: str, score) -> pa.Table:
    score = np.asarray(score, dtype=float)
    order = np.lexsort((np.arange(len(score)), np.where(np.isnan(score), np.inf, -score)))
    rank = np.empty(len(score), dtype=int)
    rank[order] = np.arange(1, len(score) + 1)
    n = len(score)
    columns = [[layer] * n, [hook_point] * n, np.arange(n), [concept] * n, [method] * n]
    return pa.table([*columns, pa.array(score, mask=np.isnan(score)), rank], schema=SALIENCE)


def one_layer(**by_concept: np.ndarray) -> Values:
    return {("mlp_post", 0): by_concept}


def drift_of(tmp_path, a: Values, b: Values) -> dict[tuple, dict]:
    with compared(write_store(tmp_path / "a", a, texts="a"), write_store(tmp_path / "b", b, texts="b")) as comparison:
        rows = comparison.drift().read_all().to_pylist()
    return {(row["hook_point"], row["layer"], row["concept"], row["neuron"]): row for row in rows}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- drift ---


def test_drift__of_means_is_welchs_statistic(tmp_path, rng):
    a, b = rng.normal(3, 2, (40, 6)), rng.normal(3.5, 1, (25, 6))
    rows = drift_of(tmp_path, one_layer(joy=a), one_layer(joy=b))
    expected = stats.ttest_ind(b, a, axis=0, equal_var=False).statistic
    assert [rows["mlp_post", 0, "joy", j]["z_mean"] for j in range(6)] == pytest.approx(list(expected))
    row = rows["mlp_post", 0, "joy", 2]
    assert (row["n_a"], row["n_b"]) == (40, 25)
    s_a, s_b = a[:, 2].std(ddof=1), b[:, 2].std(ddof=1)
    assert row["shift"] == pytest.approx((b[:, 2].mean() - a[:, 2].mean()) / np.sqrt((s_a**2 + s_b**2) / 2))
    assert row["spread"] == pytest.approx(s_b / s_a)
    assert (row["std_a"], row["std_b"]) == pytest.approx((a[:, 2].std(), b[:, 2].std()))


def test_drift__of_standard_deviations_takes_the_fourth_moment_into_account(tmp_path, rng):
    a, b = rng.standard_t(4, (50, 5)), 1.5 * rng.laplace(size=(80, 5))

    def variance_and_its_error(x):
        n, s2 = len(x), x.var(ddof=1)
        m4 = ((x - x.mean()) ** 4).mean() * (n / (n - 1)) ** 2  # kurtosis times s^4
        return s2, (m4 - s2**2 * (n - 3) / (n - 1)) / n

    rows = drift_of(tmp_path, one_layer(joy=a), one_layer(joy=b))
    for j in range(5):
        (s2_a, v_a), (s2_b, v_b) = variance_and_its_error(a[:, j]), variance_and_its_error(b[:, j])
        assert rows["mlp_post", 0, "joy", j]["z_std"] == pytest.approx((s2_b - s2_a) / np.sqrt(v_a + v_b))


def test_drift__of_gaussian_standard_deviations_has_the_textbook_error(tmp_path):
    """With kurtosis 3, var(s^2) is 2 s^4 / (n - 1)."""
    x = np.sqrt(3) * np.array([[-1.0], [1.0], *[[0.0]] * 4])  # kurtosis 3: a third of the values carries the variance
    a, b = np.repeat(x, 50, axis=0), 1.1 * np.repeat(x, 100, axis=0)
    row = drift_of(tmp_path, one_layer(joy=a), one_layer(joy=b))["mlp_post", 0, "joy", 0]
    s2_a, s2_b = a.var(ddof=1), b.var(ddof=1)
    expected = (s2_b - s2_a) / np.sqrt(2 * s2_a**2 / (len(a) - 1) + 2 * s2_b**2 / (len(b) - 1))
    assert row["z_std"] == pytest.approx(expected)


CALIBRATION = {
    "normal": (lambda rng, shape: rng.normal(size=shape), (0.04, 0.06)),
    "uniform": (lambda rng, shape: rng.uniform(size=shape), (0.04, 0.06)),
    "laplace": (lambda rng, shape: rng.laplace(size=shape), (0.04, 0.065)),
    "student": (lambda rng, shape: rng.standard_t(5, size=shape), (0.03, 0.06)),
    "gelu": (lambda rng, shape: _gelu(rng.normal(-1, 1, size=shape)), (0.035, 0.065)),
    "lognormal": (lambda rng, shape: rng.lognormal(size=shape), (0.02, 0.06)),
}


def _gelu(x):
    return x * stats.norm.cdf(x)


@pytest.mark.parametrize("name", CALIBRATION)
def test_drift__halves_of_the_same_data_pass_196_as_often_as_chance(tmp_path, name):
    draw, (low, high) = CALIBRATION[name]
    x_SN = draw(np.random.default_rng(3), (800, 3000))
    rows = drift_of(tmp_path, one_layer(joy=x_SN[::2]), one_layer(joy=x_SN[1::2])).values()
    z_mean, z_std = (np.array([row[key] for row in rows]) for key in ("z_mean", "z_std"))
    assert 0.04 < (abs(z_mean) > 1.96).mean() < 0.06
    assert low < (abs(z_std) > 1.96).mean() < high
    assert np.median(abs(z_mean)) == pytest.approx(MEDIAN_Z, abs=0.04)


def test_chance__is_the_gaussians():
    for bound, share in ((2, BEYOND_2), (3, BEYOND_3)):
        assert share == pytest.approx(2 * stats.norm.sf(bound), rel=1e-4)
    assert pytest.approx(stats.norm.ppf(0.75)) == MEDIAN_Z


CONSTANT = np.full((5, 1), 0.1)
VARYING = np.array([[1.0], [2.0], [4.0], [1.0]])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (CONSTANT, np.full((9, 1), 0.1), (0, 0, 0, 1)),
        (CONSTANT, CONSTANT + 1, (np.inf, 0, np.inf, 1)),
        (CONSTANT, CONSTANT - 1, (-np.inf, 0, -np.inf, 1)),
        (CONSTANT[:1], VARYING, (None, None, None, None)),
        (VARYING, VARYING[:1], (None, None, None, None)),
        (VARYING, VARYING[:0], (None, None, None, None)),
        (CONSTANT[:0], CONSTANT[:0], (None, None, None, None)),
    ],
)
def test_drift__where_little_is_known_or_nothing_varies(tmp_path, a, b, expected):
    row = drift_of(tmp_path, one_layer(joy=a), one_layer(joy=b))["mlp_post", 0, "joy", 0]
    assert (row["z_mean"], row["z_std"], row["shift"], row["spread"]) == expected


def test_drift__of_a_neuron_that_died_and_of_one_that_woke(tmp_path):
    dead = drift_of(tmp_path / "died", one_layer(joy=VARYING), one_layer(joy=CONSTANT))["mlp_post", 0, "joy", 0]
    awake = drift_of(tmp_path / "woke", one_layer(joy=CONSTANT), one_layer(joy=VARYING))["mlp_post", 0, "joy", 0]
    s2 = VARYING.var(ddof=1)
    z = -(VARYING.mean() - 0.1) / np.sqrt(s2 / 4)
    assert (dead["z_mean"], awake["z_mean"]) == (pytest.approx(z), pytest.approx(-z))
    assert dead["z_std"] == pytest.approx(-awake["z_std"])
    assert dead["z_std"] < 0
    assert (dead["spread"], awake["spread"]) == (0, np.inf)


def test_drift__of_two_values_in_equal_parts_is_finite(tmp_path):
    """The smallest kurtosis there is, 1, which rounding may take below 1."""
    a, b = np.tile([[0.1], [0.7]], (5000, 1)), np.tile([[0.1], [0.7]], (4000, 1))
    row = drift_of(tmp_path, one_layer(joy=a), one_layer(joy=b))["mlp_post", 0, "joy", 0]
    assert row["z_mean"] == pytest.approx(0, abs=1e-9)
    assert abs(row["z_std"]) < 1


# --- summaries ---


def test_summary__counts_what_the_rows_say(tmp_path, rng):
    a = {c: rng.normal(size=(60, 40)) for c in ("anger", "joy")}
    b = {c: x + rng.normal(size=40) * 0.4 for c, x in a.items()}
    b["anger"] *= np.where(np.arange(40) < 25, 0.5, 1.8)
    b["joy"] = 1.3 * b["joy"] + rng.normal(size=(60, 40))
    a["joy"][:, 3] = b["joy"][:, 3] = 0.5  # a dead neuron: no drift
    b["anger"][:, 7] = 2.5
    a["anger"][:, 7] = 1.5  # constant in both, at another value
    rows = drift_of(tmp_path, one_layer(**a), one_layer(**b))
    found = diff(Store(str(tmp_path / "a")), Store(str(tmp_path / "b")), top=5)
    assert {row["concept"] for row in found["drift"]} == {"anger", "joy"}
    for group in [*found["drift"], found["overall"]]:
        mine = [r for (_, _, concept, _), r in rows.items() if group.get("concept") in (None, concept)]
        assert group["n_neurons"] == group["n_compared"] == len(mine)
        assert group["min_n"] == 60
        for what, z in (("mean", "z_mean"), ("std", "z_std")):
            values = np.array([abs(row[z]) for row in mine])
            assert group[f"{what}_share_beyond_2"] == pytest.approx((values > 2).mean())
            assert group[f"{what}_share_beyond_3"] == pytest.approx((values > 3).mean())
            assert group[f"{what}_median_z"] == pytest.approx(np.median(values))
            largest = max(mine, key=lambda row: abs(row[z]))
            assert (group[f"{what}_top_neuron"], group[f"{what}_top_z"]) == (largest["neuron"], largest[z])
        assert group["median_shift"] == pytest.approx(np.median([abs(row["shift"]) for row in mine]))
        factors = [max(row["spread"], 1 / row["spread"]) for row in mine]
        assert group["median_factor"] == pytest.approx(np.median(factors))
    assert [row["mean_median_z"] for row in found["drift"]] == sorted(
        (row["mean_median_z"] for row in found["drift"]), reverse=True
    )
    ordered = sorted(rows.values(), key=lambda row: -max(abs(row["z_mean"]), abs(row["z_std"])))
    assert found["largest"] == ordered[:5]
    assert found["largest"][0]["z_mean"] == np.inf


def test_summary__leaves_out_neurons_without_a_drift(tmp_path):
    a = {"few": VARYING[:1], "joy": VARYING}
    store_a, store_b = write_store(tmp_path / "a", one_layer(**a)), write_store(tmp_path / "b", one_layer(**a))
    found = diff(store_a, store_b)
    few = next(row for row in found["drift"] if row["concept"] == "few")
    assert (few["n_neurons"], few["n_compared"], few["mean_median_z"], few["mean_top_neuron"]) == (1, 0, None, None)
    assert [row["concept"] for row in found["largest"]] == ["joy"]
    assert found["drift"][-1]["concept"] == "few"
    only = write_store(tmp_path / "c", one_layer(few=VARYING[:1]))
    assert diff(only, only)["verdict"] == ["Nothing is known: every neuron has fewer than two values in a store."]


def test_verdict__follows_what_moved(tmp_path, rng):
    x = rng.normal(size=(1000, 200))
    still = diff(*_halves(tmp_path / "still", x, lambda y: y))["verdict"]
    moved = diff(*_halves(tmp_path / "moved", x, lambda y: y + 0.3))["verdict"]
    wider = diff(*_halves(tmp_path / "wider", x, lambda y: 1.3 * y))["verdict"]
    assert ["drift no more than chance" in line for line in still] == [True, True]
    assert ["drift no more than chance" in line for line in moved] == [False, True]
    assert ["drift no more than chance" in line for line in wider] == [True, False]
    assert re.search(r"the median move is 0\.(29|3|31) standard deviations", moved[0])
    assert re.search(r"by a factor of 1\.(29|3|31)", wider[1])


def test_verdict__takes_twice_chance_as_chance():
    numbers = {"n_compared": 9, "median_shift": 0.0, "median_factor": 1.0, "mean_median_z": 0.7, "std_median_z": 0.7}
    lines = verdict(numbers | {"mean_share_beyond_2": 0.09, "std_share_beyond_2": 0.092})
    assert ["no more than chance" in line for line in lines] == [True, False]


def _halves(folder, x, change):
    a = write_store(folder / "a", one_layer(joy=x[::2]), texts="a")
    return a, write_store(folder / "b", one_layer(joy=change(x[1::2])), texts="b")


# --- salience ---


def _two_salience(tmp_path, a: dict, b: dict, width: int) -> tuple[Store, Store]:
    values = one_layer(**{concept: np.tile(np.arange(float(width)), (3, 1)) for concept in {*a, *b}})
    return tuple(
        write_store(tmp_path / name, values, scores={("mlp_post", 0): scores}) for name, scores in (("a", a), ("b", b))
    )


def test_agreement__is_scipys_spearman_with_ties_and_missing_scores(tmp_path, rng):
    a = {
        "joy": {"mean_abs": rng.normal(size=30), "cohens_d": rng.integers(0, 4, 30).astype(float)},
        "fear": {"mean_abs": np.ones(30)},
    }
    b = {"joy": {m: s + rng.integers(0, 2, 30) for m, s in a["joy"].items()}, "fear": {"mean_abs": np.arange(30.0)}}
    a["joy"]["cohens_d"][:2], b["joy"]["cohens_d"][1:4] = np.nan, np.nan
    a["joy"]["cohens_d"][9] = np.inf
    found = diff(*_two_salience(tmp_path, a, b, 30), salience="mean_abs")["salience"]
    rows = {(row["concept"], row["method"]): row for row in found}
    for method in ("mean_abs", "cohens_d"):
        x, y = a["joy"][method], b["joy"][method]
        known = ~(np.isnan(x) | np.isnan(y))
        expected = stats.spearmanr(stats.rankdata(x[known]), y[known]).statistic
        assert rows["joy", method]["spearman"] == pytest.approx(expected)
        assert rows["joy", method]["n_neurons"] == known.sum()
    assert rows["fear", "mean_abs"]["spearman"] is None


def test_agreement__is_the_jaccard_index_of_the_salient_sets(tmp_path):
    a = {"joy": {"mean_abs": np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0.0])}}
    b = {"joy": {"mean_abs": np.array([9, 0, 7, 6, 8, 4, 3, 2, 1, 0.5])}}
    stores = _two_salience(tmp_path, a, b, 10)
    for top_fraction, n_salient, n_both, jaccard in (
        (0.3, 3, 2, 2 / 4),
        (0.39, 3, 2, 2 / 4),
        (0.05, 1, 1, 1),
        (1.0, 10, 10, 1),
        (0.2, 2, 1, 1 / 3),
    ):
        [row] = diff(*stores, top_fraction=top_fraction)["salience"]
        assert (row["n_salient"], row["n_both"], row["jaccard"]) == (n_salient, n_both, pytest.approx(jaccard))


def test_agreement__does_not_call_neurons_without_a_score_salient(tmp_path):
    a = {"joy": {"mean_abs": np.array([3.0, np.nan, np.nan, np.nan])}}
    b = {"joy": {"mean_abs": np.array([3.0, 2.0, np.nan, np.nan])}}
    stores = _two_salience(tmp_path, a, b, 4)
    for pair in (stores, stores[::-1]):
        [row] = diff(*pair, top_fraction=0.5)["salience"]
        assert (row["n_both"], row["jaccard"], row["n_neurons"]) == (1, 1 / 2, 1)
        assert row["spearman"] is None


def test_rank_changes__are_the_largest_of_neurons_salient_in_either(tmp_path):
    a = {"joy": {"mean_abs": np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0.0])}}
    b = {"joy": {"mean_abs": np.array([9, 0, 7, 6, 8, 4, 2, 3, 1, 0.5])}}  # neuron 1: 2 -> 10, neuron 4: 5 -> 2
    found = diff(*_two_salience(tmp_path, a, b, 10), top=20)["rank_changes"]
    assert [(r["neuron"], r["rank_a"], r["rank_b"], r["change"], r["salient_a"], r["salient_b"]) for r in found] == [
        (1, 2, 10, 8, True, False),
        (4, 5, 2, -3, False, True),
    ]
    store_a, store_b = Store(str(tmp_path / "a")), Store(str(tmp_path / "b"))
    assert [row["change"] for row in diff(store_b, store_a)["rank_changes"]] == [-8, 3]
    assert len(diff(store_a, store_b, top=1)["rank_changes"]) == 1


# --- terms ---


X = np.random.default_rng(1).normal(size=(200, 4))


@pytest.mark.parametrize(
    ("changes", "kind", "warning"),
    [
        ({"texts": "b"}, "One model on other texts, none of which stands in both.", None),
        ({"texts": "a"}, "One model on the same texts.", "1 of A's 1 texts stand in B too"),
        (
            {"dataset__fingerprint": "half"},
            "One model on other texts.",
            "1 of A's 1 texts stand in B too: z takes all as independent, and comes out too small",
        ),
        (
            {"model__weights_fingerprint": "x"},
            "Two checkpoints of one architecture on the same texts.",
            "two checkpoints",
        ),
        (
            {"texts": "b", "model__weights_fingerprint": "x"},
            "Two checkpoints of one architecture on other texts, none of which stands in both.",
            "both weights and texts differ",
        ),
        (
            {"model__config_hash": "x", "model__weights_fingerprint": "x", "model__architecture": "Llama"},
            "Two models on the same texts.",
            "configs differ (GPT, Llama)",
        ),
        ({"tokenizer_hash": "x"}, "One model", "the tokenizers differ"),
        ({"model__dtype": "bfloat16"}, "One model", 'model.dtype differs: "float32" in A, "bfloat16" in B'),
        ({"dataset__prompt": "{text}?"}, "One model", 'the prompts differ: "{text}" in A, "{text}?" in B'),
        ({"unit": "mean"}, "One model", 'unit differs: "last_token" in A, "mean" in B'),
        ({"unit": "token"}, "One model", "B holds a value for each token"),
        ({"only_correct": True}, "One model", "only_correct differs: false in A, true in B"),
        ({"coverage": (3, 4)}, "One model", "B is partial: 3 of 4 shards, 30 of 40 samples"),
        ({"tau": 2.0}, "One model", "tau differs: 2.5 in A, 2.0 in B"),
        ({"a_key_of_later": {"x": 1}}, "One model", 'a_key_of_later differs: null in A, {"x": 1} in B'),
        (
            {"model__modules": {"mlp_post": "x"}},
            "One model",
            'model.modules differs: null in A, {"mlp_post": "x"} in B',
        ),
        ({"store_hash": "same"}, "The same run", None),
    ],
    ids=str,
)
def test_terms__name_the_kind_of_comparison_and_what_weakens_it(tmp_path, changes, kind, warning):
    hash_a = {"store_hash": "same"} if "store_hash" in changes else {}
    a = write_store(tmp_path / "a", one_layer(joy=X), texts="a", **hash_a)
    b = write_store(tmp_path / "b", one_layer(joy=X), **{"texts": "a", **changes})
    found = diff(a, b)
    assert found["comparison"].startswith(kind)
    if warning is None:
        assert found["warnings"] == []
    else:
        assert any(warning in line for line in found["warnings"]), found["warnings"]
    assert found["left_out"] == []


def test_terms__name_the_key_of_a_section_that_differs(tmp_path):
    a = write_store(tmp_path / "a", one_layer(joy=X), texts="a", recut={"of": "s", "where": "n < 5"})
    b = write_store(tmp_path / "b", one_layer(joy=X), texts="b", recut={"of": "s", "where": "n >= 5"})
    assert diff(a, b)["warnings"] == ['recut.where differs: "n < 5" in A, "n >= 5" in B']


def test_terms__warn_of_few_values(tmp_path):
    a = write_store(tmp_path / "a", one_layer(joy=X[:99], fear=X), texts="a")
    b = write_store(tmp_path / "b", one_layer(joy=X, fear=X), texts="b")
    [warning] = diff(a, b)["warnings"]
    assert warning.startswith("a concept has as few as 99 values: below 100")


def test_terms__name_what_is_left_out(tmp_path):
    a = write_store(
        tmp_path / "a",
        {("mlp_post", 0): {"joy": X, "fear": X}, ("mlp_post", 1): {"joy": X}, ("attn_out", 0): {"joy": X}},
    )
    b = write_store(
        tmp_path / "b", {("mlp_post", 0): {"joy": X, "it's": X, "law": X}, ("resid_post", 3): {"joy": X}}, texts="b"
    )
    found = diff(a, b)
    assert found["left_out"] == [
        "hook point attn_out: in A only",
        "hook point resid_post: in B only",
        "layer 1: in A only",
        "layer 3: in B only",
        "concept fear: in A only",
        "concepts it's, law: in B only",
    ]
    assert [(row["hook_point"], row["layer"], row["concept"]) for row in found["drift"]] == [("mlp_post", 0, "joy")]
    assert any("only 1 of 4 concepts stand in both: all salience but mean_abs and mean" in w for w in found["warnings"])


def test_diff__refuses_what_has_nothing_in_common(tmp_path):
    a = write_store(tmp_path / "a", one_layer(joy=X))
    b = write_store(tmp_path / "b", {("resid_post", 0): {"joy": X}})
    with pytest.raises(
        UsageError, match=r"no hook point, layer and concept in common.\n  A has hook points mlp_post; layers 0"
    ):
        diff(a, b)


def test_diff__refuses_other_widths(tmp_path):
    a = write_store(tmp_path / "a", one_layer(joy=X))
    b = write_store(tmp_path / "b", one_layer(joy=X[:, :3]))
    with pytest.raises(
        UsageError, match=r"mlp_post of layer 0 is 4 neurons wide in .*/a and 3 in .*/b; expected one width"
    ):
        diff(a, b)


def test_diff__refuses_a_store_without_statistics(tmp_path):
    a = write_store(tmp_path / "a", one_layer(joy=X))
    Store(str(tmp_path / "b")).create_json("store.json", {"format_version": 1})
    with pytest.raises(UsageError, match=r"b holds no statistics yet.*jobs\.statistics"):
        diff(a, Store(str(tmp_path / "b")))


def test_diff__refuses_a_method_that_only_one_has(tmp_path):
    a, b = _two_salience(
        tmp_path, {"joy": {"mean_abs": np.ones(4)}}, {"joy": {"mean_abs": np.ones(4), "f_ratio": np.ones(4)}}, 4
    )
    with pytest.raises(UsageError, match="no salience by 'f_ratio' in common; they share mean_abs"):
        diff(a, b, salience="f_ratio")


# --- where stores lie, what concepts are called ---


def test_diff__reads_two_filesystems(tmp_path):
    fsspec.filesystem("memory").store.clear()
    values_a, values_b = one_layer(joy=X), one_layer(joy=X + 1)
    expected = _comparable(
        diff(write_store(tmp_path / "a", values_a), write_store(tmp_path / "b", values_b, texts="b"))
    )
    a, b = write_store("memory://diff/a", values_a), write_store("memory://diff/b", values_b, texts="b")
    local_a, local_b = Store(str(tmp_path / "a")), Store(str(tmp_path / "b"))
    try:
        for pair in ((a, b), (local_a, b), (a, local_b)):
            assert _comparable(diff(*pair)) == expected
    finally:
        fsspec.filesystem("memory").store.clear()


def _comparable(found: dict) -> dict:
    """Without where the stores lie, and what the order of threads may round otherwise."""
    found["salience"] = [row | {"spearman": round(row["spearman"], 12)} for row in found["salience"]]
    return {key: value for key, value in found.items() if key not in "ab"}


def test_diff__refuses_two_servers_of_one_protocol(tmp_path):
    fs = fsspec.filesystem("memory")
    write_store("memory://diff/a", one_layer(joy=X))
    try:
        elsewhere = Store("memory://diff/a", fs=fsspec.filesystem("memory", skip_instance_cache=True))
        with pytest.raises(UsageError, match=r"lie on two servers, both reached by memory.*Copy one"):
            diff(Store("memory://diff/a"), elsewhere)
    finally:
        fs.store.clear()


def test_diff__takes_any_concept_name_and_two_hundred_of_them(tmp_path, rng):
    names = [*ODD, *(f"concept {i}" for i in range(200 - len(ODD)))]
    values = {("mlp_post", layer): {name: rng.normal(size=(5, 3)) for name in names} for layer in (0, 1)}
    found = diff(write_store(tmp_path / "a", values), write_store(tmp_path / "b", values, texts="b"), top=7)
    assert len(found["drift"]) == len(found["salience"]) == 400
    assert {row["concept"] for row in found["drift"]} == set(names)
    assert len(found["largest"]) == 7


def test_diff__works_on_a_store_of_version_1():
    found = diff(Store(str(OLD)), Store(str(OLD)))
    assert found["comparison"].startswith("The same run")
    assert found["overall"]["n_compared"] == 144
    assert found["overall"]["mean_top_z"] == found["overall"]["std_top_z"] == 0
    assert {row["jaccard"] for row in found["salience"] if row["jaccard"] is not None} == {1.0}


def test_diff__changes_nothing_in_the_stores(tmp_path):
    a, b = write_store(tmp_path / "a", one_layer(joy=X)), write_store(tmp_path / "b", one_layer(joy=X))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    diff(a, b)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("path", sorted((sql_folder() / "diff").glob("*.sql")), ids=lambda path: path.stem)
def test_queries__open_with_the_question_and_name_what_they_read(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("-- ")
    assert lines[0].endswith("?")
    assert lines[1].startswith("-- in: ")
    assert any("out: " in line for line in lines[:4])
    assert all(ord(character) < 128 for line in lines for character in line)


# --- the command ---


def neuronlens(*args, binary: bool = False, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "neuronlens", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=not binary, timeout=300, **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    a = {name: rng.normal(size=(150, 5)) for name in ODD}
    b = {name: x + 0.5 for name, x in a.items()}
    a[ODD[0]][:, 0], b[ODD[0]][:, 0] = 1.0, 2.0  # an infinite z
    write_store(folder / "a", one_layer(**a), texts="a")
    write_store(folder / "b", one_layer(**b), texts="b", unit="mean")
    return folder


def test_command__says_a_verdict_to_a_person_and_gives_a_script_json(pair):
    done = neuronlens("diff", pair / "a", pair / "b", "--top", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1], parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert found["warnings"] == ['unit differs: "last_token" in A, "mean" in B']
    assert found["largest"][0]["z_mean"] == "inf"
    assert found["overall"]["n_neurons"] == 30
    said = " ".join(done.stderr.split())
    for words in (
        "warning: unit differs",
        "One model on other texts",
        "by chance",
        "The means drift:",
        "and 3 rows more",
    ):
        assert words in said
    assert all(len(line) <= 80 for line in done.stderr.splitlines() if "─" in line)


def test_command__gives_rows_in_every_format(pair, tmp_path):
    groups = neuronlens("diff", pair / "a", pair / "b", "--format", "csv")
    assert len(groups.stdout.splitlines()) == 1 + 1 + len(ODD)
    assert "warning: unit differs" in groups.stderr
    rows = neuronlens("diff", pair / "a", pair / "b", "--all", "--format", "csv").stdout.splitlines()
    assert rows[0].startswith("layer,hook_point,neuron,concept,n_a,n_b,mean_a")
    assert len(rows) == 1 + 30
    asked = neuronlens("diff", pair / "a", pair / "b", "--all", "--format", "json")
    assert len(json.loads(asked.stdout)) == 30
    parquet = neuronlens("diff", pair / "a", pair / "b", "--all", "--format", "parquet", binary=True)
    (tmp_path / "drift.parquet").write_bytes(parquet.stdout)
    assert set(pq.read_table(tmp_path / "drift.parquet")["concept"].to_pylist()) == set(ODD)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("b", "--all"), "add --format csv, json or parquet"),
        (("b", "--json", "--format", "csv"), "both want stdout"),
        (("nowhere",), "There is no store"),
        (("b", "--salience", "beauty"), "no salience by 'beauty' in common; they share mean_abs"),
    ],
)
def test_command__gives_a_mistake_one_sentence_and_exit_code_2(pair, args, expected):
    done = neuronlens("diff", "a", *args, cwd=pair)
    assert done.returncode == 2
    assert expected in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_command__has_help_with_an_example():
    done = neuronlens("diff", "--help")
    assert "neuronlens diff" in done.stdout
