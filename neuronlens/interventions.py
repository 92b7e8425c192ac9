"""Interventions: run a model with the values inside a concept's ranges replaced, also while it generates.

    with intervene(model, table, [Rule(concept="joy")]) as applied:
        model.generate(**inputs)
    print(applied.tested, applied.changed)

Bounds are compared inclusively in the dtype of the activations: they are rounded to it, and a float16 bound beyond
65,504 becomes infinite, so that it bounds nothing. Replacements are computed in float32 (float64 for float64
activations), then rounded to the activations' dtype.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuronlens.errors import UsageError
from neuronlens.hookpoints import Site, attach, find_sites
from neuronlens.identity import model_identity
from neuronlens.models import LoadedModel
from neuronlens.programs import Program, Rule, SiteProgram
from neuronlens.ranges import RangeTable


class Applied:
    """A program at work, and what it has done so far.

    `tested` counts the finite values of named neurons (those that a rule names) that were compared with a range, at
    every position of every forward pass; `changed` counts those among them that were inside one, and so were replaced.
    Reading them waits for the device; counting does not.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._mask_BT: Tensor | None = None
        self._where_BT: Tensor | None = None
        self._runners = [_SiteRunner(site) for site in program.sites]

    @property
    def tested(self) -> int:
        return sum(runner.counts()[0] for runner in self._runners)

    @property
    def changed(self) -> int:
        return sum(runner.counts()[1] for runner in self._runners)

    def counts(self) -> dict[tuple[str, int], tuple[int, int]]:
        """(hook point, layer) -> (tested, changed)."""
        return {(runner.site.hook_point, runner.site.layer): runner.counts() for runner in self._runners}

    def set_mask(self, mask_BT: Tensor | None) -> None:
        """Count only where mask_BT (bool, the shape of the next batches) is True; None counts every position.

        Pads are changed like any token, which no real token can see, but they are not counted. Inside `generate` the
        shape changes with every step: leave the mask None there.
        """
        self._mask_BT = mask_BT

    def set_where(self, where_BT: Tensor | None) -> None:
        """Replace, and count, only where where_BT (bool, the shape of the next batches) is True; None replaces
        everywhere."""
        self._where_BT = where_BT

    def see(self, index: int, x_BTN: Tensor) -> Tensor:
        """What the program makes of x_BTN at the site `index` of `sites_of`: what `attach` is to call."""
        return self._runners[index].run(x_BTN, self._mask_BT, self._where_BT)


@contextmanager
def intervene(
    model: nn.Module | LoadedModel,
    table: RangeTable,
    rules: Sequence[Rule | Mapping[str, Any]],
    *,
    overrides: Mapping[str, str] | None = None,
    check_model: bool = True,
) -> Iterator[Applied]:
    """While the context is open, every forward pass of the model runs under these rules of the table.

    Works on transformers models and on a LoadedModel, in plain calls and at prefill and every decode step of `generate`
    (where every position counts as tested, pads of a batch included). The first rule whose range contains the value
    that the model computed decides; see `neuronlens.programs`.

    overrides: where the hook points are, for an unknown architecture (the recipe's model.modules). check_model: refuse
    a model whose config.json is not the one that the table was made with; a model built in memory has none to compare.

    Raises UsageError: rules that the table cannot serve, and a model that is not the table's.
    """
    program = Program.compile(table, rules)
    module = model.module if isinstance(model, LoadedModel) else model
    if check_model:
        check_config(module, table)
    with apply(module, program, overrides=overrides) as applied:
        yield applied


@contextmanager
def apply(module: nn.Module, program: Program, *, overrides: Mapping[str, str] | None = None) -> Iterator[Applied]:
    """As `intervene`, for a program that is compiled. Raises UsageError where the model lacks its layers or widths."""
    sites = sites_of(module, program, overrides)
    applied = Applied(program)
    with attach(module, sites, applied.see):
        yield applied


def sites_of(module: nn.Module, program: Program, overrides: Mapping[str, str] | None = None) -> list[Site]:
    """The model's site of each site of the program, in the program's order. Raises as `apply` does."""
    there = {}
    for hook_point in program.hook_points:
        layers = [site.layer for site in program.sites if site.hook_point == hook_point]
        for site in find_sites(module, [hook_point], layers, overrides):
            there[site.hook_point, site.layer] = site
    for wanted in program.sites:
        width = there[wanted.hook_point, wanted.layer].width
        if width != wanted.width:
            raise UsageError(
                f"Range table {program.table_id} has {wanted.width} neurons at {wanted.hook_point} of layer "
                f"{wanted.layer}, this {type(module).__name__} has {width}. Take the model that the table is for."
            )
    return [there[wanted.hook_point, wanted.layer] for wanted in program.sites]


def check_config(module: nn.Module, table: RangeTable) -> None:
    """Raise UsageError where the model's config.json is not the one that the table was made with."""
    folder = _checkpoint_folder(module)
    if folder is None:
        return
    try:
        found = model_identity(str(folder)).config_hash
    except UsageError:  # saved without weights or without a config: nothing to compare
        return
    expected = table.header.model
    if found != expected.config_hash:
        raise UsageError(
            f"Range table {table.id} was made with model {expected.id} (config hash {expected.config_hash}); this one, "
            f"from {folder}, has config hash {found}. Load the table's model, or pass check_model=False if you know "
            "that both are the same network."
        )


def _checkpoint_folder(module: nn.Module) -> Path | None:
    """The local folder that the model was loaded from, maybe in the hub's cache, without asking the network."""
    config = getattr(module, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One row's tensors [N] on a device; `replace` gives the replacement of every value of x_BTN."""

    lower_N: Tensor
    upper_N: Tensor
    replace: Callable[[Tensor], Tensor]


class _SiteRunner:
    """A SiteProgram on whatever device and in whatever dtype the activations turn out to be."""

    def __init__(self, site: SiteProgram) -> None:
        self.site = site
        self._named_N = torch.from_numpy(site.named_N)
        self._n_named = int(site.named_N.sum())
        self._rows: list[_Row] = []
        self._made_for: tuple[torch.device, torch.dtype] | None = None
        self._counts: Tensor | None = None

    def counts(self) -> tuple[int, int]:
        if self._counts is None:
            return 0, 0
        tested, changed = self._counts.tolist()
        return tested, changed

    def run(self, x_BTN: Tensor, mask_BT: Tensor | None, where_BT: Tensor | None = None) -> Tensor:
        """x_BTN with the values inside a row's bounds replaced."""
        if self._made_for != (x_BTN.device, x_BTN.dtype):
            self._make(x_BTN.device, x_BTN.dtype)
        where_BT1 = None if where_BT is None else _as_wide(where_BT, x_BTN, "set_where")
        mask_BT1 = None if mask_BT is None else _as_wide(mask_BT, x_BTN, "set_mask")
        if where_BT1 is not None:
            mask_BT1 = where_BT1 if mask_BT1 is None else where_BT1 & mask_BT1
        out_BTN = x_BTN
        inside_any = None
        # From the last row to the first, always on the original x: the first one has the last word.
        for row in reversed(self._rows):
            inside = (x_BTN >= row.lower_N) & (x_BTN <= row.upper_N)
            inside = inside if where_BT1 is None else inside & where_BT1
            out_BTN = torch.where(inside, row.replace(x_BTN), out_BTN)
            inside_any = inside if inside_any is None else inside_any | inside
        assert inside_any is not None, "a site of a program has one row at least"
        self._count(x_BTN.detach(), inside_any, mask_BT1)
        return out_BTN

    def _count(self, x_BTN: Tensor, inside: Tensor, real_BT1: Tensor | None) -> None:
        assert self._counts is not None
        inside = inside if real_BT1 is None else inside & real_BT1
        if x_BTN.device.type == "cpu" and bool(torch.isfinite(x_BTN.sum(dtype=torch.float32))):
            # Every value is finite, which one quick sum has shown. Elsewhere, asking would wait for the device.
            n_rows = x_BTN.shape[0] * x_BTN.shape[1] if real_BT1 is None else torch.count_nonzero(real_BT1)
            self._counts[0] += n_rows * self._n_named
        else:
            finite = torch.isfinite(x_BTN) & self._named_N
            self._counts[0] += torch.count_nonzero(finite if real_BT1 is None else finite & real_BT1)
            inside = inside & finite
        self._counts[1] += torch.count_nonzero(inside)

    @torch.inference_mode(False)  # tensors born in inference mode could not be updated by a later pass outside it
    def _make(self, device: torch.device, dtype: torch.dtype) -> None:
        site, constant_R = self.site, self.site.constant_R
        exact = torch.float64 if dtype == torch.float64 else torch.float32

        def tensor(array_N: Any, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(array_N).to(dtype).to(device)

        self._rows = []
        for r in range(len(site.lower_RN)):
            a_N, b_N = tensor(site.a_RN[r], exact), tensor(site.b_RN[r], exact)
            if constant_R[r]:
                replace = _constant(b_N.to(dtype))
            elif site.g_RN is None or site.centre_RN is None or not site.g_RN[r].any():
                replace = _affine(a_N, b_N, dtype)
            else:
                replace = _adaptive(a_N, b_N, tensor(site.g_RN[r], exact), tensor(site.centre_RN[r], exact), dtype)
            lower_N, upper_N = tensor(site.lower_RN[r], dtype), tensor(site.upper_RN[r], dtype)
            self._rows.append(_Row(lower_N=lower_N, upper_N=upper_N, replace=replace))
        self._named_N = self._named_N.to(device)
        earlier = self.counts()
        self._counts = torch.tensor(earlier, dtype=torch.int64, device=device)
        self._made_for = (device, dtype)


def _as_wide(mask_BT: Tensor, x_BTN: Tensor, setter: str) -> Tensor:
    """The mask as bool [B, T, 1], beside x_BTN."""
    if mask_BT.shape != x_BTN.shape[:2]:
        raise UsageError(
            f"The intervention's mask has shape {tuple(mask_BT.shape)}, the batch {tuple(x_BTN.shape[:2])}. "
            f"Call {setter} with each batch's own mask, or with None for every position."
        )
    return mask_BT.to(x_BTN.device, torch.bool).unsqueeze(2)


def _constant(b_N: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x_BTN: b_N


def _affine(a_N: Tensor, b_N: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x_BTN: (x_BTN * a_N + b_N).to(dtype)


def _adaptive(
    a_N: Tensor, b_N: Tensor, g_N: Tensor, centre_N: Tensor, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    return lambda x_BTN: (x_BTN * (a_N + g_N * (x_BTN - centre_N).abs()) + b_N).to(dtype)
