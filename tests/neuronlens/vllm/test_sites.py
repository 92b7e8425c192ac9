"""Finding hook points in a tree of modules that is named as vLLM names it."""

from copy import deepcopy

import pytest
from torch import nn

from neuronlens.errors import UsageError
from neuronlens.vllm.config import WorkerConfig
from neuronlens.vllm.sites import find_rank_sites


class Row(nn.Module):
    """What we read of vLLM's RowParallelLinear, on rank 1 of 2."""

    input_size, input_size_per_partition, tp_rank = 40, 20, 1


def tree(n_layers: int, mlp: nn.Module) -> nn.Module:
    blocks = [nn.ModuleDict({"self_attn": nn.Identity(), "mlp": deepcopy(mlp)}) for _ in range(n_layers)]
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(blocks)})})


LLAMA = nn.ModuleDict({"down_proj": Row()})


def test_sites__come_in_forward_order_with_the_ranks_slice():
    config = WorkerConfig(hook_points=("resid_post", "mlp_post"), layers=(-1, 0))
    sites = find_rank_sites(tree(3, LLAMA), "llama", 16, config)
    assert [(site.layer, site.hook_point) for site in sites] == [
        (0, "mlp_post"), (0, "resid_post"), (2, "mlp_post"), (2, "resid_post"),
    ]  # fmt: skip
    assert (sites[0].part, sites[0].full_width, sites[0].is_sliced) == (slice(20, 40), 40, True)
    assert (sites[1].part, sites[1].full_width, sites[1].is_sliced) == (slice(0, 16), 16, False)


def test_sites__refuse_a_path_that_two_parts_of_a_model_have():
    both = nn.ModuleDict({"vision": tree(2, LLAMA), "text": tree(2, LLAMA)})
    with pytest.raises(UsageError, match="in more than one part"):
        find_rank_sites(both, "llama", 16, WorkerConfig())
    path = {"mlp_post": "text.model.layers.{layer}.mlp.down_proj:input"}
    sites = find_rank_sites(both, "llama", 16, WorkerConfig(modules=path))
    assert [site.module_name for site in sites] == [f"text.model.layers.{i}.mlp.down_proj" for i in (0, 1)]


@pytest.mark.parametrize(
    ("mlp", "model_type", "config", "wanted"),
    [
        (nn.ModuleDict({"experts": nn.Identity()}), "llama", {}, "mixture of experts"),
        (nn.ModuleDict({"experts": nn.Identity()}), "mixtral", {}, "No rule finds mlp_post in a model of type"),
        (LLAMA, "llama", {"layers": (3,)}, "Layer 3 is out of range"),
        (nn.ModuleDict({"down_proj": nn.Identity()}), "llama", {}, "is a Identity, expected a linear layer"),
        (LLAMA, "llama", {"modules": {"mlp_post": "layers.{layer}.mlp.w2"}}, "has no module layers.{layer}.mlp.w2"),
    ],
)  # fmt: skip
def test_sites__refuse_with_a_sentence(mlp, model_type, config, wanted):
    with pytest.raises(UsageError) as error:
        find_rank_sites(tree(2, mlp), model_type, 16, WorkerConfig(**config))
    assert wanted in str(error.value)
