"""Capture: one forward pass over a batch feeds the statistics of every site, without keeping the activations.

A unit says which rows of x_BTN count: `last_token` (the last real token of each text), `token` (every real token that
is not special), `mean` (the mean over those tokens, a row a text) and `cls` (the classifier token, found by its id).
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from neuronlens.accumulate import make_accumulator
from neuronlens.batches import TokenBatch
from neuronlens.errors import UsageError
from neuronlens.hookpoints import Site, attach, last_projection
from neuronlens.models import LoadedModel
from neuronlens.predictions import AnswerKey, Predictions, predict

MAX_HELD_BYTES = 128 * 2**20
"""How much of a batch may wait for the answers that say which of its texts count."""

_Use = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Takes a site's index, x_RN and the rows of it that count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Which rows of a batch count. index_K: into the flattened [B * T]; sample_K: the text of each row, in the batch;
    position_K: the token within its prompt, pads not counted, or None for unit `mean`. All int64 on the CPU."""

    index_K: torch.Tensor
    sample_K: torch.Tensor
    position_K: torch.Tensor | None

    def chosen(self, kept_X: torch.Tensor) -> "Rows":
        """These of the rows, by their places 0 to K - 1."""
        return Rows(
            index_K=self.index_K[kept_X],
            sample_K=self.sample_K[kept_X],
            position_K=None if self.position_K is None else self.position_K[kept_X],
        )


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
        itemsize = 4 if unit == "mean" else loaded.dtype.itemsize
        self._row_bytes = sum(site.width for site in self.sites) * itemsize
        self._last_mlp = _mlp_of(loaded.module, self.sites[-1]) if unit in ("last_token", "cls") else None
        self.raw_values: dict[int, list[torch.Tensor]] = {site: [] for site in raw}
        self.raw_samples: list[torch.Tensor] = []
        self.raw_positions: list[torch.Tensor | None] = []
        self.statistics_seconds = 0.0

    def add(self, batch: TokenBatch, keep_B: torch.Tensor | None = None) -> None:
        """Run the batch (on the CPU; moved here to the model's device) and count its rows; `keep_B` (bool) leaves
        texts out. The pass ends at the last site."""
        rows = self.rows_of(batch, keep_B)
        self._note(rows)
        if len(rows.index_K) == 0:
            return
        last = len(self.sites) - 1
        take = self._taker(batch, rows, self._count, narrowed=None if self._last_mlp is None else last)

        def see(site: int, x_BTN: torch.Tensor) -> None:
            take(site, x_BTN)
            if site == last:
                raise _Captured

        with (
            torch.inference_mode(),
            attach(self._loaded.module, self.sites, see),
            _narrowed(self._last_mlp, rows.index_K.to(self._loaded.device)),
            contextlib.suppress(_Captured),
        ):
            self._loaded.hidden(batch.to(self._loaded.device))

    def add_and_predict(self, batch: TokenBatch, key: AnswerKey, *, only_correct: bool = False) -> Predictions:
        """Count the batch's rows in a pass that goes on to the model's answers, one a text, in the batch's order.
        `only_correct` leaves out the texts that are answered wrongly.

        Raises UsageError where the model answers nothing.
        """
        if self._loaded.head_reads_first:
            batch = batch.left_aligned()
        rows = self.rows_of(batch)
        if not only_correct:
            self._note(rows)
            return self._predicted(batch, rows, key, self._count)
        if len(rows.index_K) * self._row_bytes > MAX_HELD_BYTES:
            # Which texts count is known after the last layer, when the first layers' rows are long gone. Holding them
            # back would take as much memory as keeping the activations: the model runs twice instead.
            predictions = predict(self._loaded, batch, key)
            self.add(batch, predictions.correct_B.cpu())
            return predictions
        held: list[tuple[int, torch.Tensor]] = []

        def hold(site: int, x_RN: torch.Tensor, rows_K: torch.Tensor) -> None:
            held.append((site, x_RN.index_select(0, rows_K)))

        predictions = self._predicted(batch, rows, key, hold)
        kept_K = predictions.correct_B.cpu()[rows.sample_K].nonzero().squeeze(1)
        self._note(rows.chosen(kept_K))
        started = time.perf_counter()
        with torch.inference_mode():
            for site, x_KN in held if len(kept_K) else []:
                self._count(site, x_KN, kept_K.to(x_KN.device))
        self.statistics_seconds += time.perf_counter() - started
        return predictions

    def _predicted(self, batch: TokenBatch, rows: Rows, key: AnswerKey, use: _Use) -> Predictions:
        """The pass that goes on to the answers. Where all that follows reads one token of each text, the other tokens
        end at the last down projection, or before the whole MLP where no site in it needs them."""
        n_texts, n_columns = batch.ids_BT.shape
        read_B = torch.zeros(n_texts, dtype=torch.int64) if self._loaded.head_reads_first else batch.last_B
        read_B = (torch.arange(n_texts) * n_columns + read_B).to(self._loaded.device)
        mlp, projection = self._tail
        last = self.sites.index(projection) if projection in self.sites else None
        take = self._taker(batch, rows, use, narrowed=None if mlp is None else last)

        def see(site: int, x_BTN: torch.Tensor) -> torch.Tensor | None:
            if len(rows.index_K):
                take(site, x_BTN)
            ends_here = site == last and mlp is None
            return x_BTN.flatten(0, 1).index_select(0, read_B)[:, None] if ends_here else None

        with attach(self._loaded.module, self.sites, see), _narrowed(mlp, read_B):
            return predict(self._loaded, batch, key)

    @functools.cached_property
    def _tail(self) -> tuple[torch.nn.Module | None, Site | None]:
        """The last MLP, where it need see no token but those that the head reads; and the site of its down projection,
        where none comes after it."""
        projection, last = last_projection(self._loaded.module, self.sites), self.sites[-1]
        if projection is None:
            return None, None
        is_before = last.layer < projection.layer or last.hook_point == "attn_out"
        wants_the_same = last == projection and self.unit == "last_token" and not self._loaded.head_reads_first
        if is_before or wants_the_same:
            return _mlp_of(self._loaded.module, projection), projection
        return None, projection if last == projection else None

    def _taker(
        self, batch: TokenBatch, rows: Rows, use: _Use, *, narrowed: int | None
    ) -> Callable[[int, torch.Tensor], None]:
        """What hands the rows that count at a site to `use`. At the site `narrowed`, x_BTN holds them alone."""
        device = self._loaded.device
        mask_BT = self._counted_tokens(batch).to(device) if self.unit == "mean" else None
        index_K = rows.index_K.to(device)
        row_K = torch.arange(len(index_K), device=device)

        def take(site: int, x_BTN: torch.Tensor) -> None:
            started = time.perf_counter()
            x_RN = x_BTN.flatten(0, 1) if mask_BT is None else _means(x_BTN, mask_BT)
            use(site, x_RN, row_K if site == narrowed else index_K)
            self.statistics_seconds += time.perf_counter() - started

        return take

    def _count(self, site: int, x_RN: torch.Tensor, rows_K: torch.Tensor) -> None:
        self.accumulators[site].add(x_RN, rows_K)
        if site in self._raw:
            self._keep_raw(site, x_RN, rows_K)

    def _note(self, rows: Rows) -> None:
        """Once a batch: whose the raw rows are."""
        if self._raw:
            self.raw_samples.append(rows.sample_K)
            self.raw_positions.append(rows.position_K)

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


@contextlib.contextmanager
def _narrowed(mlp: torch.nn.Module | None, index_K: torch.Tensor) -> Iterator[None]:
    """The MLP sees only these tokens, [K, 1, d_model]: nothing after it needs more."""
    if mlp is None:
        yield
        return

    def choose(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args[0].flatten(0, 1).index_select(0, index_K)[:, None], *args[1:]

    handle = mlp.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
