"""The plan: shards that are frozen, complete and independent of everything but the data; and refusals before work
starts."""

import json
from pathlib import Path

import numpy as np
import pytest

from neuronlens.errors import UsageError
from neuronlens.recipe import parse_recipe
from neuronlens.store import Store, content_hash
from pipeline.collect import batches_of
from pipeline.frozen import read_samples, store_hash_of
from pipeline.plan import check_room, freeze, make_plan, without_predictions
from tests.tiny_models import SENTENCES, save_tiny, tiny_tokenizer

WORDS = " ".join(SENTENCES).split()
ANSWERS = {"joy": "<joy>", "anger": "<anger>", "fear": "<fear>"}
OLD_STORE = Path(__file__).parents[1] / "stores" / "version-1"


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


@pytest.mark.parametrize(("histograms", "n_bins"), [(True, 40), (True, 7), (False, 0)])
def test_plan__counts_the_histograms_of_all_shards_once_more(histograms, n_bins, place, small_shards, monkeypatch):
    """40 texts of each of three concepts, in several shards: 40 bins a neuron at most, or as many as are ever used."""
    monkeypatch.setattr("pipeline.plan.MERGED_BINS_USED", n_bins or 140)
    plan = make_plan(recipe(place, collect={"histograms": histograms}))
    width = sum(plan.description["widths"].values()) * len(plan.description["layers"])
    assert plan.estimate.disk_bytes["merged_histograms"] == width * 3 * n_bins * 1.5


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


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"data": {"answers": ANSWERS}}, True),
        ({}, False),
        ({"data": {"answers": ANSWERS}, "collect": {"layers": [-1]}}, True),
        ({"data": {"answers": ANSWERS}, "collect": {"layers": [0]}}, False),
        ({"data": {"answers": ANSWERS, "only_correct": True}, "collect": {"layers": [0]}}, True),
        ({"data": {"answers": ANSWERS}, "collect": {"layers": [0], "predictions": True}}, True),
        ({"data": {"answers": ANSWERS}, "collect": {"predictions": False}}, False),
        ({"data": {"answers": ANSWERS}, "collect": {"hook_points": ["blocks.0.hook_resid_post"]}}, False),
        ({"data": {"answers": ANSWERS}, "collect": {"hook_points": ["mlp_post", "blocks.1.hook_attn_out"]}}, True),
    ],
)
def test_plan__records_predictions_where_the_pass_reaches_the_end_anyway(place, sections, expected):
    description = make_plan(recipe(place, **sections)).description
    assert description["predictions"] is expected
    ids = {concept: tiny_tokenizer().convert_tokens_to_ids(answer) for concept, answer in ANSWERS.items()}
    assert description.get("answers") == (ids if expected else None)


@pytest.mark.parametrize(
    ("architecture", "head", "data", "expected"),
    [
        ("bert", "classifier", {}, True),
        ("bert", "classifier", {"answers": {"joy": "anger", "anger": "anger", "fear": "fear"}}, True),
        ("llama", "classifier", {}, True),
        ("bert", "none", {"answers": ANSWERS}, False),
        ("gpt2", "none", {"answers": ANSWERS}, False),
        ("granite", "lm", {"answers": ANSWERS}, False),
    ],
)
def test_plan__records_predictions_of_models_that_can_answer(place, tmp_path, architecture, head, data, expected):
    """Of a decoder that is not in our table, only the weights say whether its logits are read right."""
    save_tiny(tmp_path / "model", architecture, head=head)
    modules = {"mlp_post": "layers.{layer}.mlp.down_proj"} if architecture == "granite" else {}
    asked = recipe(place, model={"id": str(tmp_path / "model"), "modules": modules}, data=data)
    assert make_plan(asked).description["predictions"] is expected


@pytest.mark.parametrize(
    ("architecture", "head", "data", "expected"),
    [
        ("gpt2", "lm", {}, "nothing says which answer is right for a concept. Add data.answers"),
        ("bert", "none", {"answers": ANSWERS}, "BertModel has neither next-token nor class logits"),
        ("bert", "classifier", {"concept": "other"}, "Its classes are anger, fear, joy. Add data.answers"),
    ],
)
def test_plan__refuses_predictions_of_a_model_that_cannot_answer(place, tmp_path, architecture, head, data, expected):
    save_tiny(tmp_path / "model", architecture, head=head)
    write(tmp_path / "d.jsonl", [{"text": "a b", "label": "joy", "other": "pride"}] * 3)
    sections = {"model": {"id": str(tmp_path / "model")}, "data": {"source": str(tmp_path / "d.jsonl"), **data}}
    if "answers" in data:
        sections["data"]["answers"] = {"joy": "<joy>"}
    with pytest.raises(UsageError, match=expected):
        make_plan(recipe(place, collect={"predictions": True}, **sections))
    assert make_plan(recipe(place, **sections)).description["predictions"] is False


def test_plan__has_another_hash_where_the_predictions_would_differ(place):
    swapped = {"joy": "<anger>", "anger": "<joy>", "fear": "<fear>"}
    plans = [
        make_plan(recipe(place, data={"answers": answers}, collect={"predictions": predictions}))
        for answers in (ANSWERS, swapped)
        for predictions in ("auto", False)
    ]
    recorded, plain, other, other_plain = [plan.store_hash for plan in plans]
    assert len({recorded, plain, other}) == 3
    assert plain == other_plain, "what is right is asked of the predictions only"


def test_store_hash__of_a_store_from_before_predictions_stays(place):
    """By hand, and as the oldest version wrote it: without predictions the key counts for nothing."""
    old = json.loads((OLD_STORE / "store.json").read_text())
    assert "predictions" not in old
    assert store_hash_of(old) == store_hash_of(old | {"predictions": False}) == old["store_hash"]
    plan = make_plan(recipe(place, data={"answers": ANSWERS}))
    decides = {
        key: plan.description[key]
        for key in plan.description.keys() & old.keys()
        if key not in ("store_hash", "recipe", "versions", "created_at", "files")
    }
    assert set(decides) == old.keys() - {"store_hash", "recipe", "versions", "created_at", "files"}
    decides["model"] = {key: value for key, value in decides["model"].items() if key not in ("id", "revision")}
    decides["dataset"] = {key: value for key, value in decides["dataset"].items() if key not in ("source", "split")}
    assert without_predictions(plan).store_hash == content_hash(decides) != plan.store_hash


def test_freeze__says_that_a_store_has_no_predictions(place, tmp_path):
    store = Store(str(tmp_path))
    freeze(make_plan(recipe(place, data={"answers": ANSWERS}, collect={"predictions": False})), store)
    with pytest.raises(
        UsageError, match=r"\(predictions: False in the store, True asked for; answers: None in the store"
    ):
        freeze(make_plan(recipe(place, data={"answers": ANSWERS})), store)


def test_plan__counts_predictions_into_the_disk(place):
    with_answers = make_plan(recipe(place, data={"answers": ANSWERS})).estimate.disk_bytes["predictions"]
    assert 120 * 5 < with_answers < 120 * 100
    assert make_plan(recipe(place)).estimate.disk_bytes["predictions"] == 0


@pytest.mark.parametrize("raw", ["none", {"layers": [0]}, {"neurons": [1, 2]}])
def test_plan__a_probe_needs_all_raw_values_before_the_run(place, raw):
    with pytest.raises(UsageError, match=r"salience is probe.*collect\.raw"):
        make_plan(recipe(place, ranges={"salience": "probe"}, collect={"raw": raw}))
    make_plan(recipe(place, ranges={"salience": "probe"}, collect={"raw": "all"}))
