"""What every section of the report works with: the connection, the facts, how numbers are written and figures cut."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from neuronlens import figures
from neuronlens.labels import printable
from neuronlens.page.elements import Draughtsman, Drawing, Part, Query
from neuronlens.page.facts import Facts
from neuronlens.query import run_file

if TYPE_CHECKING:
    import duckdb
    from matplotlib.figure import Figure

MAX_CONCEPTS = 24
"""So many names still can be read on a figure as wide as a phone."""
MAX_MAPS = 12
"""So many layers have a map of their own; all of them stand in the figures by layer."""

Rows = list[dict[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """`shown` are the concepts on figures that hold all of them: those that overlap most, where there are too many."""

    con: "duckdb.DuckDBPyConnection"
    facts: Facts
    shown: tuple[str, ...]
    colours: Mapping[str, str]
    _draughtsman: Draughtsman = field(default_factory=Draughtsman)

    def rows(self, query: str, **params: Any) -> Rows:
        """The rows of sql/<query>.sql."""
        return run_file(self.con, query, **params).to_pylist()

    def draw(self, figure: "Figure", caption: str, *, more_title: str = "", more: tuple[str, ...] = ()) -> Drawing:
        return self._draughtsman.draw(figure, caption, more_title=more_title, more=more)

    def at(self, hook_point: str, title: str) -> str:
        """The title, with the hook point where the store has several."""
        return title if len(self.facts.hook_points) == 1 else f"{title} ({hook_point})"

    @property
    def cut_note(self) -> str:
        if len(self.shown) == len(self.facts.concepts):
            return ""
        return (
            f"{len(self.shown)} of {len(self.facts.concepts)} concepts are drawn: those that overlap most with others."
        )

    def drawable(self, concepts: Sequence[str]) -> tuple[list[str], str]:
        """Those of an evaluation's concepts that a figure has room for, and a note where these are not all."""
        if len(concepts) <= MAX_CONCEPTS:
            return list(concepts), ""
        drawn = [concept for concept in concepts if concept in self.shown] or list(concepts[:MAX_CONCEPTS])
        return drawn, f"{len(drawn)} of {len(concepts)} concepts are drawn; the table has all."

    @property
    def no_pairs(self) -> str:
        if len(self.facts.concepts) < 2:
            return f"The store has one concept, {self.facts.concepts[0]}: there is no pair to compare."
        return "The store holds no overlap of any pair of concepts."


def pair_maps(desk: Desk, rows: Rows, column: str, *, title: str, lead: str, query: str) -> Part:
    """A map of the pairs per layer, from rows (layer, concept_a, concept_b, `column`) of one hook point: all with one
    scale and one order of concepts."""
    place = {concept: i for i, concept in enumerate(desk.shown)}
    by_layer: dict[int, np.ndarray] = {}
    for row in rows:
        value_CC = by_layer.setdefault(row["layer"], np.full((len(place), len(place)), np.nan))
        a, b = place[row["concept_a"]], place[row["concept_b"]]
        value_CC[a, b] = value_CC[b, a] = number(row[column])
    if not by_layer:
        return Part(title=title, note=desk.no_pairs)
    every_LCC = np.array(list(by_layer.values()))
    n_known_CC = np.maximum(1, np.isfinite(every_LCC).sum(axis=0))
    order = figures.similar_together(np.nansum(every_LCC, axis=0) / n_known_CC)
    names, limits = [desk.shown[i] for i in order], rounded(every_LCC)
    layers = evenly(sorted(by_layer), MAX_MAPS)
    drawings = []
    for layer in layers:
        value_CC = by_layer[layer][np.ix_(order, order)]
        figure = figures.pair_map(names, value_CC, limits=limits, title=f"layer {layer}")
        drawings.append(desk.draw(figure, _extremes(names, value_CC)))
    cut = f"{len(layers)} of {len(by_layer)} layers are drawn." if len(layers) < len(by_layer) else ""
    is_missing = np.isnan(every_LCC[:, *np.tril_indices(len(place), -1)]).any()
    missing = "Hatched: the store keeps nothing of the pair (recipe: overlap.keep)." if is_missing else ""
    return Part(
        title=title,
        lead=lead,
        drawings=tuple(drawings),
        note=" ".join(filter(None, (desk.cut_note, cut, missing))),
        queries=(Query(name=query, params=concepts_param(desk.shown)),),
    )


def _extremes(names: Sequence[str], value_CC: np.ndarray) -> str:
    pairs = [(value_CC[i, j], names[j], names[i]) for i in range(len(names)) for j in range(i)]
    known = sorted(pair for pair in pairs if not math.isnan(pair[0]))
    if len(known) < 2:
        return ", ".join(f"{a} and {b}: {value:.2f}" for value, a, b in known) or "No pair has a value."
    (low, *least), (high, *most) = known[0], known[-1]
    return f"Least: {' and '.join(least)} ({low:.2f}). Most: {' and '.join(most)} ({high:.2f})."


def by_hook_point(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, Rows]]:
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["hook_point"], []).append(dict(row))
    return list(found.items())


def evenly(items: Sequence[T], n: int) -> list[T]:
    """At most n of them, evenly spread, the first and the last among them."""
    if len(items) <= n:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, n).round().astype(int)]


def rounded(values: np.ndarray) -> tuple[float, float]:
    """The span of the values, out to the next tenth: a scale that several figures share."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low, high = math.floor(low * 10 + 1e-9) / 10, math.ceil(high * 10 - 1e-9) / 10
    if high == low:
        return (low - 0.1, low) if low > 0 else (low, low + 0.1)
    return low, high


def concepts_param(concepts: Sequence[str]) -> str:
    """The parameter as a shell takes it."""
    listed = json.dumps(list(concepts), ensure_ascii=False).replace("'", "'\\''")
    return f" --param concepts='{listed}'"


def layers_text(layers: Sequence[int]) -> str:
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def excerpt(text: str, n_characters: int) -> str:
    """The text in one line, cut at so many characters with an ellipsis."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= n_characters else text[: n_characters - 1].rstrip() + "…"


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.0f}\u00a0%"


def decimal(value: float | None, digits: int = 2) -> str:
    """The number with a true minus, and no minus before a zero."""
    if value is None or math.isnan(value):
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def with_interval(row: Mapping[str, Any], column: str) -> str:
    """A number of three digits with the ends of its 95 % interval, where the row has them."""
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    ends = "" if low is None or high is None else f" ({decimal(low)} to {decimal(high)})"
    return decimal(row[column], 3) + ends
