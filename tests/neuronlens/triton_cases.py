"""What the Triton accumulator is fed, and an oracle in long double: on a GPU and, by Triton's interpreter, without."""

from dataclasses import dataclass

import numpy as np
import torch

from neuronlens.accumulate import TritonAccumulator
from neuronlens.histograms import MAX_BIN, N_BINS, bin_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A batch, fed in parts of `sizes` rows, each part shuffled."""

    x_RN: torch.Tensor
    sizes: tuple[int, ...]

    def fed(self, device: torch.device, *, histogram: bool = True) -> TritonAccumulator:
        accumulator = TritonAccumulator(self.x_RN.shape[1], histogram=histogram, device=device)
        order = torch.Generator().manual_seed(0)
        for part_RN in self.x_RN.to(device).split(self.sizes):
            accumulator.add(part_RN, torch.randperm(len(part_RN), generator=order).to(device))
        return accumulator


def cases(n_neurons: int, sizes: tuple[int, ...]) -> dict[str, Case]:
    rng = np.random.default_rng(3)
    n_rows = sum(sizes)
    gamma_RN = rng.gamma(2.0, size=(n_rows, n_neurons))
    drift_RN = rng.normal(size=(n_rows, n_neurons)) + 1e3 * (np.arange(n_rows) > 100)[:, None]
    holes_RN = rng.normal(size=(n_rows, n_neurons))
    holes_RN[rng.random(holes_RN.shape) < 0.02] = np.nan
    holes_RN[7, :], holes_RN[-1, :], holes_RN[:, 1:2], holes_RN[: sizes[0], 2:3] = np.inf, -np.inf, np.nan, np.nan
    wide_RN = rng.choice([3e38, -3e38, 1e38, 0.0, 1e-30], size=(n_rows, n_neurons))
    tiny_RN = rng.normal(size=(n_rows, n_neurons)) * 1e-30
    constant_RN = np.tile(np.resize([0.0, 0.1, -7001.3, 3.4e38, 1e-38, -65504.0], n_neurons), (n_rows, 1))
    found = {
        "mean 0": gamma_RN - 2.0,
        "mean 1e2": gamma_RN + 1e2,
        "mean 1e4": gamma_RN + 1e4 * 2**0.5,
        "mean moves": drift_RN,
        "some not finite": holes_RN,
        "near the largest": wide_RN,
        "near nothing": tiny_RN,
        "constant": constant_RN,
    }
    made = {name: Case(x_RN=torch.from_numpy(x_RN.astype(np.float32)), sizes=sizes) for name, x_RN in found.items()}
    made["bfloat16"] = Case(x_RN=made["some not finite"].x_RN.bfloat16(), sizes=sizes)
    made["bfloat16, mean 1e2"] = Case(x_RN=made["mean 1e2"].x_RN.bfloat16(), sizes=sizes)
    made["float16"] = Case(x_RN=made["mean 0"].x_RN.half(), sizes=sizes)
    return made


NAMES = tuple(cases(2, (20,)))


def assert_counts_only_rows_named(device: torch.device) -> None:
    """Of x whose rows have a gap between them, and whose columns have."""
    rng = np.random.default_rng(4)
    whole_RN = torch.from_numpy(rng.normal(size=(50, 24)).astype(np.float32)).to(device)
    rows_K = torch.from_numpy(rng.permutation(50)[:37]).to(device)
    for x_RN in (whole_RN, whole_RN[:, 3:20], whole_RN[:, ::2], whole_RN.double()):
        accumulator = TritonAccumulator(x_RN.shape[1], histogram=True, device=device)
        accumulator.add(x_RN, rows_K)
        accumulator.add(x_RN, rows_K[:0])
        assert_right(accumulator, x_RN[rows_K])


def assert_right(accumulator: TritonAccumulator, x_RN: torch.Tensor) -> None:
    """Moments to the tolerances of the other accumulators, counts exactly."""
    x = x_RN.float().cpu().numpy()
    got, counts_NB = accumulator.moments(), accumulator.counts()
    for j in range(x.shape[1]):
        finite = x[np.isfinite(x[:, j]), j]
        assert (got.n_N[j], got.n_nonfinite_N[j]) == (len(finite), len(x) - len(finite))
        if counts_NB is not None:
            want_B = np.bincount(bin_of(finite).astype(int) + MAX_BIN, minlength=N_BINS)
            np.testing.assert_array_equal(counts_NB[j], want_B)
        if len(finite) == 0:
            assert np.isnan([got.mean_N[j], got.min_N[j], got.max_N[j]]).all()
            continue
        exact = finite.astype(np.longdouble)
        assert (got.min_N[j], got.max_N[j]) == (exact.min(), exact.max())
        # A sum in long double rounds too, and a constant has no spread at all.
        mean = exact[0] if exact.min() == exact.max() else exact.mean()
        m2, m3, m4 = (float(((exact - mean) ** power).sum()) for power in (2, 3, 4))
        std = (m2 / len(exact)) ** 0.5
        np.testing.assert_allclose(got.mean_N[j], float(mean), rtol=0 if std == 0 else 1e-7, atol=1e-7 * std)
        np.testing.assert_allclose(got.m2_N[j], m2, rtol=2e-6)
        np.testing.assert_allclose(got.m3_N[j], m3, rtol=2e-5, atol=2e-5 * std**3 * len(exact))
        np.testing.assert_allclose(got.m4_N[j], m4, rtol=2e-5)
        np.testing.assert_allclose(got.mean_abs_N[j], float(abs(exact).mean()), rtol=1e-6)
