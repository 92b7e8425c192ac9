"""Before a worker serves: does every hook act? A program that sets a whole site must change what the model computes.

A hook that came too late, or a compiled graph of a time before it, would leave every request plain without a word.
"""

from collections.abc import Callable

import numpy as np
import torch

from neuronlens.errors import RunFailed
from neuronlens.programs import SiteProgram
from neuronlens.vllm.board import Board
from neuronlens.vllm.sites import RankSite

_SLOT = 1


def check_hooks(board: Board, forward: Callable[[], torch.Tensor]) -> None:
    """Run the model with and without each site set; `forward` gives the hidden states of some dummy tokens.

    Raises RunFailed that names the first site that nothing came of.
    """
    plain_TD = forward().float().clone()
    for tables in board.tables.sites:
        n_counted, hidden_TD = _with_site_set(board, tables.site, forward)
        if n_counted == 0 or torch.equal(hidden_TD.float(), plain_TD):
            what = "was never run" if n_counted == 0 else "changed nothing"
            raise RunFailed(
                f"The hook at {tables.site.hook_point} of layer {tables.site.layer} ({tables.site.module_name}) {what} "
                "in a forward pass in which it had to set every neuron, so interventions would be silently ignored. "
                "If this model is new to vLLM's cache, remove ~/.cache/vllm/torch_compile_cache and start again, or "
                "start with --enforce-eager."
            )
    if not torch.equal(forward().float(), plain_TD):
        raise RunFailed("A forward pass without a program differs after one that had a program; it must not.")


def _with_site_set(board: Board, site: RankSite, forward: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """How many values were tested while the site was set everywhere, and what the model computed."""
    board.tables.put(_SLOT, [_set_everywhere(site)])
    board.host_2T[:] = _SLOT
    try:
        board.seat(board.host_2T.shape[1])
        hidden_TD = forward().clone()
    finally:
        board.rest()
        board.tables.clear(_SLOT)
    return board.n_tested(), hidden_TD


def _set_everywhere(site: RankSite) -> SiteProgram:
    everything_1N = np.full((1, site.full_width), np.inf)
    return SiteProgram(
        hook_point=site.hook_point,
        layer=site.layer,
        rule_R=np.array([0]),
        lower_RN=-everything_1N,
        upper_RN=everything_1N,
        a_RN=np.zeros_like(everything_1N),
        # Not 0, which attention over an empty cache gives anyway, and not alike, which a norm would take away.
        b_RN=np.cos(np.arange(site.full_width))[None],
        g_RN=None,
        centre_RN=None,
    )
