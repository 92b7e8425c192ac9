"""The evaluation on a GPU against the same on the CPU: shared passes, ranges of several pieces, every replacement."""

import numpy as np
import pytest
import torch

from neuronlens.batches import pad
from neuronlens.measure import Intervention, Meter
from neuronlens.models import LoadedModel
from neuronlens.programs import Program
from tests.range_tables import random_pieces, table_of
from tests.tiny_models import D_MLP, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.gpu
TEXTS = [[7, 9, 1, 30, 44, 8], [5, 6], [12], [90, 80, 70, 60, 50, 40, 30, 2, 20]]
ANSWERS = torch.tensor([11, 12, 13, 14])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_meter__measures_on_the_gpu_what_it_measures_on_the_cpu(architecture):
    rows = random_pieces(0, width=D_MLP, concepts=("joy",), layers=(0, 1))
    table = table_of(rows, widths={"mlp_post": D_MLP}, method="likelihood_ratio", top_fraction=1.0)
    rules = [{"action": action, "layers": [layer]} for action in ("zero", "others", "soften") for layer in (0, 1)]
    work = [Intervention(program=Program.compile(table, [{"concept": "joy", **rule}])) for rule in rules]
    found = {}
    for device in ("cpu", "cuda"):
        loaded = LoadedModel.of(tiny_model(architecture).to(device), tiny_tokenizer())
        meter, batch = Meter(loaded, work, counted="answer"), pad(TEXTS, pad_id=loaded.pad_id)
        found[device] = meter.labelled(batch, ANSWERS), meter.off_task(batch)
    (cpu, cpu_off), (gpu, gpu_off) = found["cpu"], found["cuda"]
    np.testing.assert_allclose(gpu.confidence_RB, cpu.confidence_RB, rtol=1e-3)
    np.testing.assert_allclose(gpu.kl_RB, cpu.kl_RB, rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(gpu_off.nll_RB, cpu_off.nll_RB, rtol=1e-3)
    np.testing.assert_array_equal(gpu.tested_R, cpu.tested_R)
    assert (gpu.changed_R[1:] > 0).all()
