"""Streaming statistics of one site, kept on the model's device: memory does not grow with the number of rows."""

import functools
import importlib.util
import os
import shutil
from typing import Protocol

import numpy as np
import torch

from neuronlens import kernels
from neuronlens.histograms import MANTISSA_BITS, MAX_BIN, MIN_EXPONENT, N_BINS
from neuronlens.moments import Moments
from neuronlens.teams import Task


class Accumulator(Protocol):
    """Takes rows of activations of N neurons; gives their moments and histogram so far."""

    def add(self, x_RN: torch.Tensor, rows_K: torch.Tensor) -> None:
        """Count the rows `rows_K` (int64 indices on x's device) of x_RN."""

    def moments(self) -> Moments: ...

    def counts(self) -> np.ndarray | None:
        """Dense counts [N, N_BINS] int32, bin -MAX_BIN first; None where no histogram was asked for."""


def make_accumulator(n_neurons: int, *, histogram: bool, device: torch.device, n_threads: int = 1) -> Accumulator:
    """A compiled kernel on a CPU and where Triton can compile one, torch operations elsewhere."""
    if device.type == "cpu":
        return CpuAccumulator(n_neurons, histogram=histogram, n_threads=n_threads)
    if device.type == "cuda" and _triton_compiles(device):
        return TritonAccumulator(n_neurons, histogram=histogram, device=device)
    return TorchAccumulator(n_neurons, histogram=histogram, device=device)


class CpuAccumulator:
    """Runs `kernels.ACCUMULATE`, the columns shared out over `n_threads` of torch's threads. Half precision is widened
    to float32."""

    def __init__(self, n_neurons: int, *, histogram: bool, n_threads: int = 1) -> None:
        self._n_N = np.zeros(n_neurons, np.int64)
        self._n_nonfinite_N = np.zeros(n_neurons, np.int64)
        self._state_SN = np.zeros((kernels.N_STATE, n_neurons))
        self._state_SN[kernels.LOW] = np.inf
        self._state_SN[kernels.HIGH] = -np.inf
        self._counts_NB = np.zeros((n_neurons if histogram else 0, N_BINS), np.int32)
        kept = self._n_N, self._n_nonfinite_N, self._state_SN, self._counts_NB
        self._task = Task(kernels.ACCUMULATE, [None, None, *kept])
        self._n_threads = n_threads

    def add(self, x_RN: torch.Tensor, rows_K: torch.Tensor) -> None:
        x, rows = x_RN.float().contiguous(), rows_K.contiguous()
        assert (rows.dtype, x.shape[1]) == (torch.int64, len(self._n_N))
        self._task.point(0, x.data_ptr(), *x.shape)
        self._task.point(1, rows.data_ptr(), len(rows))
        self._task.run(x.shape[1], n_threads=self._n_threads)

    def moments(self) -> Moments:
        s, n = self._state_SN, self._n_N
        return _as_moments(
            n, self._n_nonfinite_N, s[kernels.MEAN : kernels.M4 + 1], s[kernels.SUM_ABS], s[kernels.LOW :]
        )

    def counts(self) -> np.ndarray | None:
        return self._counts_NB if len(self._counts_NB) else None


class TorchAccumulator:
    """The same statistics by torch operations on any device, without waiting for the device between batches."""

    def __init__(self, n_neurons: int, *, histogram: bool, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._n_N, self._n_nonfinite_N = zeros(n_neurons), zeros(n_neurons, dtype=torch.int64)
        self._moments_4N = zeros(4, n_neurons)
        self._sum_abs_N = zeros(n_neurons)
        self._bounds_2N = torch.stack([zeros(n_neurons) + torch.inf, zeros(n_neurons) - torch.inf])
        self._counts_NB = zeros(n_neurons, N_BINS, dtype=torch.int32) if histogram else None

    def add(self, x_RN: torch.Tensor, rows_K: torch.Tensor) -> None:
        x_KN = x_RN.index_select(0, rows_K).float()
        finite_KN = torch.isfinite(x_KN)
        n_N = finite_KN.sum(dim=0)
        self._n_nonfinite_N += len(rows_K) - n_N
        self._add_moments(x_KN, finite_KN, n_N.double())
        if self._counts_NB is not None:
            self._add_counts(x_KN, finite_KN)

    def _add_moments(self, x_KN: torch.Tensor, finite_KN: torch.Tensor, n_b_N: torch.Tensor) -> None:
        low_N = torch.where(finite_KN, x_KN, torch.inf).amin(dim=0)
        high_N = torch.where(finite_KN, x_KN, -torch.inf).amax(dim=0)
        n_safe_N = n_b_N.clamp(min=1)
        x_KN = torch.where(finite_KN, x_KN, 0)
        # The middle of the bounds is a safe centre where a float32 sum could overflow; the shift below makes up for it.
        mean_N = x_KN.sum(dim=0) / n_safe_N.float()
        middle_N = low_N / 2 + high_N / 2
        centre_N = torch.where(torch.isfinite(mean_N) & (low_N < high_N), mean_N, middle_N)
        centre_N = torch.where(n_b_N > 0, centre_N, 0)
        half_d_KN = torch.where(finite_KN, x_KN / 2 - centre_N / 2, 0)
        # Distances are divided by a power of two, which is exact, so that their fourth powers stay within float32.
        exponent_N = torch.frexp(half_d_KN.abs().amax(dim=0))[1]
        d_KN = torch.ldexp(half_d_KN, -exponent_N)
        scale_N = torch.ldexp(torch.ones_like(n_b_N), exponent_N + 1)
        d2_KN = d_KN * d_KN
        s1, s2, s3, s4 = (
            part.sum(dim=0).double() * scale_N**power
            for power, part in enumerate((d_KN, d2_KN, d2_KN * d_KN, d2_KN * d2_KN), start=1)
        )
        shift_N = s1 / n_safe_N
        mean_b_N = centre_N.double() + shift_N
        m2_b_N = (s2 - n_b_N * shift_N**2).clamp(min=0)
        m3_b_N = s3 - 3 * shift_N * s2 + 2 * n_b_N * shift_N**3
        m4_b_N = (s4 - 4 * shift_N * s3 + 6 * shift_N**2 * s2 - 3 * n_b_N * shift_N**4).clamp(min=0)
        self._merge(n_b_N, mean_b_N, m2_b_N, m3_b_N, m4_b_N)
        self._sum_abs_N += _sum_without_overflow(x_KN.abs())
        self._bounds_2N[0] = torch.minimum(self._bounds_2N[0], low_N.double())
        self._bounds_2N[1] = torch.maximum(self._bounds_2N[1], high_N.double())

    def _merge(
        self,
        n_b_N: torch.Tensor,
        mean_b_N: torch.Tensor,
        m2_b_N: torch.Tensor,
        m3_b_N: torch.Tensor,
        m4_b_N: torch.Tensor,
    ) -> None:
        n_a_N = self._n_N
        mean_N, m2_a_N, m3_a_N, m4_a_N = self._moments_4N
        n_N = n_a_N + n_b_N
        a_N, b_N = n_a_N / n_N.clamp(min=1), n_b_N / n_N.clamp(min=1)
        d_N = mean_b_N - mean_N
        m4_N = m4_a_N + m4_b_N + d_N**4 * n_a_N * b_N * (a_N**2 - a_N * b_N + b_N**2)
        m4_N += 6 * d_N**2 * (a_N**2 * m2_b_N + b_N**2 * m2_a_N) + 4 * d_N * (a_N * m3_b_N - b_N * m3_a_N)
        m3_N = m3_a_N + m3_b_N + d_N**3 * n_a_N * b_N * (a_N - b_N) + 3 * d_N * (a_N * m2_b_N - b_N * m2_a_N)
        m2_N = m2_a_N + m2_b_N + d_N**2 * n_a_N * b_N
        self._moments_4N = torch.stack([mean_N + d_N * b_N, m2_N, m3_N, m4_N])
        self._n_N = n_N

    def _add_counts(self, x_KN: torch.Tensor, finite_KN: torch.Tensor) -> None:
        assert self._counts_NB is not None
        bits_KN = x_KN.view(torch.int32)
        level_KN = ((bits_KN & 0x7FFFFFFF) >> (23 - MANTISSA_BITS)) - (((127 + MIN_EXPONENT) << MANTISSA_BITS) - 1)
        level_KN = level_KN.clamp(0, MAX_BIN)
        bin_KN = torch.where(bits_KN < 0, -level_KN, level_KN) + MAX_BIN
        first_N = torch.arange(x_KN.shape[1], device=x_KN.device) * N_BINS
        flat_KN = first_N + bin_KN
        self._counts_NB.view(-1).scatter_add_(0, flat_KN.view(-1), finite_KN.view(-1).to(torch.int32))

    def moments(self) -> Moments:
        n_N = self._n_N.cpu().numpy().astype(np.int64)
        moments_4N, bounds_2N = self._moments_4N.cpu().numpy(), self._bounds_2N.cpu().numpy()
        return _as_moments(n_N, self._n_nonfinite_N.cpu().numpy(), moments_4N, self._sum_abs_N.cpu().numpy(), bounds_2N)

    def counts(self) -> np.ndarray | None:
        return None if self._counts_NB is None else self._counts_NB.cpu().numpy()


class TritonAccumulator:
    """Runs `gpu_kernels.accumulate`, which reads x twice and launches two or three kernels."""

    def __init__(self, n_neurons: int, *, histogram: bool, device: torch.device) -> None:
        from neuronlens import gpu_kernels

        self._accumulate = gpu_kernels.accumulate
        self._state_SN = gpu_kernels.new_state(n_neurons, device)
        self._counts_NB = torch.zeros(n_neurons, N_BINS, dtype=torch.int32, device=device) if histogram else None

    def add(self, x_RN: torch.Tensor, rows_K: torch.Tensor) -> None:
        self._accumulate(x_RN, rows_K, self._state_SN, self._counts_NB)

    def moments(self) -> Moments:
        s = self._state_SN.cpu().numpy()
        n_N, n_nonfinite_N = s[kernels.N_STATE :].astype(np.int64)
        moments_4N, bounds_2N = s[kernels.MEAN : kernels.M4 + 1], s[kernels.LOW : kernels.HIGH + 1]
        return _as_moments(n_N, n_nonfinite_N, moments_4N, s[kernels.SUM_ABS], bounds_2N)

    def counts(self) -> np.ndarray | None:
        return None if self._counts_NB is None else self._counts_NB.cpu().numpy()


@functools.cache
def _triton_compiles(device: torch.device) -> bool:
    """Besides its own compiler Triton needs one for C, which an image without development tools lacks."""
    has_compiler = "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))
    if importlib.util.find_spec("triton") is None or not has_compiler:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _sum_without_overflow(x_KN: torch.Tensor) -> torch.Tensor:
    """Column sums in float64; the halves keep a float32 sum of values near the largest float in range."""
    scale = 2.0**-16
    return (x_KN * scale).sum(dim=0).double() / scale


def _as_moments(
    n_N: np.ndarray, n_nonfinite_N: np.ndarray, moments_4N: np.ndarray, sum_abs_N: np.ndarray, bounds_2N: np.ndarray
) -> Moments:
    seen_N = n_N > 0
    return Moments(
        n_N=n_N.copy(),
        n_nonfinite_N=n_nonfinite_N.copy(),
        mean_N=np.where(seen_N, moments_4N[0], np.nan),
        m2_N=moments_4N[1].copy(),
        m3_N=moments_4N[2].copy(),
        m4_N=moments_4N[3].copy(),
        min_N=np.where(seen_N, bounds_2N[0], np.nan).astype(np.float32),
        max_N=np.where(seen_N, bounds_2N[1], np.nan).astype(np.float32),
        mean_abs_N=np.where(seen_N, sum_abs_N / np.maximum(n_N, 1), np.nan),
    )
