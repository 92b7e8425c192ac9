"""The rows of the generation evaluation: how much of its concept a model still writes, and how well.

A row holds one concept under one condition; where `concept` is None, the mean over the concepts, each counting once.
The target's continuations are those of its own prompts; the complement's are those of all other prompts, each scored
for the concept of its own prompt: what is spared. docs/store-format.md, `generations`, says what the columns are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuronlens.evaluation import CONDITIONS, Case, Condition
from neuronlens.generation import Prompt, Written, distinct_2
from neuronlens.judge import Judged
from neuronlens.scores import RESAMPLES, draws, interval_95, resampled_means, wilson

N_EXAMPLES = 3
"""Of a concept's continuations, how many are kept for people to read: those of its first prompts."""

_SCORES = ("target_probability", "complement_probability", "target_drop", "complement_drop", "selectivity")
_DROPS = slice(2, 5)
_SHARES = ("target_share", "complement_share")
_MEANS = (*_SHARES, "perplexity", "distinct_2", "n_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What R passes wrote for X prompts, and what the classifier says of it; the unmodified pass is the first.

    probability_RX (float32), is_top_RX (bool), nll_RX (float64, nats): as in Judged and Written. n_tokens_RX (int64) is
    a continuation's length, distinct_2_RX (float64) NaN where it has fewer than two tokens. tested_R and changed_R
    (int64) count activations over all prompts. texts has a list of X continuations for each pass.
    """

    probability_RX: np.ndarray
    is_top_RX: np.ndarray
    nll_RX: np.ndarray
    n_tokens_RX: np.ndarray
    distinct_2_RX: np.ndarray
    tested_R: np.ndarray
    changed_R: np.ndarray
    texts: list[list[str]]

    @classmethod
    def empty(cls, n_passes: int, n_prompts: int) -> "Generated":
        """Zeros, to be filled in by the batches' results."""
        shape = (n_passes, n_prompts)
        return cls(
            probability_RX=np.zeros(shape, np.float32),
            is_top_RX=np.zeros(shape, bool),
            nll_RX=np.zeros(shape),
            n_tokens_RX=np.zeros(shape, np.int64),
            distinct_2_RX=np.full(shape, np.nan),
            tested_R=np.zeros(n_passes, np.int64),
            changed_R=np.zeros(n_passes, np.int64),
            texts=[[""] * n_prompts for _ in range(n_passes)],
        )

    def put(self, r: int, places: Sequence[int], written: Written, judged: Judged) -> None:
        """What pass r gave for the prompts at `places`."""
        at = np.asarray(places)
        self.probability_RX[r, at], self.is_top_RX[r, at] = judged.probability_B, judged.is_top_B
        self.nll_RX[r, at] = written.nll_B
        self.n_tokens_RX[r, at] = [len(ids) for ids in written.token_ids]
        self.distinct_2_RX[r, at] = [distinct_2(ids) for ids in written.token_ids]
        self.tested_R[r] += written.tested
        self.changed_R[r] += written.changed
        for place, text in zip(places, written.texts, strict=True):
            self.texts[r][place] = text


def generation_rows(
    prompts: Sequence[Prompt],
    prompt_texts: Sequence[str],
    generated: Generated,
    cases: Sequence[Case],
    *,
    n_resamples: int = RESAMPLES,
) -> list[dict[str, Any]]:
    """A row per case, concept by concept, then the mean of each condition.

    Scores and drops have the ends of their 95 % interval (percentiles over paired bootstrap resamples), shares those of
    their Wilson interval (not in means). What there was nothing to compute from is None; of base, all drops.
    """
    concept_X = np.array([prompt.concept for prompt in prompts], dtype=object)
    once, counts_SX = np.ones((1, len(prompts)), np.uint16), draws(concept_X, n_resamples=n_resamples)
    ordered = sorted(cases, key=lambda case: CONDITIONS.index(case.condition))
    rows: list[dict[str, Any]] = []
    means: dict[Condition, list[tuple[dict[str, Any], _Scores]]] = {}
    for concept in dict.fromkeys(case.concept for case in cases):
        is_target_X = concept_X == concept
        for case in (case for case in ordered if case.concept == concept):
            scores = _Scores(
                score_5=_scores(once, generated, case, is_target_X)[0],
                resampled_S5=_scores(counts_SX, generated, case, is_target_X),
            )
            rows.append(
                {"concept": concept, "condition": case.condition}
                | _counts(generated, case, is_target_X)
                | scores.columns()
                | _shares(generated, case, is_target_X)
                | _fluency(generated, case)
                | {"examples": _examples(generated, case, prompt_texts, is_target_X)}
            )
            means.setdefault(case.condition, []).append((rows[-1], scores))
    return rows + [_mean_row(of_condition) for of_condition in means.values()]


@dataclass(frozen=True, slots=True)
class _Scores:
    """The numbers of _SCORES, float64 [5], and the same in each resample, [S, 5]; NaN where unknown."""

    score_5: np.ndarray
    resampled_S5: np.ndarray

    def columns(self) -> dict[str, float | None]:
        low_5, high_5 = interval_95(self.resampled_S5)
        ends = {"": self.score_5, "_low": low_5, "_high": high_5}
        return {name + end: _known(value_5[i]) for i, name in enumerate(_SCORES) for end, value_5 in ends.items()}


def _scores(counts_SX: np.ndarray, generated: Generated, case: Case, is_target_X: np.ndarray) -> np.ndarray:
    """The numbers of _SCORES in each resample, float64 [S, 5]."""
    values_2X = generated.probability_RX[[case.number, 0]]
    target_S2 = resampled_means(counts_SX, values_2X, is_target_X.astype(float))
    others_S2 = resampled_means(counts_SX, values_2X, (~is_target_X).astype(float))
    target_drop_S, others_drop_S = target_S2[:, 1] - target_S2[:, 0], others_S2[:, 1] - others_S2[:, 0]
    found_S5 = np.stack(
        [target_S2[:, 0], others_S2[:, 0], target_drop_S, others_drop_S, target_drop_S - others_drop_S], axis=1
    )
    if case.condition == "base":  # it has nothing to be compared with
        found_S5[:, _DROPS] = np.nan
    return found_S5


def _counts(generated: Generated, case: Case, is_target_X: np.ndarray) -> dict[str, Any]:
    tested, changed = int(generated.tested_R[case.number]), int(generated.changed_R[case.number])
    return {
        "n_target": int(is_target_X.sum()),
        "n_complement": int((~is_target_X).sum()),
        **_changes(tested, changed),
    }


def _changes(tested: int, changed: int) -> dict[str, Any]:
    return {"tested": tested, "changed": changed, "changed_share": changed / tested if tested else None}


def _shares(generated: Generated, case: Case, is_target_X: np.ndarray) -> dict[str, float | None]:
    shares: dict[str, float | None] = {}
    for name, where_X in zip(_SHARES, (is_target_X, ~is_target_X), strict=True):
        k, n = int(generated.is_top_RX[case.number, where_X].sum()), int(where_X.sum())
        low, high = wilson(k, n) if n else (None, None)
        shares |= {name: k / n if n else None, f"{name}_low": low, f"{name}_high": high}
    return shares


def _fluency(generated: Generated, case: Case) -> dict[str, float | None]:
    """Over the continuations of all prompts."""
    nll, n = float(generated.nll_RX[case.number].sum()), int(generated.n_tokens_RX[case.number].sum())
    distinct_X = generated.distinct_2_RX[case.number]
    with_bigrams_X = np.isfinite(distinct_X)
    return {
        "perplexity": float(np.exp(nll / n)) if n else None,
        "distinct_2": float(distinct_X[with_bigrams_X].mean()) if with_bigrams_X.any() else None,
        "n_tokens": float(generated.n_tokens_RX[case.number].mean()),
    }


def _examples(
    generated: Generated, case: Case, prompt_texts: Sequence[str], is_target_X: np.ndarray
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt_texts[x],
            "continuation": generated.texts[case.number][x],
            "probability": float(generated.probability_RX[case.number, x]),
        }
        for x in np.flatnonzero(is_target_X)[:N_EXAMPLES].tolist()
    ]


def _mean_row(of_condition: Sequence[tuple[dict[str, Any], _Scores]]) -> dict[str, Any]:
    rows = [row for row, _ in of_condition]
    scores = _Scores(
        score_5=np.mean([scores.score_5 for _, scores in of_condition], axis=0),
        resampled_S5=np.mean([scores.resampled_S5 for _, scores in of_condition], axis=0),
    )
    sums = {key: sum(row[key] for row in rows) for key in ("n_target", "n_complement", "tested", "changed")}
    known = {key: [row[key] for row in rows if row[key] is not None] for key in _MEANS}
    return {
        **dict.fromkeys(rows[0]),
        "condition": rows[0]["condition"],
        **sums,
        **_changes(sums["tested"], sums["changed"]),
        **scores.columns(),
        **{key: sum(values) / len(values) if values else None for key, values in known.items()},
        "examples": [],
    }


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
