"""Choosing tokens: distributions against numpy, and what a row's choice may depend on."""

import math

import numpy as np
import pytest
import torch

from neuronlens.serving.engine import Sampling
from neuronlens.serving.sampling import Sampler, choose

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
N_DRAWS = 4000


def drawn_shares(**options) -> np.ndarray:
    """How often each token is chosen in many draws of one sequence."""
    sampler = Sampler(Sampling(max_tokens=1, seed=3, **options), 0)
    tokens = [choose(LOGITS[None], [sampler])[0].token_id for _ in range(N_DRAWS)]
    return np.bincount(tokens, minlength=len(LOGITS)) / N_DRAWS


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choose__draws_from_the_softmax_at_its_temperature(temperature):
    expected = softmax(LOGITS.numpy().astype(np.longdouble) / temperature)
    spread = 4 * np.sqrt(expected * (1 - expected) / N_DRAWS) + 1e-9
    assert (np.abs(drawn_shares(temperature=temperature) - expected) < spread).all()


def test_choose__keeps_the_smallest_set_that_reaches_top_p():
    """The probabilities are 0.610, 0.224, 0.136, ...: 0.8 needs two of them, which then share everything."""
    p = softmax(LOGITS.numpy().astype(np.longdouble))
    expected = np.where(np.arange(5) < 2, p / p[:2].sum(), 0)
    spread = 4 * np.sqrt(expected * (1 - expected) / N_DRAWS)
    assert (np.abs(drawn_shares(top_p=0.8) - expected) <= spread).all()
    assert drawn_shares(top_p=1e-9)[0] == 1


def test_choose__is_greedy_at_temperature_0_and_next_to_it():
    assert drawn_shares(temperature=0)[0] == 1
    assert drawn_shares(temperature=1e-8)[0] == 1


def test_choose__draws_the_same_for_a_row_whatever_stands_beside_it():
    def sampler(seed: int, index: int = 0) -> Sampler:
        return Sampler(Sampling(max_tokens=9, seed=seed), index)

    flat_BV = torch.zeros(3, 50)
    alone, beside = sampler(5), sampler(5)
    greedy = Sampler(Sampling(max_tokens=9, temperature=0), 0)
    expected = [choose(flat_BV[:1], [alone])[0].token_id for _ in range(9)]
    found = [choose(flat_BV, [greedy, sampler(6), beside])[2].token_id for _ in range(9)]
    assert found == expected
    other = sampler(5, index=1)
    assert [choose(flat_BV[:1], [other])[0].token_id for _ in range(9)] != expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_choose__tells_a_row_whose_logits_are_no_numbers(bad, temperature):
    logits_BV = torch.stack([LOGITS, LOGITS, LOGITS])
    logits_BV[1, 2] = bad
    sampling = Sampling(max_tokens=1, temperature=temperature, seed=1, top_logprobs=2)
    choices = choose(logits_BV, [Sampler(sampling, 0) for _ in range(3)])
    assert choices[1] is None
    assert choices[0] == choices[2] != None  # noqa: E711 (both are there, and the same)


def test_choose__takes_negative_and_huge_seeds():
    tokens = {
        seed: [choose(torch.zeros(1, 99), [s])[0].token_id for s in [Sampler(Sampling(max_tokens=1, seed=seed), 0)] * 5]
        for seed in (-1, -(2**63), 2**63 - 1)
    }
    assert len({tuple(t) for t in tokens.values()}) == 3
