"""What a model still knows under many interventions, batch by batch: the unmodified pass once, and under each
intervention only what it can change.

    meter = Meter(loaded, [Intervention(program=program)])
    scores = meter.labelled(batch, answer_B)
    scores.confidence_RB[0], scores.confidence_RB[1]        # of the bare model, and under the program

A decoder is asked for its next token after the text, a classifier for its class. Divergences are KL(base || edited) of
that distribution, in nats.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from neuronlens.batches import TokenBatch, batches_by_length
from neuronlens.errors import RunFailed
from neuronlens.hookpoints import attach
from neuronlens.interventions import Applied, sites_of
from neuronlens.models import LOGITS_AT_ONCE, LoadedModel
from neuronlens.prefix import WHOLE, Recorded, SharedPrefix
from neuronlens.programs import Program

Positions = Literal["all", "last"]
"""Where in a text a program acts: at every position, or at the answer's alone."""

Counted = Literal["all", "answer"]
"""Which positions `tested` and `changed` count: every real token, or the one after which the answer is read."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Intervention:
    """A program, and where in a text it acts."""

    program: Program
    positions: Positions = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """B labelled texts under R passes, the first of which is unmodified; on the CPU.

    correct_RB (bool) and confidence_RB (float32, the probability of the right answer) are None without answers; kl_RB
    (float32) is the divergence at the answer's position. nll_RB (float64, nats, summed over a text's predicted tokens)
    and n_predicted_B (int64) are None unless asked for. tested_R and changed_R (int64) count activations over the
    texts; 0 for the first pass.
    """

    correct_RB: np.ndarray | None
    confidence_RB: np.ndarray | None
    kl_RB: np.ndarray
    nll_RB: np.ndarray | None
    n_predicted_B: np.ndarray | None
    tested_R: np.ndarray
    changed_R: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class OffTask:
    """B unlabelled texts under R passes, the first of which is unmodified: the surprise at a text's predicted tokens
    and the divergences where they were predicted, summed (float64, nats), and how many tokens there were (int64)."""

    nll_RB: np.ndarray
    kl_RB: np.ndarray
    n_predicted_B: np.ndarray


class Meter:
    """Holds a model and the interventions at work; memory does not grow with the texts.

    counted: "answer" lets passes leave out all tokens but the answer's where nothing else is read, which gives the same
    answers. overrides: as in `find_sites`. Raises UsageError where the model lacks a program's layers or widths.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        interventions: Sequence[Intervention],
        *,
        counted: Counted = "all",
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        self._loaded, self._counted = loaded, counted
        self._prefix = SharedPrefix(loaded.module)
        self._at_work = [_AtWork(loaded, self._prefix, one, overrides) for one in interventions]
        self._special_ids = torch.tensor(sorted(set(loaded.tokenizer.all_special_ids)), dtype=torch.int64)

    @torch.inference_mode()
    def labelled(self, batch: TokenBatch, answer_B: Tensor | None, *, perplexity: bool = False) -> Scores:
        """The texts of a batch (on the CPU) and the right token or class of each; None: nothing is known to be right.

        perplexity: measure the surprise at the texts' own tokens too (decoders), which takes every token's logits. The
        logits of all answers, [B, vocabulary], are held. Raises RunFailed where logits are not finite.
        """
        texts = _Texts.of(self._loaded, batch)
        predicted = self._predicted(texts) if perplexity and self._loaded.kind == "decoder" else None
        answer_B = None if answer_B is None else answer_B.to(self._loaded.device)
        base: _Base | None = None
        rows = []
        counts_before = self._counts()
        for output, read_B in self._passes(texts, all_tokens=predicted is not None):
            logits_BV = self._answers(output, read_B).float()
            log_p_BV = logits_BV.log_softmax(dim=1)
            base = base or _Base.of(log_p_BV)
            row = {"kl": base.divergence_from(log_p_BV)}
            if answer_B is not None:
                row["correct"] = logits_BV.argmax(dim=1) == answer_B
                row["confidence"] = log_p_BV.gather(1, answer_B[:, None]).squeeze(1).exp()
            if predicted is not None:
                row["nll"] = self._nll(output, predicted)
            rows.append(row)
        found = {name: torch.stack([row[name] for row in rows]).cpu().numpy() for name in rows[0]}
        self._refuse_nonfinite(np.isfinite(found["kl"]) & np.isfinite(found.get("nll", np.zeros(1))))
        tested_R, changed_R = (self._counts() - counts_before).T
        return Scores(
            correct_RB=found.get("correct"),
            confidence_RB=found.get("confidence"),
            kl_RB=found["kl"],
            nll_RB=found.get("nll"),
            n_predicted_B=None if predicted is None else predicted.n_B.cpu().numpy(),
            tested_R=tested_R,
            changed_R=changed_R,
        )

    @torch.inference_mode()
    def off_task(self, batch: TokenBatch) -> OffTask:
        """Unlabelled texts (decoders): at each of their tokens, the surprise, and the divergence where it was
        predicted. A program acts at every position, whatever its intervention says: of a text that the model writes,
        each token was once the last. The base's logits of all tokens, [B * T, vocabulary], are held."""
        texts = _Texts.of(self._loaded, batch)
        predicted = self._predicted(texts)
        bases: list[_Base] = []
        nll, kl = [], []
        for hidden_BTD, _ in self._passes(texts, all_tokens=True, everywhere=True):
            sums_2B = torch.zeros((2, len(texts.read_B)), dtype=torch.float64, device=self._loaded.device)
            for i, some in enumerate(predicted.slices(self._at_once)):
                log_p_SV = self._loaded.logits(some.before(hidden_BTD)).float().log_softmax(dim=1)
                if i == len(bases):
                    bases.append(_Base.of(log_p_SV))
                nll_S = -log_p_SV.gather(1, some.token_K[:, None]).squeeze(1)
                kl_S = bases[i].divergence_from(log_p_SV)
                sums_2B.index_add_(1, some.text_K, torch.stack([nll_S, kl_S]).double())
            nll.append(sums_2B[0])
            kl.append(sums_2B[1])
        nll_RB, kl_RB = (torch.stack(sums).cpu().numpy() for sums in (nll, kl))
        self._refuse_nonfinite(np.isfinite(nll_RB + kl_RB))
        return OffTask(nll_RB=nll_RB, kl_RB=kl_RB, n_predicted_B=predicted.n_B.cpu().numpy())

    @torch.inference_mode()
    def choices(self, batch: TokenBatch, letter_ids_C: Tensor, n_choices_B: Tensor) -> np.ndarray:
        """Questions (decoders), the tokens of the letters A, B, ..., and how many of them each question has: the
        letter that the model finds most probable, int64 [R, B]."""
        texts = _Texts.of(self._loaded, batch)
        device = self._loaded.device
        is_offered_BC = torch.arange(len(letter_ids_C), device=device) < n_choices_B.to(device)[:, None]
        chosen, finite = [], []
        for output, read_B in self._passes(texts, all_tokens=False):
            logits_BC = self._answers(output, read_B)[:, letter_ids_C.to(device)].float()
            finite.append(torch.isfinite(logits_BC).all(dim=1))
            chosen.append(logits_BC.masked_fill(~is_offered_BC, -torch.inf).argmax(dim=1))
        self._refuse_nonfinite(torch.stack(finite).cpu().numpy())
        return torch.stack(chosen).cpu().numpy()

    @property
    def _at_once(self) -> int:
        return max(1, LOGITS_AT_ONCE // n_logits(self._loaded))

    def _passes(
        self, texts: "_Texts", *, all_tokens: bool, everywhere: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What `_forward` gives, pass by pass, the unmodified one first, and the column of its answers. Without
        `all_tokens`, the hidden states may be those of the answers alone."""
        with self._prefix.recording([one.start for one in self._at_work]) as recorded:
            output = self._forward(texts.batch)
        yield output, texts.read_B
        counts_answers = self._counted == "answer"
        of_answers = recorded.rows(texts.read_B) if counts_answers and not all_tokens else None
        for one in self._at_work:
            if of_answers is not None and one.may_be_narrow:
                with one.acting(self._prefix, of_answers, mask_BT=None, where_BT=None):
                    output = self._forward(texts.answers)
                yield output, torch.zeros_like(texts.read_B)
            else:
                mask_BT = texts.is_read_BT if counts_answers else texts.batch.mask_BT
                where_BT = texts.is_read_BT if one.positions == "last" and not everywhere else None
                with one.acting(self._prefix, recorded, mask_BT=mask_BT, where_BT=where_BT):
                    output = self._forward(texts.batch)
                yield output, texts.read_B

    def _forward(self, batch: TokenBatch) -> Tensor:
        """A classifier's logits [B, classes], a decoder's hidden states [B, T, d_model]."""
        loaded = self._loaded
        return loaded.class_logits(batch) if loaded.kind == "classifier" else loaded.hidden(batch)

    def _answers(self, output: Tensor, read_B: Tensor) -> Tensor:
        """The logits that an answer is read from, [B, classes or vocabulary]."""
        if self._loaded.kind == "classifier":
            return output
        return self._loaded.logits(output[torch.arange(len(read_B), device=read_B.device), read_B])

    def _predicted(self, texts: "_Texts") -> "_Predicted":
        """The tokens whose surprise counts: real and not special, but for the first of each text."""
        batch = texts.batch
        counts_BT = batch.mask_BT & ~torch.isin(batch.ids_BT, self._special_ids.to(batch.ids_BT.device))
        counts_BT[:, 0] = False
        text_K, column_K = counts_BT.nonzero(as_tuple=True)
        return _Predicted(
            text_K=text_K, column_K=column_K, token_K=batch.ids_BT[text_K, column_K], n_B=counts_BT.sum(dim=1)
        )

    def _nll(self, hidden_BTD: Tensor, predicted: "_Predicted") -> Tensor:
        """float64 [B]."""
        nll_B = torch.zeros(len(predicted.n_B), dtype=torch.float64, device=hidden_BTD.device)
        for some in predicted.slices(self._at_once):
            logits_SV = self._loaded.logits(some.before(hidden_BTD)).float()
            nll_S = functional.cross_entropy(logits_SV, some.token_K, reduction="none")
            nll_B.index_add_(0, some.text_K, nll_S.double())
        return nll_B

    def _counts(self) -> np.ndarray:
        """int64 [R, 2]: tested and changed so far."""
        return np.array([(0, 0), *((one.applied.tested, one.applied.changed) for one in self._at_work)], dtype=np.int64)

    def _refuse_nonfinite(self, finite_RB: np.ndarray) -> None:
        if finite_RB.all():
            return
        r = int((~finite_RB.all(axis=1)).argmax())
        rules = self._at_work[r - 1].applied.program.rules if r else ()
        what = f"erasing {', '.join(dict.fromkeys(rule.concept for rule in rules))}" if r else "unmodified"
        raise RunFailed(
            f"The model's logits are not finite for {int((~finite_RB[r]).sum()):,} of {finite_RB.shape[1]:,} texts of "
            f"a batch ({what}, {self._loaded.dtype}). Run in bfloat16 or float32: see model.dtype in the recipe."
        )


def n_logits(loaded: LoadedModel) -> int:
    """The size of a decoder's vocabulary, or how many classes a classifier has."""
    if loaded.kind == "classifier":
        return len(loaded.label_ids)
    return int(loaded.module.get_output_embeddings().weight.shape[0])  # type: ignore[operator]


def batches_for(loaded: LoadedModel, lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """The indices of texts of these lengths, longest first, as batches whose answers' logits fit LOGITS_AT_ONCE."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    at_once = max(1, LOGITS_AT_ONCE // n_logits(loaded))
    return [
        [order[place] for place in places[first : first + at_once]]
        for places in batches_by_length([lengths[i] for i in order], tokens_per_batch)
        for first in range(0, len(places), at_once)
    ]


class _AtWork:
    """One intervention on the model: its sites, found once, and where its passes begin."""

    def __init__(
        self, loaded: LoadedModel, prefix: SharedPrefix, one: Intervention, overrides: Mapping[str, str] | None
    ) -> None:
        self.applied, self.positions = Applied(one.program), one.positions
        self._module = loaded.module
        self._sites = sites_of(loaded.module, one.program, overrides)
        self.start = prefix.start_of(self._sites)
        self.may_be_narrow = self.start != WHOLE and prefix.maps_tokens_alone(self.start)

    @contextmanager
    def acting(
        self, prefix: SharedPrefix, recorded: Recorded, *, mask_BT: Tensor | None, where_BT: Tensor | None
    ) -> Iterator[None]:
        self.applied.set_mask(mask_BT)
        self.applied.set_where(where_BT)
        with prefix.resumed(recorded, self.start), attach(self._module, self._sites, self.applied.see):
            yield


@dataclass(frozen=True, slots=True, kw_only=True)
class _Texts:
    """A batch on the model's device, its pads at the end; read_B is the column after which each answer is read,
    is_read_BT the same as a mask, `answers` the batch of these tokens alone."""

    batch: TokenBatch
    read_B: Tensor
    is_read_BT: Tensor
    answers: TokenBatch

    @classmethod
    def of(cls, loaded: LoadedModel, batch: TokenBatch) -> "_Texts":
        batch = batch.left_aligned().to(loaded.device)
        read_B = torch.zeros_like(batch.last_B) if loaded.head_reads_first else batch.last_B
        row_B = torch.arange(len(read_B), device=read_B.device)
        is_read_BT = torch.zeros_like(batch.mask_BT)
        is_read_BT[row_B, read_B] = True
        ids_B1 = batch.ids_BT[row_B, read_B][:, None]
        answers = TokenBatch(ids_BT=ids_B1, mask_BT=torch.ones_like(ids_B1, dtype=torch.bool))
        return cls(batch=batch, read_B=read_B, is_read_BT=is_read_BT, answers=answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Predicted:
    """K tokens that are predicted from the ones before them: text, column and id of each; n_B counts them by text."""

    text_K: Tensor
    column_K: Tensor
    token_K: Tensor
    n_B: Tensor

    def before(self, hidden_BTD: Tensor) -> Tensor:
        """The hidden states [K, d_model] that predict them."""
        return hidden_BTD[self.text_K, self.column_K - 1]

    def slices(self, at_once: int) -> list["_Predicted"]:
        parts = zip(*(x_K.split(at_once) for x_K in (self.text_K, self.column_K, self.token_K)), strict=True)
        return [_Predicted(text_K=text, column_K=column, token_K=token, n_B=self.n_B) for text, column, token in parts]


@dataclass(frozen=True, slots=True)
class _Base:
    """The unmodified model's distributions, as log probabilities and as probabilities [X, vocabulary]."""

    log_p_XV: Tensor
    p_XV: Tensor

    @classmethod
    def of(cls, log_p_XV: Tensor) -> "_Base":
        return cls(log_p_XV, log_p_XV.exp())

    def divergence_from(self, log_p_XV: Tensor) -> Tensor:
        """KL(base || other), float32 [X]; rounding alone could make it negative."""
        return ((self.log_p_XV - log_p_XV) * self.p_XV).sum(dim=1).clamp(min=0)
