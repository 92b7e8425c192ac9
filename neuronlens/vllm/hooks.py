"""The hooks in vLLM's model. They must stand before the model is first run: a compiled graph keeps what it met then.

Each leaves one operation (`neuronlens.vllm.ops`) that changes the activations in place. There is no branch, no check
and no Python state in it, so that the compiler sees the same graph for every batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import neuronlens.vllm.ops  # noqa: F401  (registers the operations)
from neuronlens.vllm.sites import RankSite


def attach_hooks(model: nn.Module, sites: Sequence[RankSite]) -> None:
    """Hook every site, for as long as the model lives."""
    for index, site in enumerate(sites):
        target = model.get_submodule(site.module_name)
        if site.side == "input":
            target.register_forward_pre_hook(_input_hook(index))
        else:
            target.register_forward_hook(_output_hook(index, is_pair=site.hook_point == "resid_post"))


def _input_hook(index: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        torch.ops.neuronlens.steer(args[0], index)

    return hook


def _output_hook(index: int, *, is_pair: bool) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, tuple):
            torch.ops.neuronlens.steer(output, index)
        elif is_pair and len(output) > 1 and isinstance(output[1], torch.Tensor):
            # The block leaves the sum, which is the residual stream, to the next norm.
            torch.ops.neuronlens.steer_pair(output[0], output[1], index)
        else:
            torch.ops.neuronlens.steer(output[0], index)

    return hook
