"""Continuations, and what a classifier says of them, on a GPU against the CPU."""

import numpy as np
import pytest

from neuronlens.generation import Writer
from neuronlens.judge import Judge, classes_of
from neuronlens.models import LoadedModel
from neuronlens.serving.engine import Sampling
from tests.neuronlens.test_generation import GREEDY, N_TOKENS, PROMPTS, program
from tests.tiny_models import LABELS, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.gpu


def on(device: str, architecture: str, head: str) -> LoadedModel:
    return LoadedModel.of(tiny_model(architecture, head=head).to(device), tiny_tokenizer())


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_tokens=N_TOKENS, temperature=0.8, seed=1)])
def test_writer__writes_on_the_gpu_what_it_writes_on_the_cpu(sampling):
    written = {
        device: Writer(on(device, "gpt2", "lm"), sampling).write(PROMPTS, range(len(PROMPTS)), program("joy"))
        for device in ("cpu", "cuda")
    }
    assert written["cuda"].token_ids == written["cpu"].token_ids
    assert (written["cuda"].tested, written["cuda"].changed) == (written["cpu"].tested, written["cpu"].changed)
    np.testing.assert_allclose(written["cuda"].nll_B, written["cpu"].nll_B, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["distilbert", "gpt2"])
def test_judge__says_on_the_gpu_what_it_says_on_the_cpu(architecture):
    texts, concepts = ["i feel so happy", "", "the storm came closer and closer"], ["joy", "joy", "fear"]
    judged = {}
    for device in ("cpu", "cuda"):
        loaded = on(device, architecture, "classifier")
        judged[device] = Judge(loaded, classes_of(loaded, LABELS)).score(texts, concepts)
    np.testing.assert_allclose(judged["cuda"].probability_B, judged["cpu"].probability_B, rtol=1e-3)
    np.testing.assert_array_equal(judged["cuda"].is_top_B, judged["cpu"].is_top_B)
