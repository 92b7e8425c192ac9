"""What our hooks leave in vLLM's graph: operations that the compiler takes as they are, and a CUDA graph captures.

They find the board as vLLM's attention finds its cache, in the forward context. Importing this module registers them.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from neuronlens.vllm.config import KEY
from neuronlens.vllm.sites import in_a_row

_LIBRARY = torch.library.Library(KEY, "FRAGMENT")


def steer(x: Tensor, site: int) -> None:
    """Run the programs of the forward pass on x_TN, in place."""
    _board().run(in_a_row(x), site)


def steer_pair(x: Tensor, residual: Tensor, site: int) -> None:
    """Run them on the sum of both, in place."""
    _board().run_pair(in_a_row(x), in_a_row(residual), site)


def _board() -> Any:
    return _way_to_context()().no_compile_layers[KEY]


@cache
def _way_to_context() -> Any:
    from vllm.forward_context import get_forward_context

    return get_forward_context


def _nothing(*_: Any) -> None:
    """What the compiler runs on tensors without values."""


def _register() -> None:
    for name, schema, function in (
        ("steer", "(Tensor(a!) x, int site) -> ()", steer),
        ("steer_pair", "(Tensor(a!) x, Tensor(b!) residual, int site) -> ()", steer_pair),
    ):
        _LIBRARY.define(name + schema)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, key)
        _LIBRARY._register_fake(name, _nothing)


_register()
