"""What a model answers to its prompts: which concept it names, whether that is right, how probable the right one is.

key = AnswerKey.of({"joy": 3, "anger": 4}, "joy")
predictions = predict(loaded, batch, key)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuronlens.batches import TokenBatch
from neuronlens.errors import UsageError
from neuronlens.models import LOGITS_AT_ONCE, LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerKey:
    """The token (decoder) or class (classifier) that is right for each concept, and which of them is right for the
    texts at hand, as an index: they share a concept."""

    concepts: tuple[str, ...]
    ids: tuple[int, ...]
    right: int

    @classmethod
    def of(cls, answers: Mapping[str, int], concept: str) -> "AnswerKey":
        """In the order of the concepts' names, so that a tie falls the same way in every run."""
        concepts = tuple(sorted(answers))
        return cls(concepts=concepts, ids=tuple(answers[name] for name in concepts), right=concepts.index(concept))


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What the model answered to B prompts; tensors on its own device, so that nobody waits for it between batches.

    predicted_B: int64, index into the key's concepts of the one whose answer has the highest logit; -1 where the logits
    are not finite. correct_B: bool, whether the most probable of all tokens or classes is the right answer; False where
    the logits are not finite. confidence_B: float32, the softmax probability of the right answer; NaN where the logits
    are not finite.
    """

    predicted_B: Tensor
    correct_B: Tensor
    confidence_B: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Predictions"]) -> "Predictions":
        return cls(
            predicted_B=torch.cat([part.predicted_B for part in parts]),
            correct_B=torch.cat([part.correct_B for part in parts]),
            confidence_B=torch.cat([part.confidence_B for part in parts]),
        )

    def cpu(self) -> "Predictions":
        return Predictions(
            predicted_B=self.predicted_B.cpu(), correct_B=self.correct_B.cpu(), confidence_B=self.confidence_B.cpu()
        )


def predict(loaded: LoadedModel, batch: TokenBatch, key: AnswerKey) -> Predictions:
    """One forward pass over the batch (on the CPU; moved here to the model's device), and the head over one row a text.
    Hooks see it as usual.

    Raises UsageError for an encoder without a classifier's head: it answers nothing.
    """
    with torch.inference_mode():
        batch = batch.to(loaded.device)
        if loaded.kind == "classifier":
            return _read(loaded.class_logits(batch), key)
        if loaded.kind == "encoder":
            raise UsageError(
                f"{type(loaded.module).__name__} has neither next-token nor class logits: it answers nothing. Take a "
                "decoder or a sequence classifier, or leave out data.only_correct and collect.predictions."
            )
        hidden_BTD = loaded.hidden(batch)
        last_BD = hidden_BTD[torch.arange(len(hidden_BTD), device=loaded.device), batch.last_B]
        n_logits = loaded.module.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        at_once = max(1, LOGITS_AT_ONCE // n_logits)
        return Predictions.joined([_read(loaded.logits(some_SD), key) for some_SD in last_BD.split(at_once)])


def _read(logits_XV: Tensor, key: AnswerKey) -> Predictions:
    logits_XV = logits_XV.float()
    total_X = logits_XV.logsumexp(dim=1)
    is_finite_X = torch.isfinite(total_X)
    right = key.ids[key.right]
    correct_X = (logits_XV.argmax(dim=1) == right) & is_finite_X
    best_X = logits_XV[:, torch.tensor(key.ids, device=logits_XV.device)].argmax(dim=1)
    # Two concepts may share a class: what is correct must not be called by the other's name.
    predicted_X = torch.where(correct_X, key.right, best_X)
    return Predictions(
        predicted_B=torch.where(is_finite_X, predicted_X, -1),
        correct_B=correct_X,
        confidence_B=torch.where(is_finite_X, (logits_XV[:, right] - total_X).exp(), torch.nan),
    )
