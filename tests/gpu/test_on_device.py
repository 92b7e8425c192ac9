"""What the library does on a GPU against what it does on the CPU: statistics, the server's slots, a whole engine."""

import asyncio

import numpy as np
import pytest
import torch

from neuronlens.accumulate import TorchAccumulator
from neuronlens.models import LoadedModel
from neuronlens.serving.engine import Generation, Sampling
from neuronlens.serving.settings import Limits
from neuronlens.serving.transformers_engine import TransformersEngine
from neuronlens.slots import ProgramSlots
from tests.neuronlens.serving.tiny_engine import RULES, alone, program_of, tiny_loaded
from tests.neuronlens.test_slots import PROGRAMS, through, values

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 1e2])
def test_accumulator__agrees_with_a_longdouble_two_pass_oracle(dtype, mean):
    rng = np.random.default_rng(1)
    x_RN = torch.from_numpy(rng.normal(mean, 1.0, size=(5000, 300))).to(dtype)
    accumulator = TorchAccumulator(300, histogram=True, device=torch.device("cuda"))
    for part in x_RN.cuda().split(777):
        accumulator.add(part, torch.arange(len(part), device="cuda"))
    got, exact_RN = accumulator.moments(), x_RN.double().numpy().astype(np.longdouble)
    d_RN = exact_RN - exact_RN.mean(axis=0)
    np.testing.assert_array_equal(got.n_N, 5000)
    np.testing.assert_allclose(got.mean_N, exact_RN.mean(axis=0).astype(float), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.m2_N, (d_RN**2).sum(axis=0).astype(float), rtol=1e-5)
    np.testing.assert_allclose(got.m4_N, (d_RN**4).sum(axis=0).astype(float), rtol=1e-4)
    counts_NB = accumulator.counts()
    assert counts_NB is not None
    np.testing.assert_array_equal(counts_NB.sum(axis=1), 5000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots__change_on_the_gpu_what_they_change_on_the_cpu(dtype):
    x_BTN = values((6, 5, 37), dtype, seed=4)
    real_BT = torch.rand(6, 5) > 0.2
    found = {}
    for device in ("cpu", "cuda"):
        slots = ProgramSlots(len(PROGRAMS))
        loaded = [slots.load(one) for one in PROGRAMS]
        found[device] = through(slots, [0, *loaded[:5]], x_BTN.to(device), real_BT, by_torch=True)
    out_BTN, counts_BC = found["cuda"]
    torch.testing.assert_close(out_BTN.cpu(), found["cpu"][0], rtol=1e-6, atol=1e-6, equal_nan=True)
    np.testing.assert_array_equal(counts_BC, found["cpu"][1])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_engine__gives_each_sequence_what_it_says_alone_on_the_gpu(architecture):
    bare = tiny_loaded(architecture)
    loaded = LoadedModel.of(bare.module.to("cuda"), bare.tokenizer)
    prompts = [[7, 8, 9, 10], [11, 12], [13, 14, 15, 16, 17, 18, 19], [8, 8, 8]]
    cpu = tiny_loaded(architecture)
    wanted = [alone(cpu, prompt, 10, rules) for prompt, rules in zip(prompts, RULES, strict=False)]

    async def served() -> list[tuple[list[int], int, int]]:
        engine = TransformersEngine(loaded, model_id="tiny", config_hash="c" * 16, limits=Limits(), cache_bytes=10**8)
        await engine.start()
        sampling = Sampling(max_tokens=10, temperature=0)
        streams = engine.submit(
            [
                Generation(id=str(i), prompt_ids=tuple(prompt), sampling=sampling, program=program_of(rules))
                for i, (prompt, rules) in enumerate(zip(prompts, RULES, strict=False))
            ]
        )
        found = []
        for stream in streams:
            ids, tested, changed = [], 0, 0
            async for delta in stream:
                ids += delta.token_ids
                if delta.counts is not None:
                    tested, changed = delta.counts.tested, delta.counts.changed
            found.append((ids, tested, changed))
        await engine.close()
        return found

    assert loaded.device.type == "cuda"
    for got, expected in zip(asyncio.run(served()), wanted, strict=True):
        assert got[0] == expected[0][: len(got[0])]
        assert got[1:] == expected[1:]
