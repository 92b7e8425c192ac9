"""Collecting inside a vLLM worker: which tokens of a forward pass count, and an accumulator a site, on the device.

A shard is begun, its prompts run, and it is ended: only then do numbers leave the device. Every prompt carries the name
of its shard and the positions that never count, so that what is left of a shard that failed counts for nobody.
"""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from neuronlens.accumulate import Accumulator, make_accumulator
from neuronlens.errors import UsageError
from neuronlens.vllm.sites import RankSite, in_a_row
from neuronlens.vllm.statistics import pack

Unit = Literal["last_token", "token"]
UNITS: tuple[Unit, ...] = ("last_token", "token")


def request_name(shard: str, never_counted: Sequence[int]) -> str:
    """What a prompt carries in `extra_args["neuronlens"]`: its shard, and the positions that never count."""
    return f"{shard}:{','.join(map(str, never_counted))}"


@lru_cache(maxsize=4_096)
def _parsed(name: str) -> tuple[str, np.ndarray]:
    shard, _, positions = name.partition(":")
    return shard, np.array([int(position) for position in positions.split(",") if position], np.int64)


class Collector:
    """Statistics of this rank's sites over the shard that was begun last.

    Where every rank sees the same values, rank 0 alone collects. Until `begin`, and for requests of no shard or of
    another one, nothing is counted.
    """

    def __init__(self, sites: Sequence[RankSite], *, rank: int, device: torch.device, n_threads: int) -> None:
        self.sites = tuple(site for site in sites if site.is_sliced or rank == 0)
        self._device = device
        self._n_threads = n_threads
        self._shard: str | None = None
        self._unit: Unit = "last_token"
        self._accumulators: list[Accumulator] = []
        self._counted: dict[str, int] = {}
        """Sequence -> up to which position it was counted: one that vLLM preempted computes its tokens again."""
        self._row_K: Tensor | None = None
        self._all_K: Tensor | None = None
        self._seconds = 0.0

    def begin(self, shard: str, unit: Unit, *, histograms: bool) -> None:
        """Forget what was collected, and count this shard's requests from now on."""
        self._shard, self._unit = shard, unit
        self._accumulators = [
            make_accumulator(site.width, histogram=histograms, device=self._device, n_threads=self._n_threads)
            for site in self.sites
        ]
        self._counted, self._seconds = {}, 0.0
        self.rest()

    def end(self) -> tuple[bytes, bytes]:
        """This rank's part of the statistics, packed; nothing is counted until the next `begin`. Waits for the
        device."""
        packed = pack(self.sites, self._accumulators, self._seconds)
        self._shard, self._accumulators, self._counted = None, [], {}
        return packed

    # --- before a forward pass ---------------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether no sequence can count."""
        return self._shard is None

    def seat(
        self,
        sequences: Sequence[str],
        names: Sequence[Any],
        n_scheduled_R: np.ndarray,
        n_computed_R: np.ndarray,
        n_prompt_R: np.ndarray,
    ) -> None:
        """Choose the rows of the next forward pass that count. Arguments as `neuronlens.vllm.runner.Seater`."""
        first_R = np.cumsum(n_scheduled_R) - n_scheduled_R
        rows = []
        for i, name in enumerate(names):
            shard, never_counted = _parsed(name) if isinstance(name, str) else (None, np.empty(0, np.int64))
            if shard == self._shard:
                start, n_prompt = int(n_computed_R[i]), int(n_prompt_R[i])
                end = min(start + int(n_scheduled_R[i]), n_prompt)
                position_K = self._counted_now(sequences[i], start, end, n_prompt)
                if len(never_counted):
                    position_K = position_K[~np.isin(position_K, never_counted)]
                rows.append(position_K + (first_R[i] - start))
        row_K = np.concatenate(rows) if rows else np.empty(0, np.int64)
        self._row_K = self._all_K = None
        if len(row_K):
            self._row_K = self._on_device(torch.from_numpy(row_K))
            self._all_K = torch.arange(len(row_K), device=self._device)

    def rest(self) -> None:
        """Nothing counts until the next `seat`: what vLLM runs in between, such as dummy batches, is nobody's."""
        self._row_K = self._all_K = None

    def _counted_now(self, sequence: str, start: int, end: int, n_prompt: int) -> np.ndarray:
        """The positions of a sequence's tokens `start` to `end` that this unit counts and that were not counted."""
        first = max(start, self._counted.get(sequence, 0))
        self._counted[sequence] = max(first, end)
        if self._unit == "last_token":
            first = max(first, n_prompt - 1)
        return np.arange(first, end, dtype=np.int64)

    def _on_device(self, row_K: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return row_K
        return row_K.pin_memory().to(self._device, non_blocking=True)

    # --- in a forward pass -------------------------------------------------------------------------------------------

    def add(self, site: int, x_TN: Tensor, residual_TN: Tensor | None = None) -> None:
        """Count the chosen rows of x_TN, or of the sum of both."""
        if self._row_K is None or self._all_K is None:
            return
        started, x_TN = time.perf_counter(), in_a_row(x_TN)
        if residual_TN is None:
            self._accumulators[site].add(x_TN, self._row_K)
        else:
            x_KN = x_TN.index_select(0, self._row_K) + in_a_row(residual_TN).index_select(0, self._row_K)
            self._accumulators[site].add(x_KN, self._all_K)
        self._seconds += time.perf_counter() - started


def attach_collecting_hooks(model: nn.Module, collector: Collector) -> None:
    """Hook every site of the collector, for as long as the model lives."""
    for index, site in enumerate(collector.sites):
        target = model.get_submodule(site.module_name)
        if site.side == "input":
            target.register_forward_pre_hook(_input_hook(collector, index))
        else:
            target.register_forward_hook(_output_hook(collector, index, is_pair=site.hook_point == "resid_post"))


def check_eager(vllm_config: Any) -> None:
    """Raises UsageError where vLLM would compile the model: a compiled graph holds no accumulators."""
    if not vllm_config.model_config.enforce_eager:
        raise UsageError(
            "additional_config.neuronlens.mode is collect, and enforce_eager is false: vLLM would compile the model, "
            "and what is collected would be left out of the graph. Start with --enforce-eager."
        )


def _input_hook(collector: Collector, site: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        collector.add(site, args[0])

    return hook


def _output_hook(collector: Collector, site: int, *, is_pair: bool) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, tuple):
            collector.add(site, output)
        elif is_pair and len(output) > 1 and isinstance(output[1], Tensor):
            # The block leaves the sum, which is the residual stream, to the next norm.
            collector.add(site, output[0], output[1])
        else:
            collector.add(site, output[0])

    return hook
