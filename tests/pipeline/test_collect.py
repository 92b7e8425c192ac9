"""Collecting without a cluster: what the model answered is recorded, counts, is missed and made again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from neuronlens.errors import UsageError
from neuronlens.models import load_model
from neuronlens.recipe import Recipe
from neuronlens.store import Store
from pipeline.clean import orphans
from pipeline.collect import CollectSpec, collect_shard
from pipeline.driver import DEFAULT_FOLDER, Driver, Silent, intact_shards
from pipeline.frozen import load_shards
from pipeline.plan import Plan, freeze, make_plan
from tests.pipeline.runs import ANSWERS, recipe, table_of
from tests.tiny_models import tiny_model, tiny_tokenizer

ANSWER_COLUMNS = ["sample", "predicted", "correct", "confidence"]


def collect(plan: Plan, store: Store) -> None:
    """The shards that have no receipt yet, one by one in this process."""
    loaded, spec = load_model(plan.description["model"]["id"]), CollectSpec.of(plan.description, plan.answers)
    committed = intact_shards(store, Silent())
    for shard in freeze(plan, store):
        if shard.name not in committed:
            collect_shard(loaded, spec, store, shard)


def collected(asked: Recipe, root: Path) -> Store:
    store = Store(str(root))
    collect(make_plan(asked), store)
    return store


def with_usual_answers(place) -> dict[str, str]:
    """Answers that are sometimes right: joy's is what the tiny model says most often to its texts."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    prompts = [tokenizer(row["text"] + "<sep>", return_tensors="pt") for row in rows if row["label"] == "joy"]
    said = [int(model(**prompt).logits[0, -1].argmax()) for prompt in prompts]
    return {**ANSWERS, "joy": tokenizer.decode([max(set(said), key=said.count)])}


def answers_by_hand(store: Store, model_folder: Path, answers: dict[str, int]) -> list[dict]:
    """A row a text, each run by itself, from transformers and numpy alone."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    rows = []
    for sample in table_of(store.root, "samples", "sample").to_pylist():
        with torch.no_grad():
            logits_V = model(input_ids=torch.tensor([sample["token_ids"]])).logits[0, -1].double().numpy()
        share_V = np.exp(logits_V - logits_V.max())
        right = answers[sample["concept"]]
        rows.append(
            {
                "sample": sample["sample"],
                "shard": sample["shard"],
                "predicted": max(answers, key=lambda concept: logits_V[answers[concept]]),
                "correct": int(logits_V.argmax()) == right,
                "confidence": share_V[right] / share_V.sum(),
            }
        )
    return rows


@pytest.mark.parametrize("unit", ["last_token", "token"])
@pytest.mark.parametrize("only_correct", [False, True])
def test_collect__records_what_the_model_answered_to_every_text(place, tmp_path, small_shards, only_correct, unit):
    answers = with_usual_answers(place)
    data = {"answers": answers, "only_correct": only_correct}
    store = collected(recipe(place, data=data, collect={"unit": unit}), tmp_path)
    ids = {concept: tiny_tokenizer()(answer)["input_ids"][0] for concept, answer in answers.items()}
    assert store.describe()["answers"] == ids
    want = answers_by_hand(store, place / "model", ids)
    assert 0 < sum(row["correct"] for row in want) < 120
    got = table_of(tmp_path, "samples", "sample").select(ANSWER_COLUMNS).to_pylist()
    for ours, theirs in zip(got, want, strict=True):
        assert [ours[name] for name in ANSWER_COLUMNS[:3]] == [theirs[name] for name in ANSWER_COLUMNS[:3]]
        assert ours["confidence"] == pytest.approx(theirs["confidence"], rel=1e-4)
    assert store.faults() == []
    for receipt in store.receipts("commits"):
        mine = [row["correct"] for row in want if row["shard"] == receipt["shard"]]
        [file] = [file for file in receipt["files"] if file["kind"] == "predictions"]
        assert (file["n_rows"], receipt["n_correct"]) == (len(mine), sum(mine))
        assert receipt["n_kept"] == (sum(mine) if only_correct else len(mine))


def test_collect__has_raw_values_of_the_correct_texts_only_where_asked(place, tmp_path, small_shards):
    store = collected(recipe(place, data={"answers": with_usual_answers(place), "only_correct": True}), tmp_path)
    samples = table_of(store.root, "samples", "sample").to_pylist()
    raw = set(table_of(store.root, "activations", "all")["sample"].to_pylist())
    assert raw == {row["sample"] for row in samples if row["correct"]}


def test_collect__counts_correct_texts_without_recording_them(place, tmp_path, small_shards):
    data = {"answers": with_usual_answers(place), "only_correct": True}
    store = collected(recipe(place, data=data, collect={"predictions": False}), tmp_path)
    assert "predictions" not in store.file_lists()
    receipts = store.receipts("commits")
    assert all(receipt["n_correct"] == receipt["n_kept"] < receipt["n_samples"] for receipt in receipts)


def test_collect__records_nothing_without_answers(place, tmp_path, small_shards):
    store = collected(recipe(place, data={"answers": None}), tmp_path)
    assert "predictions" not in store.file_lists()
    assert {receipt["n_correct"] for receipt in store.receipts("commits")} == {None}
    assert table_of(store.root, "samples", "all")["correct"].null_count == 120


def test_collect__makes_a_shard_again_whose_predictions_are_lost(place, tmp_path, small_shards):
    asked = recipe(place)
    store = collected(asked, tmp_path)
    whole = table_of(store.root, "samples", "sample")
    lost = next(file.path for file in store.committed_files() if file.kind == "predictions")
    (tmp_path / lost).rename(tmp_path / "predictions" / "shard-00000.abcdefabcdef.parquet")
    assert [fault for fault in store.faults() if lost in fault]
    collect(make_plan(asked), store)
    assert store.faults() == []
    assert table_of(store.root, "samples", "sample").equals(whole)
    assert [orphan.path for orphan in orphans(store)] == ["predictions/shard-00000.abcdefabcdef.parquet"]


@pytest.mark.parametrize("root", ["anywhere", None])
def test_plan__goes_on_with_a_store_from_before_predictions(
    place, tmp_path, monkeypatch, small_shards, ray_cluster, root
):
    """Such a store has no such key, and the hash of one that was asked to do without (test_plan.py)."""
    monkeypatch.chdir(tmp_path)
    old = make_plan(recipe(place, collect={"predictions": False}))
    store = Store(root or f"{DEFAULT_FOLDER}/mine-{old.store_hash[:12]}")
    collect(old, store)
    description = store.describe()
    assert description.pop("predictions") is False
    store.replace_json("store.json", description)
    store.remove(f"commits/{load_shards(store)[2].name}.json")
    plan, found = Driver(recipe=recipe(place)).plan(name="mine", store_root=root)
    assert found.root == store.root
    collect(plan, found)
    assert store.describe() == description
    assert "predictions" not in store.file_lists()
    assert table_of(store.root, "samples", "all")["correct"].null_count == 120
    plan, _ = Driver(recipe=recipe(place, collect={"predictions": True})).plan(name="mine", store_root=store.root)
    with pytest.raises(UsageError, match="predictions: False in the store, True asked for"):
        freeze(plan, store)
