"""The rows of the generation evaluation, recomputed from the numbers of each prompt."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from neuronlens.evaluation import Case
from neuronlens.generation import Prompt, Written
from neuronlens.generation_rows import Generated, generation_rows
from neuronlens.judge import Judged
from neuronlens.scores import draws

CONCEPTS = ["joy", "anger", "joy", "fear", "joy", "anger", "joy", "fear", "fear"]
PROMPTS = [Prompt(token_ids=(i,), concept=concept) for i, concept in enumerate(CONCEPTS)]
TEXTS = [f"prompt {i}" for i in range(len(PROMPTS))]
CASES = [
    Case(concept=concept, condition=condition, number=number)
    for place, concept in enumerate(("anger", "fear", "joy"))
    for condition, number in (("base", 0), ("neuron", 1 + 2 * place), ("range", 2 + 2 * place))
]
N_PASSES, N_RESAMPLES = 7, 200


def made() -> Generated:
    rng = np.random.default_rng(0)
    generated = Generated.empty(N_PASSES, len(PROMPTS))
    for r in range(N_PASSES):
        for places in ([0, 3, 8], [1, 2, 4, 5, 6, 7]):
            said = tuple(tuple(rng.integers(0, 4, size=rng.integers(0, 9)).tolist()) for _ in places)
            written = Written(
                texts=tuple(f"text {r} {place}" for place in places),
                token_ids=said,
                nll_B=np.array([2.0 * len(ids) for ids in said]) + rng.random(len(places)),
                tested=10 * r,
                changed=r,
            )
            judged = Judged(
                probability_B=rng.random(len(places)).astype(np.float32), is_top_B=rng.random(len(places)) < 0.5
            )
            generated.put(r, places, written, judged)
    return generated


GENERATED = made()
ROWS = generation_rows(PROMPTS, TEXTS, GENERATED, CASES, n_resamples=N_RESAMPLES)
OF_CASE = {(row["concept"], row["condition"]): row for row in ROWS}


def _means(case: Case, places: list[int]) -> list[float]:
    """target and complement probability, their drops and the selectivity, over these prompts (some several times)."""
    p, base = GENERATED.probability_RX[[case.number, 0]].astype(float)
    mine = [i for i in places if CONCEPTS[i] == case.concept]
    others = [i for i in places if CONCEPTS[i] != case.concept]
    target, complement = np.mean([p[i] for i in mine]), np.mean([p[i] for i in others])
    target_drop, complement_drop = np.mean([base[i] - p[i] for i in mine]), np.mean([base[i] - p[i] for i in others])
    return [target, complement, target_drop, complement_drop, target_drop - complement_drop]


NAMES = ("target_probability", "complement_probability", "target_drop", "complement_drop", "selectivity")


def _resamples(case: Case) -> np.ndarray:
    drawn = draws(np.array(CONCEPTS, dtype=object), n_resamples=N_RESAMPLES)
    return np.array([_means(case, np.repeat(np.arange(len(CONCEPTS)), counts).tolist()) for counts in drawn])


def test_rows__are_a_row_per_case_and_the_means_at_the_end():
    assert [(row["concept"], row["condition"]) for row in ROWS] == [
        (concept, condition) for concept in ("anger", "fear", "joy", None) for condition in ("base", "neuron", "range")
    ]
    assert {frozenset(row) for row in ROWS} == {frozenset(ROWS[0])}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.concept}-{case.condition}")
def test_scores__are_means_over_prompts_with_percentiles_of_paired_resamples(case):
    row, expected, resampled = OF_CASE[case.concept, case.condition], _means(case, range(9)), _resamples(case)
    for i, name in enumerate(NAMES):
        if case.condition == "base" and i >= 2:
            assert row[name] is row[f"{name}_low"] is row[f"{name}_high"] is None
            continue
        assert row[name] == pytest.approx(expected[i], rel=1e-6)
        assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx(
            np.percentile(resampled[:, i], [2.5, 97.5]).tolist(), rel=1e-6
        )


def test_means__count_every_concept_once():
    cases = [case for case in CASES if case.condition == "range"]
    row = OF_CASE[None, "range"]
    resampled = np.mean([_resamples(case) for case in cases], axis=0)
    for i, name in enumerate(NAMES):
        assert row[name] == pytest.approx(np.mean([_means(case, range(9))[i] for case in cases]), rel=1e-6)
        assert row[f"{name}_low"] == pytest.approx(np.percentile(resampled[:, i], 2.5), rel=1e-6)
    for name in ("target_share", "perplexity", "distinct_2", "n_tokens"):
        assert row[name] == pytest.approx(np.mean([OF_CASE[case.concept, "range"][name] for case in cases]))
    assert row["tested"] == sum(OF_CASE[case.concept, "range"]["tested"] for case in cases)
    assert row["changed_share"] == pytest.approx(0.1)
    assert row["examples"] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.concept}-{case.condition}")
def test_shares__are_of_top_classes_with_wilsons_interval(case):
    row, top = OF_CASE[case.concept, case.condition], GENERATED.is_top_RX[case.number]
    for side, is_mine in (("target", True), ("complement", False)):
        where = [i for i, concept in enumerate(CONCEPTS) if (concept == case.concept) == is_mine]
        k = int(sum(top[i] for i in where))
        wilson = binomtest(k, len(where)).proportion_ci(method="wilson")
        assert row[f"n_{side}"] == len(where)
        assert row[f"{side}_share"] == pytest.approx(k / len(where))
        assert (row[f"{side}_share_low"], row[f"{side}_share_high"]) == pytest.approx((wilson.low, wilson.high))


def test_fluency__is_pooled_over_all_continuations():
    row, r = OF_CASE["fear", "neuron"], 3
    n_X = GENERATED.n_tokens_RX[r]
    assert row["perplexity"] == pytest.approx(math.exp(GENERATED.nll_RX[r].sum() / n_X.sum()))
    assert row["n_tokens"] == pytest.approx(n_X.mean())
    known = [x for x in GENERATED.distinct_2_RX[r] if not math.isnan(x)]
    assert 0 < len(known) < len(PROMPTS)
    assert row["distinct_2"] == pytest.approx(sum(known) / len(known))
    assert (row["tested"], row["changed"]) == (60, 6)


def test_examples__are_the_first_three_prompts_of_the_concept():
    expected = [
        {"prompt": f"prompt {x}", "continuation": f"text 6 {x}", "probability": float(GENERATED.probability_RX[6, x])}
        for x in (0, 2, 4)
    ]
    assert OF_CASE["joy", "range"]["examples"] == expected


def test_rows__of_models_that_say_nothing_have_no_perplexity():
    silent = Generated.empty(3, 2)
    cases = [case for case in CASES if case.concept == "anger"]
    prompts = [Prompt(token_ids=(1,), concept="anger")] * 2
    for row in generation_rows(prompts, ["a", "b"], silent, cases, n_resamples=5):
        assert (row["perplexity"], row["distinct_2"], row["n_tokens"], row["target_probability"]) == (None, None, 0, 0)
        assert row["complement_probability"] is row["complement_share"] is row["complement_share_low"] is None
        assert row["selectivity"] is None
