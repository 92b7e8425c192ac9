"""Sequences in one batch, each under its own program, held to the bare model alone."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuronlens.serving.batcher import Row
from neuronlens.serving.engine import Sampling
from tests.by_hand import HIDDEN, ZeroInside
from tests.neuronlens.serving.tiny_engine import (
    FIRST_WORD,
    RULES,
    Run,
    alone,
    generation,
    tiny_loaded,
    wide_table,
)
from tests.tiny_models import DECODERS, WINDOW

N_WORDS = 300


def words(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(FIRST_WORD, N_WORDS) for _ in range(n)]


@pytest.mark.parametrize("architecture", DECODERS)
def test_batch__gives_every_row_the_tokens_that_it_gets_alone(architecture):
    """Random prompts, lengths, programs and times of arrival; prompts are read in pieces of at most 9 tokens."""
    loaded, rng = tiny_loaded(architecture), random.Random(architecture)
    run = Run(loaded)
    wanted: list[tuple[list[int], int, Any]] = [
        (words(rng, rng.randrange(1, 25)), rng.randrange(1, 20), rng.choice(RULES)) for _ in range(14)
    ]
    rows: list[Row] = []
    while len(rows) < len(wanted) or run.batcher.has_work:
        for prompt, n, rules in wanted[len(rows) : len(rows) + rng.randrange(3)]:
            rows.append(run.add(generation(prompt, n, rules)))
        run.step()
    n_different = 0
    for row, (prompt, n, rules) in zip(rows, wanted, strict=True):
        ids, tested, changed = alone(loaded, prompt, n, rules)
        assert run.ids[row] == ids
        counts = run.counts[row]
        assert (counts.tested, counts.changed) == (tested, changed) if counts else rules is None
        n_different += ids != alone(loaded, prompt, n, None)[0]
    assert n_different >= 3, "the programs changed nothing, so the test shows nothing"
    assert max(run.batcher.batch_sizes) == 4


def test_batch__runs_requests_that_arrive_together_in_one_forward_pass():
    run = Run(tiny_loaded(), max_batch=8, prefill_tokens=100)
    for rules in RULES:
        run.add(generation([10, 11, 12], 4, rules))
    run.finish()
    assert list(run.batcher.batch_sizes) == [7, 7, 7, 7]


def test_batch__takes_a_newcomer_before_the_others_are_done():
    run = Run(tiny_loaded(), prefill_tokens=100)
    first = run.add(generation([10, 11], 20))
    for _ in range(3):
        run.step()
    late = run.add(generation([12, 13], 2))
    run.step()
    assert run.ids[late], "the newcomer has tokens after one step"
    assert len(run.ids[first]) < 20


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("phase", ["prompt", "generation"])
def test_phases__act_on_the_prompt_or_on_what_follows_alone(architecture, phase):
    """By hand: the whole text is run anew for every token, and edited at the positions of the phase alone."""
    loaded = tiny_loaded(architecture)
    prompt, n = [10, 40, 77, 9], 6
    rules = [{"concept": "joy", "hook_points": ["mlp_post"]}]
    rows = wide_table().select("joy", hook_points=["mlp_post"]).to_pylist()
    edits = [ZeroInside(rows)]

    def edit(hook_point: str, layer: int, x_1TN: Tensor) -> Tensor:
        inside = slice(0, len(prompt)) if phase == "prompt" else slice(len(prompt), None)
        changed = x_1TN.clone()
        changed[:, inside] = edits[0](hook_point, layer, x_1TN[:, inside])
        return changed

    ids = list(prompt)
    for _ in range(n):
        edits[0] = ZeroInside(rows)
        hidden_TD = HIDDEN[architecture](loaded.module, ids, edit)
        ids.append(int(loaded.logits(hidden_TD[-1:]).argmax()))
    run = Run(loaded)
    row = run.add(generation(prompt, n, rules, phases=frozenset({phase})))
    run.finish()
    assert run.ids[row] == ids[len(prompt) :]
    counts = run.counts[row]
    n_positions = len(prompt) if phase == "prompt" else n - 1
    assert counts.tested == len(rows) * n_positions
    assert 0 < counts.changed == edits[0].changed < alone(loaded, prompt, n, rules)[2]


def test_cancel__frees_the_place_and_leaves_the_others_right():
    loaded = tiny_loaded()
    run = Run(loaded, max_batch=2, prefill_tokens=3)
    gone = run.add(generation([10, 11, 12, 13, 14, 15], 30, RULES[1]))
    stays = run.add(generation([20, 21], 12, RULES[3]))
    waits = run.add(generation([30, 31, 32], 12, RULES[4]))
    never = run.add(generation([40, 41], 5))
    run.step()
    gone.cancelled = never.cancelled = True
    run.finish()
    for row, prompt, rules in ((stays, [20, 21], RULES[3]), (waits, [30, 31, 32], RULES[4])):
        assert run.ids[row] == alone(loaded, prompt, 12, rules)[0]
    assert len(run.ids[gone]) < 30
    assert run.ids[never] == []
    assert (run.batcher.n_running, run.batcher.n_waiting) == (0, 0)


def test_failure__of_one_row_leaves_the_others_right():
    """The model raises whenever a certain token is in the batch: in a prompt, and again where it is generated."""
    loaded, poison = tiny_loaded(), 123
    run = Run(loaded, max_batch=4, prefill_tokens=50)

    def raise_on_poison(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == poison).any():
            raise RuntimeError("this token is not for me")

    hook = loaded.module.base_model.register_forward_pre_hook(raise_on_poison, with_kwargs=True)
    prompts = [[20, 21, 22], [30, poison, 31], [40, 41], [50, 51, 52, 53]]
    rows = [run.add(generation(prompt, 8, RULES[i])) for i, prompt in enumerate(prompts)]
    run.finish()
    hook.remove()
    assert set(run.errors) == {rows[1]}
    assert "this token is not for me" in str(run.errors[rows[1]])
    for i in (0, 2, 3):
        ids, tested, changed = alone(loaded, prompts[i], 8, RULES[i])
        assert run.ids[rows[i]] == ids
        counts = run.counts[rows[i]]
        assert counts is None or (counts.tested, counts.changed) == (tested, changed)


def test_failure__by_numbers_that_are_none_ends_its_row_and_not_the_next_in_its_place():
    """A value of 3e38 makes the residual stream infinite and the logits NaN. NaN stays in the cache, and times a
    weight of 0 it is NaN again: whoever takes over the place would break, were it not zeroed."""
    loaded = tiny_loaded()
    run = Run(loaded, max_batch=2)
    breaking = [{"concept": "joy", "action": "set", "value": 3e38, "tau": float("inf"), "hook_points": ["resid_post"]}]
    long_prompt = list(range(20, 40))
    beside = run.add(generation(long_prompt, 12, RULES[1]))
    broken = run.add(generation([10, 11, 12, 13, 14, 15, 16], 9, breaking))
    after = run.add(generation([30], 14))
    run.finish()
    assert run.errors[broken].by_intervention
    assert set(run.errors) == {broken}
    assert run.ids[beside] == alone(loaded, long_prompt, 12, RULES[1])[0]
    assert run.ids[after] == alone(loaded, [30], 14, None)[0]


def test_memory__holds_back_what_does_not_fit_and_refuses_what_never_will():
    loaded = tiny_loaded()
    one_place = loaded.module.config.n_layer * 2 * loaded.module.config.n_embd * 4 * WINDOW
    run = Run(loaded, max_batch=4, cache_bytes=2 * one_place)
    rows = [run.add(generation([10 + i, 11], 30)) for i in range(5)]
    run.finish()
    assert max(run.batcher.batch_sizes) == 2
    for i, row in enumerate(rows):
        assert run.ids[row] == alone(loaded, [10 + i, 11], 30, None)[0]
    assert run.batcher.fits(WINDOW)
    assert not run.batcher.fits(4 * WINDOW)


def test_window__can_be_filled_to_its_last_token():
    loaded = tiny_loaded()
    run = Run(loaded, prefill_tokens=200)
    long = run.add(generation(words(random.Random(0), WINDOW - 1), 1))
    short = run.add(generation([10], WINDOW - 1))
    run.finish()
    assert run.ids[long] == alone(loaded, long.generation.prompt_ids, 1, None)[0]
    assert run.ids[short] == alone(loaded, [10], WINDOW - 1, None)[0]


def test_draws__depend_on_the_seed_and_the_place_alone():
    loaded = tiny_loaded()
    sampling = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, seed=7)

    def drawn(*neighbours: list[int], index: int = 0) -> list[int]:
        run = Run(loaded)
        for prompt in neighbours:
            run.add(generation(prompt, 9, RULES[1]))
        row = run.add(generation([10, 11], 12, sampling=sampling, index=index))
        run.finish()
        return run.ids[row]

    assert drawn() == drawn([20, 21], [30, 31, 32])
    assert drawn() != drawn(index=1)


def test_logprobs__are_those_of_the_whole_model():
    loaded = tiny_loaded("llama")
    sampling = Sampling(max_tokens=5, temperature=0, top_logprobs=3)
    run = Run(loaded)
    run.add(generation([20, 21], 5))
    row = run.add(generation([10, 11, 12], 5, sampling=sampling))
    run.finish()
    text = [10, 11, 12, *run.ids[row]]
    logits_TV = loaded.module(torch.tensor([text])).logits[0].double().numpy().astype(np.longdouble)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    for i, delta in enumerate(run.deltas[row]):
        (found,) = delta.logprobs
        expected_V = log_p_TV[2 + i]
        assert found.logprob == pytest.approx(float(expected_V[found.token_id]), abs=1e-4)
        assert [token for token, _, _ in found.top] == np.argsort(-expected_V)[:3].tolist()
        np.testing.assert_allclose([p for _, _, p in found.top], np.sort(expected_V)[::-1][:3].astype(float), atol=1e-4)
