"""The report's queries, held to numpy on the values themselves."""

import itertools

import numpy as np
import pytest

from neuronlens.query import connect, run_file
from tests.report_stores import (
    arrays,
    evaluation_row,
    generation_rows,
    put_evaluation,
    put_generation,
    put_sweep,
    write_report_store,
)
from tests.synthetic_store import bins_of, moments_of

CONCEPTS = ("anger", "it's", "joy", "law")
WIDTH, N_LAYERS, N_SAMPLES = 12, 2, 60
N_SALIENT = 3  # floor(0.3 * 12)


@pytest.fixture(scope="module")
def values():
    values = arrays(CONCEPTS, n_layers=N_LAYERS, n_samples=N_SAMPLES, width=WIDTH)
    values["joy"][0, :, 5] = 2.5
    values["law"][1, 0, 3] = 80.0
    return values


@pytest.fixture(scope="module")
def con(values, tmp_path_factory):
    store = write_report_store(tmp_path_factory.mktemp("sql") / "store", values, answered=True)
    with connect(store.file_lists()) as con:
        yield con


def rows(con, query: str, **params) -> list[dict]:
    return run_file(con, query, **params).to_pylist()


def ovl(values, layer: int, neuron: int, a: str, b: str) -> float:
    p, q = (bins_of(values[c][layer, :, neuron]) for c in (a, b))
    return sum(min(p.get(k, 0), q.get(k, 0)) for k in p) / N_SAMPLES


def salient(values, layer: int, concept: str) -> set[int]:
    mean_abs = np.abs(values[concept][layer].astype(np.longdouble)).mean(axis=0)
    return set(np.argsort(-mean_abs, kind="stable")[:N_SALIENT].tolist())


def mean_ovl(values, layer: int, neuron: int, concepts=CONCEPTS) -> float:
    """Meant over concepts, each with all others."""
    return float(np.mean([np.mean([ovl(values, layer, neuron, c, d) for d in CONCEPTS if d != c]) for c in concepts]))


def test_report_answers__is_the_share_answered_right(con):
    assert rows(con, "report_answers") == [
        {"concept": c, "n_answered": N_SAMPLES, "accuracy": 0.5, "confidence": 0.5} for c in CONCEPTS
    ]


def test_report_gaussianity__counts_shapes_layer_by_layer(con, values):
    for row in rows(con, "report_gaussianity"):
        shapes = [moments_of(values[c][row["layer"], :, n]) for c in CONCEPTS for n in range(WIDTH)]
        varying = [shape for shape in shapes if shape["skewness"] is not None]
        near = [abs(s["skewness"]) < 1 and 2 <= s["kurtosis"] <= 5 for s in varying]
        assert (row["n_bumps"], row["n_constant"]) == (len(varying), len(shapes) - len(varying))
        assert row["share_near_gaussian"] == pytest.approx(np.mean(near))
        excess = np.array([s["kurtosis"] - 3 for s in varying])
        assert [row[f"{p}_excess_kurtosis"] for p in ("p05", "median", "p95")] == pytest.approx(
            np.quantile(excess, [0.05, 0.5, 0.95]), rel=1e-6
        )
        jarque_bera = [N_SAMPLES / 6 * (s["skewness"] ** 2 + (s["kurtosis"] - 3) ** 2 / 4) for s in varying]
        assert row["median_jarque_bera"] == pytest.approx(np.median(jarque_bera), rel=1e-6)
    assert [row["n_constant"] for row in rows(con, "report_gaussianity")] == [1, 0]


def test_report_gaussianity_by_concept__leaves_constant_neurons_out(con, values):
    found = {(row["layer"], row["concept"]): row for row in rows(con, "report_gaussianity_by_concept")}
    assert len(found) == N_LAYERS * len(CONCEPTS)
    assert found[0, "joy"]["n_neurons"] == WIDTH - 1
    shapes = [moments_of(values["law"][1, :, n]) for n in range(WIDTH)]
    near = np.mean([abs(s["skewness"]) < 1 and 2 <= s["kurtosis"] <= 5 for s in shapes])
    assert found[1, "law"]["share_near_gaussian"] == pytest.approx(near)


def test_report_overlap__is_the_mean_over_neurons(con, values):
    found = rows(con, "report_overlap", concepts=["it's", "joy", "law"])
    assert len(found) == N_LAYERS * 3
    for row in found:
        pair = row["concept_a"], row["concept_b"]
        expected = np.mean([ovl(values, row["layer"], n, *pair) for n in range(WIDTH)])
        assert row["mean_ovl"] == pytest.approx(expected, abs=1e-6)


def test_report_overlap_by_layer__names_the_extreme_pairs(con, values):
    for row in rows(con, "report_overlap_by_layer"):
        means = {
            pair: float(np.mean([ovl(values, row["layer"], n, *pair) for n in range(WIDTH)]))
            for pair in itertools.combinations(CONCEPTS, 2)
        }
        assert row["mean_ovl"] == pytest.approx(np.mean(list(means.values())), abs=1e-6)
        assert (row["lowest_a"], row["lowest_b"]) == min(means, key=means.__getitem__)
        assert (row["highest_a"], row["highest_b"]) == max(means, key=means.__getitem__)
        assert row["highest_ovl"] == pytest.approx(max(means.values()), abs=1e-6)
        assert (row["n_pairs"], row["n_dropped"]) == (6, 0)


def test_report_concepts__takes_those_that_overlap_most(con, values):
    shared = {
        c: sum(ovl(values, la, n, c, d) for d in CONCEPTS if d != c for la in range(N_LAYERS) for n in range(WIDTH))
        for c in CONCEPTS
    }
    expected = sorted(sorted(shared, key=shared.__getitem__)[-2:])
    assert [row["concept"] for row in rows(con, "report_concepts", n_concepts=2)] == expected
    assert [row["concept"] for row in rows(con, "report_concepts", n_concepts=99)] == sorted(CONCEPTS)


def test_report_salient_overlap__is_the_jaccard_index_of_the_salient_sets(con, values):
    found = rows(con, "report_salient_overlap", concepts=list(CONCEPTS[1:]))
    assert len(found) == N_LAYERS * 3
    for row in found:
        a, b = (salient(values, row["layer"], row[f"concept_{side}"]) for side in "ab")
        assert row["n_both"] == len(a & b)
        assert row["jaccard"] == pytest.approx(len(a & b) / len(a | b))


def test_report_salient_overlap__agrees_with_the_view(con):
    view = con.sql("from salient_overlap").to_arrow_table().to_pylist()
    of_view = {(r["layer"], r["concept_a"], r["concept_b"]): r["jaccard"] for r in view}
    found = rows(con, "report_salient_overlap", concepts=list(CONCEPTS))
    assert {(r["layer"], r["concept_a"], r["concept_b"]): r["jaccard"] for r in found} == of_view


def test_report_polysemantic__counts_every_neuron_once(con, values):
    found = rows(con, "report_polysemantic")
    for layer in range(N_LAYERS):
        own = {row["n_concepts"]: row["n_neurons"] for row in found if row["layer"] == layer}
        served = [sum(n in salient(values, layer, c) for c in CONCEPTS) for n in range(WIDTH)]
        assert own == {k: served.count(k) for k in set(served)}


def test_report_separable_neurons__are_those_with_the_least_overlap(con, values):
    everywhere = {
        (layer, n): mean_ovl(values, layer, n)
        for layer in range(N_LAYERS)
        for n in range(WIDTH)
        if (layer, n) != (0, 5)  # constant under joy
    }
    expected = sorted(everywhere, key=everywhere.__getitem__)
    assert [(r["layer"], r["neuron"]) for r in rows(con, "report_separable_neurons", n_neurons=4)] == expected[:4]
    found = rows(con, "report_separable_neurons", n_neurons=99)
    assert {(row["layer"], row["neuron"]) for row in found} == set(expected)
    for row, site in zip(found, expected, strict=True):  # some are equal but for rounding
        assert row["mean_ovl"] == pytest.approx(everywhere[row["layer"], row["neuron"]], abs=1e-6)
        assert row["mean_ovl"] == pytest.approx(everywhere[site], abs=1e-6)


def test_report_polysemantic_neurons__serve_the_most_concepts_and_overlap_least(con, values):
    served = {}
    for layer, n in itertools.product(range(N_LAYERS), range(WIDTH)):
        concepts = [c for c in CONCEPTS if n in salient(values, layer, c)]
        if len(concepts) > 1:
            served[layer, n] = (-len(concepts), mean_ovl(values, layer, n, concepts), concepts)
    expected = sorted(served, key=lambda site: (served[site][:2], site))
    counts = [served[site][0] for site in expected]
    assert len(set(counts)) < len(counts), "none are equal: their order shows nothing"
    found = rows(con, "report_polysemantic_neurons", n_neurons=99)
    assert [(row["layer"], row["neuron"]) for row in found] == expected
    for row in found:
        n_concepts, overlap, concepts = served[row["layer"], row["neuron"]]
        assert (row["n_concepts"], row["concepts"]) == (-n_concepts, concepts)
        assert row["mean_ovl"] == pytest.approx(overlap, abs=1e-6)


def test_report_polysemantic_neurons__leaves_out_neurons_of_one_value(tmp_path):
    values = arrays(["a", "b"], n_layers=1)
    for x_LSN in values.values():
        x_LSN[:, :, 9:] = 50.0
    store = write_report_store(tmp_path / "store", values)
    with connect(store.file_lists()) as con:
        assert rows(con, "report_polysemantic_neurons", n_neurons=5) == []


def test_report_queries__answer_for_each_hook_point(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"]), hook_points=("mlp_post", "resid_post"))
    with connect(store.file_lists()) as con:
        for query, params in (("report_separable_neurons", {"n_neurons": 2}), ("report_gaussianity", {})):
            found = [row["hook_point"] for row in rows(con, query, **params)]
            assert sorted(found) == ["mlp_post"] * 2 + ["resid_post"] * 2


def test_neuron_histogram__sums_the_bins_over_shards(con, values):
    found = rows(con, "neuron_histogram", hook_point="mlp_post", layer=1, neuron=3)
    for concept in CONCEPTS:
        own = {row["bin"]: row["n"] for row in found if row["concept"] == concept}
        assert own == bins_of(values[concept][1, :, 3])


def test_report_evaluations__are_the_rows_of_the_files_in_the_order_of_conditions(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    kept = [evaluation_row(c, k, 0.5, 0.25) for c in "ba" for k in ("range", "base", "neuron")]
    put_evaluation(tmp_path / "store", kept, action="dampen", factor=0.5, layers=[0])
    with connect(store.file_lists()) as con:
        found = rows(con, "report_evaluations")
    assert [(row["concept"], row["condition"]) for row in found] == [
        (c, k) for c in "ab" for k in ("base", "neuron", "range")
    ]
    of_file = {(row["concept"], row["condition"]): row for row in kept}
    for row in found:
        assert (row["action"], row["factor"], row["layers"], row["n_texts"]) == ("dampen", 0.5, [0], 90)
        for name, value in of_file[row["concept"], row["condition"]].items():
            assert row[name] == value, name


def test_report_sweeps__are_the_means_with_their_settings_in_order(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    settings = [
        {"tau": 1.5, "layers": [0], "drops": (0.4, 0.1, 0.2)},
        {"method": "hpd", "tau": None, "mass": 0.9, "action": "others", "drops": (0.6, 0.0, 0.3)},
    ]
    put_sweep(tmp_path / "store", settings, controls={"shuffled": (0.2, 0.2)})
    put_evaluation(tmp_path / "store", [evaluation_row("a", "range", 0.5, 0.5)])  # of old code, without means
    with connect(store.file_lists()) as con:
        found = rows(con, "report_sweeps")
    assert [(row["setting"], row["condition"]) for row in found] == [
        (i, k) for i in (0, 1) for k in ("neuron", "range", "shuffled")
    ]
    keys = ("tau", "layers", "method", "mass", "action")
    assert [[row[key] for key in keys] for row in found if row["condition"] == "range"] == [
        [1.5, [0], "paper", None, "zero"],
        [None, None, "hpd", 0.9, "others"],
    ]
    ranged = found[1]
    assert [ranged[f"target_drop{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.4, 0.38, 0.42])
    assert [ranged[f"complement_drop{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.1, 0.08, 0.12])
    assert [ranged[f"selectivity{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.3, 0.27, 0.33])
    assert (ranged["kl_complement"], ranged["kl_target"], ranged["changed_share"]) == (0.2, 0.4, 0.4)
    assert (ranged["n_texts"], ranged["bare_confidence"]) == (120, 0.9)


def test_report_sweeps__number_the_sets_of_texts_that_evaluations_share(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    sets = {"s.1": ("a", 100), "s.2": ("a", 100), "s.3": ("b", 100), "s.4": ("c", 200), "s.5": (None, 100)}
    for name, (texts_hash, n_texts) in (sets | {"s.6": (None, 100)}).items():
        put_sweep(tmp_path / "store", [{"drops": (0.4, 0.1, 0.2)}], name=name, texts_hash=texts_hash, n_texts=n_texts)
    with connect(store.file_lists()) as con:
        texts = {row["evaluation_id"]: row["texts"] for row in rows(con, "report_sweeps")}
    assert texts["s.1"] == texts["s.2"]
    assert sorted(texts.values()) == [1, *[2] * 2, 3, 4, 5]
    assert texts["s.4"] == 1


def test_report_sweep_concepts__are_those_of_one_setting(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    settings = [{"tau": tau, "drops": (tau / 10, 0.1, 0.2)} for tau in (1.0, 2.0)]
    put_sweep(tmp_path / "store", settings, concepts=["b", "a"])
    put_sweep(tmp_path / "store", settings, name="sweep.2", concepts=["c"])
    with connect(store.file_lists()) as con:
        found = rows(con, "report_sweep_concepts", evaluation_id="sweep.000000000001", setting=1)
    assert [(row["concept"], row["condition"]) for row in found] == [
        (concept, condition) for concept in "ab" for condition in ("neuron", "range")
    ]
    drops = {row["concept"]: row["target_drop"] for row in found if row["condition"] == "range"}
    assert drops == pytest.approx({"b": 0.3, "a": 0.1})


def test_report_generations__are_the_rows_of_the_files_the_means_after_their_concepts(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    kept = generation_rows(["b", "a"])
    put_generation(tmp_path / "store", kept[::-1], name="tbl_0.002", action="dampen", factor=0.5, layers=[0])
    put_generation(tmp_path / "store", kept[:1], name="tbl_0.001", n_prompts=7, classifier="other")
    with connect(store.file_lists()) as con:
        found = rows(con, "report_generations")
    expected = [("tbl_0.002", c, k) for c in ("a", "b", None) for k in ("base", "neuron", "range")]
    assert [(row["generation_id"], row["concept"], row["condition"]) for row in found] == [
        *expected,
        ("tbl_0.001", "b", "base"),
    ]
    of_file = {(row["concept"], row["condition"]): row for row in kept}
    for row in found[:-1]:
        assert (row["action"], row["factor"], row["layers"], row["n_prompts"]) == ("dampen", 0.5, [0], 90)
        assert (row["classifier"], row["max_tokens"], row["temperature"]) == ("org/judge", 32, 0.0)
        for name, value in of_file[row["concept"], row["condition"]].items():
            assert row[name] == value, name
    assert (found[-1]["n_prompts"], found[-1]["classifier"]) == (7, "other")
