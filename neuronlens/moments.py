"""Mergeable moments of neuron activations, up to the fourth order.

Sums of powers are kept around the mean and merged in float64 by Pebay's formulas (Pebay 2008, SAND2008-6212, eqs. 2.1
and 3.1), so that a neuron whose mean is 10,000 times its standard deviation still gets its kurtosis right.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Central moments of N neurons over the samples of one concept.

    Shapes: all [N]; n and n_nonfinite int64, min and max float32, the others float64. m2, m3 and m4 are sums of
    powers of the distance from the mean, not divided by n. Only finite values count in n and in the moments; NaN and
    infinities are counted in n_nonfinite. A neuron with n = 0 has NaN for mean, mean_abs, min and max.
    """

    n_N: np.ndarray
    n_nonfinite_N: np.ndarray
    mean_N: np.ndarray
    m2_N: np.ndarray
    m3_N: np.ndarray
    m4_N: np.ndarray
    min_N: np.ndarray
    max_N: np.ndarray
    mean_abs_N: np.ndarray

    @classmethod
    def of(cls, x_BN: np.ndarray) -> "Moments":
        """The moments of the rows of x_BN, in float64 by two passes."""
        finite_BN = np.isfinite(x_BN)
        x_BN = np.where(finite_BN, x_BN, 0).astype(np.float64)
        n_N = finite_BN.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_N = x_BN.sum(axis=0) / n_N
            mean_abs_N = np.abs(x_BN).sum(axis=0) / n_N
        low_N = np.where(finite_BN, x_BN, np.inf).min(axis=0, initial=np.inf)
        high_N = np.where(finite_BN, x_BN, -np.inf).max(axis=0, initial=-np.inf)
        mean_N = np.where(low_N == high_N, low_N, mean_N)
        d_BN = np.where(finite_BN, x_BN - np.nan_to_num(mean_N), 0)
        return cls(
            n_N=n_N,
            n_nonfinite_N=len(x_BN) - n_N,
            mean_N=mean_N,
            m2_N=(d_BN**2).sum(axis=0),
            m3_N=(d_BN**3).sum(axis=0),
            m4_N=(d_BN**4).sum(axis=0),
            min_N=np.where(n_N > 0, low_N, np.nan).astype(np.float32),
            max_N=np.where(n_N > 0, high_N, np.nan).astype(np.float32),
            mean_abs_N=mean_abs_N,
        )

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both samples together; the order of merging changes the result by rounding only."""
        n_N = self.n_N + other.n_N
        n_safe_N = np.maximum(n_N, 1)
        a_N, b_N = self.n_N / n_safe_N, other.n_N / n_safe_N
        mean_a_N, mean_b_N = _or_zero(self.mean_N), _or_zero(other.mean_N)
        d_N = np.where((self.n_N > 0) & (other.n_N > 0), mean_b_N - mean_a_N, 0.0)
        m4_N = self.m4_N + other.m4_N + d_N**4 * self.n_N * b_N * (a_N**2 - a_N * b_N + b_N**2)
        m4_N += 6 * d_N**2 * (a_N**2 * other.m2_N + b_N**2 * self.m2_N) + 4 * d_N * (a_N * other.m3_N - b_N * self.m3_N)
        m3_N = self.m3_N + other.m3_N + d_N**3 * self.n_N * b_N * (a_N - b_N)
        m3_N += 3 * d_N * (a_N * other.m2_N - b_N * self.m2_N)
        return Moments(
            n_N=n_N,
            n_nonfinite_N=self.n_nonfinite_N + other.n_nonfinite_N,
            mean_N=np.where(n_N > 0, np.where(self.n_N > 0, mean_a_N + d_N * b_N, mean_b_N), np.nan),
            m2_N=self.m2_N + other.m2_N + d_N**2 * self.n_N * b_N,
            m3_N=m3_N,
            m4_N=m4_N,
            min_N=np.fmin(self.min_N, other.min_N),
            max_N=np.fmax(self.max_N, other.max_N),
            mean_abs_N=np.where(n_N > 0, _or_zero(self.mean_abs_N) * a_N + _or_zero(other.mean_abs_N) * b_N, np.nan),
        )

    @property
    def std_N(self) -> np.ndarray:
        """Population standard deviation (ddof = 0), NaN where n = 0."""
        return np.sqrt(self._per_value(self.m2_N))

    @property
    def skewness_N(self) -> np.ndarray:
        """Third standardised moment, NaN where the standard deviation is 0."""
        return self._standardised(self.m3_N, 3)

    @property
    def kurtosis_N(self) -> np.ndarray:
        """Fourth standardised moment (3 for a Gaussian), NaN where the standard deviation is 0."""
        return self._standardised(self.m4_N, 4)

    def _per_value(self, sum_N: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return sum_N / self.n_N

    def _standardised(self, sum_N: np.ndarray, power: int) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._per_value(sum_N) / self.std_N**power


def _or_zero(x_N: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x_N), 0.0, x_N)
