"""The erasure evaluation against texts run one by one through hand-written passes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import nn

from neuronlens import measure
from neuronlens.erasure import erasure_rows
from neuronlens.errors import RunFailed, UsageError
from neuronlens.evaluation import Case, EvaluationPlan, Measured, TestText, measure_texts, plan_conditions
from neuronlens.measure import Positions
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
        rows = [] if case.condition == "base" else ROWS[case.concept]
        self.edit = ZeroInside(rows, whole=case.condition == "neuron")
        self.correct, self.confidence, self.nll, self.n, self.log_p = [], [], [], [], []
        for text in TEXTS:
            with torch.no_grad():
                logits = model.lm_head(gpt2_hidden(model, text.token_ids, self.edit)).double().numpy()
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            answer = ANSWERS[text.concept]
            self.correct.append(log_p[-1].argmax() == answer)
            self.confidence.append(np.exp(log_p[-1, answer]))
            self.log_p.append(log_p[-1])
            surprises = [-log_p[t - 1, i] for t, i in enumerate(text.token_ids) if t > 0 and i not in SPECIALS]
            self.nll.append(sum(surprises))
            self.n.append(len(surprises))

    def perplexity(self, target: str) -> float:
        others = [i for i, text in enumerate(TEXTS) if text.concept != target]
        return math.exp(sum(self.nll[i] for i in others) / sum(self.n[i] for i in others))


@lru_cache
def by_hand(case: Case) -> ByHand:
    return ByHand(tiny_model("gpt2"), case)


BASE = Case(concept="joy", condition="base", number=0)
CONCEPTS = ("joy", "anger")
CASES = [
    Case(concept=concept, condition=condition, number=0)
    for concept in CONCEPTS
    for condition in ("base", "neuron", "range")
]


@dataclass(frozen=True)
class Ran:
    """An evaluation of some concepts, and where each of its cases is in the results."""

    plan: EvaluationPlan
    measured: Measured

    def number(self, concept: str, condition: str) -> int:
        found = [case.number for case in self.plan.cases if (case.concept, case.condition) == (concept, condition)]
        assert len(found) == 1
        return found[0]

    def of(self, concept: str, condition: str) -> dict[str, Any]:
        """The numbers of one case, X of each."""
        r, m = self.number(concept, condition), self.measured
        return {
            "correct": None if m.correct_RX is None else m.correct_RX[r],
            "confidence": None if m.confidence_RX is None else m.confidence_RX[r],
            "kl": m.kl_RX[r],
            "nll": None if m.nll_RX is None else m.nll_RX[r],
            "counts": (m.tested_R[r], m.changed_R[r]),
        }

    def rows(self, texts: Sequence[TestText] | None = None, **more: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in erasure_rows(texts or TEXTS, self.measured, self.plan.cases, **more)]


def run(
    loaded: LoadedModel,
    table: RangeTable,
    *,
    concepts: Sequence[str] = CONCEPTS,
    texts: Sequence[TestText] | None = None,
    answers: Any = ANSWERS,
    edit: Edit | None = None,
    tokens_per_batch: int = 60,
    positions: Positions = "all",
    **more: Any,
) -> Ran:
    plan = EvaluationPlan()
    plan_conditions(plan, 0, table, edit or Edit(), concepts, positions=positions)
    chosen = TEXTS if texts is None else texts
    return Ran(plan, measure_texts(loaded, plan.at_work(), chosen, answers, tokens_per_batch=tokens_per_batch, **more))


@pytest.fixture(scope="module")
def ran(loaded: LoadedModel, table: RangeTable) -> Ran:
    return run(loaded, table)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.condition} {case.concept}")
def test_measure_texts__equals_masking_by_hand(ran: Ran, case: Case) -> None:
    expected, base = by_hand(case), by_hand(BASE)
    got = ran.of(case.concept, case.condition)
    np.testing.assert_array_equal(got["correct"], expected.correct)
    np.testing.assert_allclose(got["confidence"], expected.confidence, rtol=1e-4)
    np.testing.assert_allclose(got["nll"], expected.nll, rtol=1e-5)
    np.testing.assert_array_equal(ran.measured.n_predicted_X, expected.n)
    divergence = [entropy(np.exp(p), np.exp(q)) for p, q in zip(base.log_p, expected.log_p, strict=True)]
    np.testing.assert_allclose(got["kl"], divergence, rtol=1e-4, atol=5e-7)
    assert got["counts"] == (expected.edit.tested, expected.edit.changed)


def test_measure_texts__conditions_differ(ran: Ran) -> None:
    confidence_RX = ran.measured.confidence_RX
    assert confidence_RX is not None
    assert (np.abs(confidence_RX[1:] - confidence_RX[0]).max(axis=1) > 1e-4).all()
    for concept in CONCEPTS:
        ranged, whole = ran.of(concept, "range"), ran.of(concept, "neuron")
        assert np.abs(ranged["confidence"] - whole["confidence"]).max() > 1e-4
        assert 0 < ranged["counts"][1] < ranged["counts"][0]
        assert whole["counts"][1] == whole["counts"][0] > 0


def test_measure_texts__does_not_depend_on_the_batches(loaded: LoadedModel, table: RangeTable) -> None:
    one_by_one = run(loaded, table, tokens_per_batch=1).measured
    for tokens_per_batch in (25, WHOLE_BUDGET):
        batched = run(loaded, table, tokens_per_batch=tokens_per_batch).measured
        np.testing.assert_array_equal(batched.correct_RX, one_by_one.correct_RX)
        np.testing.assert_allclose(batched.confidence_RX, one_by_one.confidence_RX, rtol=1e-5)
        np.testing.assert_allclose(batched.nll_RX, one_by_one.nll_RX, rtol=1e-5)
        np.testing.assert_allclose(batched.kl_RX, one_by_one.kl_RX, rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(batched.tested_R, one_by_one.tested_R)
        np.testing.assert_array_equal(batched.changed_R, one_by_one.changed_R)


def test_measure_texts__holds_few_logits_at_a_time(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_texts(loaded, [], TEXTS, ANSWERS, tokens_per_batch=WHOLE_BUDGET)
    limit = 7 * len(loaded.tokenizer)
    monkeypatch.setattr(measure, "LOGITS_AT_ONCE", limit)
    seen: list[int] = []
    handle = loaded.module.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.numel()))
    sliced = measure_texts(loaded, [], TEXTS, ANSWERS, tokens_per_batch=WHOLE_BUDGET)
    handle.remove()
    assert max(seen) <= limit
    np.testing.assert_allclose(sliced.nll_RX, whole.nll_RX, rtol=1e-5)
    np.testing.assert_array_equal(sliced.correct_RX, whole.correct_RX)


def test_measure_texts__runs_the_first_blocks_once_a_batch(loaded: LoadedModel, table: RangeTable) -> None:
    ran_blocks: list[list[int]] = [[], []]
    handles = [
        block.ln_2.register_forward_hook(lambda module, args, x, layer=layer: ran_blocks[layer].append(len(x)))
        for layer, block in enumerate(loaded.module.transformer.h)
    ]
    progress: list[int] = []
    run(loaded, table, edit=Edit(layers=(1,)), tokens_per_batch=50, on_progress=progress.append)
    for handle in handles:
        handle.remove()
    assert sum(progress) == len(TEXTS)
    assert len(progress) > 1
    assert ran_blocks[0] == progress
    # joy has MLP neurons, which the second block must compute; anger has the block's output, which is known.
    assert ran_blocks[1] == [n for n in progress for _ in range(3)]


def test_measure_texts__without_answers_has_perplexity_and_divergence_alone(
    loaded: LoadedModel, table: RangeTable, ran: Ran
) -> None:
    without = run(loaded, table, answers=None)
    assert (without.measured.correct_RX, without.measured.confidence_RX) == (None, None)
    np.testing.assert_allclose(without.measured.nll_RX, ran.measured.nll_RX, rtol=1e-6)
    np.testing.assert_array_equal(without.measured.kl_RX, ran.measured.kl_RX)
    rows = without.rows()
    assert {r["target_accuracy"] for r in rows} == {r["complement_accuracy_low"] for r in rows} == {None}
    assert {r["selectivity"] for r in rows} == {r["target_drop_high"] for r in rows} == {None}
    assert all(r["perplexity"] > 1 for r in rows)
    assert all((r["kl_target"] > 0) == (r["condition"] != "base") for r in rows)


def test_measure_texts__takes_texts_with_nothing_to_predict(loaded: LoadedModel, table: RangeTable) -> None:
    texts = [TestText(token_ids=(SEP,), concept="joy"), TestText(token_ids=(9,), concept="fear")]
    got = run(loaded, table, concepts=["joy"], texts=texts, answers=None)
    assert got.measured.n_predicted_X is not None
    assert got.measured.n_predicted_X.tolist() == [0, 0]
    assert {row["perplexity"] for row in got.rows(texts)} == {None}


def test_measure_texts__does_what_the_edit_says(loaded: LoadedModel, table: RangeTable) -> None:
    def joy(condition: str, edit: Edit) -> dict[str, Any]:
        return run(loaded, table, concepts=["joy"], edit=edit).of("joy", condition)

    both, upper = joy("range", Edit()), joy("range", Edit(layers=(1,)))
    assert 0 < upper["counts"][0] == both["counts"][0] // 2
    assert joy("range", Edit(tau=0.5))["counts"][1] < both["counts"][1]
    # At one site, what is done there cannot change what is found there.
    kept, lower = joy("range", Edit(action="dampen", factor=1, layers=(0,))), joy("range", Edit(layers=(0,)))
    np.testing.assert_allclose(kept["confidence"], joy("base", Edit())["confidence"], rtol=1e-6)
    assert 0 < kept["counts"][1] == lower["counts"][1]
    # Adaptive ranges have no whole-neuron form; zeroed neurons stand for it.
    zeroed, adaptive = joy("neuron", Edit()), joy("neuron", Edit(action="adaptive", factor=0.5))
    np.testing.assert_array_equal(adaptive["confidence"], zeroed["confidence"])


def test_measure_texts__acts_at_the_answer_alone_where_told_to(loaded: LoadedModel, table: RangeTable) -> None:
    model = loaded.module
    for layer, expected_same in ((0, False), (1, True)):
        edit = Edit(layers=(layer,))
        last = run(loaded, table, concepts=["joy"], edit=edit, positions="last").of("joy", "range")
        everywhere = run(loaded, table, concepts=["joy"], edit=edit).of("joy", "range")
        by_hand_X, tested, changed = [], 0, 0
        for text in TEXTS:
            zero = ZeroInside([r for r in ROWS["joy"] if r["layer"] == layer])

            def at_last(hook_point: str, at: int, x: torch.Tensor, zero: ZeroInside = zero) -> torch.Tensor:
                return torch.cat([x[:, :-1], zero(hook_point, at, x[:, -1:])], dim=1)

            logits = model.lm_head(gpt2_hidden(model, text.token_ids, at_last))[-1].detach().double().softmax(dim=0)
            by_hand_X.append(float(logits[ANSWERS[text.concept]]))
            tested, changed = tested + zero.tested, changed + zero.changed
        np.testing.assert_allclose(last["confidence"], by_hand_X, rtol=1e-4)
        assert last["counts"] == (tested, changed)
        # In the last layer, what is changed elsewhere is not seen from the answer.
        assert (np.abs(everywhere["confidence"] - last["confidence"]).max() < 1e-6) == expected_same


LABEL_OF = {"joy": 0, "anger": 1, "fear": 2}


@pytest.mark.parametrize("condition", ["base", "neuron", "range"])
def test_measure_texts__reads_a_classifiers_head_and_counts_no_pads(condition: Any) -> None:
    model = tiny_model("bert", head="classifier")
    loaded = LoadedModel.of(model, tiny_tokenizer())
    rows = [row("joy", n, 0.1, 0.1, layer=layer, rank=n + 1) for layer in (0, 1) for n in range(0, D_MLP, 2)]
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
    plain = run(loaded, table, concepts=["joy"], answers=None)
    got = plain.of("joy", condition)
    assert got["correct"].tolist() == [int(v.argmax()) == LABEL_OF[t.concept] for v, t in zip(p, TEXTS, strict=True)]
    np.testing.assert_allclose(
        got["confidence"], [v[LABEL_OF[t.concept]] for v, t in zip(p, TEXTS, strict=True)], rtol=1e-4
    )
    assert got["counts"] == (edit.tested, edit.changed)
    assert (plain.measured.nll_RX, plain.measured.n_predicted_X) == (None, None)
    turned = run(loaded, table, concepts=["joy"], answers={"joy": 1, "anger": 2, "fear": 0}).of("joy", condition)
    np.testing.assert_allclose(turned["confidence"][0], p[0][1], rtol=1e-4)


def test_measure_texts__refuses_what_cannot_be_measured(loaded: LoadedModel) -> None:
    def refused(model: LoadedModel, texts: Sequence[TestText], answers: Any, match: str) -> None:
        with pytest.raises(UsageError, match=match):
            measure_texts(model, [], texts, answers, tokens_per_batch=60)

    bert = LoadedModel.of(tiny_model("bert", head="none"), tiny_tokenizer())
    classifier = LoadedModel.of(tiny_model("bert", head="classifier"), tiny_tokenizer())
    stranger = [TestText(token_ids=(9, SEP), concept="awe")]
    refused(bert, TEXTS, ANSWERS, "neither next-token nor class logits")
    refused(loaded, stranger, ANSWERS, r"'awe' of the test texts has no answer. There are: joy, anger, fear")
    refused(classifier, stranger, None, r"'awe' of the test texts is no class of this model's head. There are: joy")


def test_measure_texts__refuses_logits_that_are_not_finite() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[3] = math.nan
    loaded = LoadedModel.of(model, tiny_tokenizer())
    with pytest.raises(RunFailed, match=r"not finite for 1 of 1 texts of a batch \(unmodified, torch.float32\)"):
        measure_texts(loaded, [], TEXTS, ANSWERS, tokens_per_batch=1)


def test_plan_conditions__holds_each_program_once(table: RangeTable) -> None:
    plan = EvaluationPlan()
    for setting, tau in enumerate((1.0, 2.5, None)):
        plan_conditions(plan, setting, table, Edit(tau=tau), CONCEPTS)
    numbers = {(case.setting, case.concept, case.condition): case.number for case in plan.cases}
    assert len(numbers) == len(plan.cases) == 3 * 2 * 3
    assert {n for (_, _, condition), n in numbers.items() if condition == "base"} == {0}
    for concept in CONCEPTS:
        # Whole neurons know of no tau, and the table's own is 2.5.
        assert len({numbers[setting, concept, "neuron"] for setting in range(3)}) == 1
        assert numbers[1, concept, "range"] == numbers[2, concept, "range"] != numbers[0, concept, "range"]
    assert plan.n_passes == 1 + 2 * (1 + 2)
    acting = plan.at_work()
    assert len({one.program.id for one in acting}) == len(acting) == 6


def test_plan_conditions__takes_the_bare_model_where_no_neuron_is_chosen(table: RangeTable) -> None:
    plan = EvaluationPlan()
    programs = plan_conditions(plan, 0, table, Edit(layers=(0,)), CONCEPTS)  # anger has neurons in layer 1 only
    assert programs["anger"] is None
    assert [case.number for case in plan.cases] == [0, 1, 2, 0, 0, 0]


def test_evaluation_plan__is_cut_where_its_programs_take_too_much(table: RangeTable) -> None:
    plan = EvaluationPlan()
    plan_conditions(plan, 0, table, Edit(), CONCEPTS)
    sizes = [one.n_bytes for one in plan.interventions]
    assert plan.groups(sum(sizes)) == [slice(0, 4)]
    assert plan.groups(sizes[0] + sizes[1]) == [slice(0, 2), slice(2, 4)]
    assert plan.groups(1) == [slice(i, i + 1) for i in range(4)]
    assert EvaluationPlan().groups(1) == [slice(0, 0)]
