"""Which program every token of a forward pass runs under, and what the programs have done.

Arrays over the tokens keep their place on the device, since a CUDA graph reads them: they are written before every
forward pass that has a program, and set back to slot 0 after it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from neuronlens.vllm.tables import SiteTables, SlotTables, replace_by_numba, replace_by_torch

Replace = Callable[[Tensor, SiteTables, Tensor, Tensor, Tensor], None]


class Board:
    """slot_T: each token's slot; counter_T: the row of counts_UC that it is counted in, row 0 for nobody's.

    counts_UC is int64, a row a ticket: tested, then changed by each rule.
    """

    def __init__(
        self, tables: SlotTables, *, n_tokens: int, n_counters: int, n_rules: int, rank: int, device: torch.device
    ) -> None:
        self.tables = tables
        self.is_idle = True
        self.slot_T = torch.zeros(n_tokens, dtype=torch.int32, device=device)
        self.counter_T = torch.zeros(n_tokens, dtype=torch.int32, device=device)
        self.counts_UC = torch.zeros(n_counters + 1, 1 + n_rules, dtype=torch.int64, device=device)
        self._nobody_T = torch.zeros(n_tokens, dtype=torch.int32, device=device)
        self._is_cpu = device.type == "cpu"
        # Where every rank sees the same values, one of them counts.
        self._counts_here = [site.site.is_sliced or rank == 0 for site in tables.sites]
        self._host_2T = torch.zeros(2, n_tokens, dtype=torch.int32, pin_memory=not self._is_cpu)
        self._n_seated = 0
        self._replace = _replace_for(device)

    @property
    def host_2T(self) -> np.ndarray:
        """Slots and counters of the next forward pass, to be filled in before `seat`."""
        return self._host_2T.numpy()

    def seat(self, n_tokens: int) -> None:
        """Take over the first n_tokens of host_2T; every other token is without a program."""
        n = max(n_tokens, self._n_seated)
        self._host_2T[:, n_tokens:n] = 0
        self.slot_T[:n].copy_(self._host_2T[0, :n], non_blocking=True)
        self.counter_T[:n].copy_(self._host_2T[1, :n], non_blocking=True)
        self._n_seated, self.is_idle = n_tokens, False

    def rest(self) -> None:
        """No token has a program, until the next `seat`."""
        if self.is_idle:
            return
        self.slot_T[: self._n_seated].zero_()
        self._n_seated, self.is_idle = 0, True

    def run(self, x_TN: Tensor, index: int) -> None:
        """Replace, in x_TN, the values inside a range of their token's program at site `index`."""
        # A CUDA graph is captured while nobody is seated, and has to hold the launch.
        if self.is_idle and self._is_cpu:
            return
        counter_T = self.counter_T if self._counts_here[index] else self._nobody_T
        self._replace(x_TN, self.tables.sites[index], self.slot_T, counter_T, self.counts_UC)

    def run_pair(self, x_TN: Tensor, residual_TN: Tensor, index: int) -> None:
        """The same where the values are x_TN + residual_TN: a value that is replaced stands in the residual, and x is 0
        there, so that the sum is the replacement to the last bit. All other values keep both parts."""
        if self.is_idle and self._is_cpu:
            return
        sum_TN = x_TN + residual_TN
        new_TN = sum_TN.clone()
        self.run(new_TN, index)
        changed_TN = new_TN != sum_TN
        residual_TN.copy_(torch.where(changed_TN, new_TN, residual_TN))
        x_TN.masked_fill_(changed_TN, 0)

    def counts(self, row: int) -> list[int]:
        """What was counted in a row, which is 0 again afterwards. Waits for the device."""
        found = self.counts_UC[row].tolist()
        self.counts_UC[row] = 0
        return found


def _replace_for(device: torch.device) -> Replace:
    if device.type == "cpu":
        return replace_by_numba
    if device.type == "cuda":
        from neuronlens.vllm.triton_kernel import replace_by_triton

        return replace_by_triton
    return replace_by_torch
