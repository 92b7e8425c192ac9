"""The rows of the erasure evaluation: what each intervention took from its target, and what from the complement.

A row holds one concept under one condition of one setting; where `concept` is None, the mean over the concepts, each
counting once ("macro"). docs/store-format.md, `evaluations`, says what the columns are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import numpy as np

from neuronlens.evaluation import CONDITIONS, Case, Condition, Measured, TestText
from neuronlens.measure import Counted
from neuronlens.scores import RESAMPLES, draws, interval_95, length_matched, resampled_means, wilson

_MEANS = (
    *("target_accuracy", "target_confidence", "complement_accuracy", "complement_confidence"),
    *("kl_target", "kl_complement", "perplexity", "off_task_perplexity", "off_task_kl", "choice_accuracy"),
)
_DROPS = (
    *("target_drop", "complement_drop", "selectivity"),
    *("target_accuracy_drop", "complement_accuracy_drop", "selectivity_accuracy"),
)
"""By confidence, then by accuracy: the order of `_Drops`."""


class ErasureRow(TypedDict):
    """What there was nothing to compute from is None; of base, which has nothing to be compared with, all drops.

    Accuracies have the ends of their Wilson 95 % interval (not in means), drops and selectivities those of a paired
    bootstrap one. Further keys are the setting's own: tau, top_fraction, layers and so on.
    """

    setting: int
    concept: str | None
    condition: Condition
    control: str | None
    target_accuracy: float | None
    target_accuracy_low: float | None
    target_accuracy_high: float | None
    target_confidence: float | None
    complement_accuracy: float | None
    complement_accuracy_low: float | None
    complement_accuracy_high: float | None
    complement_confidence: float | None
    n_target: int
    n_complement: int
    perplexity: float | None
    tested: int
    changed: int
    changed_share: float | None
    counted: Counted
    kl_target: float | None
    kl_complement: float | None
    target_drop: float | None
    target_drop_low: float | None
    target_drop_high: float | None
    complement_drop: float | None
    complement_drop_low: float | None
    complement_drop_high: float | None
    selectivity: float | None
    selectivity_low: float | None
    selectivity_high: float | None
    target_accuracy_drop: float | None
    target_accuracy_drop_low: float | None
    target_accuracy_drop_high: float | None
    complement_accuracy_drop: float | None
    complement_accuracy_drop_low: float | None
    complement_accuracy_drop_high: float | None
    selectivity_accuracy: float | None
    selectivity_accuracy_low: float | None
    selectivity_accuracy_high: float | None
    off_task_perplexity: float | None
    off_task_kl: float | None
    choice_accuracy: float | None
    choice_accuracy_low: float | None
    choice_accuracy_high: float | None


def erasure_rows(
    texts: Sequence[TestText],
    measured: Measured,
    cases: Sequence[Case],
    *,
    settings: Sequence[Mapping[str, Any]] = ({},),
    counted: Counted = "all",
    right_choice_Q: np.ndarray | None = None,
    n_resamples: int = RESAMPLES,
) -> list[ErasureRow]:
    """A row per case, setting by setting, concept by concept, and the means of each setting's conditions after them.

    settings: the columns of each setting. right_choice_Q (int64): the right letter of each question.
    """
    concept_X = np.array([text.concept for text in texts], dtype=object)
    length_X = np.array([len(text.token_ids) for text in texts])
    counts_SX = draws(concept_X, n_resamples=n_resamples) if measured.confidence_RX is not None else None
    rows: dict[Case, dict[str, Any]] = {}
    means: dict[tuple[int, Condition], _Mean] = {}
    for concept in dict.fromkeys(case.concept for case in cases):
        target_X = (concept_X == concept).astype(float)
        for matched in (False, True):
            some = [c for c in cases if c.concept == concept and (c.condition == "length_matched") == matched]
            sides = _Sides(
                target_X=target_X, complement_X=length_matched(length_X, target_X > 0) if matched else 1 - target_X
            )
            for case, drops in zip(some, _drops(measured, some, sides, counts_SX), strict=True):
                rows[case] = _row(case, measured, sides, right_choice_Q) | drops.columns()
                means.setdefault((case.setting, case.condition), _Mean()).add(rows[case], drops)
    ordered = sorted(cases, key=lambda case: (case.setting, CONDITIONS.index(case.condition)))
    found = []
    for setting in dict.fromkeys(case.setting for case in ordered):
        mine = [case for case in ordered if case.setting == setting]
        concepts = dict.fromkeys(case.concept for case in cases if case.setting == setting)
        whose = [rows[case] for concept in concepts for case in mine if case.concept == concept]
        whose += [means[setting, condition].row() for condition in dict.fromkeys(case.condition for case in mine)]
        found += [{**row, "counted": counted, **settings[setting]} for row in whose]
    return cast(list[ErasureRow], found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """What each text counts on either side, float64 [X]: 0 or 1, but for a complement that is weighted."""

    target_X: np.ndarray
    complement_X: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drops:
    """The numbers of _DROPS for one case, float64 [6], with the ends of their intervals, and the same in each resample,
    [S, 6]; NaN where unknown."""

    drop_6: np.ndarray
    low_6: np.ndarray
    high_6: np.ndarray
    resampled_S6: np.ndarray

    @classmethod
    def unknown(cls) -> "_Drops":
        nothing_6 = np.full(6, np.nan)
        return cls(drop_6=nothing_6, low_6=nothing_6, high_6=nothing_6, resampled_S6=np.zeros((0, 6)))

    def columns(self) -> dict[str, float | None]:
        ends = {"": self.drop_6, "_low": self.low_6, "_high": self.high_6}
        return {name + end: _known(value_6[i]) for i, name in enumerate(_DROPS) for end, value_6 in ends.items()}


def _drops(measured: Measured, cases: Sequence[Case], sides: _Sides, counts_SX: np.ndarray | None) -> list[_Drops]:
    """The drops of cases that share a target and a complement. Base has nothing to be compared with."""
    confidence_RX, correct_RX = measured.confidence_RX, measured.correct_RX
    if confidence_RX is None or correct_RX is None or counts_SX is None or not cases:
        return [_Drops.unknown()] * len(cases)
    numbers = [case.number for case in cases]
    lost_2CX = np.stack([x_RX[0].astype(float) - x_RX[numbers] for x_RX in (confidence_RX, correct_RX)])
    every_text_once = np.ones((1, counts_SX.shape[1]), np.uint16)
    [drop_C6], resampled_SC6 = (_drops_in(counts, lost_2CX, sides) for counts in (every_text_once, counts_SX))
    low_C6, high_C6 = interval_95(resampled_SC6)
    found = [
        _Drops(drop_6=drop_C6[i], low_6=low_C6[i], high_6=high_C6[i], resampled_S6=resampled_SC6[:, i])
        for i in range(len(cases))
    ]
    return [_Drops.unknown() if c.condition == "base" else one for c, one in zip(cases, found, strict=True)]


def _drops_in(counts_SX: np.ndarray, lost_2CX: np.ndarray, sides: _Sides) -> np.ndarray:
    """What C cases lost of confidence and accuracy, as _DROPS of each resample, [S, C, 6]."""
    flat = lost_2CX.reshape(-1, lost_2CX.shape[2])
    shape = (len(counts_SX), *lost_2CX.shape[:2])
    target_S2C = resampled_means(counts_SX, flat, sides.target_X).reshape(shape)
    others_S2C = resampled_means(counts_SX, flat, sides.complement_X).reshape(shape)
    drops_S23C = np.stack([target_S2C, others_S2C, target_S2C - others_S2C], axis=2)
    return drops_S23C.reshape(shape[0], 6, shape[2]).transpose(0, 2, 1)


class _Mean:
    """The mean over concepts of one condition, each counting once."""

    def __init__(self) -> None:
        self._rows: list[Mapping[str, Any]] = []
        self._n_6 = np.zeros(6)
        self._drop_6 = np.zeros(6)
        self._resampled_S6: np.ndarray | None = None

    def add(self, row: Mapping[str, Any], drops: _Drops) -> None:
        self._rows.append(row)
        is_known_6 = np.isfinite(drops.drop_6)
        self._n_6 += is_known_6
        self._drop_6 += np.where(is_known_6, drops.drop_6, 0)
        if is_known_6.any():
            resampled_S6 = np.where(is_known_6, drops.resampled_S6, 0)
            self._resampled_S6 = resampled_S6 if self._resampled_S6 is None else self._resampled_S6 + resampled_S6

    def row(self) -> dict[str, Any]:
        first = self._rows[0]
        sums = {key: sum(row[key] for row in self._rows) for key in ("n_target", "n_complement", "tested", "changed")}
        controls = {row["control"] for row in self._rows}
        return {
            **dict.fromkeys(first),
            **{key: _mean_of([row[key] for row in self._rows]) for key in _MEANS},
            **sums,
            "setting": first["setting"],
            "condition": first["condition"],
            "control": controls.pop() if len(controls) == 1 else None,
            "changed_share": sums["changed"] / sums["tested"] if sums["tested"] else None,
            **self._drops().columns(),
        }

    def _drops(self) -> _Drops:
        if self._resampled_S6 is None:
            return _Drops.unknown()
        n_6 = np.where(self._n_6, self._n_6, np.nan)
        resampled_S6 = self._resampled_S6 / n_6
        low_6, high_6 = interval_95(resampled_S6)
        return _Drops(drop_6=self._drop_6 / n_6, low_6=low_6, high_6=high_6, resampled_S6=resampled_S6)


def _row(case: Case, measured: Measured, sides: _Sides, right_choice_Q: np.ndarray | None) -> dict[str, Any]:
    """All but the drops."""
    r = case.number
    tested, changed = int(measured.tested_R[r]), int(measured.changed_R[r])
    row: dict[str, Any] = {"setting": case.setting, "concept": case.concept, "condition": case.condition}
    row["control"] = case.control
    for side, weight_X in (("target", sides.target_X), ("complement", sides.complement_X)):
        row |= _accuracy(side, measured.correct_RX, r, weight_X)
        row[f"{side}_confidence"] = _mean(measured.confidence_RX, r, weight_X)
        row[f"kl_{side}"] = _mean(measured.kl_RX, r, weight_X)
        row[f"n_{side}"] = int(np.count_nonzero(weight_X))
    row["perplexity"] = _perplexity(measured.nll_RX, r, measured.n_predicted_X, sides.complement_X)
    row |= {"tested": tested, "changed": changed, "changed_share": changed / tested if tested else None}
    return row | _off_task(measured, r) | _choices(measured, r, right_choice_Q)


def _accuracy(side: str, correct_RX: np.ndarray | None, r: int, weight_X: np.ndarray) -> dict[str, float | None]:
    """The share that is right, and the ends of its interval where every text counts as one or not at all."""
    names = [f"{side}_accuracy{end}" for end in ("", "_low", "_high")]
    if correct_RX is None or not weight_X.any():
        return dict.fromkeys(names)
    if not np.isin(weight_X, (0, 1)).all():
        return dict(zip(names, (_mean(correct_RX, r, weight_X), None, None), strict=True))
    k, n = int(correct_RX[r][weight_X > 0].sum()), int(weight_X.sum())
    return dict(zip(names, (k / n, *wilson(k, n)), strict=True))


def _off_task(measured: Measured, r: int) -> dict[str, float | None]:
    found = measured.off_task
    n = 0 if found is None else int(found.n_predicted_B.sum())
    if found is None or n == 0:
        return {"off_task_perplexity": None, "off_task_kl": None}
    return {
        "off_task_perplexity": float(np.exp(found.nll_RB[r].sum() / n)),
        "off_task_kl": float(found.kl_RB[r].sum() / n),
    }


def _choices(measured: Measured, r: int, right_choice_Q: np.ndarray | None) -> dict[str, float | None]:
    names = ("choice_accuracy", "choice_accuracy_low", "choice_accuracy_high")
    if measured.choice_RQ is None or right_choice_Q is None:
        return dict.fromkeys(names)
    k, n = int((measured.choice_RQ[r] == right_choice_Q).sum()), len(right_choice_Q)
    return dict(zip(names, (k / n, *wilson(k, n)), strict=True))


def _mean(values_RX: np.ndarray | None, r: int, weight_X: np.ndarray) -> float | None:
    if values_RX is None or not weight_X.any():
        return None
    return float(np.average(values_RX[r].astype(float), weights=weight_X))


def _perplexity(
    nll_RX: np.ndarray | None, r: int, n_predicted_X: np.ndarray | None, weight_X: np.ndarray
) -> float | None:
    if nll_RX is None or n_predicted_X is None:
        return None
    n_predicted = float(weight_X @ n_predicted_X)
    return float(np.exp(weight_X @ nll_RX[r] / n_predicted)) if n_predicted else None


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
