"""The plan: shards that are frozen, complete and independent of everything but the data; and refusals before work
starts."""

import json

import numpy as np
import pytest

from neuronlens.errors import UsageError
from neuronlens.recipe import parse_recipe
from neuronlens.store import Store
from pipeline.collect import batches_of, read_samples
from pipeline.plan import check_room, freeze, make_plan
from tests.tiny_models import SENTENCES, save_tiny, tiny_tokenizer

WORDS = " ".join(SENTENCES).split()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(place, **sections):
    content = {
        "model": {"id": str(place / "model")},
        "data": {"source": str(place / "train.jsonl"), "prompt": "{text}<sep>"},
    }
    for section, values in sections.items():
        content[section] = {**content.get(section, {}), **values}
    return parse_recipe(content)


def test_plan__holds_every_sample_once_in_shards_of_one_concept(place, tmp_path, small_shards):
    plan = make_plan(recipe(place))
    store = Store(str(tmp_path))
    shards = freeze(plan, store)
    assert len(shards) > 6
    seen, rows = [], [json.loads(line) for line in (place / "train.jsonl").open()]
    for shard in shards:
        table = read_samples(store, shard)
        seen += table["row"].to_pylist()
        for row, text, ids in zip(*(table[name].to_pylist() for name in ("row", "text", "token_ids")), strict=True):
            assert rows[row] == {"text": text, "label": shard.concept}
            assert ids == tiny_tokenizer()(text + "<sep>")["input_ids"]
        assert sum(map(len, table["token_ids"].to_pylist())) == shard.n_tokens
    assert sorted(seen) == list(range(120))


def test_plan__fills_batches_to_the_token_budget_and_no_further(place, tmp_path, small_shards):
    plan = make_plan(recipe(place, compute={"tokens_per_batch": 60}))
    store = Store(str(tmp_path))
    for shard in freeze(plan, store):
        batches = list(batches_of(read_samples(store, shard), pad_id=0))
        assert len(batches) == shard.n_batches
        assert np.concatenate([rows for rows, _ in batches]).tolist() == list(range(shard.n_samples))
        assert all(batch.ids_BT.numel() <= 60 or len(batch.ids_BT) == 1 for _, batch in batches)


def test_plan__is_the_same_whatever_the_workers(place, small_shards):
    one, many = (make_plan(recipe(place, compute={"workers": n})) for n in (1, 7))
    assert (one.shards, one.store_hash) == (many.shards, many.store_hash)


@pytest.mark.parametrize(
    "sections",
    [
        {"collect": {"unit": "token"}},
        {"collect": {"layers": [0]}},
        {"collect": {"histograms": False}},
        {"data": {"prompt": "{text}"}},
        {"data": {"max_per_concept": 5}},
    ],
)
def test_plan__has_another_hash_where_the_content_would_differ(place, sections):
    assert make_plan(recipe(place, **sections)).store_hash != make_plan(recipe(place)).store_hash


def test_plan__keeps_its_hash_where_the_content_would_not_differ(place):
    same = recipe(place, ranges={"tau": 1.0}, compute={"workers": 3}, test={"source": "elsewhere.jsonl"})
    assert make_plan(same).store_hash == make_plan(recipe(place)).store_hash


def test_freeze__refuses_a_store_made_by_another_recipe(place, tmp_path):
    store = Store(str(tmp_path))
    freeze(make_plan(recipe(place)), store)
    freeze(make_plan(recipe(place)), store)
    with pytest.raises(UsageError, match=r"made by another recipe .*unit: last_token in the store, token asked for"):
        freeze(make_plan(recipe(place, collect={"unit": "token"})), store)


def test_plan__cuts_and_counts_texts_longer_than_the_window(place, tmp_path):
    write(tmp_path / "long.jsonl", [{"text": " ".join(WORDS * 3), "label": "joy"}, {"text": "so glad", "label": "joy"}])
    plan = make_plan(recipe(place, data={"source": str(tmp_path / "long.jsonl")}))
    assert plan.description["dataset"]["n_truncated"] == 1
    assert plan.n_tokens <= 64 + 10


def test_plan__drops_raw_values_that_pass_the_budget(place):
    kept, dropped = (make_plan(recipe(place, collect={"raw_budget": budget})) for budget in ("1GB", "1KB"))
    assert kept.estimate.raw_kept
    assert not dropped.estimate.raw_kept
    assert "would pass collect.raw_budget" in dropped.estimate.raw_note
    assert make_plan(recipe(place, collect={"raw_budget": "1KB", "raw": "all"})).estimate.raw_kept


def test_check_room__refuses_what_the_disk_cannot_hold(place, tmp_path, monkeypatch):
    plan = make_plan(recipe(place))
    check_room(plan, Store(str(tmp_path / "not" / "yet")))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000})())
    with pytest.raises(UsageError, match=r"expected to write .* GB free"):
        check_room(plan, Store(str(tmp_path)))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"data": {"answers": {"joy": "<joy>"}}},
            r"data\.answers has no entry for the label 'anger' \(\d+ of 120 rows",
        ),
        ({"data": {"answers": {"joy": "<joy>", "anger": "i feel so", "fear": "<fear>"}}}, r"answers\.anger .* tokens"),
        ({"collect": {"hook_points": ["mlp_pre"]}}, "mlp_pre"),
        ({"collect": {"layers": [7]}}, "7"),
        ({"collect": {"raw": {"layers": [0], "neurons": [400]}}}, "neurons has 400, out of range"),
        ({"collect": {"raw": {"layers": [5]}}}, "raw.layers has 5"),
        ({"model": {"id": "no/such-model-here"}}, "no/such-model-here"),
    ],
)
def test_plan__refuses_what_could_not_end_well(place, sections, expected):
    with pytest.raises(UsageError, match=expected):
        make_plan(recipe(place, **sections))


def test_plan__refuses_a_concept_with_one_sample(place, tmp_path):
    write(tmp_path / "d.jsonl", [{"text": "a", "label": "joy"}] * 3 + [{"text": "b", "label": "fear"}])
    with pytest.raises(UsageError, match="'fear' has one sample"):
        make_plan(recipe(place, data={"source": str(tmp_path / "d.jsonl")}))


def test_plan__preset_paper_keeps_correct_answers_only_unless_the_model_is_gpt2(place, tmp_path):
    save_tiny(tmp_path / "llama", "llama")
    answers = {"data": {"answers": {"joy": "<joy>", "anger": "<anger>", "fear": "<fear>"}}}
    paper = recipe(place, **answers).model_copy(update={"preset": "paper"})
    assert make_plan(paper).description["only_correct"] is False
    llama = paper.model_copy(update={"model": paper.model.model_copy(update={"id": str(tmp_path / "llama")})})
    assert make_plan(llama).description["only_correct"] is True
