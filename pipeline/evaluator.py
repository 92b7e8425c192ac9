"""What a worker does for an evaluation: batches of test texts, each under a group of interventions.

A group is as many interventions as fit the memory together when they are compiled. Its programs stay compiled on a
worker until it is given a batch of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from neuronlens.evaluation import EvaluationPlan, batch_of
from neuronlens.interventions import check_config
from neuronlens.measure import Counted, Meter, batches_for
from neuronlens.models import LoadedModel

MOST_PROGRAM_BYTES = 1 << 30
"""Of the programs of one group."""

TextKind = Literal["labelled", "off_task", "choices"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationWork:
    """What all jobs of an evaluation share; `id` tells it from others. letter_ids: of multiple-choice questions."""

    id: str
    plan: EvaluationPlan
    groups: tuple[slice, ...]
    counted: Counted
    perplexity: bool
    letter_ids: tuple[int, ...] = ()

    def passes(self, group: int) -> np.ndarray:
        """The numbers of a group's passes: the unmodified one, which every group runs, then its own."""
        some = self.groups[group]
        return np.array([0, *range(some.start + 1, some.stop + 1)])


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationJob:
    """A batch of texts of one kind under one group: their places among the texts of that kind, their tokens, and for
    each the right answer (labelled; None where there is none) or the number of its choices."""

    kind: TextKind
    group: int
    places: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    facts: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{len(self.places)} {self.kind.replace('_', '-')} texts"


class Evaluator:
    """Holds a model, and the group of interventions that it was last asked for."""

    def __init__(self, loaded: LoadedModel, overrides: dict[str, str] | None) -> None:
        self._loaded, self._overrides = loaded, overrides
        self._held: tuple[str, int] | None = None
        self._meter: Meter | None = None

    def run(self, work: EvaluationWork, job: EvaluationJob) -> Any:
        """Scores, OffTask or the letters chosen, as `Meter` gives them. Raises as it does."""
        meter = self._meter_for(work, job.group)
        batch = batch_of(job.rows, self._loaded)
        if job.kind == "off_task":
            return meter.off_task(batch)
        facts = None if job.facts is None else torch.tensor(job.facts)
        if job.kind == "choices":
            assert facts is not None, "a question has choices"
            return meter.choices(batch, torch.tensor(work.letter_ids), facts)
        return meter.labelled(batch, facts, perplexity=work.perplexity)

    def _meter_for(self, work: EvaluationWork, group: int) -> Meter:
        if self._meter is None or self._held != (work.id, group):
            self._meter = None  # before the next one takes its memory
            some = work.groups[group]
            for place in {one.table for one in work.plan.interventions[some]}:
                check_config(self._loaded.module, work.plan.tables[place])
            self._meter = Meter(self._loaded, work.plan.at_work(some), counted=work.counted, overrides=self._overrides)
            self._held = (work.id, group)
        return self._meter


def jobs_of(
    kind: TextKind,
    loaded: LoadedModel,
    rows: Sequence[tuple[int, ...]],
    facts_X: np.ndarray | None,
    tokens_per_batch: int,
    n_groups: int,
) -> list[EvaluationJob]:
    """Every batch of these texts under every group; a group's batches come together."""
    return [
        EvaluationJob(
            kind=kind,
            group=group,
            places=tuple(places),
            rows=tuple(rows[i] for i in places),
            facts=None if facts_X is None else tuple(facts_X[places].tolist()),
        )
        for group in range(n_groups)
        for places in batches_for(loaded, [len(row) for row in rows], tokens_per_batch)
    ]
