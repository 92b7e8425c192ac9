"""The rows of sql/report_sweeps.sql as what is drawn of them: sets of test texts, lines along one key, families.

    for texts in text_sets(run_file(con, "report_sweeps").to_pylist()):
        lines = lines_along(texts.evaluations["sweep.0123456789ab"], "tau")

A row is the mean over concepts of one setting under one condition. A setting is told by the keys SETTING_COLUMNS.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from neuronlens.report import SETTING_COLUMNS

Row = Mapping[str, Any]

NUMBERS = ("tau", "top_fraction", "mass", "penalty", "budget", "factor", "value")
"""The keys of a setting along which a sweep is drawn, besides layers."""
CONTROLS = ("random", "wrong_concept", "shuffled", "length_matched")

_FAMILY = ("method", "action", "hook_points", "positions")
"""What tells one way of intervening from another; the other keys are its parameters."""
_UNSAID = {"positions": "all", "salience": "mean_abs", "layers": None, "hook_points": None}
"""Values that go without saying where all settings have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """P numbers and the ends of their 95 % intervals; NaN where not known."""

    value_P: np.ndarray
    low_P: np.ndarray
    high_P: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Row], column: str) -> "Spread":
        return cls(
            value_P=numbers(rows, column),
            low_P=numbers(rows, f"{column}_low"),
            high_P=numbers(rows, f"{column}_high"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """P settings that differ in one key, in its order. `name` says in what the line differs from those beside it.

    target, others: what the answers lost of confidence. kl_P: of the others' answers, nats. best: the highest
    selectivity. whole: the same settings with whole neurons in place of ranges, None where they were not measured.
    """

    name: str
    x_P: np.ndarray
    target: Spread
    others: Spread
    kl_P: np.ndarray
    best: float
    whole: "Line | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """P settings of one way of intervening. `varied` are the keys in which they differ; where that is one, they are a
    path, in its order, else they stand in none."""

    name: str
    varied: tuple[str, ...]
    is_path: bool
    target: Spread
    others: Spread
    kl_P: np.ndarray
    best: float

    def joined(self, cost_P: np.ndarray) -> np.ndarray:
        """Which settings a line joins, and in what order: all of a path, else those that no other beats."""
        return np.arange(len(cost_P)) if self.is_path else frontier(self.target.value_P, cost_P)


@dataclass(frozen=True, kw_only=True)
class TextSet:
    """The evaluations that were made on the same test texts: only these can be compared."""

    number: int
    n_texts: int
    bare_confidence: float
    rows: Sequence[Row]

    @functools.cached_property
    def _by_setting(self) -> dict[tuple[str, int], dict[str, Row]]:
        groups = _grouped(self.rows, _place)
        return {place: {row["condition"]: row for row in own} for place, own in groups.items()}

    @property
    def evaluations(self) -> dict[str, list[Row]]:
        """The rows of each evaluation."""
        return _grouped(self.rows, lambda row: row["evaluation_id"])

    def under(self, condition: str) -> list[Row]:
        return _under(self.rows, condition)

    @property
    def different(self) -> list[Row]:
        """The rows of condition range, of a setting that was evaluated twice the first."""
        found: dict[tuple[Any, ...], Row] = {}
        for row in self.under("range"):
            found.setdefault(setting_of(row), row)
        return list(found.values())

    @property
    def has_drops(self) -> bool:
        """Whether the texts have right answers, of which confidence can be lost."""
        return any(row["target_drop"] is not None for row in self.rows)

    def best(self, *, controlled: bool = False) -> Row | None:
        """The row of condition range with the highest selectivity; `controlled`: among settings that have controls."""
        rows = self.under("range")
        if controlled:
            rows = [row for row in rows if not self.beside(row).keys().isdisjoint(CONTROLS)]
        return max(
            (row for row in rows if row["selectivity"] is not None), key=lambda row: row["selectivity"], default=None
        )

    def beside(self, row: Row) -> dict[str, Row]:
        """The rows of the same setting in the same evaluation, by condition."""
        return self._by_setting[_place(row)]


def text_sets(rows: Sequence[Row]) -> list[TextSet]:
    """From all rows of report_sweeps.sql."""
    return [
        TextSet(
            number=number,
            n_texts=own[0]["n_texts"],
            bare_confidence=_number(own[0]["bare_confidence"]),
            rows=own,
        )
        for number, own in _grouped(rows, lambda row: row["texts"]).items()
    ]


def lines_along(rows: Sequence[Row], key: str) -> list[Line]:
    """The lines of one evaluation along a number of its settings, the one with the highest selectivity first. A line
    has two settings at least."""
    return _lines(rows, key, lambda row: _number(row[key]))


def lines_along_layers(rows: Sequence[Row]) -> list[Line]:
    """As `lines_along`, over the settings that act in one layer. Where the same was done in all layers at once, its
    point comes last, at the x that `x_of_all` gives, and a NaN keeps it apart."""
    layers = [row["layers"][0] for row in rows if row["layers"] is not None and len(row["layers"]) == 1]
    if not layers:
        return []

    def x_of(row: Row) -> float:
        if row["layers"] is None:
            return x_of_all(layers)
        return float(row["layers"][0]) if len(row["layers"]) == 1 else math.nan

    return [_apart(line, max(layers)) for line in _lines(rows, "layers", x_of)]


def x_of_all(layers: Iterable[int]) -> float:
    return max(layers) + 1.5


def families_of(rows: Sequence[Row]) -> list[Family]:
    """Settings by what is done, the family with the highest selectivity first."""
    found = []
    groups = _grouped(rows, lambda row: tuple(_hashable(row[key]) for key in _FAMILY))
    told = [key for key in _FAMILY if key in ("method", "action") or _differ(rows, key)]
    for own in groups.values():
        varied = tuple(key for key in differing(own) if key not in _FAMILY)
        is_path = len(varied) <= 1
        own = sorted(own, key=lambda row: _in_order(row[varied[0]])) if varied and is_path else own
        found.append(Family(name=said(own[0], told), varied=varied, is_path=is_path, **_measures(own)))
    return sorted(found, key=_best_first)


def whole_neurons(rows: Sequence[Row]) -> Family | None:
    """All that was measured with whole neurons as one family, whatever was done to them; the same result once, since
    it does not depend on ranges."""
    different = {(row["target_drop"], row["kl_complement"]): row for row in _under(rows, "neuron")}
    own = list(different.values())
    if not own:
        return None
    return Family(name="whole neurons", varied=tuple(differing(own)), is_path=False, **_measures(own))


def frontier(gain_P: np.ndarray, cost_P: np.ndarray) -> np.ndarray:
    """The settings that no other beats (as much gain for less cost, or more gain for as little), by ascending gain."""
    order = np.lexsort((cost_P, -gain_P))
    kept: list[int] = []
    for i in order:
        if np.isfinite(gain_P[i]) and np.isfinite(cost_P[i]) and (not kept or cost_P[i] < cost_P[kept[-1]]):
            kept.append(int(i))
    return np.array(kept[::-1], dtype=int)


def setting_of(row: Row, *, but: str | None = None) -> tuple[Any, ...]:
    """What a row says of its setting, to be compared."""
    return tuple(_hashable(row[key]) for key in SETTING_COLUMNS if key != but)


def differing(rows: Sequence[Row], *, but: str | None = None) -> list[str]:
    """The keys in which the settings differ."""
    return [key for key in SETTING_COLUMNS if key != but and _differ(rows, key)]


def said(row: Row, keys: Iterable[str]) -> str:
    """The row's setting in words, of these keys. What does not apply to it is left out."""
    return ", ".join(filter(None, (_words(key, row[key]) for key in keys)))


def common(rows: Sequence[Row], *, but: str | None = None) -> str:
    """In words, what all settings have in common, without what goes without saying."""
    keys = [key for key in ("method", "action", *SETTING_COLUMNS) if key != but and not _differ(rows, key)]
    telling = [key for key in dict.fromkeys(keys) if key not in _UNSAID or rows[0][key] != _UNSAID[key]]
    return said(rows[0], telling)


def numbers(rows: Sequence[Row], column: str) -> np.ndarray:
    """A column as float64; NaN where it is not known."""
    return np.array([_number(row[column]) for row in rows], dtype=float)


def _lines(rows: Sequence[Row], key: str, x_of: Callable[[Row], float]) -> list[Line]:
    whole_at = {_place(row): row for row in _under(rows, "neuron")}
    placed = [row for row in _under(rows, "range") if math.isfinite(x_of(row))]
    groups = _grouped(placed, lambda row: setting_of(row, but=key))
    drawn = [own for own in groups.values() if len({x_of(row) for row in own}) > 1]
    told = differing([row for own in drawn for row in own], but=key)
    lines = []
    for own in drawn:
        own = sorted(own, key=x_of)
        name, x_P = said(own[0], told) or "ranges", np.array([x_of(row) for row in own])
        line, whole = _line(name, x_P, own), [whole_at[_place(row)] for row in own if _place(row) in whole_at]
        lines.append(replace(line, whole=_line(name, x_P, whole)) if len(whole) == len(own) else line)
    return sorted(lines, key=_best_first)


def _line(name: str, x_P: np.ndarray, rows: Sequence[Row]) -> Line:
    return Line(name=name, x_P=x_P, **_measures(rows))


def _measures(rows: Sequence[Row]) -> dict[str, Any]:
    selectivity_P = numbers(rows, "selectivity")
    return {
        "target": Spread.of(rows, "target_drop"),
        "others": Spread.of(rows, "complement_drop"),
        "kl_P": numbers(rows, "kl_complement"),
        "best": float(np.nanmax(selectivity_P)) if np.isfinite(selectivity_P).any() else math.nan,
    }


def _apart(line: Line, last: int) -> Line:
    """The line with a NaN before the points beyond the last layer."""
    place = int(np.searchsorted(line.x_P, last, side="right"))
    if place == len(line.x_P):
        return line

    def cut(x_P: np.ndarray) -> np.ndarray:
        return np.insert(x_P, place, math.nan)

    def cut_spread(spread: Spread) -> Spread:
        return Spread(value_P=cut(spread.value_P), low_P=cut(spread.low_P), high_P=cut(spread.high_P))

    return replace(
        line,
        x_P=cut(line.x_P),
        target=cut_spread(line.target),
        others=cut_spread(line.others),
        kl_P=cut(line.kl_P),
        whole=None if line.whole is None else _apart(line.whole, last),
    )


def _place(row: Row) -> tuple[str, int]:
    return row["evaluation_id"], row["setting"]


def _under(rows: Sequence[Row], condition: str) -> list[Row]:
    return [row for row in rows if row["condition"] == condition]


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _differ(rows: Sequence[Row], key: str) -> bool:
    return len({_hashable(row[key]) for row in rows}) > 1


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _in_order(value: Any) -> tuple[bool, Any]:
    return value is None, 0 if value is None else value


def _best_first(one: Line | Family) -> float:
    return math.inf if math.isnan(one.best) else -one.best


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _words(key: str, value: Any) -> str:
    if key == "layers":
        return "all layers" if value is None else f"layer{'s' * (len(value) > 1)} {'+'.join(map(str, value))}"
    if key == "hook_points":
        return "all hook points" if value is None else "+".join(value)
    if key == "positions":
        return "all positions" if value == "all" else "last position"
    if value is None:
        return ""
    if key == "method":
        return str(value)
    return f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
