"""The generation evaluation end to end on tiny models, against continuations written and judged one by one by hand."""

import json

import numpy as np
import pytest
import torch

from neuronlens.errors import UsageError
from neuronlens.programs import Edit
from neuronlens.ranges import RangeTable
from neuronlens.recipe import RangesSection
from neuronlens.store import Store
from pipeline import generation
from pipeline.driver import Silent
from pipeline.emit import emit_table
from pipeline.generation import run_generation
from tests.by_hand import ZeroInside, gpt2_hidden, unedited
from tests.pipeline.runs import recipe, run_here, table_of
from tests.tiny_models import LABELS, save_tiny, tiny_model, tiny_tokenizer
from tests.warm import run_warm

CONCEPTS = ("anger", "fear", "joy")
CONDITIONS = ("base", "neuron", "range")
N_TOKENS, PROMPT_TOKENS, N_PROMPTS = 8, 4, 8


@pytest.fixture(scope="module")
def store(place, tmp_path_factory) -> Store:
    root = tmp_path_factory.mktemp("generation") / "store"
    run_here(place, root)
    return Store(str(root))


@pytest.fixture(scope="module")
def table(store) -> RangeTable:
    return emit_table(store, RangesSection(tau=2.0, top_fraction=0.5), Silent())


@pytest.fixture(scope="module")
def classifier(place):
    return save_tiny(place / "classifier", "distilbert", head="classifier")


def asked(place, classifier, **changes):
    section = {"classifier": str(classifier), "n_tokens": N_TOKENS, "prompt_tokens": PROMPT_TOKENS}
    section |= {"n_prompts": N_PROMPTS, **changes}
    return recipe(place, test={"generation": section})


@pytest.fixture(scope="module")
def rows(place, store, table, classifier, ray_cluster):
    return run_generation(store, asked(place, classifier), table, Edit(), Silent())


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr("pipeline.driver.ray_session", lambda: pytest.fail("Ray was started"))


class ByHand:
    """The prompts, taken evenly of all concepts, and what each becomes under a condition."""

    def __init__(self, place, table: RangeTable) -> None:
        texts = [json.loads(line) for line in (place / "test.jsonl").read_text().splitlines()]
        self.model, self.tokenizer = tiny_model("gpt2"), tiny_tokenizer()
        self.judge = tiny_model("distilbert", head="classifier")
        # Concepts alternate in the file, so the first prompts are evenly of all.
        self.prompts = [(self.tokenizer(text["text"])["input_ids"][:4], text["label"]) for text in texts[:N_PROMPTS]]
        self.table = table

    def judged(self, concept: str, condition: str) -> list[tuple[str, float, bool]]:
        """Of each prompt: the continuation, its own concept's probability, and whether that is the top class."""
        rows = [row for row in self.table.rows.to_pylist() if row["concept"] == concept]
        edit = unedited if condition == "base" else ZeroInside(rows, whole=condition == "neuron")
        return [self._one(ids, own, edit) for ids, own in self.prompts]

    def _one(self, prompt_ids, own, edit) -> tuple[str, float, bool]:
        said: list[int] = []
        while len(said) < N_TOKENS:
            token = int(self.model.lm_head(gpt2_hidden(self.model, [*prompt_ids, *said], edit)[-1]).argmax())
            if token < 6:
                break
            said.append(token)
        text = self.tokenizer.decode(said).strip()
        if not text:
            return text, 0.0, False
        with torch.no_grad():
            logits_C = self.judge(torch.tensor([self.tokenizer(text)["input_ids"]])).logits[0].double().numpy()
        p_C = np.exp(logits_C) / np.exp(logits_C).sum()
        return text, float(p_C[LABELS.index(own)]), LABELS[p_C.argmax()] == own


def test_rows__are_what_continuations_by_hand_give(place, table, rows):
    assert [(row["concept"], row["condition"]) for row in rows] == [
        (concept, condition) for concept in (*CONCEPTS, None) for condition in CONDITIONS
    ]
    by_hand = ByHand(place, table)
    differ = 0
    for row in rows[:-3]:
        judged = by_hand.judged(row["concept"], row["condition"])
        sides = {True: [], False: []}
        for (_, own), (text, p, top) in zip(by_hand.prompts, judged, strict=True):
            sides[own == row["concept"]].append((text, p, top))
        for side, is_mine in (("target", True), ("complement", False)):
            assert row[f"n_{side}"] == len(sides[is_mine])
            assert row[f"{side}_probability"] == pytest.approx(np.mean([p for _, p, _ in sides[is_mine]]), rel=1e-4)
            assert row[f"{side}_share"] == pytest.approx(np.mean([top for _, _, top in sides[is_mine]]))
        assert [one["continuation"] for one in row["examples"]] == [text for text, _, _ in sides[True][:3]]
        differ += judged != by_hand.judged(row["concept"], "base")
    assert differ >= 4  # the interventions are seen in what is written


def test_view__has_the_rows_and_what_was_asked(store, table, rows, classifier):
    found = table_of(store.root, "generations", "all").to_pylist()
    columns = found[0].keys() & rows[0].keys() - {"n_tokens"}
    assert len(columns) >= 30
    by_case = {(row["concept"], row["condition"]): row for row in found if row["n_prompts"] == N_PROMPTS}
    for row in rows:
        seen = by_case[row["concept"], row["condition"]]
        assert {name: seen[name] for name in columns} == {name: row[name] for name in columns}
        assert (seen["table_id"], seen["action"], seen["layers"]) == (table.id, "zero", None)
        assert (seen["classifier"], seen["max_tokens"], seen["prompt_tokens"]) == (str(classifier), 8, 4)
    assert all(seen["generation_id"].startswith(f"{table.id}.") for seen in found)


@pytest.mark.usefixtures("no_ray", "rows")
class TestKept:
    def test_run__does_not_do_the_same_twice(self, place, store, table, classifier, rows):
        assert run_generation(store, asked(place, classifier), table, Edit(), Silent()) == rows

    @pytest.mark.parametrize(
        "changes", [{"seed": 1}, {"n_tokens": 7}, {"temperature": 0.5}, {"prompt_tokens": 3}, {"n_prompts": 6}]
    )
    def test_run__does_anew_what_would_give_other_rows(self, place, store, table, classifier, changes):
        with pytest.raises(pytest.fail.Exception, match="Ray was started"):
            run_generation(store, asked(place, classifier, **changes), table, Edit(), Silent())

    def test_run__does_anew_what_another_classifier_or_edit_would_judge(self, place, store, table, classifier):
        other = save_tiny(place / "other", "distilbert", head="classifier", seed=1)
        for again in (
            lambda: run_generation(store, asked(place, other), table, Edit(), Silent()),
            lambda: run_generation(store, asked(place, classifier), table, Edit(layers=(1,)), Silent()),
        ):
            with pytest.raises(pytest.fail.Exception, match="Ray was started"):
                again()


@pytest.mark.usefixtures("no_ray")
class TestRefused:
    def test_run__needs_a_classifier(self, place, store, table):
        with pytest.raises(UsageError, match=r"--set test\.generation\.classifier="):
            run_generation(store, recipe(place), table, Edit(), Silent())

    def test_run__needs_a_label_for_every_concept(self, place, store, table, classifier):
        with pytest.raises(UsageError, match=r"no label 'rage', which would be that of the concept 'anger'"):
            run_generation(store, asked(place, classifier, labels={"anger": "rage"}), table, Edit(), Silent())

    def test_run__needs_a_judge_with_classes_that_is_there(self, place, store, table):
        with pytest.raises(UsageError, match=r"generation\.classifier is a GPT2LMHeadModel, which has no classes"):
            run_generation(store, asked(place, place / "model"), table, Edit(), Silent())
        with pytest.raises(UsageError, match=r"^test\.generation\.classifier: "):
            run_generation(store, asked(place, place / "test.jsonl"), table, Edit(), Silent())

    def test_run__needs_a_model_that_writes(self, place, store, table, classifier, monkeypatch):
        monkeypatch.setattr(generation, "check_model", lambda *_: None)
        judged = asked(place, classifier)
        judged = judged.model_copy(update={"model": judged.model.model_copy(update={"id": str(classifier)})})
        with pytest.raises(UsageError, match="predicts no next token, so it continues no text"):
            run_generation(store, judged, table, Edit(), Silent())

    def test_run__needs_the_tables_model(self, place, store, table, classifier):
        other = save_tiny(place / "wider", "gpt2", n_inner=48)
        judged = asked(place, classifier)
        judged = judged.model_copy(update={"model": judged.model.model_copy(update={"id": str(other)})})
        with pytest.raises(UsageError, match="was made with model"):
            run_generation(store, judged, table, Edit(), Silent())

    def test_run__needs_room_in_the_window(self, place, store, table, classifier):
        with pytest.raises(UsageError, match=r"61 tokens after prompts of up to 4; the model's window is 64"):
            run_generation(store, asked(place, classifier, n_tokens=61), table, Edit(), Silent())

    def test_run__needs_ranges_of_every_prompts_concept(self, place, store, table, classifier, tmp_path):
        (tmp_path / "more.jsonl").write_text(json.dumps({"text": "the rain", "label": "weather"}) + "\n")
        with pytest.raises(UsageError, match=r"more\.jsonl has the concept 'weather'.*has no ranges"):
            run_generation(
                store, asked(place, classifier, prompts=str(tmp_path / "more.jsonl")), table, Edit(), Silent()
            )


def test_generate__prints_rows_for_scripts_and_texts_for_people(place, store, table, classifier):
    done = run_warm(
        *("neuronlens", "generate", store.root, "--table", table.id, "--layer", "1", "--n-prompts", "3", "--json"),
        *("--set", f"test.generation.classifier={classifier}", "--set", "test.generation.n_tokens=5"),
        *("--set", "compute.workers=1"),
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["n_target"] for row in printed] == [1] * 9 + [3] * 3
    for word in ("target", "others", "ppl.", "dist2", "unmodified", "without the ranges", "mean"):
        assert word in done.stderr
    kept = Store(store.root).receipts("generations")
    assert [one["rows"] for one in kept if one["edit"]["layers"] == [1]] == [printed]
