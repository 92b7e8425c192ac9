"""Ranges against whole neurons, in the erasure evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuronlens import figures
from neuronlens.canvas import CONDITION_NAMES
from neuronlens.figures import Measured
from neuronlens.page.desk import Desk, decimal, layers_text, number, percent
from neuronlens.page.elements import Drawing, Part, Query, Section, Table
from neuronlens.page.facts import Facts

MAX_EVALUATIONS = 4
_ABOUT = {
    "accuracy": "share answered right, with its 95 % interval",
    "confidence": "mean probability of the right answer",
}
_QUERIES = (Query(name="report_evaluations"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One file of evaluations/ or generations/: what was done, and a row per concept and condition; rows of means have
    the concept None."""

    title: str
    rows: Sequence[Mapping[str, Any]]

    @property
    def concepts(self) -> list[str]:
        return list(dict.fromkeys(row["concept"] for row in self.rows if row["concept"] is not None))

    @property
    def conditions(self) -> list[str]:
        return list(dict.fromkeys(row["condition"] for row in self.rows))

    def numbers(self, condition: str, column: str, concepts: Sequence[str | None]) -> np.ndarray:
        """A number per concept; NaN where it was not measured."""
        found = {row["concept"]: row.get(column) for row in self.rows if row["condition"] == condition}
        return np.array([number(found.get(concept)) for concept in concepts])

    def mean(self, condition: str, column: str) -> float:
        """The mean over concepts; NaN where nothing was measured."""
        numbers = self.numbers(condition, column, self.concepts)
        return float(np.nanmean(numbers)) if np.isfinite(numbers).any() else math.nan

    def has(self, column: str) -> bool:
        return any(row.get(column) is not None for row in self.rows)

    def measured(self, column: str, concepts: Sequence[str | None]) -> list[Measured]:
        """The column under every condition, with its intervals where it has any."""
        has_interval = self.has(f"{column}_low")
        return [
            Measured(
                condition=condition,
                name=CONDITION_NAMES.get(condition, condition),
                value_C=self.numbers(condition, column, concepts),
                low_C=self.numbers(condition, f"{column}_low", concepts) if has_interval else None,
                high_C=self.numbers(condition, f"{column}_high", concepts) if has_interval else None,
            )
            for condition in self.conditions
        ]


def evaluations_of(facts: Facts) -> list[Evaluation]:
    """Those of one setting; of a sweep, a section a setting would be too many."""
    single = [one for one in facts.evaluations if {row.get("setting", 0) for row in one.get("rows", ())} == {0}]
    return [
        Evaluation(title=_title(one), rows=[row for row in one["rows"] if row["concept"] is not None]) for one in single
    ]


def section(desk: Desk, evaluations: Sequence[Evaluation]) -> Section:
    parts = [_part(desk, evaluation) for evaluation in evaluations[:MAX_EVALUATIONS]]
    if not evaluations:
        note = (
            "Nothing was evaluated: the recipe has no test, or the evaluation was not run. With test texts: neuronlens "
            "evaluate STORE --set test.source=test.jsonl"
        )
        parts = [Part(note=note)]
    elif len(evaluations) > MAX_EVALUATIONS:
        note = f"{MAX_EVALUATIONS} of {len(evaluations)} evaluations are drawn."
        parts.append(Part(note=note, queries=_QUERIES))
    return Section(
        anchor="erasure",
        title="Ranges against whole neurons",
        lead="For every concept in turn, its salient neurons are silenced, whole or only where their value falls "
        "inside the concept's range, while the model answers test texts. A good intervention takes the target concept "
        "away and leaves the others alone.",
        parts=tuple(parts),
    )


def edit_text(edit: Mapping[str, Any]) -> str:
    """What was done, and where, in words."""
    numbers = [
        f"{key} {edit[key]:g}" for key in ("factor", "value", "tau", "top_fraction") if edit.get(key) is not None
    ]
    where = [f"layers {layers_text(edit['layers'])}"] if edit.get("layers") else []
    where += [", ".join(edit["hook_points"])] if edit.get("hook_points") else []
    return ", ".join([f"action {edit.get('action', 'zero')}", *numbers, *where])


def _title(evaluation: Mapping[str, Any]) -> str:
    done = edit_text(evaluation.get("edit", {}))
    return f"{evaluation['table']}: {done}, {evaluation.get('n_texts', 0):,} test texts"


def _part(desk: Desk, evaluation: Evaluation) -> Part:
    concepts, cut = desk.drawable(evaluation.concepts)
    drawings = [
        *_answers(desk, evaluation, "accuracy", concepts),
        *_answers(desk, evaluation, "confidence", concepts),
        *_perplexity(desk, evaluation, concepts),
    ]
    return Part(
        title=evaluation.title,
        drawings=tuple(drawings),
        table=_table(evaluation).without_empty_columns(),
        note=cut,
        queries=_QUERIES,
    )


def _answers(desk: Desk, evaluation: Evaluation, kind: str, concepts: Sequence[str]) -> list[Drawing]:
    if not evaluation.has(f"target_{kind}"):
        return []
    target = evaluation.measured(f"target_{kind}", concepts)
    others = evaluation.measured(f"complement_{kind}", concepts)
    name, about = kind.capitalize(), _ABOUT[kind]
    drawings = [
        desk.draw(
            figures.conditions(concepts, target, title=f"{name} on the target", unit=kind),
            f"Test texts of the row's concept: {about}. To be erased: further left is better.",
        ),
        desk.draw(
            figures.conditions(concepts, others, title=f"{name} on the others", unit=kind),
            f"Test texts of all others while the row's concept is erased: {about}. To be spared: further right is "
            "better.",
        ),
    ]
    if kind == "accuracy" and evaluation.conditions[0] == "base" and len(evaluation.conditions) > 1:
        drawings.append(
            desk.draw(
                figures.trade_off(target, others, unit=kind),
                "A mark per concept and condition, a grey line between the two of a concept. Higher: more is erased; "
                "further left: the others lose less.",
            )
        )
    return drawings


def _perplexity(desk: Desk, evaluation: Evaluation, concepts: Sequence[str]) -> list[Drawing]:
    if not evaluation.has("perplexity"):
        return []
    measured = evaluation.measured("perplexity", concepts)
    figure = figures.conditions(concepts, measured, title="Perplexity of the others", unit="perplexity", share=False)
    return [desk.draw(figure, "Perplexity of the other concepts' test texts: further left is better.")]


def _table(evaluation: Evaluation) -> Table:
    columns = ("target_accuracy", "target_confidence", "complement_accuracy", "complement_confidence", "perplexity")
    rows = []
    for condition in evaluation.conditions:
        means = (decimal(evaluation.mean(condition, column), 3) for column in columns)
        rows.append(("mean of all", CONDITION_NAMES.get(condition, condition), *means, ""))
    for row in evaluation.rows:
        numbers = (decimal(row.get(column), 3) for column in columns)
        changed = percent(row["changed"] / row["tested"]) if row.get("tested") else ""
        rows.append((row["concept"], CONDITION_NAMES.get(row["condition"], row["condition"]), *numbers, changed))
    return Table(
        columns=(
            *("concept", "intervention", "target accuracy", "target confidence", "others' accuracy"),
            *("others' confidence", "perplexity", "changed"),
        ),
        rows=tuple(rows),
        numbers=frozenset(range(2, 8)),
        caption="Changed: the share of the salient neurons' activations that the intervention replaced.",
    )
