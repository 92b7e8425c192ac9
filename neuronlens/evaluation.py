"""The erasure evaluation: what does a model still know of a concept, and of all the others, without its neurons?

For every concept there are conditions: `base`, the model as it is; `neuron`, the concept's salient neurons replaced
whatever their value; `range`, the same neurons replaced inside the concept's ranges only; and the controls of
`neuronlens.controls`. A good intervention drops the target and leaves the complement, which is the texts of all other
concepts. The plan holds every intervention once, however many conditions and settings ask for it, and says on whose
results each row of `neuronlens.erasure` is scored.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from neuronlens.batches import TokenBatch, pad
from neuronlens.errors import UsageError
from neuronlens.measure import Counted, Intervention, Meter, OffTask, Positions, Scores, batches_for
from neuronlens.models import LoadedModel
from neuronlens.programs import Edit, Program, Rule
from neuronlens.ranges import RangeTable

Condition = Literal["base", "neuron", "range", "random", "wrong_concept", "shuffled", "length_matched"]

CONDITIONS: tuple[Condition, ...] = get_args(Condition)


@dataclass(frozen=True, slots=True, kw_only=True)
class TestText:
    """A prompt, as the model's tokens (no pads), and the concept that it is labelled with."""

    __test__ = False  # not a test, whatever pytest makes of the name

    token_ids: tuple[int, ...]
    concept: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row to be: a concept under a condition of a setting, and the number of the pass that it is scored on.

    Pass 0 is the bare model, pass i the plan's intervention i - 1. control: what a control took, in words.
    """

    setting: int = 0
    concept: str
    condition: Condition
    number: int
    control: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """An intervention before it is compiled: rules over the plan's table of that number, and where in a text it acts.

    n_bytes: what its arrays take.
    """

    table: int
    rules: tuple[Rule, ...]
    positions: Positions
    n_bytes: int


@dataclass(slots=True)
class EvaluationPlan:
    """Which interventions an evaluation takes, and which rows are scored on each."""

    tables: list[RangeTable] = field(default_factory=list)
    interventions: list[Planned] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    _numbers: dict[tuple[str, Positions], int] = field(default_factory=dict)
    _parts: dict[tuple[int, str], RangeTable] = field(default_factory=dict)

    @property
    def n_passes(self) -> int:
        return 1 + len(self.interventions)

    def number_of(
        self, table: RangeTable, rules: Sequence[Rule], positions: Positions, program: Program | None = None
    ) -> int:
        """The number of the pass under these rules of one concept, which compile to `program`. The same program is one
        pass, whatever it came from; where the table has no neuron for the rules, it is the unmodified one."""
        program = program or self.compiled(table, rules)
        if program is None:
            return 0
        key = (program.id, positions)
        if key not in self._numbers:
            self.interventions.append(
                Planned(table=self._place(table), rules=tuple(rules), positions=positions, n_bytes=program.n_bytes)
            )
            self._numbers[key] = len(self.interventions)
        return self._numbers[key]

    def compiled(self, table: RangeTable, rules: Sequence[Rule]) -> Program | None:
        """The program of these rules, of one concept; None where the table has no neuron for any of them."""
        part = self._part(self._place(table), rules[0].concept)
        known = [rule for rule in rules if _has_neurons(part, rule)]
        return Program.compile(part, known) if known else None

    def at_work(self, some: slice = slice(None)) -> list[Intervention]:
        """These interventions, ready to act."""
        compiled = [(self.compiled(self.tables[one.table], one.rules), one) for one in self.interventions[some]]
        return [
            Intervention(program=program, positions=one.positions) for program, one in compiled if program is not None
        ]

    def bare(self) -> "EvaluationPlan":
        """What `at_work` needs, to be sent to others."""
        return EvaluationPlan(tables=self.tables, interventions=self.interventions)

    def groups(self, most_bytes: int) -> list[slice]:
        """The interventions cut where their programs would take more than so many bytes; one group at least."""
        groups, first, total = [], 0, 0
        for i, one in enumerate(self.interventions):
            total += one.n_bytes
            if total > most_bytes and i > first:
                groups.append(slice(first, i))
                first, total = i, one.n_bytes
        return [*groups, slice(first, len(self.interventions))]

    def _place(self, table: RangeTable) -> int:
        place = next((i for i, known in enumerate(self.tables) if known is table), len(self.tables))
        if place == len(self.tables):
            self.tables.append(table)
        return place

    def _part(self, place: int, concept: str) -> RangeTable:
        """The table's rows of one concept alone, which a thousand programs of it then need not look for."""
        key = (place, concept)
        if key not in self._parts:
            table = self.tables[place]
            rows = table.rows.filter(pc.equal(table.rows["concept"], concept))
            self._parts[key] = replace(table, rows=rows)
        return self._parts[key]


def _has_neurons(part: RangeTable, rule: Rule) -> bool:
    """Whether a table of one concept's rows has any where the rule acts."""
    rows = part.rows
    for name, chosen in (("hook_point", rule.hook_points), ("layer", rule.layers)):
        if chosen is not None:
            rows = rows.filter(pc.is_in(rows[name], value_set=pa.array(chosen, rows.schema.field(name).type)))
    return rows.num_rows > 0


def whole_neurons(edit: Edit, concept: str) -> Rule:
    """The rule of condition `neuron`: what `edit` does, done to every value of the concept's neurons."""
    fields = {**edit.model_dump(), "tau": math.inf}
    if edit.action in ("adaptive", "soften"):
        # What depends on a range's width or posterior has no whole-neuron form: it is held against zeroed neurons.
        fields |= {"action": "zero", "factor": None}
    return Rule(concept=concept, **fields)


def plan_conditions(
    plan: EvaluationPlan,
    setting: int,
    table: RangeTable,
    edit: Edit,
    concepts: Sequence[str],
    *,
    positions: Positions = "all",
) -> dict[str, Program | None]:
    """Add base, neuron and range of each concept; gives the range program of each, None where nothing is replaced.

    Raises UsageError where the table cannot serve the edit.
    """
    programs = {}
    for concept in concepts:
        whole, ranged = whole_neurons(edit, concept), Rule.of(edit, concept)
        programs[concept] = program = plan.compiled(table, [ranged])
        numbers: dict[Condition, int] = {
            "base": 0,
            "neuron": plan.number_of(table, [whole], positions),
            "range": plan.number_of(table, [ranged], positions, program),
        }
        plan.cases += [
            Case(setting=setting, concept=concept, condition=condition, number=number)
            for condition, number in numbers.items()
        ]
    return programs


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What R passes gave, the unmodified one first, for X test texts in the order given.

    correct_RX (bool) and confidence_RX (float32, the probability of the right answer) are None without answers. kl_RX
    (float32, nats) is KL(base || edited) at the answer. nll_RX (float64, nats, summed over a text's predicted tokens)
    and n_predicted_X (int64) are None where nobody asked. tested_R and changed_R (int64) count activations over all
    texts. off_task: the same passes over unlabelled texts. choice_RQ (int64): the letter chosen for each question.
    """

    correct_RX: np.ndarray | None
    confidence_RX: np.ndarray | None
    kl_RX: np.ndarray
    nll_RX: np.ndarray | None
    n_predicted_X: np.ndarray | None
    tested_R: np.ndarray
    changed_R: np.ndarray
    off_task: OffTask | None = None
    choice_RQ: np.ndarray | None = None

    @classmethod
    def empty(
        cls,
        n_passes: int,
        n_texts: int,
        *,
        answers: bool,
        perplexity: bool,
        n_off_task: int = 0,
        n_questions: int = 0,
    ) -> "Measured":
        """Zeros, to be filled in by the batches' results."""
        shape, off_task = (n_passes, n_texts), (n_passes, n_off_task)
        return cls(
            correct_RX=np.zeros(shape, bool) if answers else None,
            confidence_RX=np.zeros(shape, np.float32) if answers else None,
            kl_RX=np.zeros(shape, np.float32),
            nll_RX=np.zeros(shape) if perplexity else None,
            n_predicted_X=np.zeros(n_texts, np.int64) if perplexity else None,
            tested_R=np.zeros(n_passes, np.int64),
            changed_R=np.zeros(n_passes, np.int64),
            off_task=OffTask(
                nll_RB=np.zeros(off_task), kl_RB=np.zeros(off_task), n_predicted_B=np.zeros(n_off_task, np.int64)
            )
            if n_off_task
            else None,
            choice_RQ=np.zeros((n_passes, n_questions), np.int64) if n_questions else None,
        )

    def put(self, passes: np.ndarray, places: Sequence[int], found: Scores) -> None:
        """The results of the texts at `places`, under these passes (their numbers)."""
        at = np.ix_(passes, np.asarray(places))
        for into, values in (
            (self.correct_RX, found.correct_RB),
            (self.confidence_RX, found.confidence_RB),
            (self.kl_RX, found.kl_RB),
            (self.nll_RX, found.nll_RB),
        ):
            if into is not None and values is not None:
                into[at] = values
        if self.n_predicted_X is not None and found.n_predicted_B is not None:
            self.n_predicted_X[np.asarray(places)] = found.n_predicted_B
        self.tested_R[passes] += found.tested_R
        self.changed_R[passes] += found.changed_R

    def put_off_task(self, passes: np.ndarray, places: Sequence[int], found: OffTask) -> None:
        assert self.off_task is not None, "there are unlabelled texts"
        at = np.ix_(passes, np.asarray(places))
        self.off_task.nll_RB[at], self.off_task.kl_RB[at] = found.nll_RB, found.kl_RB
        self.off_task.n_predicted_B[np.asarray(places)] = found.n_predicted_B

    def put_choices(self, passes: np.ndarray, places: Sequence[int], chosen_RB: np.ndarray) -> None:
        assert self.choice_RQ is not None, "there are questions"
        self.choice_RQ[np.ix_(passes, np.asarray(places))] = chosen_RB


def measure_texts(
    loaded: LoadedModel,
    interventions: Sequence[Intervention],
    texts: Sequence[TestText],
    answers: Mapping[str, int] | None,
    *,
    tokens_per_batch: int,
    perplexity: bool = True,
    counted: Counted = "all",
    overrides: Mapping[str, str] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Measured:
    """All texts under the bare model and every intervention, in this process. A text's result does not depend on the
    batch that it is in, but for rounding. on_progress hears the number of texts in each batch.

    answers: see `answers_of`, whose errors this raises, and those of `Meter`.
    """
    answer_X = answers_of(loaded, [text.concept for text in texts], answers)
    meter = Meter(loaded, interventions, counted=counted, overrides=overrides)
    has_nll = perplexity and loaded.kind == "decoder"
    measured = Measured.empty(1 + len(interventions), len(texts), answers=answer_X is not None, perplexity=has_nll)
    passes = np.arange(1 + len(interventions))
    for places in batches_for(loaded, [len(text.token_ids) for text in texts], tokens_per_batch):
        batch = batch_of([texts[i].token_ids for i in places], loaded)
        answer_B = None if answer_X is None else torch.from_numpy(answer_X[places])
        measured.put(passes, places, meter.labelled(batch, answer_B, perplexity=has_nll))
        if on_progress is not None:
            on_progress(len(places))
    return measured


def batch_of(rows: Sequence[Sequence[int]], loaded: LoadedModel) -> TokenBatch:
    return pad(rows, pad_id=loaded.pad_id)


def answers_of(loaded: LoadedModel, concepts: Sequence[str], answers: Mapping[str, int] | None) -> np.ndarray | None:
    """The right token (decoder) or class (classifier) of each text, int64; None where nothing is known to be right.

    answers: that of each concept. Without it, a classifier takes the concept as its label, and a decoder is measured by
    divergence and perplexity alone. Raises UsageError: a concept without an answer, a model with nothing to measure.
    """
    if loaded.kind == "encoder":
        raise UsageError(
            f"{type(loaded.module).__name__} has neither next-token nor class logits: nothing can be evaluated. Take a "
            "decoder or a sequence classifier, or leave the test section out of the recipe."
        )
    if answers is None and loaded.kind == "decoder":
        return None
    known = loaded.label_ids if answers is None else answers
    missing = sorted(set(concepts) - set(known))
    if missing:
        what = "is no class of this model's head" if answers is None else "has no answer"
        raise UsageError(
            f"The concept {missing[0]!r} of the test texts {what}. There are: {', '.join(map(str, known))}. "
            "Add it to data.answers."
        )
    return np.array([known[concept] for concept in concepts], dtype=np.int64)
