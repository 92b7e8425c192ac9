"""A classifier as the judge of texts: how probable does it find a concept?

judge = Judge(load_model("path/or/hub-id"), classes_of(classifier, ["joy"], {"joy": "LABEL_3"}))
judged = judge.score(["what a day"], ["joy"])
judged.probability_B, judged.is_top_B
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from neuronlens.batches import pad
from neuronlens.errors import RunFailed, UsageError
from neuronlens.models import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the classifier says of B texts: the probability of each one's concept (float32), and whether that is the
    most probable of all classes (bool). An empty text speaks of nothing: 0 and False."""

    probability_B: np.ndarray
    is_top_B: np.ndarray


def classes_of(
    classifier: LoadedModel, concepts: Collection[str], labels: Mapping[str, str] | None = None
) -> dict[str, int]:
    """The class of each concept. labels: concept -> the classifier's label; without one, they have the same name.

    Raises UsageError for a model that is no classifier, and for a concept of which it has no class.
    """
    if classifier.kind != "classifier":
        raise UsageError(
            f"test.generation.classifier is a {type(classifier.module).__name__}, which has no classes; expected a "
            "sequence classifier. python -m jobs.finetune makes one from an encoder."
        )
    known, named = classifier.label_ids, labels or {}
    missing = [concept for concept in concepts if named.get(concept, concept) not in known]
    if missing:
        label = named.get(missing[0], missing[0])
        raise UsageError(
            f"The classifier has no label {label!r}, which would be that of the concept {missing[0]!r} "
            f"({len(missing)} of {len(concepts)} concepts lack one). Its labels: {', '.join(map(str, known))}. "
            "Say which is which in test.generation.labels."
        )
    return {concept: known[named.get(concept, concept)] for concept in concepts}


class Judge:
    """Holds a classifier and the class of each concept.

    Probabilities are a softmax over the classes; a sigmoid of each where the classifier says of itself that a text may
    have several labels.
    """

    def __init__(self, classifier: LoadedModel, class_of: Mapping[str, int]) -> None:
        self._classifier, self._class_of = classifier, class_of
        problem = getattr(cast(Any, classifier.module).config, "problem_type", None)
        self._is_one_of_several = problem != "multi_label_classification"

    @torch.inference_mode()
    def score(self, texts: Sequence[str], concepts: Sequence[str]) -> Judged:
        """Each text, for its own concept, in one batch; what is longer than the classifier's window loses its end.

        Raises RunFailed where logits are not finite.
        """
        judged = Judged(probability_B=np.zeros(len(texts), np.float32), is_top_B=np.zeros(len(texts), bool))
        classifier = self._classifier
        rows = classifier.tokenizer(list(texts), truncation=True, max_length=classifier.window)["input_ids"]
        said = [i for i, text in enumerate(texts) if text.strip() and rows[i]]
        if not said:
            return judged
        batch = pad([rows[i] for i in said], pad_id=classifier.pad_id).to(classifier.device)
        logits_BC = classifier.class_logits(batch).float()
        if not torch.isfinite(logits_BC).all():
            raise RunFailed(
                f"The classifier's logits are not finite ({classifier.dtype}). Take another one, or one saved in "
                "float32 or bfloat16."
            )
        class_B = torch.tensor([self._class_of[concepts[i]] for i in said], device=classifier.device)
        probability_BC = logits_BC.softmax(dim=1) if self._is_one_of_several else logits_BC.sigmoid()
        judged.probability_B[said] = probability_BC.gather(1, class_B[:, None])[:, 0].cpu().numpy()
        judged.is_top_B[said] = (logits_BC.argmax(dim=1) == class_B).cpu().numpy()
        return judged
