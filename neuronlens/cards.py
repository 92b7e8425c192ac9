"""One neuron as a person looks at it: its values under each concept, and the range of each.

card = read_card(con, hook_point="mlp_post", layer=3, neuron=7, tau=2.5).of_most_salient(8)
edges_G = np.linspace(*card.limits(), 81)
shares = [bump.shares(edges_G) for bump in card.bumps]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from neuronlens.errors import UsageError
from neuronlens.query import run_file

if TYPE_CHECKING:
    import duckdb

OUTER_SHARE = 0.01
"""An axis runs from this quantile of the values to the one that leaves as much above."""
_GAUSSIAN_OUTER = 2.3263478740408408
"""Where a standard Gaussian has OUTER_SHARE above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts as shares: K bins, ascending, without gaps in themselves but with gaps between them where nothing lies.

    lower_K and upper_K are the bins' edges, drawn in to the smallest and the largest value; share_K sums to 1.
    """

    lower_K: np.ndarray
    upper_K: np.ndarray
    share_K: np.ndarray

    def cdf(self, x_X: np.ndarray) -> np.ndarray:
        """Share of the values up to each x, straight-line within a bin."""
        return np.interp(x_X, *self._knots())

    def quantile(self, q: float) -> float:
        x, up_to = self._knots()
        return float(np.interp(q, up_to, x))

    def _knots(self) -> tuple[np.ndarray, np.ndarray]:
        up_to = np.cumsum(self.share_K)
        before = np.concatenate([[0.0], up_to[:-1]])
        # A bin that holds one value many times has no length: a hair's breadth makes it a step.
        upper = np.maximum(self.upper_K, np.nextafter(self.lower_K, np.inf))
        x = np.column_stack([self.lower_K, upper]).ravel()
        return x, np.column_stack([before, up_to]).ravel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bump:
    """The values of one neuron under one concept; [lower, upper] is its range, or the ends of its `pieces`.

    Where there is no value (n = 0), mean, std, lower, upper, min and max are NaN. `pieces` are the intervals that a
    range table gives the neuron, ascending, none where it is not salient; None where the range is mean -+ tau * std.
    `rank` is the neuron's place among its layer's for the concept, by mean |a|; `nearest` is the concept that shares
    the most of its values, and `nearest_ovl` how much, 0 to 1: None where the store does not say. `row` is all that
    sql/neuron_card.sql says.
    """

    concept: str
    n: int
    mean: float
    std: float
    lower: float
    upper: float
    min: float
    max: float
    rank: int | None
    nearest: str | None
    nearest_ovl: float | None
    histogram: Histogram | None
    row: Mapping[str, Any]
    pieces: tuple[tuple[float, float], ...] | None = None

    @property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """What the range consists of: lower and upper of each piece."""
        return ((self.lower, self.upper),) if self.pieces is None else self.pieces

    @property
    def is_empty(self) -> bool:
        return self.n == 0 or math.isnan(self.mean)

    def shares(self, edges_G: np.ndarray) -> np.ndarray:
        """Share of the values between each edge and the next, [G - 1]: from the histogram, else of the Gaussian with
        the same mean and std."""
        if self.is_empty:
            return np.zeros(len(edges_G) - 1)
        if self.histogram is not None:
            return np.diff(self.histogram.cdf(edges_G))
        return np.diff(self._gaussian_cdf(edges_G))

    def share_in_range(self) -> float:
        """Share of the values inside the range; NaN where there is no value."""
        if self.is_empty:
            return math.nan
        ends = np.array([end for low, high in self.intervals for end in (low, np.nextafter(high, np.inf))])
        up_to = self.histogram.cdf(ends) if self.histogram else self._gaussian_cdf(ends)
        return float((up_to[1::2] - up_to[::2]).sum())

    def outer_quantiles(self) -> tuple[float, float]:
        """Between which two values all but the lowest and the highest hundredth lie."""
        if self.histogram is not None:
            return self.histogram.quantile(OUTER_SHARE), self.histogram.quantile(1 - OUTER_SHARE)
        reach = _GAUSSIAN_OUTER * self.std
        return max(self.min, self.mean - reach), min(self.max, self.mean + reach)

    def _gaussian_cdf(self, x_X: np.ndarray) -> np.ndarray:
        if self.std == 0:
            return (x_X > self.mean).astype(float)
        return np.array([math.erfc((self.mean - x) / self.std / math.sqrt(2)) / 2 for x in x_X.tolist()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A neuron and its bumps, in the order of the concepts' names. `n_concepts` counts those that were left out to
    draw fewer, too. `table` is the range table whose ranges they have; without one, they are mean -+ tau * std."""

    hook_point: str
    layer: int
    neuron: int
    tau: float
    bumps: tuple[Bump, ...]
    n_concepts: int
    table: str | None = None

    @property
    def name(self) -> str:
        return f"{self.hook_point}, layer {self.layer}, neuron {self.neuron}"

    @property
    def has_histograms(self) -> bool:
        return any(bump.histogram is not None for bump in self.bumps)

    def of(self, concepts: Sequence[str]) -> "Card":
        """With the bumps of these concepts only, in their order. Raises UsageError for one that there is not."""
        known = {bump.concept: bump for bump in self.bumps}
        for concept in concepts:
            if concept not in known:
                raise UsageError(f"There is no concept {concept!r} in this store. Concepts: {', '.join(known)}.")
        chosen = tuple(known[concept] for concept in dict.fromkeys(concepts))
        return replace(self, bumps=chosen, n_concepts=len(chosen))

    def of_most_salient(self, n: int) -> "Card":
        """With at most n bumps: of the concepts for which the neuron ranks highest."""
        ranked = sorted(self.bumps, key=lambda bump: (bump.rank is None, bump.rank, bump.concept))
        chosen = {bump.concept for bump in ranked[:n]}
        return replace(self, bumps=tuple(bump for bump in self.bumps if bump.concept in chosen))

    def limits(self) -> tuple[float, float]:
        """The ends of an axis on which every range and all but the outermost hundredth of every bump's values lie."""
        ends = [
            end
            for bump in self.bumps
            if not bump.is_empty
            for end in (*bump.outer_quantiles(), bump.lower, bump.upper)
            if math.isfinite(end)
        ]
        low, high = min(ends, default=0.0), max(ends, default=0.0)
        is_point = high - low <= max(1e-9 * abs(low), 1e-30)
        margin = (0.1 * abs(low) or 1.0) if is_point else 0.02 * (high - low)
        return low - margin, high + margin


def read_card(
    con: "duckdb.DuckDBPyConnection", *, hook_point: str, layer: int, neuron: int, tau: float, table: str | None = None
) -> Card:
    """A neuron from a connection over a store, with the ranges of a range table in it or of mean -+ tau * std. Raises
    UsageError where the store has no statistics of it."""
    site: dict[str, Any] = {"hook_point": hook_point, "layer": layer, "neuron": neuron}
    rows = run_file(con, "neuron_card", tau=tau, **site).to_pylist()
    if not rows:
        raise UsageError(
            f"The store has no statistics of {hook_point}, layer {layer}, neuron {neuron}: that layer was not merged "
            "yet. Run the same recipe again to finish it, or: python -m jobs.statistics STORE"
        )
    counts: dict[str, list[dict[str, Any]]] = {}
    for row in run_file(con, "neuron_histogram", **site).to_pylist():
        counts.setdefault(row["concept"], []).append(row)
    if table is not None:
        rows = _with_ranges_of(rows, run_file(con, "neuron_ranges", table_id=table, **site).to_pylist())
    bumps = tuple(_bump(row, counts.get(row["concept"], [])) for row in rows)
    return Card(**site, tau=tau, bumps=bumps, n_concepts=len(bumps), table=table)


def _with_ranges_of(rows: Sequence[Mapping[str, Any]], ranges: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a card with the ranges of a table: `lower` and `upper` are the outer ends of `pieces`."""
    pieces_of: dict[str, list[dict[str, Any]]] = {}
    for piece in ranges:
        shown = {name: piece[name] for name in ("lower", "upper", "posterior")}
        pieces_of.setdefault(piece["concept"], []).append(shown)
    found = []
    for row in rows:
        pieces = pieces_of.get(row["concept"], [])
        lower, upper = (pieces[0]["lower"], pieces[-1]["upper"]) if pieces else (None, None)
        found.append({**row, "lower": lower, "upper": upper, "pieces": pieces})
    return found


def _bump(row: Mapping[str, Any], counts: Sequence[Mapping[str, Any]]) -> Bump:
    numbers = {name: _number(row[name]) for name in ("mean", "std", "lower", "upper", "min", "max")}
    return Bump(
        concept=row["concept"],
        n=row["n"],
        rank=row["rank"],
        nearest=row["nearest"],
        nearest_ovl=row["nearest_ovl"],
        histogram=_histogram(counts, numbers["min"], numbers["max"]) if counts else None,
        row=row,
        pieces=tuple((piece["lower"], piece["upper"]) for piece in row["pieces"]) if "pieces" in row else None,
        **numbers,
    )


def _histogram(counts: Sequence[Mapping[str, Any]], lowest: float, highest: float) -> Histogram:
    n_K = np.array([row["n"] for row in counts], dtype=float)
    return Histogram(
        lower_K=np.array([row["lower"] for row in counts]).clip(lowest, highest),
        upper_K=np.array([row["upper"] for row in counts]).clip(lowest, highest),
        share_K=n_K / n_K.sum(),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
