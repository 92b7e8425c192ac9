"""The erasure evaluation: what does a model still know of a concept, and of all the others, without its neurons?

For every concept there are three conditions: `base`, the model as it is; `neuron`, the concept's salient neurons
replaced whatever their value; `range`, the same neurons replaced inside the concept's ranges only. Each is run once
over all test texts, base once for all concepts. A good intervention drops the target and leaves the complement, which
is the texts of all other concepts.

A decoder is asked for its next token after the prompt, a classifier for its class. Perplexity is that of the prompts
of the complement, special tokens not predicted; base has it over the same complement, so that the conditions compare.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from neuronlens.batches import TokenBatch, batches_by_length, pad
from neuronlens.errors import RunFailed, UsageError
from neuronlens.interventions import Applied, intervene
from neuronlens.models import LoadedModel
from neuronlens.programs import Edit, Rule
from neuronlens.ranges import RangeTable

Condition = Literal["base", "neuron", "range"]

CONDITIONS: tuple[Condition, ...] = ("base", "neuron", "range")

LOGITS_AT_ONCE = 1 << 24
"""Logits held at a time: the LM head runs over slices of tokens, so that memory does not grow with the vocabulary."""

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: 95 % lie between the two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestText:
    """A prompt, as the model's tokens (no pads), and the concept that it is labelled with."""

    __test__ = False  # not a test, whatever pytest makes of the name

    token_ids: tuple[int, ...]
    concept: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run over the test texts: the bare model (base, concept None), or one concept's neurons or ranges replaced."""

    concept: str | None
    condition: Condition

    def __post_init__(self) -> None:
        if (self.concept is None) != (self.condition == "base"):
            raise ValueError(f"base is the case without a concept, every other has one; found {self}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CaseResult:
    """What one case gave, for each of X texts in the order given.

    correct_X (bool) and confidence_X (float32, the probability of the right answer) are None without answers; nll_X
    (float64, nats, summed over the text's predicted tokens) and n_predicted_X (int64) are None for a classifier. tested
    and changed count activations at real tokens over all texts; 0 for base.
    """

    case: Case
    correct_X: np.ndarray | None
    confidence_X: np.ndarray | None
    nll_X: np.ndarray | None
    n_predicted_X: np.ndarray | None
    tested: int
    changed: int


class ErasureRow(TypedDict):
    """One concept under one condition. The complement is every text of another concept.

    Accuracies have the bounds of their Wilson 95 % interval. What there was nothing to compute from is None.
    """

    concept: str
    condition: Condition
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


def erasure_cases(concepts: Sequence[str]) -> list[Case]:
    """Every run that the evaluation of these concepts takes: base, then neuron and range of each."""
    edits: tuple[Condition, ...] = ("neuron", "range")
    return [
        Case(concept=None, condition="base"),
        *(Case(concept=concept, condition=condition) for concept in concepts for condition in edits),
    ]


def evaluate_case(
    loaded: LoadedModel,
    table: RangeTable | None,
    case: Case,
    texts: Sequence[TestText],
    answers: Mapping[str, int] | None,
    *,
    tokens_per_batch: int,
    edit: Edit | None = None,
    overrides: Mapping[str, str] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> CaseResult:
    """Run all texts under one case. The result of a text does not depend on the batch that it is in, but for rounding.

    answers: the right token (decoder) or class (classifier) of each concept; without it a decoder is measured by
    perplexity alone, and a classifier takes the concept as its label. edit: what is done and where, by default zero at
    all of the table's sites; its tau is that of the ranges. overrides: as in `find_sites`. on_progress is called after
    each batch with the number of texts in it.

    Raises UsageError: a concept without an answer, a model with nothing to measure, a table that does not fit;
    RunFailed where the logits are not finite.
    """
    answer_X = _answers(loaded, [text.concept for text in texts], answers)
    n_texts = len(texts)
    correct_X, confidence_X = np.zeros(n_texts, dtype=bool), np.zeros(n_texts, dtype=np.float32)
    nll_X, n_predicted_X = np.zeros(n_texts), np.zeros(n_texts, dtype=np.int64)
    order = sorted(range(n_texts), key=lambda i: -len(texts[i].token_ids))
    lengths = [len(texts[i].token_ids) for i in order]
    with torch.inference_mode(), _under(case, loaded, table, edit or Edit(), overrides) as applied:
        for places in batches_by_length(lengths, tokens_per_batch):
            chosen = [order[place] for place in places]
            batch = pad([texts[i].token_ids for i in chosen], pad_id=loaded.pad_id)
            if applied is not None:
                applied.set_mask(batch.mask_BT.to(loaded.device))
            answer_B = None if answer_X is None else torch.from_numpy(answer_X[chosen])
            measured = (
                _classify(loaded, batch, answer_B) if loaded.kind == "classifier" else _predict(loaded, batch, answer_B)
            )
            correct_X[chosen], confidence_X[chosen] = measured.correct_B, measured.confidence_B
            nll_X[chosen], n_predicted_X[chosen] = measured.nll_B, measured.n_predicted_B
            if on_progress is not None:
                on_progress(len(chosen))
    _refuse_nonfinite(loaded, case, np.isfinite(nll_X) & np.isfinite(confidence_X))
    has_nll = loaded.kind != "classifier"
    return CaseResult(
        case=case,
        correct_X=None if answer_X is None else correct_X,
        confidence_X=None if answer_X is None else confidence_X,
        nll_X=nll_X if has_nll else None,
        n_predicted_X=n_predicted_X if has_nll else None,
        tested=0 if applied is None else applied.tested,
        changed=0 if applied is None else applied.changed,
    )


def erasure_rows(texts: Sequence[TestText], base: CaseResult, cases: Sequence[CaseResult]) -> list[ErasureRow]:
    """A row per concept and condition, from the results over `texts`: for each concept of `cases`, base comes first."""
    concept_X = np.array([text.concept for text in texts], dtype=object)
    rows = []
    for concept in dict.fromkeys(result.case.concept for result in cases):
        assert concept is not None, "base is given apart from the other cases"
        mine = [result for result in cases if result.case.concept == concept]
        mine.sort(key=lambda result: CONDITIONS.index(result.case.condition))
        rows += [_row(concept, result, concept_X == concept) for result in [base, *mine]]
    return rows


def wilson(k: int, n: int) -> tuple[float, float]:
    """The Wilson 95 % score interval of a proportion, k of n (Wilson 1927); (0, 1) where n is 0: nothing is known."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At k = 0 the lower end is 0, at k = n the upper is 1; rounding would leave them beside it.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """The numbers of one batch, on the CPU; what does not apply is 0."""

    correct_B: np.ndarray
    confidence_B: np.ndarray
    nll_B: np.ndarray
    n_predicted_B: np.ndarray


@contextmanager
def _under(
    case: Case, loaded: LoadedModel, table: RangeTable | None, edit: Edit, overrides: Mapping[str, str] | None
) -> Iterator[Applied | None]:
    if case.concept is None:
        yield None
        return
    if table is None:
        raise UsageError(f"The case {case.condition} of {case.concept} needs a range table, and none was given.")
    with intervene(loaded, table, [_rule(case.concept, case.condition, edit)], overrides=overrides) as applied:
        yield applied


def _rule(concept: str, condition: Condition, edit: Edit) -> Rule:
    if condition == "range":
        return Rule.of(edit, concept)
    fields = {**edit.model_dump(), "tau": math.inf}
    if edit.action == "adaptive":
        # The whole neuron has no half width to divide by: adaptive ranges are held against zeroed neurons.
        fields |= {"action": "zero", "factor": None}
    return Rule(concept=concept, **fields)


def _answers(loaded: LoadedModel, concepts: Sequence[str], answers: Mapping[str, int] | None) -> np.ndarray | None:
    """The right token or class of each text, int64; None where only perplexity can be measured."""
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


def _refuse_nonfinite(loaded: LoadedModel, case: Case, finite_X: np.ndarray) -> None:
    if not finite_X.all():
        raise RunFailed(
            f"The model's logits are not finite for {int((~finite_X).sum()):,} of {len(finite_X):,} test texts "
            f"({case.condition}, {case.concept or 'all concepts'}, {loaded.dtype}). Run in bfloat16 or float32: see "
            "model.dtype in the recipe."
        )


def _classify(loaded: LoadedModel, batch: TokenBatch, answer_B: Tensor | None) -> _Measured:
    assert answer_B is not None, "a classifier always has answers"
    logits_BL = loaded.class_logits(batch.to(loaded.device)).float()
    top_B, log_p_B = _top_and_log_p(logits_BL, answer_B.to(loaded.device))
    nothing = np.zeros(len(answer_B))
    return _Measured(
        correct_B=(top_B.cpu() == answer_B).numpy(),
        confidence_B=log_p_B.exp().cpu().numpy(),
        nll_B=nothing,
        n_predicted_B=nothing,
    )


def _predict(loaded: LoadedModel, batch: TokenBatch, answer_B: Tensor | None) -> _Measured:
    """One forward pass: the answer after each prompt, and the surprise at the prompt's own tokens."""
    n_texts = len(batch.ids_BT)
    hidden_BTD = loaded.hidden(batch.to(loaded.device))
    text_K, column_K = _predicted_tokens(loaded, batch).nonzero(as_tuple=True)
    rows, columns, targets = [text_K], [column_K - 1], [batch.ids_BT[text_K, column_K]]
    if answer_B is not None:
        rows, columns = [torch.arange(n_texts), *rows], [batch.last_B, *columns]
        targets = [answer_B, *targets]
    top_X, log_p_X = _next_token(loaded, hidden_BTD, torch.cat(rows), torch.cat(columns), torch.cat(targets))
    n_answers = 0 if answer_B is None else n_texts
    nothing = np.zeros(n_texts)
    return _Measured(
        correct_B=nothing if answer_B is None else (top_X[:n_answers] == answer_B).numpy(),
        confidence_B=nothing if answer_B is None else log_p_X[:n_answers].exp().numpy(),
        nll_B=np.bincount(text_K.numpy(), weights=-log_p_X[n_answers:].double().numpy(), minlength=n_texts),
        n_predicted_B=np.bincount(text_K.numpy(), minlength=n_texts),
    )


def _predicted_tokens(loaded: LoadedModel, batch: TokenBatch) -> Tensor:
    """Bool [B, T]: the tokens whose surprise counts, real and not special, but for the first of the text."""
    special = torch.tensor(sorted(set(loaded.tokenizer.all_special_ids)), dtype=torch.int64)
    counts_BT = batch.mask_BT & ~torch.isin(batch.ids_BT, special)
    counts_BT[:, 0] = False
    return counts_BT


def _next_token(
    loaded: LoadedModel, hidden_BTD: Tensor, row_X: Tensor, column_X: Tensor, target_X: Tensor
) -> tuple[Tensor, Tensor]:
    """After each token (row, column) of the batch: the most probable next token, the log probability of the target."""
    device = hidden_BTD.device
    n_logits = loaded.module.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    at_once = max(1, LOGITS_AT_ONCE // n_logits)
    top_X = torch.empty(len(row_X), dtype=torch.int64, device=device)
    log_p_X = torch.empty(len(row_X), device=device)
    for first in range(0, len(row_X), at_once):
        some = slice(first, first + at_once)
        logits_SV = loaded.logits(hidden_BTD[row_X[some].to(device), column_X[some].to(device)]).float()
        top_X[some], log_p_X[some] = _top_and_log_p(logits_SV, target_X[some].to(device))
    return top_X.cpu(), log_p_X.cpu()


def _top_and_log_p(logits_XV: Tensor, target_X: Tensor) -> tuple[Tensor, Tensor]:
    return logits_XV.argmax(dim=1), -torch.nn.functional.cross_entropy(logits_XV, target_X, reduction="none")


def _row(concept: str, result: CaseResult, is_target_X: np.ndarray) -> ErasureRow:
    target, others = _accuracy(result, is_target_X), _accuracy(result, ~is_target_X)
    return ErasureRow(
        concept=concept,
        condition=result.case.condition,
        target_accuracy=target[0],
        target_accuracy_low=target[1],
        target_accuracy_high=target[2],
        target_confidence=_mean(result.confidence_X, is_target_X),
        complement_accuracy=others[0],
        complement_accuracy_low=others[1],
        complement_accuracy_high=others[2],
        complement_confidence=_mean(result.confidence_X, ~is_target_X),
        n_target=int(is_target_X.sum()),
        n_complement=int((~is_target_X).sum()),
        perplexity=_perplexity(result, ~is_target_X),
        tested=result.tested,
        changed=result.changed,
    )


def _accuracy(result: CaseResult, chosen_X: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """The accuracy over the chosen texts, and the ends of its interval."""
    if result.correct_X is None or not chosen_X.any():
        return None, None, None
    k, n = int(result.correct_X[chosen_X].sum()), int(chosen_X.sum())
    return k / n, *wilson(k, n)


def _mean(values_X: np.ndarray | None, chosen_X: np.ndarray) -> float | None:
    return None if values_X is None or not chosen_X.any() else float(values_X[chosen_X].mean(dtype=np.float64))


def _perplexity(result: CaseResult, chosen_X: np.ndarray) -> float | None:
    if result.nll_X is None or result.n_predicted_X is None:
        return None
    n_predicted = int(result.n_predicted_X[chosen_X].sum())
    return float(np.exp(result.nll_X[chosen_X].sum() / n_predicted)) if n_predicted else None
