"""The erasure evaluation against texts run one by one through hand-written passes."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from neuronlens import evaluation
from neuronlens.errors import RunFailed, UsageError
from neuronlens.evaluation import Case, CaseResult, TestText, erasure_cases, erasure_rows, evaluate_case, wilson
from neuronlens.models import LoadedModel
from neuronlens.programs import Edit
from neuronlens.ranges import RangeTable
from tests.by_hand import ZeroInside, gpt2_hidden
from tests.range_tables import row, table_of
from tests.tiny_models import D_MLP, D_MODEL, tiny_model, tiny_tokenizer

PAD, EOS, SEP = 0, 1, 2
ANSWERS = {"joy": 3, "anger": 4, "fear": 5}
SPECIALS = {PAD, EOS, SEP}
WHOLE_BUDGET = 10_000

ROWS = {
    "joy": [row("joy", n, 0.1, 0.1, layer=layer, rank=n + 1) for layer in (0, 1) for n in range(0, D_MLP, 2)],
    "anger": [row("anger", n, 0.5, 0.3, layer=1, hook_point="resid_post", rank=n + 1) for n in range(0, D_MODEL, 2)],
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel.of(tiny_model("gpt2"), tiny_tokenizer())


@pytest.fixture(scope="module")
def table() -> RangeTable:
    return table_of([*ROWS["joy"], *ROWS["anger"]], widths={"mlp_post": D_MLP, "resid_post": D_MODEL})


def made_texts(n: int = 17) -> list[TestText]:
    """Texts of 1 to 20 tokens that end in <sep>; some have <eos> within."""
    rng = np.random.default_rng(5)
    texts = []
    for i in range(n):
        ids = [int(token) for token in rng.integers(6, 300, size=i if i < 3 else int(rng.integers(3, 20)))]
        if i % 4 == 3:
            ids[len(ids) // 2] = EOS
        texts.append(TestText(token_ids=(*ids, SEP), concept=("joy", "anger", "fear")[i % 3]))
    return texts


TEXTS = made_texts()


class ByHand:
    """Every number of a case, one text at a time, in float64 after the model's own layers."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.edit = ZeroInside(ROWS[case.concept] if case.concept else [], whole=case.condition == "neuron")
        self.correct, self.confidence, self.nll, self.n = [], [], [], []
        for text in TEXTS:
            with torch.no_grad():
                logits = model.lm_head(gpt2_hidden(model, text.token_ids, self.edit)).double().numpy()
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            answer = ANSWERS[text.concept]
            self.correct.append(log_p[-1].argmax() == answer)
            self.confidence.append(np.exp(log_p[-1, answer]))
            surprises = [-log_p[t - 1, i] for t, i in enumerate(text.token_ids) if t > 0 and i not in SPECIALS]
            self.nll.append(sum(surprises))
            self.n.append(len(surprises))

    def perplexity(self, target: str) -> float:
        others = [i for i, text in enumerate(TEXTS) if text.concept != target]
        return math.exp(sum(self.nll[i] for i in others) / sum(self.n[i] for i in others))


@lru_cache
def by_hand(case: Case) -> ByHand:
    return ByHand(tiny_model("gpt2"), case)


CASES = erasure_cases(["joy", "anger"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.condition} {case.concept}")
def test_evaluate_case__equals_masking_by_hand(loaded: LoadedModel, table: RangeTable, case: Case) -> None:
    expected = by_hand(case)
    got = evaluate_case(loaded, table, case, TEXTS, ANSWERS, tokens_per_batch=60)
    np.testing.assert_array_equal(got.correct_X, expected.correct)
    np.testing.assert_allclose(got.confidence_X, expected.confidence, rtol=1e-4)
    np.testing.assert_allclose(got.nll_X, expected.nll, rtol=1e-5)
    np.testing.assert_array_equal(got.n_predicted_X, expected.n)
    assert (got.tested, got.changed) == (expected.edit.tested, expected.edit.changed)


def test_evaluate_case__conditions_differ(loaded: LoadedModel, table: RangeTable) -> None:
    runs = [evaluate_case(loaded, table, case, TEXTS, ANSWERS, tokens_per_batch=WHOLE_BUDGET) for case in CASES]
    confidences = np.array([run.confidence_X for run in runs])
    assert (np.abs(confidences[1:] - confidences[0]).max(axis=1) > 1e-4).all()
    assert np.abs(confidences[1] - confidences[2]).max() > 1e-4
    assert np.abs(confidences[3] - confidences[4]).max() > 1e-4
    assert all(0 < run.changed < run.tested for run in runs if run.case.condition == "range")
    assert all(run.changed == run.tested for run in runs if run.case.condition == "neuron")


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=["base", "range"])
def test_evaluate_case__does_not_depend_on_the_batches(loaded: LoadedModel, table: RangeTable, case: Case) -> None:
    one_by_one = evaluate_case(loaded, table, case, TEXTS, ANSWERS, tokens_per_batch=1)
    for tokens_per_batch in (25, WHOLE_BUDGET):
        batched = evaluate_case(loaded, table, case, TEXTS, ANSWERS, tokens_per_batch=tokens_per_batch)
        np.testing.assert_array_equal(batched.correct_X, one_by_one.correct_X)
        np.testing.assert_allclose(batched.confidence_X, one_by_one.confidence_X, rtol=1e-5)
        np.testing.assert_allclose(batched.nll_X, one_by_one.nll_X, rtol=1e-5)
        assert (batched.tested, batched.changed) == (one_by_one.tested, one_by_one.changed)


def test_evaluate_case__holds_few_logits_at_a_time(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate_case(loaded, None, CASES[0], TEXTS, ANSWERS, tokens_per_batch=WHOLE_BUDGET)
    limit = 7 * len(loaded.tokenizer)
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", limit)
    seen: list[int] = []
    handle = loaded.module.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.numel()))
    sliced = evaluate_case(loaded, None, CASES[0], TEXTS, ANSWERS, tokens_per_batch=WHOLE_BUDGET)
    handle.remove()
    assert max(seen) <= limit
    np.testing.assert_allclose(sliced.nll_X, whole.nll_X, rtol=1e-5)
    np.testing.assert_array_equal(sliced.correct_X, whole.correct_X)


def test_evaluate_case__runs_the_trunk_once_a_batch(loaded: LoadedModel, table: RangeTable) -> None:
    passes: list[int] = []
    handle = loaded.module.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    progress: list[int] = []
    evaluate_case(loaded, table, CASES[1], TEXTS, ANSWERS, tokens_per_batch=50, on_progress=progress.append)
    handle.remove()
    assert passes == progress
    assert sum(progress) == len(TEXTS)
    assert len(progress) > 1


def test_evaluate_case__without_answers_has_perplexity_alone(loaded: LoadedModel, table: RangeTable) -> None:
    with_answers = evaluate_case(loaded, table, CASES[2], TEXTS, ANSWERS, tokens_per_batch=60)
    without = evaluate_case(loaded, table, CASES[2], TEXTS, None, tokens_per_batch=60)
    assert (without.correct_X, without.confidence_X) == (None, None)
    np.testing.assert_allclose(without.nll_X, with_answers.nll_X, rtol=1e-6)
    base = evaluate_case(loaded, None, CASES[0], TEXTS, None, tokens_per_batch=60)
    rows = erasure_rows(TEXTS, base, [without])
    assert [r["target_accuracy"] for r in rows] == [None, None]
    assert [r["complement_accuracy_low"] for r in rows] == [None, None]
    assert all(r["perplexity"] > 1 for r in rows)


def test_evaluate_case__takes_texts_with_nothing_to_predict(loaded: LoadedModel) -> None:
    texts = [TestText(token_ids=(SEP,), concept="joy"), TestText(token_ids=(9,), concept="fear")]
    base = evaluate_case(loaded, None, CASES[0], texts, None, tokens_per_batch=60)
    assert base.n_predicted_X is not None
    assert base.n_predicted_X.tolist() == [0, 0]
    (first, _) = erasure_rows(texts, base, [base_like(base, "joy")])
    assert first["perplexity"] is None


def base_like(result: CaseResult, concept: str) -> CaseResult:
    return CaseResult(
        case=Case(concept=concept, condition="range"),
        correct_X=result.correct_X,
        confidence_X=result.confidence_X,
        nll_X=result.nll_X,
        n_predicted_X=result.n_predicted_X,
        tested=0,
        changed=0,
    )


def test_evaluate_case__does_what_the_edit_says(loaded: LoadedModel, table: RangeTable) -> None:
    def run(condition: Any, edit: Edit) -> CaseResult:
        case = Case(concept="joy", condition=condition)
        return evaluate_case(loaded, table, case, TEXTS, ANSWERS, tokens_per_batch=WHOLE_BUDGET, edit=edit)

    both, upper = run("range", Edit()), run("range", Edit(layers=(1,)))
    assert 0 < upper.tested == both.tested // 2
    assert run("range", Edit(tau=0.5)).changed < both.changed
    # At one site, what is done there cannot change what is found there.
    kept, lower = run("range", Edit(action="dampen", factor=1, layers=(0,))), run("range", Edit(layers=(0,)))
    base = evaluate_case(loaded, None, CASES[0], TEXTS, ANSWERS, tokens_per_batch=WHOLE_BUDGET)
    np.testing.assert_allclose(kept.confidence_X, base.confidence_X, rtol=1e-6)
    assert 0 < kept.changed == lower.changed
    # Adaptive ranges have no whole-neuron form; zeroed neurons stand for it.
    zeroed, adaptive = run("neuron", Edit()), run("neuron", Edit(action="adaptive", factor=0.5))
    np.testing.assert_array_equal(adaptive.confidence_X, zeroed.confidence_X)


LABEL_OF = {"joy": 0, "anger": 1, "fear": 2}


@pytest.mark.parametrize("condition", ["base", "neuron", "range"])
def test_evaluate_case__reads_a_classifiers_head_and_counts_no_pads(condition: Any) -> None:
    model = tiny_model("bert", head="classifier")
    loaded = LoadedModel.of(model, tiny_tokenizer())
    rows = [row("joy", n, 0.1, 0.1, layer=layer, rank=n + 1) for layer in (0, 1) for n in range(0, D_MLP, 2)]
    case = Case(concept=None if condition == "base" else "joy", condition=condition)
    edit = ZeroInside([] if condition == "base" else rows, whole=condition == "neuron")

    def masked(layer: int) -> Any:
        return lambda module, args: (edit("mlp_post", layer, args[0]),)

    handles = [b.output.dense.register_forward_pre_hook(masked(i)) for i, b in enumerate(model.bert.encoder.layer)]
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([text.token_ids])).logits[0].double().numpy() for text in TEXTS]
    for handle in handles:
        handle.remove()
    p = [np.exp(v) / np.exp(v).sum() for v in logits]

    table = table_of(rows, widths={"mlp_post": D_MLP})
    got = evaluate_case(loaded, table, case, TEXTS, None, tokens_per_batch=60)
    assert got.correct_X is not None
    assert got.correct_X.tolist() == [int(v.argmax()) == LABEL_OF[t.concept] for v, t in zip(p, TEXTS, strict=True)]
    np.testing.assert_allclose(
        got.confidence_X, [v[LABEL_OF[t.concept]] for v, t in zip(p, TEXTS, strict=True)], rtol=1e-4
    )
    assert (got.tested, got.changed) == (edit.tested, edit.changed)
    assert (got.nll_X, got.n_predicted_X) == (None, None)
    turned = evaluate_case(loaded, table, case, TEXTS, {"joy": 1, "anger": 2, "fear": 0}, tokens_per_batch=60)
    assert turned.confidence_X is not None
    np.testing.assert_allclose(turned.confidence_X[0], p[0][1], rtol=1e-4)


def test_evaluate_case__refuses_what_cannot_be_measured(loaded: LoadedModel, table: RangeTable) -> None:
    def run(model: LoadedModel, case: Case, texts: Sequence[TestText], answers: Any, table: Any = table) -> None:
        evaluate_case(model, table, case, texts, answers, tokens_per_batch=60)

    bert = LoadedModel.of(tiny_model("bert", head="none"), tiny_tokenizer())
    classifier = LoadedModel.of(tiny_model("bert", head="classifier"), tiny_tokenizer())
    stranger = [TestText(token_ids=(9, SEP), concept="awe")]
    with pytest.raises(UsageError, match="neither next-token nor class logits"):
        run(bert, CASES[0], TEXTS, ANSWERS)
    with pytest.raises(UsageError, match=r"'awe' of the test texts has no answer. There are: joy, anger, fear"):
        run(loaded, CASES[0], stranger, ANSWERS)
    with pytest.raises(UsageError, match=r"'awe' of the test texts is no class of this model's head. There are: joy"):
        run(classifier, CASES[0], stranger, None)
    with pytest.raises(UsageError, match=r"no concept fear\. It has: anger, joy"):
        run(loaded, Case(concept="fear", condition="range"), TEXTS, ANSWERS)
    with pytest.raises(UsageError, match="needs a range table"):
        run(loaded, CASES[1], TEXTS, ANSWERS, None)


def test_evaluate_case__refuses_logits_that_are_not_finite() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[3] = math.nan
    n_long = sum(len(text.token_ids) > 3 for text in TEXTS)
    with pytest.raises(RunFailed, match=f"not finite for {n_long} of 17 test texts"):
        evaluate_case(LoadedModel.of(model, tiny_tokenizer()), None, CASES[0], TEXTS, ANSWERS, tokens_per_batch=1)


def test_case__has_a_concept_unless_it_is_base() -> None:
    for concept, condition in [("joy", "base"), (None, "range")]:
        with pytest.raises(ValueError, match="base is the case without a concept"):
            Case(concept=concept, condition=condition)  # type: ignore[arg-type]


def test_erasure_cases__run_base_once() -> None:
    names = [(case.concept, case.condition) for case in CASES]
    assert names == [(None, "base"), ("joy", "neuron"), ("joy", "range"), ("anger", "neuron"), ("anger", "range")]


def test_erasure_rows__equal_the_numbers_by_hand(loaded: LoadedModel, table: RangeTable) -> None:
    base, *others = (evaluate_case(loaded, table, case, TEXTS, ANSWERS, tokens_per_batch=60) for case in CASES)
    rows = erasure_rows(TEXTS, base, others[::-1])
    assert [(r["concept"], r["condition"]) for r in rows] == [
        (concept, condition) for concept in ("anger", "joy") for condition in ("base", "neuron", "range")
    ]
    for got in rows:
        concept = got["concept"]
        case = Case(concept=None if got["condition"] == "base" else concept, condition=got["condition"])
        hand = by_hand(case)
        target = [i for i, text in enumerate(TEXTS) if text.concept == concept]
        rest = [i for i in range(len(TEXTS)) if i not in target]
        assert (got["n_target"], got["n_complement"]) == (len(target), len(rest))
        assert got["target_accuracy"] == sum(hand.correct[i] for i in target) / len(target)
        assert got["complement_accuracy"] == sum(hand.correct[i] for i in rest) / len(rest)
        assert got["target_confidence"] == pytest.approx(np.mean([hand.confidence[i] for i in target]), rel=1e-4)
        assert got["complement_confidence"] == pytest.approx(np.mean([hand.confidence[i] for i in rest]), rel=1e-4)
        assert got["perplexity"] == pytest.approx(hand.perplexity(concept), rel=1e-5)
        assert (got["tested"], got["changed"]) == (hand.edit.tested, hand.edit.changed)


def result(
    case: Case, correct: list[int], confidence: list[float], nll: list[float], n: list[int], **counts: int
) -> CaseResult:
    return CaseResult(
        case=case,
        correct_X=np.array(correct, dtype=bool),
        confidence_X=np.array(confidence, dtype=np.float32),
        nll_X=np.array(nll),
        n_predicted_X=np.array(n),
        **{"tested": 0, "changed": 0, **counts},
    )


def test_erasure_rows__split_target_from_complement() -> None:
    texts = [TestText(token_ids=(9,), concept=concept) for concept in ("joy", "joy", "fear", "fear", "fear")]
    base = result(Case(concept=None, condition="base"), [1, 1, 1, 0, 1], [0.5] * 5, [1, 1, 2, 4, 6], [1, 1, 2, 2, 2])
    ranged = result(
        Case(concept="joy", condition="range"),
        [0, 1, 1, 0, 0],
        [0, 0.5, 1, 1, 0.25],
        [9] * 5,
        [9] * 5,
        tested=8,
        changed=2,
    )
    first, second = erasure_rows(texts, base, [ranged])
    low, high = wilson(2, 3)
    assert first == {
        "concept": "joy",
        "condition": "base",
        "target_accuracy": 1.0,
        "target_accuracy_low": wilson(2, 2)[0],
        "target_accuracy_high": 1.0,
        "target_confidence": 0.5,
        "complement_accuracy": pytest.approx(2 / 3),
        "complement_accuracy_low": low,
        "complement_accuracy_high": high,
        "complement_confidence": 0.5,
        "n_target": 2,
        "n_complement": 3,
        "perplexity": pytest.approx(math.exp(2)),
        "tested": 0,
        "changed": 0,
    }
    assert (second["target_accuracy"], second["target_confidence"]) == (0.5, 0.25)
    assert (second["complement_accuracy"], second["complement_confidence"]) == (pytest.approx(1 / 3), 0.75)
    assert (second["perplexity"], second["tested"], second["changed"]) == (pytest.approx(math.e), 8, 2)


def test_erasure_rows__have_none_where_there_is_no_text() -> None:
    texts = [TestText(token_ids=(9,), concept="joy")]
    base = result(Case(concept=None, condition="base"), [1], [0.5], [1], [1])
    for concept, empty in [("joy", "complement"), ("fear", "target")]:
        got = erasure_rows(texts, base, [result(Case(concept=concept, condition="range"), [1], [0.5], [1], [1])])[0]
        assert dict(got)[f"n_{empty}"] == 0
        assert dict(got)[f"{empty}_accuracy"] is None
        assert dict(got)[f"{empty}_confidence"] is None
    assert got["perplexity"] == pytest.approx(math.e)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 17), (17, 17), (3, 17), (841, 1000), (99_999, 100_000)])
def test_wilson__equals_scipys(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson__knows_nothing_without_trials() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
