"""Many programs at work in one forward pass: every row of a batch runs under the program in its slot.

    slots = ProgramSlots(n_slots=8)
    slot = slots.load(program)                                  # 1 to 8; slot 0 is no program
    step = slots.step([slot, 0, 0, slot], real_BT)              # which row runs under which, for one forward pass
    x_BTN = step.run("mlp_post", 3, x_BTN)                      # in a hook
    counts_BC = step.counts()                                   # per row: tested, then changed by each rule

The arithmetic, the order of rules and the counting are those of `neuronlens.interventions`. On float32 activations of
a CPU one compiled pass does it; anywhere else torch operations do, without waiting for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuronlens.programs import Program, SiteProgram
from neuronlens.slot_kernel import ADAPTIVE, BANK, CENTRE, CONSTANT, LOWER, RULE, UPPER, A, B, G, replace_inside

SiteKey = tuple[str, int]
"""Hook point and layer."""


class ProgramSlots:
    """Programs by slot, ready to run at whatever site they name. One thread uses it."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._slot_of: dict[object, int] = {}
        self._users = [0] * (n_slots + 1)
        self._programs: list[Program | None] = [None] * (n_slots + 1)
        self._banks: dict[SiteKey, _Bank] = {}

    @property
    def sites(self) -> frozenset[SiteKey]:
        """Where programs that are loaded act."""
        return frozenset(site for slot in self._slot_of.values() for site in self._sites_of(slot))

    def load(self, program: Program) -> int:
        """The slot of this program, which it keeps until it was released as often as it was loaded.

        Raises IndexError where every slot is in use: the caller counts programs before it loads them.
        """
        key = program_key(program)
        if key not in self._slot_of:
            slot = self._free_slot()
            self._slot_of[key], self._programs[slot] = slot, program
            for site in program.sites:
                bank = self._banks.setdefault((site.hook_point, site.layer), _Bank(self.n_slots + 1, site.width))
                bank.put(slot, site)
        slot = self._slot_of[key]
        self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """One user less. The program stays loaded until its slot is needed."""
        self._users[slot] -= 1

    def step(self, slot_B: Sequence[int], real_BT: Tensor, *, by_torch: bool = False) -> "Step | None":
        """What a forward pass needs to know: each row's slot, and which tokens are real (bool, on the CPU).

        None where no row has a program. by_torch: do without the compiled pass, to compare the two.
        """
        at_work = {slot for slot in slot_B if slot}
        if not at_work:
            return None
        return Step(
            banks={site: self._banks[site] for slot in at_work for site in self._sites_of(slot)},
            slot_B=np.array(slot_B),
            real_BT=real_BT,
            n_rules=max(len(program.rules) for slot in at_work if (program := self._programs[slot])),
            by_torch=by_torch,
        )

    def _sites_of(self, slot: int) -> list[SiteKey]:
        program = self._programs[slot]
        return [] if program is None else [(site.hook_point, site.layer) for site in program.sites]

    def _free_slot(self) -> int:
        loaded = set(self._slot_of.values())
        unused = [slot for slot in range(1, self.n_slots + 1) if slot not in loaded]
        if unused:
            return unused[0]
        idle = [(key, slot) for key, slot in self._slot_of.items() if self._users[slot] == 0]
        key, slot = idle[0]
        for site in self._sites_of(slot):
            self._banks[site].clear(slot)
        del self._slot_of[key]
        self._programs[slot] = None
        return slot


def program_key(program: Program) -> object:
    """Equal for programs that may share a slot: the same arrays, which also belong to the same rules."""
    return program.id, tuple(tuple(site.rule_R.tolist()) for site in program.sites)


class Step:
    """One forward pass over B rows of T tokens, at the sites of `banks`."""

    def __init__(
        self, *, banks: dict[SiteKey, "_Bank"], slot_B: np.ndarray, real_BT: Tensor, n_rules: int, by_torch: bool
    ) -> None:
        self._banks = banks
        self._slot_B = slot_B
        self._real_BT = real_BT
        self._real_numpy_BT = real_BT.numpy()
        self._counts_BC = torch.zeros(len(slot_B), 1 + n_rules, dtype=torch.int64)
        self._counts_numpy_BC = self._counts_BC.numpy()
        self._by_torch = by_torch
        self._slot_on_device_B: Tensor | None = None

    def run(self, hook_point: str, layer: int, x_BTN: Tensor) -> Tensor | None:
        """x_BTN with the values inside a range of their row's program replaced; None where no program acts here."""
        bank = self._banks.get((hook_point, layer))
        if bank is None:
            return None
        if x_BTN.is_cpu and x_BTN.dtype is torch.float32 and not self._by_torch:
            return self._run_compiled(bank, x_BTN)
        return self._run_on_device(bank, x_BTN)

    def counts(self) -> np.ndarray:
        """int64 [B, 1 + rules]: tested, then changed by each rule of the row's program. Waits for the device."""
        return self._counts_BC.cpu().numpy()

    def _run_compiled(self, bank: "_Bank", x_BTN: Tensor) -> Tensor:
        # On one token a row, each of these few steps costs as much as the values do: the model has just pushed Python
        # out of the CPU's caches.
        x = x_BTN.numpy() if x_BTN.is_contiguous() else x_BTN.contiguous().numpy()
        out = np.empty_like(x)
        replace_inside(x, self._real_numpy_BT, self._slot_B, *bank.compiled, out, self._counts_numpy_BC)
        return torch.from_numpy(out)

    def _run_on_device(self, bank: "_Bank", x_BTN: Tensor) -> Tensor:
        if self._slot_on_device_B is None:
            self._slot_on_device_B = torch.from_numpy(self._slot_B).to(x_BTN.device)
            self._real_BT, self._counts_BC = self._real_BT.to(x_BTN.device), self._counts_BC.to(x_BTN.device)
        slot_B, counts_BC = self._slot_on_device_B, self._counts_BC
        rows = bank.rows(x_BTN.device, x_BTN.dtype)
        finite_BTN = torch.isfinite(x_BTN) & self._real_BT[:, :, None]
        counts_BC[:, 0] += (finite_BTN & (rows.named_SN[slot_B] > 0)[:, None]).sum(dim=(1, 2))
        out_BTN, decided_BTN = x_BTN, torch.zeros_like(x_BTN, dtype=torch.bool)
        for r in range(int(bank.n_rows_S[self._slot_B].max())):
            k_B = rows.rows_2SR[BANK, slot_B, r]  # row 0 for slots with fewer rows: nothing is inside
            inside = rows.inside(x_BTN, k_B) & ~decided_BTN & self._real_BT[:, :, None]
            out_BTN = torch.where(inside, rows.replaced(x_BTN, k_B), out_BTN)
            decided_BTN = decided_BTN | inside
            n_inside_B = (inside & finite_BTN).sum(dim=(1, 2))
            counts_BC.scatter_add_(1, 1 + rows.rows_2SR[RULE, slot_B, r, None], n_inside_B[:, None])
        return out_BTN


class _Bank:
    """The rows of all slots' programs at one site, a row for each piece of a rule: slot s has n_rows_S[s] of them.
    Arrays as `slot_kernel` takes them."""

    def __init__(self, n_slots: int, width: int) -> None:
        self.n_rows_S = np.zeros(n_slots, dtype=np.int64)
        self.rows_2SR = np.zeros((2, n_slots, 1), dtype=np.int64)
        self.named_SN = np.zeros((n_slots, width), dtype=np.int32)
        self.compiled: tuple[np.ndarray, ...] = ()
        """What the compiled pass takes of the bank."""
        self._sites: dict[int, SiteProgram] = {}
        self._on: dict[tuple[torch.device, torch.dtype], _Rows] = {}

    def put(self, slot: int, site: SiteProgram) -> None:
        self._sites[slot] = site
        self._lay_out()

    def clear(self, slot: int) -> None:
        del self._sites[slot]
        self._lay_out()

    def rows(self, device: torch.device, dtype: torch.dtype) -> "_Rows":
        if (device, dtype) not in self._on:
            self._on[device, dtype] = _Rows.of(list(self._sites.values()), self, device, dtype)
        return self._on[device, dtype]

    def _lay_out(self) -> None:
        """Lay every slot's rows after row 0, which no value is inside of."""
        most = max((len(site.rule_R) for site in self._sites.values()), default=1)
        self.rows_2SR = np.zeros((2, len(self.n_rows_S), most), dtype=np.int64)
        self.n_rows_S[:], self.named_SN[:], first = 0, 0, 1
        for slot, site in self._sites.items():
            n = self.n_rows_S[slot] = len(site.rule_R)
            self.rows_2SR[BANK, slot, :n] = np.arange(first, first + n)
            self.rows_2SR[RULE, slot, :n] = site.rule_R
            self.named_SN[slot] = site.named_N
            first += n
        self._on.clear()
        rows = _Rows.of(list(self._sites.values()), self, torch.device("cpu"), torch.float32)
        numbers_KFN, kinds_K2 = rows.numbers_KFN.numpy(), rows.kinds_K2.numpy()
        self.compiled = (self.n_rows_S, self.rows_2SR, self.named_SN, numbers_KFN, kinds_K2)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """A bank on a device: bounds rounded to the activations' dtype, the rest in the dtype that replacements are
    computed in; numbers_KFN holds both in the latter, which loses nothing."""

    dtype: torch.dtype
    rows_2SR: Tensor
    named_SN: Tensor
    numbers_KFN: Tensor
    kinds_K2: Tensor

    @classmethod
    def of(cls, sites: Sequence[SiteProgram], bank: _Bank, device: torch.device, dtype: torch.dtype) -> "_Rows":
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        width = bank.named_SN.shape[1]
        nothing_1FN = np.array([np.inf, -np.inf, 0, 0, 0, 0])[None, :, None] * np.ones((1, 1, width))
        numbers_KFN = torch.from_numpy(np.concatenate([nothing_1FN, *map(_numbers, sites)]))
        numbers_KFN[:, : UPPER + 1] = numbers_KFN[:, : UPPER + 1].to(dtype).double()
        kinds_K2 = np.concatenate([[[True, False]], *map(_kinds, sites)])
        return cls(
            dtype=dtype,
            rows_2SR=torch.from_numpy(bank.rows_2SR).to(device),
            named_SN=torch.from_numpy(bank.named_SN).to(device),
            numbers_KFN=numbers_KFN.to(exact).to(device),
            kinds_K2=torch.from_numpy(kinds_K2).to(device),
        )

    def inside(self, x_BTN: Tensor, k_B: Tensor) -> Tensor:
        """Which values are in the range of row k_B[b]."""
        return (x_BTN >= self.numbers_KFN[k_B, LOWER, None]) & (x_BTN <= self.numbers_KFN[k_B, UPPER, None])

    def replaced(self, x_BTN: Tensor, k_B: Tensor) -> Tensor:
        """What each value becomes under row k_B[b], were it inside."""
        a_B1N, b_B1N = self.numbers_KFN[k_B, A, None], self.numbers_KFN[k_B, B, None]
        distance = (x_BTN - self.numbers_KFN[k_B, CENTRE, None]).abs()
        # A slope of 0 times an infinite distance would be NaN.
        adaptive_B11, constant_B11 = self.kinds_K2[k_B, ADAPTIVE, None, None], self.kinds_K2[k_B, CONSTANT, None, None]
        slope = torch.where(adaptive_B11, a_B1N + self.numbers_KFN[k_B, G, None] * distance, a_B1N)
        return torch.where(constant_B11, b_B1N, x_BTN * slope + b_B1N).to(self.dtype)


def _numbers(site: SiteProgram) -> np.ndarray:
    """[R, 6, N] float64."""
    zeros_RN = np.zeros_like(site.a_RN)
    g_RN, centre_RN = (zeros_RN if part is None else part for part in (site.g_RN, site.centre_RN))
    return np.stack([site.lower_RN, site.upper_RN, site.a_RN, site.b_RN, g_RN, centre_RN], axis=1)


def _kinds(site: SiteProgram) -> np.ndarray:
    """[R, 2] bool: constant, adaptive."""
    adaptive_R = np.zeros(len(site.rule_R), bool) if site.g_RN is None else site.g_RN.any(axis=1)
    return np.stack([site.constant_R, adaptive_R], axis=1)
