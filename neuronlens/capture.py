"""Capture: one forward pass over a batch feeds the statistics of every site, without keeping the activations.

A unit says which rows of x_BTN count: `last_token` (the last real token of each text), `token` (every real token that
is not special), `mean` (the mean over those tokens, a row a text) and `cls` (the classifier token, found by its id).
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from neuronlens.accumulate import make_accumulator
from neuronlens.batches import TokenBatch
from neuronlens.errors import UsageError
from neuronlens.hookpoints import Site, attach
from neuronlens.models import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Which rows of a batch count. index_K: into the flattened [B * T]; sample_K: the text of each row, in the batch;
    position_K: the token within its prompt, pads not counted, or None for unit `mean`. All int64 on the CPU."""

    index_K: torch.Tensor
    sample_K: torch.Tensor
    position_K: torch.Tensor | None


class _Captured(Exception):
    """Ends a forward pass whose last site has been seen: the layers after it would be wasted work."""


class Capture:
    """Streams the activations at `sites` into moments, histograms and, for the sites in `raw`, a list of rows.

    `raw` maps a site's index to the neurons to keep (None for all). Memory does not grow with the number of rows,
    except by the raw rows, which the caller bounds by the size of a shard. `statistics_seconds` is the part of the
    passes that went into them; on a GPU, where kernels run behind the caller's back, the time to launch them.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sites: Sequence[Site],
        *,
        unit: str,
        histograms: bool,
        raw: dict[int, np.ndarray | None],
        n_threads: int = 1,
    ) -> None:
        self.sites = tuple(sites)
        self.unit = unit
        self._loaded = loaded
        self._raw = raw
        self._special_ids = torch.tensor(sorted(set(loaded.tokenizer.all_special_ids)), dtype=torch.int64)
        self._cls_id = loaded.tokenizer.cls_token_id
        if unit == "cls" and self._cls_id is None:
            raise UsageError(
                "collect.unit is cls, but this model's tokenizer has no classifier token. Use last_token for a decoder."
            )
        self.accumulators = [
            make_accumulator(site.width, histogram=histograms, device=loaded.device, n_threads=n_threads)
            for site in self.sites
        ]
        self._last_mlp = _mlp_of(loaded.module, self.sites[-1]) if unit in ("last_token", "cls") else None
        self.raw_values: dict[int, list[torch.Tensor]] = {site: [] for site in raw}
        self.raw_samples: list[torch.Tensor] = []
        self.raw_positions: list[torch.Tensor | None] = []
        self.statistics_seconds = 0.0

    def add(self, batch: TokenBatch, keep_B: torch.Tensor | None = None) -> None:
        """Run the batch (on the CPU; moved here to the model's device) and count its rows; `keep_B` (bool) leaves
        texts out."""
        rows = self.rows_of(batch, keep_B)
        if self._raw:
            self.raw_samples.append(rows.sample_K)
            self.raw_positions.append(rows.position_K)
        if len(rows.index_K) == 0:
            return
        mask_BT = self._counted_tokens(batch) if self.unit == "mean" else None
        device = self._loaded.device
        index_K, last = rows.index_K.to(device), len(self.sites) - 1
        mask_BT = None if mask_BT is None else mask_BT.to(device)

        row_K = torch.arange(len(index_K), device=device)

        def see(site: int, x_BTN: torch.Tensor) -> None:
            started = time.perf_counter()
            x_RN = x_BTN.flatten(0, 1) if mask_BT is None else _means(x_BTN, mask_BT)
            is_narrow = site == last and self._last_mlp is not None
            rows = row_K if is_narrow else index_K
            self.accumulators[site].add(x_RN, rows)
            if site in self._raw:
                self._keep_raw(site, x_RN, rows)
            self.statistics_seconds += time.perf_counter() - started
            if site == last:
                raise _Captured

        with (
            torch.inference_mode(),
            attach(self._loaded.module, self.sites, see),
            self._narrowed(index_K),
            contextlib.suppress(_Captured),
        ):
            self._loaded.hidden(batch.to(device))

    @contextlib.contextmanager
    def _narrowed(self, index_K: torch.Tensor) -> Iterator[None]:
        """The last MLP of the pass sees only the tokens that count, [K, 1, d_model]: nothing after it needs more."""
        if self._last_mlp is None:
            yield
            return

        def choose(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return args[0].flatten(0, 1).index_select(0, index_K)[:, None], *args[1:]

        handle = self._last_mlp.register_forward_pre_hook(choose)
        try:
            yield
        finally:
            handle.remove()

    def rows_of(self, batch: TokenBatch, keep_B: torch.Tensor | None = None) -> Rows:
        """The rows that this unit counts. For `mean`, rows index the texts themselves: [B]."""
        n_columns = batch.ids_BT.shape[1]
        sample_B = torch.arange(len(batch.ids_BT))
        if self.unit == "mean":
            counted_B = self._counted_tokens(batch).any(dim=1)
            sample_K = sample_B[counted_B if keep_B is None else counted_B & keep_B]
            return Rows(index_K=sample_K, sample_K=sample_K, position_K=None)
        rows_BT = self._row_mask(batch)
        if keep_B is not None:
            rows_BT = rows_BT & keep_B[:, None]
        sample_K, column_K = rows_BT.nonzero(as_tuple=True)
        position_K = batch.positions_BT[sample_K, column_K]
        return Rows(index_K=sample_K * n_columns + column_K, sample_K=sample_K, position_K=position_K)

    def _row_mask(self, batch: TokenBatch) -> torch.Tensor:
        if self.unit == "token":
            return self._counted_tokens(batch)
        rows_BT = torch.zeros_like(batch.mask_BT)
        if self.unit == "last_token":
            rows_BT[torch.arange(len(rows_BT)), batch.last_B] = True
            return rows_BT
        found_BT = (batch.ids_BT == self._cls_id) & batch.mask_BT
        rows_BT[torch.arange(len(rows_BT)), found_BT.int().argmax(dim=1)] = True
        return rows_BT & found_BT

    def _counted_tokens(self, batch: TokenBatch) -> torch.Tensor:
        """Real tokens that are not special: specials are known by id, wherever they stand."""
        return batch.mask_BT & ~torch.isin(batch.ids_BT, self._special_ids)

    def _keep_raw(self, site: int, x_RN: torch.Tensor, index_K: torch.Tensor) -> None:
        neurons = self._raw[site]
        x_KN = x_RN.index_select(0, index_K)
        if neurons is not None:
            x_KN = x_KN.index_select(1, torch.as_tensor(neurons, device=x_KN.device))
        self.raw_values[site].append(x_KN.to("cpu"))


def _mlp_of(module: torch.nn.Module, site: Site) -> torch.nn.Module | None:
    """The MLP block around an `mlp_post` site, where it is a module of its own that maps each token alone."""
    parent = site.module_name.rpartition(".")[0]
    return module.get_submodule(parent) if site.hook_point == "mlp_post" and parent.endswith(".mlp") else None


def _means(x_BTN: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The mean of each text's counted tokens, float32 [B, N]; a text without any has a row of NaN that no index
    names."""
    weight_BT1 = mask_BT.unsqueeze(2)
    total_BN = torch.where(weight_BT1, x_BTN.float(), 0).sum(dim=1)
    return total_BN / weight_BT1.sum(dim=1)


def correct_B(loaded: LoadedModel, batch: TokenBatch, answer: int) -> torch.Tensor:
    """Bool [B], on the CPU: does the model's most probable next token after each prompt equal the token `answer`?"""
    with torch.inference_mode():
        if loaded.kind == "classifier":
            return (loaded.class_logits(batch.to(loaded.device)).argmax(dim=1) == answer).cpu()
        hidden_BTD = loaded.hidden(batch.to(loaded.device))
        last_BD = hidden_BTD[torch.arange(len(hidden_BTD)), batch.last_B]
        return (loaded.logits(last_BD).argmax(dim=1) == answer).cpu()
