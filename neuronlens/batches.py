"""Batches of tokens: rows of ids padded to the longest, with a mask that says which are real."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """B texts of at most T tokens. ids_BT is int64; mask_BT is bool, True where the token is real, false on pads."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor

    @property
    def positions_BT(self) -> torch.Tensor:
        """Position ids counted over real tokens only, so that left padding does not shift learned positions."""
        return (self.mask_BT.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def last_B(self) -> torch.Tensor:
        """Index of each row's last real token."""
        n_columns = self.mask_BT.shape[1]
        return n_columns - 1 - self.mask_BT.flip(1).int().argmax(dim=1)

    @property
    def is_left_aligned(self) -> bool:
        """True where every row's real tokens stand first: pads come after and a causal model never sees them."""
        return bool(self.mask_BT[:, 0].all()) and bool((self.mask_BT[:, 1:] <= self.mask_BT[:, :-1]).all())

    def left_aligned(self) -> "TokenBatch":
        """The same texts with all their pads at the end."""
        order_BT = (~self.mask_BT).int().argsort(dim=1, stable=True)
        return TokenBatch(ids_BT=self.ids_BT.gather(1, order_BT), mask_BT=self.mask_BT.gather(1, order_BT))

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(ids_BT=self.ids_BT.to(device), mask_BT=self.mask_BT.to(device))


def pad(rows: Sequence[Sequence[int]], *, pad_id: int, side: Literal["left", "right"] = "right") -> TokenBatch:
    """The rows of token ids as one batch on the CPU, padded at `side`. Every row needs at least one token."""
    width = max(len(row) for row in rows)
    ids_BT = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask_BT = np.zeros((len(rows), width), dtype=bool)
    for b, row in enumerate(rows):
        real = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids_BT[b, real] = row
        mask_BT[b, real] = True
    return TokenBatch(ids_BT=torch.from_numpy(ids_BT), mask_BT=torch.from_numpy(mask_BT))


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """The indices 0, 1, ... of `lengths`, cut into batches of at most `tokens_per_batch` tokens, pads counted.

    The order is kept, so give the lengths sorted: then little is padded. A text longer than the budget stands alone.
    """
    batches: list[list[int]] = []
    longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if batches and longest * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = length
    return batches
