"""Sweeps and controls end to end on a tiny model: the same numbers as evaluations one by one, and what the store keeps
of them."""

import json

import numpy as np
import pytest

from neuronlens.errors import UsageError
from neuronlens.query import connect
from neuronlens.recipe import ComputeSection, RangesSection
from neuronlens.report import erasure_table, sweep_table
from neuronlens.store import Store
from neuronlens.sweep import parse_grid
from pipeline.driver import Silent
from pipeline.emit import emit_table, load_table
from pipeline.erasure import evaluate_sweep, evaluate_table, table_of_recipe
from tests.pipeline.runs import ANSWERS, KeptSpares, recipe, run_here
from tests.tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("ray_cluster", "small_shards")

CONTROLS = ("random", "wrong_concept", "shuffled", "length_matched")
CONDITIONS = ("base", "neuron", "range", *CONTROLS)
CONCEPTS = ("anger", "fear", "joy")
SWEEP = ["tau=1,2.5", "top_fraction=0.2,0.6", "layers=1,all"]


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def evaluated(evaluate, *args, **more):
    with KeptSpares(ComputeSection(), at_most=1) as spares:
        return evaluate(*args, spares=spares, **more)


@pytest.fixture(scope="module")
def asked(place, tmp_path_factory):
    """A recipe with texts of every kind, and a store that was collected by it."""
    patch = pytest.MonkeyPatch()
    patch.setattr("pipeline.plan.MIN_SHARD_TOKENS", 150)
    folder = tmp_path_factory.mktemp("erasure")
    questions = [{"question": "up?", "choices": ["sun", "rain"], "answer": i % 2} for i in range(6)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    test = {"off_task": str(place / "train.jsonl"), "off_task_texts": 5}
    collect = {"hook_points": ["mlp_post", "resid_post"]}
    run_here(place, folder / "store", test=None, collect=collect)
    patch.undo()
    store = Store(str(folder / "store"))
    emit_table(store, RangesSection(), Silent())
    made = recipe(place, collect=collect, test={**test, "multiple_choice": str(folder / "questions.jsonl")})
    return made, store


@pytest.fixture(scope="module")
def swept(asked, ray_cluster):
    """The rows, kept in three files."""
    made, store = asked
    patch = pytest.MonkeyPatch()
    patch.setattr("pipeline.erasure.ROWS_A_FILE", 100)
    rows = evaluated(
        evaluate_sweep, made, store, table_of_recipe(store, made), parse_grid(SWEEP), Silent(), controls=CONTROLS
    )
    patch.undo()
    assert [len(receipt["rows"]) for receipt in store.receipts("evaluations")] == [100, 100, 24]
    return rows, store


def test_evaluate_sweep__has_every_setting_concept_and_condition(swept):
    rows, store = swept
    settings = [(tau, fraction, layers) for tau in (1.0, 2.5) for fraction in (0.2, 0.6) for layers in ([1], None)]
    assert [(row["setting"], row["concept"], row["condition"]) for row in rows] == [
        (setting, concept, condition)
        for setting in range(8)
        for concept in (*CONCEPTS, None)
        for condition in CONDITIONS
    ]
    for row in rows:
        assert (row["tau"], row["top_fraction"], row["layers"]) == settings[row["setting"]]
        assert (row["counted"], row["perplexity"], row["method"]) == ("answer", None, "paper")
        assert row["off_task_perplexity"] > 1
        assert 0 <= row["choice_accuracy"] <= 1
        if row["condition"] != "base":
            assert row["selectivity_low"] <= row["selectivity"] <= row["selectivity_high"]
    # The table of 0.3 does not hold 0.6 of the neurons: one more was made, and one of all neurons for random ones.
    assert len({row["table_id"] for row in rows}) == 1
    fractions = {load_table(store, table_id).header.top_fraction for table_id in store.table_ids()}
    assert fractions == {0.3, 0.6, 1.0}
    assert sweep_table(rows).row_count == 8
    random = {row["control"] for row in rows if row["condition"] == "random"}
    assert random == {"seed 0"}
    wrong = {(row["concept"], row["control"]) for row in rows if row["condition"] == "wrong_concept"}
    assert wrong == {("anger", "fear"), ("fear", "joy"), ("joy", "anger"), (None, None)}
    assert {row["control"] for row in rows if row["condition"] == "shuffled"} == {"raw values"}


def test_evaluate_sweep__gives_what_an_evaluation_of_each_setting_gives(asked, swept):
    made, store = asked
    table = emit_table(store, RangesSection(tau=1.0, top_fraction=0.6), Silent())
    plain = evaluated(evaluate_table, made, store, table, Silent())
    of_sweep = [row for row in swept[0] if row["setting"] == 3]  # tau 1, 0.6, all layers
    kept = {(row["concept"], row["condition"]): row for row in of_sweep}
    assert len(plain) == 4 * 3
    for row in plain:
        other = kept[row["concept"], row["condition"]]
        assert (row["setting"], row["counted"]) == (0, "all")
        assert row["tested"] > other["tested"] or row["condition"] == "base"
        for name, value in row.items():
            if name in ("setting", "counted", "table_id", "tested", "changed", "changed_share", "perplexity"):
                continue
            if isinstance(value, float):
                assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
            else:
                assert other[name] == value, name
    assert erasure_table(plain) is not None


def test_evaluate_sweep__is_kept_and_not_run_again(asked, swept):
    made, store = asked
    heard = Heard()
    again = evaluated(
        evaluate_sweep, made, store, table_of_recipe(store, made), parse_grid(SWEEP), heard, controls=CONTROLS
    )
    assert again == swept[0]
    [line] = heard.lines
    assert line.startswith("evaluated before: evaluations/sweep.")
    with connect(store.file_lists(), fs=store.fs) as con:
        found = con.sql(
            "select setting, tau, layers, concept, condition, control, selectivity, selectivity_low, kl_target, "
            f"counted, table_id from evaluations where evaluation_id = '{line.split('/')[1][:-5]}' order by all"
        ).fetchall()
    assert len(found) == len(again)
    means = {(row[0], row[4]): row[6] for row in found if row[3] is None}
    for row in again:
        if row["concept"] is None:
            assert means[row["setting"], row["condition"]] == row["selectivity"]


def test_evaluate_table__with_controls_is_another_evaluation(asked, swept):
    made, store = asked
    table = table_of_recipe(store, made)
    rows = evaluated(evaluate_table, made, store, table, Silent(), controls=("wrong_concept",), perplexity=False)
    by = {(row["concept"], row["condition"]): row for row in rows}
    assert {row["perplexity"] for row in rows} == {None}
    for concept, other in (("anger", "fear"), ("fear", "joy"), ("joy", "anger")):
        assert by[concept, "wrong_concept"]["changed"] == by[other, "range"]["changed"]
        confidence = by[concept, "wrong_concept"]["target_confidence"]
        assert by[concept, "base"]["target_confidence"] - confidence == pytest.approx(
            by[concept, "wrong_concept"]["target_drop"], abs=1e-6
        )


def test_evaluations__of_the_same_texts_share_their_hash(asked, swept):
    made, store = asked
    fewer = {"test": made.test.model_copy(update={"off_task": None, "multiple_choice": None})}
    table = table_of_recipe(store, made)
    for changes in (fewer, {"test": made.test.model_copy(update={"max_per_concept": 3})}):
        evaluated(evaluate_table, made.model_copy(update=changes), store, table, Silent(), perplexity=False)
    with connect(store.file_lists(), fs=store.fs) as con:
        found = con.sql(
            "select n_texts, count(distinct texts_hash) from evaluations group by all order by all"
        ).fetchall()
        [(n_evaluations,)] = con.sql(
            "select count(distinct evaluation_id) from evaluations where n_texts = 30"
        ).fetchall()
    assert found == [(9, 1), (30, 1)]
    assert n_evaluations >= 2


def test_evaluate__refuses_before_it_loads_anything(asked, place, tmp_path):
    made, store = asked
    table = table_of_recipe(store, made)
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "so proud", "label": "pride"}) + "\n")
    changed = made.model_copy(
        update={
            "test": made.test.model_copy(update={"source": str(tmp_path / "test.jsonl")}),
            "model": made.model.model_copy(update={"id": str(tmp_path / "no-model")}),
        }
    )
    with pytest.raises(
        UsageError, match=r"concept 'pride' \(1 of 1 rows\), for which range table tbl_.* has no ranges"
    ):
        evaluated(evaluate_table, changed, store, table, Silent())
    with pytest.raises(UsageError, match="no layer 7"):
        evaluated(evaluate_sweep, changed, store, table, parse_grid(["layers=7"]), Silent())
    with pytest.raises(UsageError, match="The recipe has no test section"):
        evaluated(evaluate_table, made.model_copy(update={"test": None}), store, table, Silent())


def test_table_of_recipe__is_the_one_that_the_recipe_asks_for(asked):
    made, store = asked
    assert table_of_recipe(store, made).header.top_fraction == 0.3
    other = made.model_copy(update={"ranges": made.ranges.model_copy(update={"tau": 9.0})})
    assert len(store.table_ids()) > 1
    with pytest.raises(UsageError, match="Name one with --table"):
        table_of_recipe(store, other)


def test_only_correct__gives_ranges_of_the_texts_that_were_answered_right(place, tmp_path):
    """The answer of joy is made to be what the tiny model says most often."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    lines = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    prompts = [tokenizer(line["text"] + "<sep>", return_tensors="pt") for line in lines if line["label"] == "joy"]
    said = [int(model(**prompt).logits[0, -1].argmax()) for prompt in prompts]
    answers = {**ANSWERS, "joy": tokenizer.decode([max(set(said), key=said.count)])}
    tables = {}
    for only_correct in (False, True):
        root = tmp_path / str(only_correct)
        run_here(place, root, test=None, data={"answers": answers, "only_correct": only_correct})
        store = Store(str(root))
        tables[only_correct] = emit_table(store, RangesSection(tau=2.0, top_fraction=1.0), Silent())
    store = Store(str(tmp_path / "False"))
    with connect(store.file_lists(), fs=store.fs) as con:
        expected = con.sql(
            "select layer, neuron, count(*), avg(value::double), stddev_pop(value::double) from activations "
            "join (select sample, correct from samples) using (sample) where concept = 'joy' and correct group by all"
        ).fetchall()
    own = {(r["layer"], r["neuron"]): r for r in tables[True].select("joy").to_pylist()}
    assert len(own) == len(expected) == 2 * 40
    for layer, neuron, n, mean, std in expected:
        r = own[layer, neuron]
        assert (r["n"], r["mean"], r["std"]) == (n, pytest.approx(mean, abs=1e-6), pytest.approx(std, abs=1e-6))
        assert r["upper"] == pytest.approx(mean + 2 * std, abs=1e-5)
    everything = {(r["layer"], r["neuron"]): r["mean"] for r in tables[False].select("joy").to_pylist()}
    assert max(abs(everything[key] - own[key]["mean"]) for key in own) > 1e-3


def test_kept_rows__are_numbers_that_json_knows(swept):
    rows, _ = swept
    assert np.isfinite([v for row in rows for v in row.values() if isinstance(v, float)]).all()
    json.dumps(rows, allow_nan=False)
