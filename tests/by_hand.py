"""Forward passes and interventions written out by hand, one text at a time: oracles for hooks and batches."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Edit = Callable[[str, int, Tensor], Tensor]
"""(hook point, layer, x_1TN) -> what the forward pass goes on with."""


def unedited(hook_point: str, layer: int, x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def gpt2_hidden(model: nn.Module, ids: Sequence[int], edit: Edit = unedited) -> Tensor:
    """The hidden states [T, d_model] after GPT-2's final norm, from its own submodules."""
    trunk: Any = model.transformer
    x = trunk.wte(torch.tensor([ids])) + trunk.wpe(torch.arange(len(ids))[None])
    for layer, block in enumerate(trunk.h):
        mid = x + edit("attn_out", layer, block.attn(block.ln_1(x))[0])
        post = edit("mlp_post", layer, block.mlp.act(block.mlp.c_fc(block.ln_2(mid))))
        x = edit("resid_post", layer, mid + post @ block.mlp.c_proj.weight + block.mlp.c_proj.bias)
    return trunk.ln_f(x)[0]


@torch.no_grad()
def llama_hidden(model: nn.Module, ids: Sequence[int], edit: Edit = unedited) -> Tensor:
    """The hidden states [T, d_model] after Llama's final norm, from its own submodules."""
    trunk: Any = model.model
    x = trunk.embed_tokens(torch.tensor([ids]))
    rotary = trunk.rotary_emb(x, torch.arange(len(ids))[None])
    for layer, block in enumerate(trunk.layers):
        normed = block.input_layernorm(x)
        mid = x + block.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
        normed = block.post_attention_layernorm(mid)
        post = edit("mlp_post", layer, block.mlp.act_fn(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed))
        x = edit("resid_post", layer, mid + block.mlp.down_proj(post))
    return trunk.norm(x)[0]


HIDDEN = {"gpt2": gpt2_hidden, "llama": llama_hidden}


class ZeroInside:
    """An edit that sets to 0 the values of named neurons inside their ranges, neuron by neuron, and counts."""

    def __init__(self, rows: Sequence[dict[str, Any]], *, whole: bool = False) -> None:
        self.ranges: dict[tuple[str, int], dict[int, tuple[np.float32, np.float32]]] = {}
        for row in rows:
            bounds = (-np.inf, np.inf) if whole else (row["lower"], row["upper"])
            site = self.ranges.setdefault((row["hook_point"], row["layer"]), {})
            site[row["neuron"]] = (np.float32(bounds[0]), np.float32(bounds[1]))
        self.tested = self.changed = 0

    def __call__(self, hook_point: str, layer: int, x: Tensor) -> Tensor:
        values = x.numpy().copy()
        for neuron, (lower, upper) in self.ranges.get((hook_point, layer), {}).items():
            column_T = values[0, :, neuron]
            inside_T = (lower <= column_T) & (column_T <= upper)
            self.tested += len(column_T)
            self.changed += int(inside_T.sum())
            column_T[inside_T] = 0
        return torch.from_numpy(values)
