"""The rules of every slot at every site, on the device, in arrays that keep their place: a CUDA graph reads them.

Slot 0 is no program. A program has up to `rules` rules, each a row for every piece of its ranges; the programs of all
slots share a site's `rule_rows`, before which row 0 contains no value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuronlens.programs import SiteProgram
from neuronlens.slot_kernel import ADAPTIVE, BANK, CENTRE, CONSTANT, LOWER, REPLACE_IN_PLACE, RULE, UPPER, A, B, G
from neuronlens.teams import Task
from neuronlens.vllm.config import WorkerConfig
from neuronlens.vllm.sites import RankSite

N_FIELDS = 6
_ALONE = 1 << 15
"""Up to so many values one thread is as fast as two: asking another to help takes as long as its half."""


class NoRoom(Exception):
    """Every slot is in use, or a site has too few rule rows left; other programs must end first."""


@dataclass(frozen=True, slots=True)
class SiteTables:
    """The arrays of one site, N neurons of this rank. Rows of numbers_KFN and kinds_K2 as `slot_kernel` has them."""

    site: RankSite
    n_rows_S: Tensor
    rows_2SR: Tensor
    named_SN: Tensor
    numbers_KFN: Tensor
    kinds_K2: Tensor

    @classmethod
    def empty(cls, site: RankSite, config: WorkerConfig, device: torch.device) -> "SiteTables":
        n_slots, n_rows = config.slots + 1, config.rule_rows + 1

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        parts = (
            zeros(n_slots, dtype=torch.int64),
            zeros(2, n_slots, config.rule_rows, dtype=torch.int64),
            zeros(n_slots, site.width, dtype=torch.int32),
            zeros(n_rows, N_FIELDS, site.width, dtype=torch.float32),
            zeros(n_rows, 2, dtype=torch.bool),
        )
        tables = cls(site, *parts)
        tables.numbers_KFN[0, LOWER], tables.numbers_KFN[0, UPPER] = torch.inf, -torch.inf
        return tables

    def arrays(self) -> tuple[np.ndarray, ...]:
        """On a CPU: the five in numpy, as `slot_kernel` takes them, in the tensors' memory."""
        parts = self.n_rows_S, self.rows_2SR, self.named_SN, self.numbers_KFN, self.kinds_K2
        return tuple(part.numpy() for part in parts)

    def put(self, slot: int, program: SiteProgram, rows: Sequence[int], dtype: torch.dtype) -> None:
        """The part of this rank into `slot`, its rows at these places. Bounds are rounded to the activations' dtype."""
        part, n_rows = self.site.part, len(rows)
        self.numbers_KFN[list(rows)] = _numbers(program, part, dtype).to(self.numbers_KFN.device)
        self.kinds_K2[list(rows)] = _kinds(program).to(self.kinds_K2.device)
        self.named_SN[slot] = torch.from_numpy(program.named_N[part].astype(np.int32)).to(self.named_SN.device)
        self.rows_2SR[BANK, slot, :n_rows] = torch.tensor(list(rows), device=self.rows_2SR.device)
        self.rows_2SR[RULE, slot, :n_rows] = torch.from_numpy(program.rule_R).to(self.rows_2SR.device)
        self.n_rows_S[slot] = n_rows

    def clear(self, slot: int) -> None:
        self.n_rows_S[slot] = 0
        self.named_SN[slot] = 0


class SlotTables:
    """The tables of all sites, and which rule rows are free. All changes happen between two forward passes."""

    def __init__(
        self, sites: Sequence[RankSite], config: WorkerConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.sites = [SiteTables.empty(site, config, device) for site in sites]
        self._dtype = dtype
        self._max_rules, self._n_rows = config.rules, config.rule_rows
        self._index = {(site.hook_point, site.layer): i for i, site in enumerate(sites)}
        self._free = [list(range(config.rule_rows, 0, -1)) for _ in sites]
        self._rows: dict[int, dict[int, list[int]]] = {}
        """Slot -> site -> its rule rows."""

    def fault(self, program: Sequence[SiteProgram]) -> str | None:
        """Why these tables can never hold the program, in a sentence or two; None where they can."""
        n_rules = 1 + max(int(part.rule_R.max()) for part in program)
        if n_rules > self._max_rules:
            return f"The program has {n_rules} rules, this server's `rules` is {self._max_rules}. Give fewer."
        for part in program:
            index = self._index.get((part.hook_point, part.layer))
            if index is None:
                hooked = sorted({site.site.hook_point for site in self.sites})
                layers = sorted({site.site.layer for site in self.sites})
                return (
                    f"Layer {part.layer} of {part.hook_point} is not hooked in this server, which hooks "
                    f"{', '.join(hooked)} in layers {layers}."
                )
            if self.sites[index].site.full_width != part.width:
                return (
                    f"The table has {part.width} neurons at {part.hook_point} of layer {part.layer}, this model "
                    f"{self.sites[index].site.full_width}."
                )
            if len(part.rule_R) > self._n_rows:
                return (
                    f"The program needs {len(part.rule_R)} rows at {part.hook_point} of layer {part.layer}, one for "
                    f"each piece of its rules' ranges, this server's `rule_rows` is {self._n_rows}. Give fewer rules, "
                    "take a table with fewer pieces, or start the server with more rule_rows in additional_config."
                )
        return None

    def has_room(self, program: Sequence[SiteProgram], spare: Sequence[int] = ()) -> bool:
        """Whether the rule rows suffice once the slots `spare` are cleared."""
        for part in program:
            index = self._index[part.hook_point, part.layer]
            n_free = len(self._free[index]) + sum(len(self._rows.get(slot, {}).get(index, ())) for slot in spare)
            if n_free < len(part.rule_R):
                return False
        return True

    def put(self, slot: int, program: Sequence[SiteProgram]) -> None:
        """Load the program into an empty slot. Raises NoRoom, and changes nothing, where rule rows are too few."""
        if not self.has_room(program):
            raise NoRoom
        self._rows[slot] = {}
        for part in program:
            index = self._index[part.hook_point, part.layer]
            rows = [self._free[index].pop() for _ in part.rule_R]
            self._rows[slot][index] = rows
            self.sites[index].put(slot, part, rows, self._dtype)

    def clear(self, slot: int) -> None:
        for index, rows in self._rows.pop(slot, {}).items():
            self.sites[index].clear(slot)
            self._free[index].extend(rows)


class ReplaceByNumba:
    """Changes values at one site, in the CPU's memory and of any floating dtype, in place: one compiled pass, whose
    tokens are shared out over torch's threads. slot_T and counts_TC (int32: tested, then changed by each rule), which
    keep their place, may have more tokens than come."""

    def __init__(self, tables: SiteTables, slot_T: Tensor, counts_TC: Tensor, *, n_threads: int) -> None:
        self._task = Task(REPLACE_IN_PLACE, [None, slot_T.numpy(), *tables.arrays(), counts_TC.numpy()])
        self._n_threads = n_threads
        self._width = tables.site.width

    def __call__(self, x_TN: Tensor) -> None:
        x = x_TN if x_TN.dtype is torch.float32 and x_TN.is_contiguous() else x_TN.float().contiguous()
        n_tokens, width = x.shape
        assert width == self._width, f"{width} neurons, expected {self._width}"
        self._task.point(0, x.data_ptr(), n_tokens, width)
        self._task.run(n_tokens, n_threads=self._n_threads if n_tokens * width > _ALONE else 1)
        if x is not x_TN:
            x_TN.copy_(x)


def replace_by_torch(x_TN: Tensor, tables: SiteTables, slot_T: Tensor, counts_TC: Tensor) -> None:
    """The same by torch operations, on any device, without waiting for it: what the Triton kernel is held to."""
    slot_T, counts_TC = slot_T[: len(x_TN)].long(), counts_TC[: len(x_TN)]
    x = x_TN.float()
    finite_TN = torch.isfinite(x)
    named_TN = tables.named_SN[slot_T] > 0
    counts_TC[:, 0] += (finite_TN & named_TN).sum(dim=1)
    out_TN, decided_TN = x, torch.zeros_like(finite_TN)
    for r in range(tables.rows_2SR.shape[2]):
        is_row_T = tables.n_rows_S[slot_T] > r
        k_T = torch.where(is_row_T, tables.rows_2SR[BANK, slot_T, r], 0)
        numbers_TFN = tables.numbers_KFN[k_T]
        inside_TN = (x >= numbers_TFN[:, LOWER]) & (x <= numbers_TFN[:, UPPER]) & ~decided_TN
        out_TN = torch.where(inside_TN, _replaced(x, numbers_TFN, tables.kinds_K2[k_T]), out_TN)
        decided_TN = decided_TN | inside_TN
        column_T = 1 + torch.where(is_row_T, tables.rows_2SR[RULE, slot_T, r], 0)
        n_inside_T1 = (inside_TN & finite_TN).sum(dim=1, keepdim=True, dtype=torch.int32)
        counts_TC.scatter_add_(1, column_T[:, None], n_inside_T1)
    x_TN.copy_(out_TN)


def _replaced(x_TN: Tensor, numbers_TFN: Tensor, kinds_T2: Tensor) -> Tensor:
    a_TN, b_TN = numbers_TFN[:, A], numbers_TFN[:, B]
    distance_TN = (x_TN - numbers_TFN[:, CENTRE]).abs()
    slope_TN = torch.where(kinds_T2[:, ADAPTIVE, None], a_TN + numbers_TFN[:, G] * distance_TN, a_TN)
    # A slope of 0 times an infinite value would be NaN.
    return torch.where(kinds_T2[:, CONSTANT, None], b_TN, x_TN * slope_TN + b_TN)


def _numbers(program: SiteProgram, part: slice, dtype: torch.dtype) -> Tensor:
    """[R, 6, N] float32 of this rank's neurons."""
    zeros_RN = np.zeros_like(program.a_RN)
    g_RN, centre_RN = (zeros_RN if values is None else values for values in (program.g_RN, program.centre_RN))
    fields = [program.lower_RN, program.upper_RN, program.a_RN, program.b_RN, g_RN, centre_RN]
    numbers_RFN = torch.from_numpy(np.stack([field[:, part] for field in fields], axis=1))
    numbers_RFN[:, : UPPER + 1] = numbers_RFN[:, : UPPER + 1].to(dtype).double()
    return numbers_RFN.float()


def _kinds(program: SiteProgram) -> Tensor:
    """[R, 2] bool: constant, adaptive."""
    n_rows = len(program.rule_R)
    adaptive_R = np.zeros(n_rows, bool) if program.g_RN is None else program.g_RN.any(axis=1)
    return torch.from_numpy(np.stack([program.constant_R, adaptive_R], axis=1))
