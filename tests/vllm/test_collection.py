"""An engine that collects gives the statistics of what the bare transformers model computes, each token once."""

import contextlib
from functools import lru_cache

import numpy as np
import pytest
import torch

from neuronlens.errors import UsageError
from neuronlens.histograms import MAX_BIN, N_BINS, bin_of
from neuronlens.hookpoints import attach, find_sites
from neuronlens.moments import Moments
from tests.vllm.tiny import BLOCK, loaded_of

pytestmark = pytest.mark.vllm
HOOK_POINTS = ("mlp_post", "mlp_out", "attn_out", "resid_post")
UNITS = ("last_token", "token")
LONGEST = 200
SPECIAL, ORDINARY = 2, 6
"""<sep> is a special token; from 6 on, none is."""


@contextlib.contextmanager
def collecting(folder, **options):
    from neuronlens.vllm.collection import CollectingEngine

    given = {
        "hook_points": HOOK_POINTS,
        "layers": "all",
        "longest_prompt": LONGEST,
        "dtype": "float32",
        "block_size": BLOCK,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 26,
        "seed": 0,
    }
    engine = CollectingEngine(str(folder), **{**given, **options})
    try:
        yield engine
    finally:
        engine.close()


def prompts_of(n_prompts=24, longest=60, seed=0, before=()):
    """Token ids, most prompts with a special token somewhere within and one at the end."""
    rng = np.random.default_rng(seed)
    prompts = []
    for number in range(n_prompts):
        ids = rng.integers(ORDINARY, 300, rng.integers(1, longest)).tolist()
        if number % 4:
            ids.insert(int(rng.integers(len(ids) + 1)), SPECIAL)
            ids.append(SPECIAL)
        prompts.append((*before, *ids))
    return tuple(prompts)


@lru_cache(maxsize=16)
def expected(folder, prompts, unit):
    """For each site: hook point, layer, and float32 rows x_RN of the tokens that count, one prompt at a time."""
    loaded = loaded_of(folder)
    sites = find_sites(loaded.module, HOOK_POINTS)
    rows = [[] for _ in sites]
    for ids in prompts:
        counted = [len(ids) - 1] if unit == "last_token" else [i for i, token in enumerate(ids) if token != SPECIAL]
        with torch.no_grad(), attach(loaded.module, sites, lambda i, x_1TN, at=counted: rows[i].append(x_1TN[0, at])):
            loaded.module(torch.tensor([ids]))
    return [(site.hook_point, site.layer, torch.cat(part).numpy()) for site, part in zip(sites, rows, strict=True)]


def assert_statistics(found, folder, prompts, unit, *, histograms=True):
    wanted = expected(folder, prompts, unit)
    assert [(site.hook_point, site.layer) for site in found.sites] == [(point, layer) for point, layer, _ in wanted]
    for site, (_, _, x_RN) in zip(found.sites, wanted, strict=True):
        got, true = site.moments(), Moments.of(x_RN)
        assert site.width == x_RN.shape[1]
        np.testing.assert_array_equal(got.n_N, true.n_N)
        assert not got.n_nonfinite_N.any()
        scale_N = np.abs(x_RN).max(axis=0).astype(np.float64) + 1e-2
        for name, power in (("mean", 1), ("min", 1), ("max", 1), ("mean_abs", 1), ("m2", 2), ("m3", 3), ("m4", 4)):
            n_N = 1 if power == 1 else true.n_N
            error_N = np.abs(getattr(got, f"{name}_N") - getattr(true, f"{name}_N")) / (scale_N**power * n_N)
            assert error_N.max() < 1e-4, (site.hook_point, site.layer, name)
        np.testing.assert_allclose(got.m2_N, true.m2_N, rtol=1e-4)
        counts_NB = site.counts()
        if not histograms:
            assert counts_NB is None
            continue
        true_NB = np.zeros((site.width, N_BINS), np.int64)
        for neuron, bins_R in enumerate(bin_of(x_RN).T):
            true_NB[neuron] = np.bincount(bins_R.astype(np.int64) + MAX_BIN, minlength=N_BINS)
        np.testing.assert_array_equal(counts_NB.sum(axis=1), true.n_N)
        # A value at a bin's edge may fall on its other side.
        assert np.abs(counts_NB - true_NB).sum() / 2 < 2e-3 * true_NB.sum() + 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_engine__collects_what_transformers_computes(models, architecture):
    folder, prompts = models[architecture], prompts_of()
    with collecting(folder) as engine:
        for unit in UNITS:
            assert_statistics(engine.run(prompts, unit=unit, histograms=True), folder, prompts, unit)
        bare = engine.run(prompts[:5], unit="token", histograms=False)
        assert_statistics(bare, folder, prompts[:5], "token", histograms=False)


def test_engine__takes_layers_hook_points_and_a_prompt_as_long_as_the_models_window(models):
    folder = models["gpt2"]
    window = loaded_of(folder).window
    prompts = (tuple(np.random.default_rng(1).integers(ORDINARY, 300, window).tolist()),)
    with collecting(folder, longest_prompt=window, layers=[1], hook_points=["resid_post"]) as engine:
        found = engine.run(prompts, unit="last_token", histograms=True)
        with pytest.raises(UsageError, match="The unit is mean; through vLLM it can be last_token or token"):
            engine.run(prompts, unit="mean", histograms=True)
    (site,) = found.sites
    x_1N = next(x for point, layer, x in expected(folder, prompts, "last_token") if (point, layer) == ("resid_post", 1))
    np.testing.assert_allclose(site.moments().mean_N, x_1N[0], rtol=1e-3, atol=1e-4)


def test_engine__counts_a_prompt_in_chunks_once(models):
    folder, prompts = models["llama"], prompts_of(longest=120)
    with collecting(folder, tokens_per_batch=16, max_num_seqs=4) as engine:
        for unit in UNITS:
            assert_statistics(engine.run(prompts, unit=unit, histograms=True), folder, prompts, unit)


def test_engine__counts_tokens_that_another_prompt_has_left_in_the_prefix_cache(models, monkeypatch):
    folder = models["llama"]
    prefix = np.random.default_rng(5).integers(ORDINARY, 300, 3 * BLOCK).tolist()
    prompts = prompts_of(n_prompts=16, before=prefix)
    with collecting(folder) as engine:
        n_cached, generate = [], engine.llm.generate

        def spy(*args, **kwargs):
            outputs = generate(*args, **kwargs)
            n_cached.append(sum(output.num_cached_tokens for output in outputs))
            return outputs

        monkeypatch.setattr(engine.llm, "generate", spy)
        for unit in ("last_token", "token", "last_token"):
            assert_statistics(engine.run(prompts, unit=unit, histograms=True), folder, prompts, unit)
    assert n_cached[1] == 0
    assert min(n_cached[0], n_cached[2]) >= 8 * len(prefix)


def test_engine__counts_a_preempted_prompt_once(models, monkeypatch):
    folder, prompts = models["llama"], prompts_of(n_prompts=12, longest=190, seed=3)
    # Four prompts at a time, a few tokens of each, and blocks for one and a half of them.
    narrow = {"num_gpu_blocks_override": 10, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    options = {"long_prefill_token_threshold": 16, "scheduler_reserve_full_isl": False, **narrow}
    with collecting(folder, **options) as engine:
        preempted = []
        scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request
        monkeypatch.setattr(scheduler, "_preempt_request", lambda *a, **k: (preempted.append(a), preempt(*a, **k))[1])
        for unit in UNITS:
            assert_statistics(engine.run(prompts, unit=unit, histograms=True), folder, prompts, unit)
    assert len(preempted) > 4


def test_engine__counts_a_shard_that_failed_half_way_once(models, monkeypatch):
    folder, prompts = models["llama"], prompts_of(n_prompts=30)
    with collecting(folder, tokens_per_batch=64, max_num_seqs=4) as engine:
        llm_engine = engine.llm.llm_engine
        step, n_steps = llm_engine.step, []

        def fail():
            n_steps.append(1)
            if len(n_steps) == 4:
                raise RuntimeError("a step failed")
            return step()

        with monkeypatch.context() as patch:
            patch.setattr(llm_engine, "step", fail)
            with pytest.raises(RuntimeError, match="a step failed"):
                engine.run(prompts, unit="token", histograms=True)
        assert engine.is_alive()
        assert llm_engine.get_num_unfinished_requests() == 0
        assert_statistics(engine.run(prompts, unit="token", histograms=True), folder, prompts, "token")


@pytest.mark.usefixtures("two_ranks")
def test_engine__of_two_ranks_collects_the_same(models):
    folder, prompts = models["llama"], prompts_of()
    with collecting(folder, tensor_parallel=2) as engine:
        for unit in UNITS:
            assert_statistics(engine.run(prompts, unit=unit, histograms=True), folder, prompts, unit)


def test_worker__collects_from_an_eager_model_only(models):
    with pytest.raises(UsageError, match="enforce_eager is false"), collecting(models["llama"], enforce_eager=False):
        pass
