"""The next token of every sequence in a batch: greedy or drawn, each with random numbers of its own.

A sequence's draws depend on its seed and its place among the request's choices, on nothing else in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuronlens.serving.engine import Sampling

_SEED_BITS = (1 << 64) - 1


class Sampler:
    """How one sequence chooses, and its random numbers."""

    def __init__(self, sampling: Sampling, index: int) -> None:
        self.sampling = sampling
        entropy = None if sampling.seed is None else [sampling.seed & _SEED_BITS, index]
        self._random = None if self.is_greedy else np.random.default_rng(entropy)

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature == 0

    def uniform(self) -> float:
        """The next number in [0, 1)."""
        assert self._random is not None, "a greedy sequence draws nothing"
        return float(self._random.random())


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A chosen token; with log probabilities asked for, its own and those of the most probable tokens, by falling
    probability."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[Choice | None]:
    """A token for every row; None where the row's logits are not numbers. logits_BV is float, on any device."""
    logits_BV = logits_BV.float()
    best_B, token_B = logits_BV.max(dim=1)
    drawn = [b for b, sampler in enumerate(samplers) if not sampler.is_greedy]
    is_number = torch.isfinite(best_B).tolist()
    if drawn:
        drawn = [b for b in drawn if is_number[b]]
        rows = torch.tensor(drawn, device=logits_BV.device, dtype=torch.int64)
        token_B[rows] = _draw(logits_BV[rows], [samplers[b] for b in drawn]) if drawn else token_B[rows]
    tokens = token_B.tolist()
    asked = {b: top for b, s in enumerate(samplers) if (top := s.sampling.top_logprobs) is not None and is_number[b]}
    logprobs = _logprobs(logits_BV, tokens, asked) if asked else {}
    return [None if not is_number[b] else logprobs.get(b, Choice(token_id=tokens[b])) for b in range(len(samplers))]


def _draw(logits_SV: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Tokens [S] from the distributions after temperature, cut to the smallest set whose probability reaches top_p."""
    device = logits_SV.device

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    shifted_SV = (logits_SV - logits_SV.max(dim=1, keepdim=True).values).double()
    probability_SV = torch.softmax(shifted_SV / column([s.sampling.temperature for s in samplers]), dim=1)
    sorted_SV, token_SV = probability_SV.sort(dim=1, descending=True, stable=True)
    total_SV = sorted_SV.cumsum(dim=1)
    kept_SV = total_SV - sorted_SV < column([s.sampling.top_p for s in samplers])
    reach_S1 = (sorted_SV * kept_SV).sum(dim=1, keepdim=True)
    place_S1 = torch.searchsorted(total_SV, column([s.uniform() for s in samplers]) * reach_S1, right=True)
    last_S1 = kept_SV.sum(dim=1, keepdim=True) - 1
    return token_SV.gather(1, torch.minimum(place_S1, last_S1))[:, 0]


def _logprobs(logits_BV: Tensor, tokens: Sequence[int], asked: dict[int, int]) -> dict[int, Choice]:
    rows = list(asked)
    log_p_RV = torch.log_softmax(logits_BV[rows], dim=1)
    n_top = min(max(asked.values()), log_p_RV.shape[1])
    top_RK, token_RK = (x.tolist() for x in log_p_RV.topk(n_top, dim=1))
    own_R = log_p_RV.gather(1, torch.tensor([[tokens[b]] for b in rows], device=log_p_RV.device))[:, 0].tolist()
    return {
        b: Choice(
            token_id=tokens[b],
            logprob=own_R[r],
            top=tuple(zip(token_RK[r][: asked[b]], top_RK[r][: asked[b]], strict=True)),
        )
        for r, b in enumerate(rows)
    }
