"""Run only what an intervention can change: a model's unmodified first part is computed once a batch, and every pass
under a program resumes behind it.

    prefix = SharedPrefix(loaded.module)
    start = prefix.start_of(sites)
    with prefix.recording([start]) as recorded:
        base_BTD = loaded.hidden(batch)
    with prefix.resumed(recorded, start), attach(loaded.module, sites, fn):
        edited_BTD = loaded.hidden(batch)

While a pass is resumed, the blocks and the attention that are known give back what was recorded, whatever they are
given; all else of the model's own forward, masks and positions included, runs as ever. Hooks see the blocks' outputs as
usual. Where all that follows the start maps each token alone, `Recorded.rows` keeps one token of each text, and the
pass may be over a batch of one token a text.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neuronlens.hookpoints import FORWARD_ORDER, HOOK_POINTS, RULES, Site, config_of, find_sites

_ATTENTION = {
    "gpt2": "attn",
    "gpt_neox": "attention",
    "bert": "attention.self",
    "roberta": "attention.self",
    "distilbert": "attention",
}
"""model_type -> the one part of a block in which tokens see each other, where it is not called self_attn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a resumed pass takes from the unmodified one: the outputs of the first n_blocks blocks, and that of the next
    block's attention where `with_attention`. n_blocks 0 without attention is a whole pass."""

    n_blocks: int
    with_attention: bool


WHOLE = Start(n_blocks=0, with_attention=False)


@dataclass(frozen=True, slots=True)
class Recorded:
    """The outputs of one unmodified pass: tensors [B, T, D], in the tuples that the modules gave, where they gave any.

    blocks and attention: layer -> output. Of a tuple, what stands behind the tensor is gone: attention's weights, which
    nobody reads.
    """

    blocks: dict[int, Any] = field(default_factory=dict)
    attention: dict[int, Any] = field(default_factory=dict)

    def rows(self, column_B: Tensor) -> "Recorded":
        """The same at one token of each text: [B, 1, D]."""
        row_B = torch.arange(len(column_B), device=column_B.device)

        def chosen(output: Any) -> Any:
            if isinstance(output, tuple):
                return (chosen(output[0]), *output[1:])
            return output[row_B, column_B][:, None]

        return Recorded(
            {layer: chosen(output) for layer, output in self.blocks.items()},
            {layer: chosen(output) for layer, output in self.attention.items()},
        )


class SharedPrefix:
    """Records and resumes the passes of one model. A model whose architecture `neuronlens.hookpoints` does not know
    runs whole passes."""

    def __init__(self, module: nn.Module) -> None:
        model_type = getattr(config_of(module), "model_type", "")
        self._known: frozenset[Site] = frozenset()
        self._blocks: list[nn.Module] = []
        self._attention: list[nn.Module] = []
        if model_type in RULES:
            sites = find_sites(module, HOOK_POINTS)
            self._known = frozenset(sites)
            self._blocks = [module.get_submodule(s.module_name) for s in sites if s.hook_point == "resid_post"]
            name = _ATTENTION.get(model_type, "self_attn")
            self._attention = [block.get_submodule(name) for block in self._blocks]

    def start_of(self, sites: Sequence[Site]) -> Start:
        """The latest start before which nothing happens at any of these sites."""
        if not set(sites) <= self._known:
            return WHOLE
        first = min(sites, key=lambda site: (site.layer, FORWARD_ORDER.index(site.hook_point)))
        if first.hook_point == "resid_post":
            return Start(n_blocks=first.layer + 1, with_attention=False)
        return Start(n_blocks=first.layer, with_attention=True)

    def maps_tokens_alone(self, start: Start) -> bool:
        """Whether no token sees another behind this start, so that a pass may go on with some of them."""
        n_seen = start.n_blocks + start.with_attention
        return start.n_blocks > 0 and n_seen == len(self._blocks)

    @contextmanager
    def recording(self, starts: Sequence[Start]) -> Iterator[Recorded]:
        """While the context is open, a pass leaves what these starts need in the Recorded."""
        recorded = Recorded()
        blocks = {start.n_blocks - 1 for start in starts if start.n_blocks}
        attention = {start.n_blocks for start in starts if start.with_attention}
        handles = [self._blocks[i].register_forward_hook(_keeper(recorded.blocks, i)) for i in blocks]
        handles += [self._attention[i].register_forward_hook(_keeper(recorded.attention, i)) for i in attention]
        try:
            yield recorded
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def resumed(self, recorded: Recorded, start: Start) -> Iterator[None]:
        """While the context is open, passes over the recorded batch begin at `start`."""
        patched: list[tuple[nn.Module, Any]] = []
        try:
            if start.n_blocks:
                # All of them give what the last one gave: nobody looks at the others.
                known = recorded.blocks[start.n_blocks - 1]
                patched += [_patch(block, known) for block in self._blocks[: start.n_blocks]]
            if start.with_attention:
                patched.append(_patch(self._attention[start.n_blocks], recorded.attention[start.n_blocks]))
            yield
        finally:
            for module, own in patched:
                if own is None:
                    del module.forward
                else:
                    module.forward = own


def _keeper(outputs: dict[int, Any], layer: int) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs[layer] = (output[0], *[None] * (len(output) - 1)) if isinstance(output, tuple) else output

    return keep


def _patch(module: nn.Module, output: Any) -> tuple[nn.Module, Any]:
    """Let the module give `output`; the second is the forward that it had of its own, over its class's, or None."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    return module, own
