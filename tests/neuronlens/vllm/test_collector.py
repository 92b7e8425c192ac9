"""The collector without vLLM: which rows of a pass count, pairs and ranks, and the statistics on their way."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from neuronlens.errors import RunFailed, UsageError
from neuronlens.histograms import MAX_BIN, bin_of
from neuronlens.moments import Moments
from neuronlens.vllm.collector import Collector, attach_collecting_hooks, check_eager, request_name
from neuronlens.vllm.sites import RankSite
from neuronlens.vllm.statistics import join

WIDTH = 6


def site_of(hook_point="mlp_post", side="input", *, first=0, full_width=WIDTH, layer=0):
    return RankSite(
        hook_point=hook_point,
        layer=layer,
        module_name="m",
        side=side,
        full_width=full_width,
        width=WIDTH,
        first=first,
    )


def collector_of(*sites, rank=0, unit="token", histograms=True):
    made = Collector(sites or [site_of()], rank=rank, device=torch.device("cpu"), n_threads=1)
    made.begin("s1", unit, histograms=histograms)
    return made


def seat(collector, *rows):
    """Rows of (sequence, what its request carries, tokens in this pass, position before it, length of the prompt)."""
    sequences, names, scheduled, computed, prompt = zip(*rows, strict=True)
    collector.seat(sequences, names, np.array(scheduled), np.array(computed), np.array(prompt))


def chosen(collector):
    return [] if collector._row_K is None else collector._row_K.tolist()


ALL = request_name("s1", [])


@pytest.mark.parametrize(
    ("unit", "rows", "expected"),
    [
        ("token", [("a", ALL, 3, 0, 3), ("b", ALL, 2, 0, 2)], [0, 1, 2, 3, 4]),
        ("last_token", [("a", ALL, 3, 0, 3), ("b", ALL, 2, 0, 2)], [2, 4]),
        ("token", [("a", request_name("s1", [0, 5]), 4, 0, 6), ("b", ALL, 1, 0, 1)], [1, 2, 3, 4]),
        ("token", [("a", request_name("s1", [0, 5]), 2, 4, 6)], [0]),
        ("last_token", [("a", ALL, 3, 0, 4), ("b", ALL, 1, 9, 10)], [3]),
        ("token", [("a", ALL, 3, 2, 4)], [0, 1]),
        ("last_token", [("a", ALL, 1, 4, 4)], []),
        ("token", [("a", None, 2, 0, 2), ("b", request_name("s0", []), 2, 0, 2), ("c", ALL, 1, 0, 1)], [4]),
        ("token", [("a", 7, 2, 0, 2)], []),
    ],
    ids=[
        "all of a prompt",
        "the last of a prompt",
        "none that is special",
        "special further on",
        "chunks",
        "none that was generated",
        "no generated one as the last",
        "none of another shard",
        "what others put there",
    ],
)
def test_seat__chooses_the_rows_that_count(unit, rows, expected):
    collector = collector_of(unit=unit)
    seat(collector, *rows)
    assert chosen(collector) == expected


def test_seat__counts_what_a_preempted_sequence_computes_again_once():
    collector = collector_of()
    seat(collector, ("a", ALL, 4, 0, 10))
    seat(collector, ("b", ALL, 1, 0, 1), ("a", ALL, 6, 0, 10))
    assert chosen(collector) == [0, 5, 6]
    seat(collector, ("a", ALL, 4, 6, 10))
    assert chosen(collector) == [0, 1, 2, 3]
    seat(collector, ("a", ALL, 10, 0, 10))
    assert chosen(collector) == []


def test_rest__leaves_no_row_to_what_runs_between_steps():
    collector = collector_of()
    seat(collector, ("a", ALL, 2, 0, 2))
    collector.rest()
    collector.add(0, torch.full((8, WIDTH), torch.nan))
    (site,) = join([collector.end()]).sites
    assert not site.moments().n_nonfinite_N.any()
    assert collector.is_empty


def run(collector, x_TN):
    seat(collector, ("a", ALL, len(x_TN), 0, len(x_TN)))
    for site in range(len(collector.sites)):
        collector.add(site, torch.from_numpy(x_TN))


def test_begin__forgets_a_shard_that_was_left():
    collector = collector_of()
    run(collector, np.full((5, WIDTH), 3.0, np.float32))
    collector.begin("s1", "token", histograms=False)
    run(collector, np.ones((2, WIDTH), np.float32))
    (site,) = join([collector.end()]).sites
    assert site.moments().n_N.tolist() == [2] * WIDTH
    assert site.moments().mean_N.tolist() == [1.0] * WIDTH
    assert site.counts() is None


class Block(nn.Module):
    def forward(self, x_TN):
        return x_TN * 2, x_TN * 3


@pytest.mark.parametrize(("hook_point", "factor"), [("resid_post", 5), ("attn_out", 2)])
def test_hooks__add_both_parts_of_a_residual_stream_and_no_others(hook_point, factor):
    model = nn.Module()
    model.m = Block()
    collector = collector_of(site_of(hook_point, "output"))
    attach_collecting_hooks(model, collector)
    x_TN = np.random.default_rng(0).normal(size=(9, WIDTH)).astype(np.float32)
    seat(collector, ("x", None, 4, 0, 4), ("a", ALL, 5, 0, 5))
    model.m(torch.from_numpy(x_TN))
    (site,) = join([collector.end()]).sites
    np.testing.assert_allclose(site.moments().mean_N, factor * x_TN[4:].mean(axis=0, dtype=np.float64), rtol=1e-5)


def test_join__puts_the_ranks_slices_side_by_side():
    rng = np.random.default_rng(1)
    whole_TN = rng.normal(size=(300, 2 * WIDTH)).astype(np.float32)
    packed = []
    for rank in (1, 0):
        first = rank * WIDTH
        shared = site_of("resid_post", "output", layer=1)
        collector = collector_of(site_of(first=first, full_width=2 * WIDTH), shared, rank=rank)
        assert len(collector.sites) == 2 - rank, "what all ranks see, rank 0 collects"
        run(collector, np.ascontiguousarray(whole_TN[:, first : first + WIDTH]))
        packed.append(collector.end())
    found = join(packed)
    sliced, shared = sorted(found.sites, key=lambda site: site.layer)
    assert (sliced.width, shared.width) == (2 * WIDTH, WIDTH)
    true = Moments.of(whole_TN)
    np.testing.assert_array_equal(sliced.moments().n_N, true.n_N)
    np.testing.assert_allclose(sliced.moments().m4_N, true.m4_N, rtol=1e-5)
    np.testing.assert_allclose(sliced.moments().mean_N, true.mean_N, rtol=1e-4, atol=1e-6)
    counts_NB = sliced.counts()
    for neuron in range(2 * WIDTH):
        bins = np.repeat(np.arange(-MAX_BIN, MAX_BIN + 1), counts_NB[neuron])
        np.testing.assert_array_equal(bins, np.sort(bin_of(whole_TN[:, neuron])))


def test_join__refuses_a_site_of_which_a_rank_is_missing():
    collector = collector_of(site_of(first=WIDTH, full_width=2 * WIDTH), rank=1)
    with pytest.raises(RunFailed, match=r"mlp_post of layer 0 has 12 neurons; .* from 6 on, 6 in all"):
        join([collector.end()])


def test_check_eager__refuses_a_compiled_model():
    config = SimpleNamespace(model_config=SimpleNamespace(enforce_eager=False))
    with pytest.raises(UsageError, match="Start with --enforce-eager"):
        check_eager(config)
