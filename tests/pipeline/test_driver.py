"""The main job end to end on a tiny model: the same for any number of workers, resumable, true to the raw values."""

import json
import os
import shutil

import numpy as np
import pytest
import ray
import torch

from neuronlens.errors import UsageError
from neuronlens.moments import Moments
from neuronlens.query import connect, run_file
from neuronlens.ranges import RangeTable
from neuronlens.recipe import ComputeSection, parse_recipe
from neuronlens.store import Store
from pipeline import driver, workers
from pipeline.workers import Spares
from tests.pipeline.runs import ANSWERS, TWO_WORKERS, assert_same_tables, recipe, run, run_here, table_of
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("ray_cluster", "small_shards")


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory, ray_cluster):
    """One run that others are compared with."""
    patch = pytest.MonkeyPatch()
    patch.setattr("pipeline.plan.MIN_SHARD_TOKENS", 150)
    root = tmp_path_factory.mktemp("finished") / "store"
    summary = run(place, root, collect={"hook_points": ["mlp_post", "resid_post"]}, compute=TWO_WORKERS)
    patch.undo()
    return root, summary


def test_run__leaves_everything_that_it_promises(finished):
    root, summary = finished
    assert summary.n_samples == 120
    assert set(summary.stages) == {"plan", "collect", "statistics", "ranges", "evaluate"}
    assert [(row["concept"], row["condition"]) for row in summary.erasure] == [
        (concept, condition) for concept in ("anger", "fear", "joy", None) for condition in ("base", "neuron", "range")
    ]
    table = RangeTable.load(str(root / "ranges" / summary.range_table))
    assert table.concepts == ("anger", "fear", "joy")
    assert table.hook_points == ("mlp_post", "resid_post")
    assert Store(str(root)).faults() == []
    shards = table_of(root, "shards", "shard")
    assert shards.num_rows > 6
    assert len(Store(str(root)).file_lists()["predictions"]) == shards.num_rows
    assert table_of(root, "samples", "all")["correct"].null_count == 0


def test_run__moments_are_those_of_the_raw_values(finished):
    root, _ = finished
    raw = table_of(root, "activations", "hook_point, layer, neuron, sample").to_pandas()
    moments = table_of(root, "moments", "hook_point, layer, neuron, concept").to_pandas()
    assert len(raw) == 120 * 2 * (40 + 16)
    assert len(moments) == 3 * 2 * (40 + 16)
    for key, values in raw.groupby(["hook_point", "layer", "neuron", "concept"], observed=True)["value"]:
        if key[2] % 7:
            continue
        want = Moments.of(values.to_numpy()[:, None])
        row = moments.set_index(["hook_point", "layer", "neuron", "concept"]).loc[key]
        assert row["n"] == len(values)
        for name in ("mean", "std", "skewness", "kurtosis", "mean_abs"):
            np.testing.assert_allclose(row[name], getattr(want, f"{name}_N")[0], rtol=2e-5, atol=2e-6)


def test_run__partials_merge_to_what_sql_computes_from_the_raw_values(finished):
    root, _ = finished
    with connect(Store(str(root)).file_lists()) as con:
        for hook_point, layer in (("mlp_post", 0), ("mlp_post", 1), ("resid_post", 1)):
            raw = run_file(con, "moments_from_raw", hook_point=hook_point, layer=layer).to_pandas()
            site = f"hook_point = '{hook_point}' and layer = {layer}"
            merged = con.sql(f"from moments where {site} order by neuron, concept").to_arrow_table().to_pandas()
            assert len(raw) == len(merged) > 0
            for name in ("neuron", "concept", "n", "n_nonfinite", "min", "max"):
                np.testing.assert_array_equal(merged[name], raw[name])
            for name in ("mean", "std", "skewness", "kurtosis", "mean_abs"):
                np.testing.assert_allclose(merged[name], raw[name], rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("one_thread_each")
@pytest.mark.parametrize("n_workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_run__gives_the_same_for_one_worker_two_and_three(place, tmp_path, finished, n_workers):
    root, summary = finished
    again = run(
        place,
        tmp_path,
        collect={"hook_points": ["mlp_post", "resid_post"]},
        compute={"workers": n_workers},
        test=None,
    )
    assert_same_tables(tmp_path, root)
    assert table_of(tmp_path, "activations", "all").equals(table_of(root, "activations", "all"))
    assert again.range_table == summary.range_table


def test_run__evaluates_in_the_process_that_collected(place, tmp_path, monkeypatch):
    """Each process more imports torch and transformers once more."""
    started, start = [], workers._actor_class

    def counted(*resources):
        started.append(resources)
        return start(*resources)

    monkeypatch.setattr(workers, "_actor_class", counted)
    monkeypatch.setattr(driver, "Spares", Spares)
    summary = run(place, tmp_path / "store")
    assert len(summary.erasure) == 12
    assert started == [(0, 0)], "cores that it held would be missing to the statistics"


def test_spares__forget_a_worker_that_died(place, tmp_path):
    with Spares(ComputeSection(workers=1)) as spares:
        actor = spares.take()
        ray.kill(actor)
        spares.put(actor)
        assert spares.take() is None


@pytest.mark.usefixtures("one_thread_each")
def test_run__goes_on_where_it_stopped(place, tmp_path, finished):
    root, summary = finished
    copy = tmp_path / "store"
    shutil.copytree(root, copy)
    lost = sorted((copy / "commits").iterdir())[3]
    lost.unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in (copy / "commits").iterdir()}
    again = run(place, copy, collect={"hook_points": ["mlp_post", "resid_post"]})
    assert lost.exists()
    assert {name: (copy / "commits" / name).stat().st_mtime_ns for name in kept} == kept
    assert again.range_table == summary.range_table
    assert again.erasure == summary.erasure


@pytest.fixture(params=[run_here, pytest.param(run, marks=pytest.mark.slow)], ids=["here", "on Ray"])
def filled(request, place, tmp_path):
    """A function that makes a store in tmp_path by a recipe of these sections."""
    return lambda **sections: request.param(place, tmp_path, test=None, **sections)


@pytest.mark.parametrize("unit", ["token", "mean"])
def test_run__takes_every_unit(filled, tmp_path, unit):
    filled(collect={"unit": unit})
    n = table_of(tmp_path, "moments", "all")["n"].to_numpy()
    with connect(Store(str(tmp_path)).file_lists()) as con:
        [(n_texts, n_tokens)] = con.sql(
            "select count(*), sum(len(list_filter(token_ids, lambda id: id > 5))) from samples"
        ).fetchall()
    per_neuron = n.reshape(-1).sum() / (2 * 40)
    assert per_neuron == (n_tokens if unit == "token" else n_texts)


def test_run__keeps_statistics_without_histograms_and_raw(filled, tmp_path):
    filled(collect={"histograms": False, "raw": "none"})
    overlap = table_of(tmp_path, "overlap", "all").to_pandas()
    assert overlap["ovl"].isna().all()
    assert overlap["ovl_gaussian"].notna().all()
    assert not (tmp_path / "raw").exists()


def test_run__keeps_raw_values_of_chosen_neurons_only(filled, tmp_path):
    filled(collect={"raw": {"layers": [1], "neurons": [3, 39]}})
    raw = table_of(tmp_path, "activations", "all").to_pandas()
    assert set(raw["layer"]) == {1}
    assert set(raw["neuron"]) == {3, 39}
    assert len(raw) == 120 * 2


def test_run__counts_correct_answers_only_where_asked(filled, place, tmp_path):
    """The answer of joy is made to be what the tiny model says most often; whether it does is asked text by text."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    prompts = [tokenizer(row["text"] + "<sep>", return_tensors="pt") for row in rows if row["label"] == "joy"]
    said = [int(model(**prompt).logits[0, -1].argmax()) for prompt in prompts]
    usual = max(set(said), key=said.count)
    answers = {**ANSWERS, "joy": tokenizer.decode([usual])}
    filled(data={"only_correct": True, "answers": answers})
    n = table_of(tmp_path, "moments", "all").to_pandas().groupby("concept")["n"].max()
    assert 2 <= n["joy"] == said.count(usual) < 40
    assert n["anger"] < 40


@pytest.mark.parametrize(
    "architecture", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("distilbert", "roberta"))]
)
def test_run__evaluates_a_classifier_by_its_head(place, tmp_path, architecture):
    save_tiny(tmp_path / "model", architecture, head="classifier")
    summary = run(
        place,
        tmp_path / "store",
        model={"id": str(tmp_path / "model")},
        data={"prompt": "{text}", "answers": None},
        collect={"unit": "mean"},
    )
    labels = {"joy": 0, "anger": 1, "fear": 2}
    assert Store(summary.store).describe()["answers"] == labels
    answered = table_of(summary.store, "samples", "sample").select(["token_ids", "concept", "predicted", "correct"])
    model = tiny_model(architecture, head="classifier")
    for row in answered.to_pylist():
        best = int(model(input_ids=torch.tensor([row["token_ids"]])).logits[0].argmax())
        assert (labels[row["predicted"]], row["correct"]) == (best, best == labels[row["concept"]])
    base = [row for row in summary.erasure if row["condition"] == "base" and row["concept"] is not None]
    assert sum(row["n_target"] for row in base) == 30
    assert all(row["perplexity"] is None and row["target_accuracy"] is not None for row in base)


def test_run__gives_a_plain_language_model_its_perplexity(place, tmp_path):
    summary = run(place, tmp_path, data={"answers": None})
    assert all(row["target_accuracy"] is None and row["perplexity"] > 1 for row in summary.erasure)


def test_run__refuses_test_texts_of_an_unknown_concept(place, tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"text": "so glad", "label": "pride"}) + "\n")
    with pytest.raises(UsageError, match=r"concept 'pride' \(1 of 1 rows\), for which .*train.jsonl has no texts"):
        run(place, tmp_path / "store", test={"source": str(path)})
    assert not (tmp_path / "store").exists()


def test_run__preset_paper_reads_the_last_residual_stream(place, tmp_path):
    paper = parse_recipe(
        {
            "preset": "paper",
            "compute": {"workers": 1},
            "model": {"id": str(place / "model")},
            "data": {"source": str(place / "train.jsonl"), "prompt": "{text}<sep>", "answers": ANSWERS},
        }
    )
    summary = driver.run(paper, name="paper", store_root=str(tmp_path))
    table = RangeTable.load(str(tmp_path / "ranges" / summary.range_table))
    assert (table.hook_points, table.layers) == (("resid_post",), (1,))
    assert table.rows.num_rows == 3 * int(0.3 * 16)


def test_run__puts_the_store_under_the_working_folder_by_default(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = driver.run(recipe(place, test=None), name="mine")
    assert summary.erasure == []
    assert os.path.relpath(summary.store, tmp_path).startswith("neuronlens-runs/mine-")
