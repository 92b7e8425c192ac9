"""Batches of test texts on a worker, in this process: whoever runs which, the results are those of one."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuronlens.errors import UsageError
from neuronlens.evaluation import EvaluationPlan, Measured, TestText, measure_texts, plan_conditions
from neuronlens.models import LoadedModel, load_model
from neuronlens.multiple_choice import EncodedQuestions
from neuronlens.programs import Edit
from neuronlens.recipe import parse_recipe
from pipeline.erasure import Filling
from pipeline.erasure_texts import TestData, check_test, load_labelled_test
from pipeline.evaluator import EvaluationWork, Evaluator
from tests.range_tables import row, table_of
from tests.tiny_models import D_MLP, save_tiny, tiny_model, tiny_tokenizer

ANSWERS = {"joy": "<joy>", "anger": "<anger>"}
TABLE = table_of(
    [
        row(concept, n, mean, 0.2, layer=layer, rank=n + 1)
        for concept, mean in (("joy", 0.1), ("anger", -0.1))
        for layer in (0, 1)
        for n in range(20)
    ],
    widths={"mlp_post": D_MLP},
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel.of(tiny_model("gpt2"), tiny_tokenizer())


def made_data(loaded: LoadedModel) -> TestData:
    rng = np.random.default_rng(0)

    def texts(n: int) -> list[tuple[int, ...]]:
        return [tuple(rng.integers(6, 300, size=rng.integers(2, 15)).tolist()) for _ in range(n)]

    labelled = [TestText(token_ids=ids, concept=("joy", "anger")[i % 2]) for i, ids in enumerate(texts(11))]
    questions = EncodedQuestions(
        prompts=tuple(texts(5)),
        letter_ids=(40, 41, 42),
        n_choices_Q=np.array([2, 3, 3, 2, 3]),
        right_Q=np.array([0, 1, 2, 0, 1]),
        n_too_long=0,
    )
    return TestData(
        texts=tuple(labelled),
        answer_X=np.array([3 if text.concept == "joy" else 4 for text in labelled]),
        off_task=tuple(texts(7)),
        questions=questions,
    )


def ran(loaded: LoadedModel, data: TestData, plan: EvaluationPlan, *, n_workers: int, most_bytes: int) -> Measured:
    """The jobs in any order, each on any of some workers."""
    assert data.questions is not None
    work = EvaluationWork(
        id="one",
        plan=plan.bare(),
        groups=tuple(plan.groups(most_bytes)),
        counted="all",
        perplexity=True,
        letter_ids=data.questions.letter_ids,
    )
    measured = Measured.empty(plan.n_passes, 11, answers=True, perplexity=True, n_off_task=7, n_questions=5)
    told: list[int] = []
    filling = Filling(measured, work, on_done=told.append, stop_requested=lambda: False)
    jobs = data.jobs(loaded, 30, len(work.groups))
    random.Random(n_workers).shuffle(jobs)
    workers = [Evaluator(loaded, None) for _ in range(n_workers)]
    for i, job in enumerate(jobs):
        filling.done(job, workers[i % n_workers].run(work, job))
    assert sum(told) == (11 + 7 + 5) * plan.n_passes
    assert filling.n_done == len(jobs)
    return measured


def test_evaluator__gives_the_same_whoever_runs_which_group_of_programs(loaded: LoadedModel) -> None:
    data, plan = made_data(loaded), EvaluationPlan()
    plan_conditions(plan, 0, TABLE, Edit(), ["joy", "anger"])
    plan_conditions(plan, 1, TABLE, Edit(layers=(1,)), ["joy", "anger"])
    whole = ran(loaded, data, plan, n_workers=1, most_bytes=1 << 30)
    alone = measure_texts(loaded, plan.at_work(), data.texts, {"joy": 3, "anger": 4}, tokens_per_batch=30)
    cut = ran(loaded, data, plan, n_workers=3, most_bytes=2 * plan.interventions[0].n_bytes)
    assert len(plan.groups(2 * plan.interventions[0].n_bytes)) > 2
    for name in ("correct_RX", "confidence_RX", "kl_RX", "nll_RX", "n_predicted_X", "tested_R", "changed_R"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(alone, name))
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name))
    assert whole.off_task is not None
    assert cut.off_task is not None
    np.testing.assert_array_equal(cut.off_task.nll_RB, whole.off_task.nll_RB)
    np.testing.assert_array_equal(cut.off_task.kl_RB, whole.off_task.kl_RB)
    np.testing.assert_array_equal(cut.choice_RQ, whole.choice_RQ)
    assert whole.off_task.n_predicted_B.min() > 0
    assert (whole.off_task.kl_RB[1:] > 0).all()


def test_evaluator__compiles_a_group_once(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    data, plan = made_data(loaded), EvaluationPlan()
    plan_conditions(plan, 0, TABLE, Edit(), ["joy", "anger"])
    work = EvaluationWork(
        id="one", plan=plan.bare(), groups=(slice(0, 4),), counted="all", perplexity=False, letter_ids=(40, 41, 42)
    )
    compiled: list[slice] = []
    own = EvaluationPlan.at_work
    monkeypatch.setattr(EvaluationPlan, "at_work", lambda self, some: (compiled.append(some), own(self, some))[1])
    evaluator = Evaluator(loaded, None)
    for job in data.jobs(loaded, 30, 1):
        evaluator.run(work, job)
    assert compiled == [slice(0, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluator")
    save_tiny(folder / "model", "gpt2")
    save_tiny(folder / "classifier", "bert", head="classifier")
    rows = [{"text": f"so {word}", "label": label} for word in ("glad", "cross") for label in ("joy", "anger")]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = [
        {"text": ""},
        {"text": "the river and the rain " * 30},
        {"text": "a door"},
        {"text": "  "},
        {"text": "sun"},
    ]
    (folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    question = {"question": "hot?", "choices": ["ice", "fire"], "answer": "B"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    return folder


def recipe_of(folder: Path, model: str = "model", **test: Any) -> Any:
    return parse_recipe(
        {
            "model": {"id": str(folder / model)},
            "data": {
                "source": str(folder / "test.jsonl"),
                "prompt": "{text}<sep>",
                "answers": ANSWERS if model == "model" else None,
            },
            "test": {"source": str(folder / "test.jsonl"), **test},
        }
    )


def loaded_data(folder: Path, model: str = "model", **test: Any) -> TestData:
    recipe = recipe_of(folder, model, **test)
    skeleton = load_model(recipe.model.id, device="meta")
    return TestData.load(recipe, recipe.test, load_labelled_test(recipe, recipe.test), skeleton)


def test_test_data__holds_what_the_recipe_names(folder: Path) -> None:
    data = loaded_data(
        folder, off_task=str(folder / "plain.jsonl"), off_task_texts=2, multiple_choice=str(folder / "questions.jsonl")
    )
    tokenizer = tiny_tokenizer()
    assert [text.token_ids[-1] for text in data.texts] == [tokenizer.convert_tokens_to_ids("<sep>")] * 4
    assert data.answer_X is not None
    assert data.answer_X.tolist() == [3, 4, 3, 4]
    assert [len(row) for row in data.off_task] == [64, len(tokenizer("a door")["input_ids"])]
    assert data.questions is not None
    assert data.questions.right_Q.tolist() == [1]
    longest = max(len(row) for row in data.off_task)
    jobs = data.jobs(load_model(str(folder / "model"), device="meta"), 20, 2)
    assert [job.group for job in jobs if job.kind == "off_task"] == [0, 0, 1, 1]
    assert sum(len(job.places) for job in jobs if job.kind == "labelled") == 2 * 4
    assert {len(job.rows[0]) for job in jobs if job.kind == "off_task"} == {longest, len(data.off_task[1])}
    assert loaded_data(folder).as_lists() != data.as_lists() == data.as_lists()


def test_test_data__of_a_classifier_refuses_what_needs_a_next_token(folder: Path) -> None:
    for name, file in (("off_task", "plain.jsonl"), ("multiple_choice", "questions.jsonl")):
        with pytest.raises(UsageError, match=rf"test.{name} is given, and BertForSequence.* predicts no next token"):
            loaded_data(folder, "classifier", **{name: str(folder / file)})


def test_check_test__refuses_concepts_that_the_data_have_not(folder: Path) -> None:
    recipe = recipe_of(folder)
    check_test(recipe, {"joy": 2, "anger": 2})
    with pytest.raises(UsageError, match=r"concept 'anger' \(2 of 4 rows\), for which .* has no texts. Known: joy"):
        check_test(recipe, {"joy": 2})
