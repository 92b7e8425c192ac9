"""Two ranks on the CPU: each has its slice of the MLP's neurons and all of the residual stream."""

import numpy as np
import pytest

from tests.vllm.tiny import RULES, alone, engine
from tests.vllm.traffic import Sequence_, drive

pytestmark = pytest.mark.vllm


@pytest.mark.usefixtures("two_ranks")
def test_tensor_parallel__says_and_counts_what_one_rank_does(models):
    folder, rng = models["llama"], np.random.default_rng(2)
    sequences = [
        Sequence_(prompt=rng.integers(6, 300, size=int(rng.integers(4, 50))).tolist(), max_tokens=10, rules=rules)
        for rules in (*RULES, RULES[1])
    ]
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "enable_prefix_caching": False}
    with engine(folder, **options, max_num_batched_tokens=32, max_model_len=128) as llm:
        drive(llm, folder, sequences, rng)
    n_differing = 0
    for one in sequences:
        ids, tested, changed = alone(folder, one.prompt, one.max_tokens, one.rules)
        assert one.tokens == ids
        if one.rules is not None:
            assert one.counts is not None
            assert one.counts.tested == tested
            assert abs(one.counts.changed - changed) <= 2
            n_differing += ids != alone(folder, one.prompt, one.max_tokens, None)[0]
    assert n_differing >= 5
