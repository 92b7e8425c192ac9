"""Which program every token of a forward pass runs under, and what the programs have done.

Arrays over the tokens keep their place on the device, since a CUDA graph reads them: they are written before every
forward pass that has a program, and set back to slot 0 after it.
"""

from collections.abc import Callable
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from neuronlens.slot_kernel import SETTLE
from neuronlens.teams import Task
from neuronlens.vllm.tables import ReplaceByNumba, SiteTables, SlotTables, replace_by_torch

Replace = Callable[[Tensor], None]
"""Changes one site's x_TN in place."""


class Board:
    """slot_T (int32): each token's slot. counts_TC (int32): what this forward pass did to each token: tested, then
    changed by each rule; after the pass it is added to the rows of counts_UC (int64), a row a ticket, row 0 nobody's.
    """

    def __init__(
        self, tables: SlotTables, *, n_tokens: int, n_counters: int, n_rules: int, rank: int, device: torch.device
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.tables = tables
        self.is_idle = True
        self._is_cpu = device.type == "cpu"
        self._host_2T = torch.zeros(2, n_tokens, dtype=torch.int32, pin_memory=not self._is_cpu)
        # On the CPU what is filled in is what is read.
        self.slot_T, self._counter_T = self._host_2T if self._is_cpu else zeros(2, n_tokens, dtype=torch.int32)
        self.counts_TC = zeros(n_tokens, 1 + n_rules, dtype=torch.int32)
        self.counts_UC = zeros(n_counters + 1, 1 + n_rules, dtype=torch.int64)
        self._nobodys_TC = torch.zeros_like(self.counts_TC)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._n_seated = 0
        if self._is_cpu:
            self._settle = Task(SETTLE, [*self.host_2T, self.counts_TC.numpy(), self.counts_UC.numpy()])
        self._replace = [
            # Where every rank sees the same values, one of them counts.
            _replace_at(site, self.slot_T, self.counts_TC if site.site.is_sliced or rank == 0 else self._nobodys_TC)
            for site in tables.sites
        ]

    @cached_property
    def host_2T(self) -> np.ndarray:
        """Slots of the next forward pass, and rows of counts_UC, to be filled in before `seat`, when the last pass has
        been settled by `rest` and `wait_for_copy` has returned."""
        return self._host_2T.numpy()

    def wait_for_copy(self) -> None:
        """Until what was filled in last has left: a device that is a step behind copies it only then."""
        if self._copied is not None:
            self._copied.synchronize()

    def seat(self, n_tokens: int) -> None:
        """Take over the first n_tokens of host_2T; every other token is without a program."""
        if not self._is_cpu:
            self.slot_T[:n_tokens].copy_(self._host_2T[0, :n_tokens], non_blocking=True)
            self._counter_T[:n_tokens].copy_(self._host_2T[1, :n_tokens], non_blocking=True)
            if self._copied is not None:
                self._copied.record()
        self._n_seated, self.is_idle = n_tokens, False

    def rest(self) -> None:
        """The forward pass is over: write down its counts. No token has a program, until the next `seat`."""
        if self.is_idle:
            return
        self.is_idle = True
        if self._is_cpu:
            self._settle.run(self._n_seated)
            return
        seated = slice(self._n_seated)
        self.counts_UC.index_add_(0, self._counter_T[seated], self.counts_TC[seated].long())
        self.counts_TC[seated].zero_()
        self.slot_T[seated].zero_()

    def run(self, x_TN: Tensor, index: int) -> None:
        """Replace, in x_TN, the values inside a range of their token's program at site `index`."""
        # A CUDA graph is captured while nobody is seated, and has to hold the launch.
        if self.is_idle and self._is_cpu:
            return
        self._replace[index](x_TN)

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
        self.rest()
        found = self.counts_UC[row].tolist()
        self.counts_UC[row] = 0
        return found

    def n_tested(self) -> int:
        """How many values were tested since the last call, whoever counts them; forgets all counts. For the canary."""
        self.rest()
        found = int(self.counts_UC[:, 0].sum()) + int(self._nobodys_TC[:, 0].sum())
        self.counts_UC.zero_()
        self._nobodys_TC.zero_()
        return found


def _replace_at(tables: SiteTables, slot_T: Tensor, counts_TC: Tensor) -> Replace:
    if slot_T.is_cpu:
        return ReplaceByNumba(tables, slot_T, counts_TC, n_threads=torch.get_num_threads())
    replace = replace_by_torch
    if slot_T.is_cuda:
        from neuronlens.vllm.triton_kernel import replace_by_triton

        replace = replace_by_triton
    return partial(replace, tables=tables, slot_T=slot_T, counts_TC=counts_TC)
