"""Every request says what it says alone, whatever runs beside it: as transformers' `generate` under `intervene`."""

import numpy as np
import pytest

from neuronlens.errors import UsageError
from neuronlens.vllm.offline import steered
from tests.range_tables import RULES_ON_PIECES
from tests.vllm.tiny import RULES, WINDOW, alone, alone_in_phases, engine, program_of, table_with_pieces
from tests.vllm.traffic import Sequence_, drive

pytestmark = pytest.mark.vllm


def prompts(rng: np.random.Generator, n: int, longest: int) -> list[list[int]]:
    """Random token ids; half of them begin alike, so that the prefix cache has something to share."""
    shared = rng.integers(6, 300, size=longest).tolist()
    made = []
    for i in range(n):
        length = int(rng.integers(3, longest))
        own = rng.integers(6, 300, size=length).tolist()
        made.append(shared[: length // 2 * 2] + own[:3] if i % 2 else own)
    return made


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_steering__every_request_says_what_it_says_alone(models, architecture):
    folder, rng = models[architecture], np.random.default_rng(3)
    # Chunks of 24 tokens, a cache of 18 blocks for sequences of up to 7, four slots for six programs.
    options = {
        "max_num_batched_tokens": 24,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": 18,
        "neuronlens": {"slots": 4},
    }
    sequences = [
        Sequence_(prompt=prompt, max_tokens=int(rng.integers(4, 40)), rules=RULES[int(rng.integers(len(RULES)))])
        for prompt in prompts(rng, 36, 160)
    ]
    for one in sequences[::9]:
        one.abort_after = 3
    with engine(folder, **options) as llm:
        n_preempted = drive(llm, folder, sequences, rng)
    assert n_preempted > 0, "the cache was meant to be too small"
    assert any(one.n_refused for one in sequences), "the slots were meant to be too few"
    n_differing = 0
    for one in sequences:
        ids, tested, _ = alone(folder, one.prompt, one.max_tokens, one.rules)
        assert one.tokens == ids[: len(one.tokens)]
        assert one.abort_after is not None or len(one.tokens) == len(ids)
        if one.rules is None:
            continue
        plain, _, _ = alone(folder, one.prompt, one.max_tokens, None)
        n_differing += ids != plain
        assert one.counts is not None
        assert one.counts.changed > 0
        if one.abort_after is None:
            assert one.counts.tested <= tested  # the prefix cache may have known the front of the prompt
    n_steered = sum(one.rules is not None for one in sequences)
    assert n_differing > 0.8 * n_steered, "programs were meant to change what is said"


def test_steering__keeps_to_its_phases_also_after_preemption(models):
    folder, rng = models["llama"], np.random.default_rng(8)
    sequences = [
        Sequence_(prompt=prompt, max_tokens=40, rules=RULES[1 + i % 4], phases=(("prompt",), ("generation",))[i % 2])
        for i, prompt in enumerate(prompts(rng, 8, 60))
    ]
    options = {"max_num_batched_tokens": 16, "enable_prefix_caching": False, "num_gpu_blocks_override": 6}
    with engine(folder, **options, max_model_len=WINDOW // 4) as llm:
        n_preempted = drive(llm, folder, sequences, rng)
    assert n_preempted > 0
    n_differing = 0
    for one in sequences:
        ids, tested, changed = alone_in_phases(folder, one.prompt, one.max_tokens, one.rules, one.phases)
        assert one.tokens == ids
        assert one.counts is not None
        assert (one.counts.tested, one.counts.changed) == (tested, changed)
        n_differing += ids != alone(folder, one.prompt, one.max_tokens, one.rules)[0]
    assert n_differing >= 4, "a phase was meant to make a difference"


def test_steering__counts_what_the_transformers_engine_counts(models):
    folder, rng = models["llama"], np.random.default_rng(5)
    sequences = [
        Sequence_(prompt=prompt, max_tokens=40, rules=rules)
        for prompt, rules in zip(prompts(rng, 6, 60), RULES[1:], strict=True)
    ]
    options = {"max_num_batched_tokens": 16, "enable_prefix_caching": False, "num_gpu_blocks_override": 6}
    with engine(folder, **options, max_model_len=WINDOW // 4) as llm:
        n_preempted = drive(llm, folder, sequences, rng)
    assert n_preempted > 0
    for one in sequences:
        ids, tested, changed = alone(folder, one.prompt, one.max_tokens, one.rules)
        assert one.tokens == ids
        assert one.counts is not None
        assert (one.counts.tested, one.counts.changed) == (tested, changed)


def test_steering__by_ranges_with_pieces_says_what_it_says_alone(models):
    """Ten rule rows hold one program of two rules at a time: the others wait. Three rules need twelve."""
    folder, rng = models["llama"], np.random.default_rng(6)
    table = table_with_pieces(folder)
    sequences = [
        Sequence_(prompt=prompt, max_tokens=20, rules=rules, table=table)
        for prompt, rules in zip(prompts(rng, 8, 40), [*RULES_ON_PIECES, None, *RULES_ON_PIECES[:3]], strict=True)
    ]
    options = {"enable_prefix_caching": False, "neuronlens": {"rules": 4, "rule_rows": 10}}
    with engine(folder, **options, max_model_len=WINDOW // 4) as llm:
        drive(llm, folder, sequences, rng)
        too_large = program_of(folder, [{"concept": "joy"}, {"concept": "fear"}, {"concept": "joy"}], table)
        with (
            pytest.raises(UsageError, match=r"needs 12 rows at .* this server's `rule_rows` is 10"),
            steered(llm, too_large),
        ):
            pass
    n_differing = 0
    for one in sequences:
        ids, tested, changed = alone(folder, one.prompt, one.max_tokens, one.rules, table)
        assert one.tokens == ids
        if one.rules is not None:
            assert one.counts is not None
            assert one.counts.tested == tested
            # Eight edges a neuron: of 8,000 values that differ by rounding, a few lie on the two sides of one.
            assert one.counts.changed == pytest.approx(changed, rel=0.005)
            n_differing += ids != alone(folder, one.prompt, one.max_tokens, None)[0]
    assert n_differing >= 4, "programs were meant to change what is said"
