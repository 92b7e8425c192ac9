"""The rows of the erasure evaluation, from made-up results, against sums and loops by hand."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from neuronlens.erasure import erasure_rows
from neuronlens.evaluation import Case, Condition, Measured, TestText
from neuronlens.measure import OffTask
from neuronlens.scores import draws, length_matched, wilson

CONCEPTS = ("joy", "joy", "fear", "fear", "fear")
DROPS = ("target_drop", "complement_drop", "selectivity")
ACCURACY_DROPS = ("target_accuracy_drop", "complement_accuracy_drop", "selectivity_accuracy")


def texts_of(concepts: Sequence[str], lengths: Sequence[int] | None = None) -> list[TestText]:
    return [
        TestText(token_ids=(9,) * n, concept=concept)
        for concept, n in zip(concepts, lengths or [1] * len(concepts), strict=True)
    ]


def measured(
    correct: Any, confidence: Any, *, kl: Any = None, nll: Any = None, n: Any = None, counts: Any = None, **more: Any
) -> Measured:
    """Results of R passes; what a test does not care about is 0."""
    correct_RX = np.array(correct, dtype=bool)
    zeros = np.zeros(correct_RX.shape)
    counts_R2 = np.zeros((len(correct_RX), 2), int) if counts is None else np.array(counts)
    return Measured(
        correct_RX=correct_RX,
        confidence_RX=np.array(confidence, dtype=np.float32),
        kl_RX=np.array(zeros if kl is None else kl, dtype=np.float32),
        nll_RX=np.array(zeros if nll is None else nll),
        n_predicted_X=np.ones(correct_RX.shape[1], int) if n is None else np.array(n),
        tested_R=counts_R2[:, 0],
        changed_R=counts_R2[:, 1],
        **more,
    )


def case(concept: str, condition: Condition, number: int, **more: Any) -> Case:
    return Case(concept=concept, condition=condition, number=number, **more)


JOY = [case("joy", "base", 0), case("joy", "range", 1)]


def test_erasure_rows__split_target_from_complement() -> None:
    found = measured(
        [[1, 1, 1, 0, 1], [0, 1, 1, 0, 0]],
        [[0.5] * 5, [0, 0.5, 1, 1, 0.25]],
        kl=[[0] * 5, [2, 4, 3, 3, 0]],
        nll=[[1, 1, 2, 4, 6], [9] * 5],
        n=[1, 1, 2, 2, 2],
        counts=[(0, 0), (8, 2)],
    )
    first, second, *means = erasure_rows(texts_of(CONCEPTS), found, JOY, settings=[{"tau": 2.5, "layers": [1]}])
    low, high = wilson(2, 3)
    drops = {f"{name}{end}": None for name in (*DROPS, *ACCURACY_DROPS) for end in ("", "_low", "_high")}
    nothing = ("off_task_perplexity", "off_task_kl", "choice_accuracy", "choice_accuracy_low", "choice_accuracy_high")
    assert first == {
        "setting": 0,
        "tau": 2.5,
        "layers": [1],
        "concept": "joy",
        "condition": "base",
        "control": None,
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
        "changed_share": None,
        "counted": "all",
        "kl_target": 0.0,
        "kl_complement": 0.0,
        **drops,
        **dict.fromkeys(nothing),
    }
    assert first.keys() == second.keys() == means[0].keys()
    assert (second["target_accuracy"], second["target_confidence"]) == (0.5, 0.25)
    assert (second["complement_accuracy"], second["complement_confidence"]) == (pytest.approx(1 / 3), 0.75)
    assert (second["kl_target"], second["kl_complement"]) == (3, 2)
    assert (second["tested"], second["changed"], second["changed_share"]) == (8, 2, 0.25)
    assert second["perplexity"] == pytest.approx(math.exp(27 / 6))
    # The target loses 0.25 of confidence, the others gain as much.
    assert [second[name] for name in DROPS] == pytest.approx([0.25, -0.25, 0.5])  # type: ignore[literal-required]
    assert [second[name] for name in ACCURACY_DROPS] == pytest.approx([1 / 2, 1 / 3, 1 / 6])  # type: ignore[literal-required]


def random_results(rng: np.random.Generator, n_passes: int, n_texts: int) -> Measured:
    return measured(
        rng.random((n_passes, n_texts)) < 0.7,
        rng.random((n_passes, n_texts)),
        kl=rng.random((n_passes, n_texts)),
        counts=rng.integers(1, 9, (n_passes, 2)),
    )


def test_erasure_rows__have_the_intervals_of_a_bootstrap_by_hand() -> None:
    rng = np.random.default_rng(1)
    concepts = ["joy", "fear", "awe", "fear", "joy", "fear", "awe", "awe", "fear"] * 3
    found = random_results(rng, 4, len(concepts))
    cases = [
        case(concept, condition, number)
        for concept, offset in (("joy", 0), ("fear", 1))
        for condition, number in (("base", 0), ("neuron", 1 + offset), ("range", 3))
    ]
    rows = erasure_rows(texts_of(concepts), found, cases, n_resamples=200)
    counts_SX = draws(np.array(concepts, dtype=object), n_resamples=200)

    def replicates(concept: str, number: int, x_RX: np.ndarray) -> np.ndarray:
        """[S, 3]: target drop, complement drop, selectivity, each resample's texts written out."""
        values = []
        for counts_X in counts_SX:
            drawn = [i for i, n in enumerate(counts_X.tolist()) for _ in range(n)]
            lost = [(float(x_RX[0, i]) - float(x_RX[number, i]), concepts[i]) for i in drawn]
            target = [d for d, whose in lost if whose == concept]
            others = [d for d, whose in lost if whose != concept]
            values.append((sum(target) / len(target), sum(others) / len(others)))
        both = np.array(values)
        return np.column_stack([both, both[:, 0] - both[:, 1]])

    def check(row: Any, expected_S3: np.ndarray, names: Sequence[str]) -> None:
        for name, column_S in zip(names, expected_S3.T, strict=True):
            low, high = np.quantile(column_S, [0.025, 0.975])
            assert (row[f"{name}_low"], row[f"{name}_high"]) == (pytest.approx(low), pytest.approx(high))
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]

    assert found.confidence_RX is not None
    assert found.correct_RX is not None
    for names, x_RX in ((DROPS, found.confidence_RX), (ACCURACY_DROPS, found.correct_RX)):
        for row, one in zip(rows, cases, strict=False):
            if one.condition != "base":
                check(row, replicates(one.concept, one.number, x_RX), names)
        mean = next(row for row in rows if row["concept"] is None and row["condition"] == "neuron")
        check(mean, (replicates("joy", 1, x_RX) + replicates("fear", 2, x_RX)) / 2, names)


def test_erasure_rows__end_each_setting_with_means_over_concepts() -> None:
    rng = np.random.default_rng(2)
    concepts = ["joy", "fear", "fear", "awe", "awe", "awe"]
    found = random_results(rng, 5, 6)
    cases = [
        case(concept, condition, number, setting=setting, control=control)
        for setting in (0, 1)
        for concept, control in (("joy", "fear"), ("fear", "awe"))
        for condition, number in (("range", 1 + setting), ("base", 0), ("wrong_concept", 3 + setting))
    ]
    rows = erasure_rows(texts_of(concepts), found, cases, settings=[{"tau": 1.0}, {"tau": 2.0}], counted="answer")
    order: list[Condition] = ["base", "range", "wrong_concept"]
    assert [(row["setting"], row["concept"], row["condition"]) for row in rows] == [
        (setting, concept, condition) for setting in (0, 1) for concept in ("joy", "fear", None) for condition in order
    ]
    assert [dict(row)["tau"] for row in rows] == [1.0] * 9 + [2.0] * 9
    assert {row["counted"] for row in rows} == {"answer"}
    for setting in (0, 1):
        for condition in order:
            mine = [row for row in rows if (row["setting"], row["condition"]) == (setting, condition)]
            joy, fear, mean = (dict(row) for row in mine)
            for name in ("target_accuracy", "complement_confidence", "kl_target", "kl_complement", "perplexity"):
                assert mean[name] == pytest.approx((joy[name] + fear[name]) / 2)
            for name in ("tested", "changed", "n_target", "n_complement"):
                assert mean[name] == joy[name] + fear[name]
            assert (mean["changed_share"] or 0) == pytest.approx(mean["changed"] / max(1, mean["tested"]))
            assert mean["target_accuracy_low"] is None
            if condition != "base":
                assert mean["selectivity"] == pytest.approx((joy["selectivity"] + fear["selectivity"]) / 2)
                assert mean["selectivity_low"] < mean["selectivity"] < mean["selectivity_high"]
            assert mean["control"] is None


def test_erasure_rows__weigh_the_complement_by_length() -> None:
    concepts, lengths = ["joy"] * 3 + ["fear"] * 4, [1, 1, 2, 1, 2, 2, 9]
    rng = np.random.default_rng(3)
    found = random_results(rng, 2, 7)
    cases = [*JOY, case("joy", "length_matched", 1)]
    rows = erasure_rows(texts_of(concepts, lengths), found, cases)
    plain, matched = rows[1], rows[2]
    # Two thirds of the target's texts have length 1, a third length 2, none 9.
    weight_X = np.array([0, 0, 0, 2 / 3, 1 / 6, 1 / 6, 0])
    np.testing.assert_allclose(length_matched(np.array(lengths), np.array([c == "joy" for c in concepts])), weight_X)
    assert found.confidence_RX is not None
    assert found.correct_RX is not None
    lost_X = found.confidence_RX[0] - found.confidence_RX[1]
    assert matched["complement_drop"] == pytest.approx(float(weight_X @ lost_X), rel=1e-5)
    assert matched["target_drop"] == plain["target_drop"]
    assert matched["complement_accuracy"] == pytest.approx(weight_X @ found.correct_RX[1])
    assert matched["complement_accuracy_low"] is None
    assert matched["kl_complement"] == pytest.approx(weight_X @ found.kl_RX[1], rel=1e-5)
    assert (matched["n_complement"], plain["n_complement"]) == (3, 4)


def test_erasure_rows__have_none_where_there_is_no_text() -> None:
    found = measured([[1], [0]], [[0.5], [0.25]])
    for concept, empty, other in [("joy", "complement", "target"), ("fear", "target", "complement")]:
        cases = [case(concept, "base", 0), case(concept, "range", 1)]
        row = dict(erasure_rows(texts_of(["joy"]), found, cases)[1])
        assert row[f"n_{empty}"] == 0
        for name in ("accuracy", "accuracy_low", "confidence", "drop", "drop_low"):
            assert row[f"{empty}_{name}"] is None
            assert row[f"{other}_{name}"] is not None
        assert row["selectivity"] is row["selectivity_low"] is row[f"kl_{empty}"] is None
    assert row["perplexity"] == 1.0


def test_erasure_rows__tell_of_unlabelled_text_and_of_choices() -> None:
    found = measured(
        np.ones((2, 5)),
        np.ones((2, 5)),
        off_task=OffTask(
            nll_RB=np.array([[1.0, 2.0], [4.0, 8.0]]),
            kl_RB=np.array([[0.0, 0.0], [0.5, 2.5]]),
            n_predicted_B=np.array([2, 4]),
        ),
        choice_RQ=np.array([[0, 1, 2], [0, 0, 0]]),
    )
    base, ranged, *_ = erasure_rows(texts_of(CONCEPTS), found, JOY, right_choice_Q=np.array([0, 1, 1]))
    assert (base["off_task_perplexity"], base["off_task_kl"]) == (pytest.approx(math.exp(0.5)), 0.0)
    assert (ranged["off_task_perplexity"], ranged["off_task_kl"]) == (pytest.approx(math.exp(2)), 0.5)
    assert [row["choice_accuracy"] for row in (base, ranged)] == pytest.approx([2 / 3, 1 / 3])
    assert (ranged["choice_accuracy_low"], ranged["choice_accuracy_high"]) == wilson(1, 3)


def test_erasure_rows__of_an_intervention_that_changes_nothing_are_zero() -> None:
    found = measured([[1, 0, 1, 0, 1]], [[0.5] * 5])
    _, row, *_ = erasure_rows(texts_of(CONCEPTS), found, [case("joy", "base", 0), case("joy", "range", 0)])
    assert [row[name] for name in (*DROPS, "selectivity_low", "selectivity_high")] == [0.0] * 5  # type: ignore[literal-required]
