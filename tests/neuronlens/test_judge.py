"""The judge against the classifier called text by text."""

import numpy as np
import pytest
import torch

from neuronlens.errors import RunFailed, UsageError
from neuronlens.judge import Judge, classes_of
from neuronlens.models import LoadedModel
from tests.tiny_models import LABELS, SENTENCES, tiny_model, tiny_tokenizer

TEXTS = [*SENTENCES, "rain", "", "   ", " ".join(SENTENCES * 3)]
CONCEPTS = [LABELS[i % 3] for i in range(len(TEXTS))]


def classifier(architecture: str = "distilbert", **config) -> LoadedModel:
    return LoadedModel.of(tiny_model(architecture, head="classifier", **config), tiny_tokenizer())


@pytest.mark.parametrize("architecture", ["distilbert", "gpt2"])
@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_score__is_what_the_classifier_says_of_each_text_alone(architecture, problem):
    loaded = classifier(architecture, problem_type=problem)
    judged = Judge(loaded, classes_of(loaded, LABELS)).score(TEXTS, CONCEPTS)
    for b, text in enumerate(TEXTS):
        if not text.strip():
            assert (judged.probability_B[b], judged.is_top_B[b]) == (0, False)
            continue
        ids = tiny_tokenizer()(text)["input_ids"][: loaded.window]
        with torch.no_grad():
            logits_C = loaded.module(torch.tensor([ids])).logits[0].double().numpy()
        p_C = 1 / (1 + np.exp(-logits_C)) if problem else np.exp(logits_C) / np.exp(logits_C).sum()
        assert judged.probability_B[b] == pytest.approx(p_C[LABELS.index(CONCEPTS[b])], rel=1e-4)
        assert judged.is_top_B[b] == (LABELS[logits_C.argmax()] == CONCEPTS[b])
    assert 0 < judged.is_top_B.sum() < len(TEXTS)


def test_score__gives_empty_texts_nothing_even_where_all_are():
    judged = Judge(classifier(), {"joy": 0}).score(["", " "], ["joy", "joy"])
    assert judged.probability_B.tolist() == [0, 0]


def test_score__refuses_logits_that_are_not_finite():
    loaded = classifier()
    with torch.no_grad():
        loaded.module.classifier.bias[1] = torch.inf
    with pytest.raises(RunFailed, match="classifier's logits are not finite"):
        Judge(loaded, {"joy": 0}).score(["i feel"], ["joy"])


def test_classes_of__are_named_by_the_concept_or_by_the_mapping():
    loaded = classifier()
    assert classes_of(loaded, ["fear", "joy"]) == {"fear": 2, "joy": 0}
    assert classes_of(loaded, ["fear", "rage"], {"rage": "anger", "other": "none"}) == {"fear": 2, "rage": 1}


def test_classes_of__refuses_a_concept_without_a_label_and_says_which_there_are():
    with pytest.raises(UsageError, match=r"no label 'rage'.*1 of 2 concepts.*joy, anger, fear.*generation\.labels"):
        classes_of(classifier(), ["joy", "rage"])
    with pytest.raises(UsageError, match=r"no label 'LABEL_7', which would be that of the concept 'joy'"):
        classes_of(classifier(), ["joy"], {"joy": "LABEL_7"})


def test_classes_of__refuses_a_model_without_classes():
    with pytest.raises(UsageError, match="GPT2LMHeadModel, which has no classes; expected a sequence classifier"):
        classes_of(LoadedModel.of(tiny_model("gpt2"), tiny_tokenizer()), ["joy"])
