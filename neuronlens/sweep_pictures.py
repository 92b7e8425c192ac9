"""What the evaluations of a store show, as figures with their captions: for the report and for `neuronlens figures`.

    for texts in text_sets(run_file(con, "report_sweeps").to_pylist()):
        pictures = [*comparisons(con, texts), *sweeps(texts)]

Comparisons hold all evaluations of one set of test texts; a sweep is one evaluation's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuronlens.canvas import CONDITION_NAMES, CONDITIONS, LINE, PALE_INK
from neuronlens.query import run_file
from neuronlens.sweep_figures import MAX_WHOLE, dumbbells, sweep, trade_offs, whole_beside
from neuronlens.sweep_lines import (
    CONTROLS,
    NUMBERS,
    Line,
    Row,
    Spread,
    TextSet,
    common,
    families_of,
    lines_along,
    lines_along_layers,
    numbers,
    whole_neurons,
    x_of_all,
)

if TYPE_CHECKING:
    import duckdb
    from matplotlib.figure import Figure

MAX_LINES = 8
"""So many lines of one figure can be told apart."""
MAX_ROWS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure: of which kind, what its file is called (without the ending), and what one sees on it."""

    kind: str
    name: str
    figure: "Figure"
    caption: str


def comparisons(
    con: "duckdb.DuckDBPyConnection", texts: TextSet, *, colours: Mapping[str, str], suffix: str = ""
) -> list[Picture]:
    """What one set of test texts says of all settings: the trade-off, the best setting concept by concept and, where
    there are some, beside its controls. `suffix` ends their names."""
    found = [_trade_off(texts, suffix), _concepts(con, texts, colours, suffix), _controls(texts, suffix)]
    return [picture for picture in found if picture is not None]


def sweeps(texts: TextSet) -> list[Picture]:
    """A figure per evaluation and key that varies in it: the numbers, then the layers."""
    found = []
    for evaluation_id, rows in texts.evaluations.items():
        for key in NUMBERS:
            found += _sweep(texts, evaluation_id, lines_along(rows, key), key, f"Sweep of {key}")
        lines = lines_along_layers(rows)
        layers = sorted({row["layers"][0] for row in rows if row["layers"] is not None and len(row["layers"]) == 1})
        ticks = {**{float(layer): str(layer) for layer in layers}, **({x_of_all(layers): "all"} if layers else {})}
        found += _sweep(texts, evaluation_id, lines, "layers", "Layer by layer", ticks)
    return found


def about_texts(texts: TextSet) -> str:
    """What tells the set from others, in words."""
    answered = "" if math.isnan(texts.bare_confidence) else f" (bare confidence {texts.bare_confidence:.3f})"
    return f"{texts.n_texts:,} test texts{answered}"


def _sweep(
    texts: TextSet,
    evaluation_id: str,
    lines: Sequence[Line],
    key: str,
    title: str,
    ticks: Mapping[float, str] | None = None,
) -> list[Picture]:
    if not lines:
        return []
    figure = sweep(
        lines[:MAX_LINES],
        title=title,
        about=_listed(common(texts.evaluations[evaluation_id], but=key), about_texts(texts)),
        x_label="layer" if key == "layers" else key,
        ticks=ticks,
    )
    is_unseen = any(line.whole for line in lines) and not whole_beside(lines[:MAX_LINES])
    unseen = f" Whole neurons are drawn beside at most {MAX_WHOLE} lines." if is_unseen else ""
    caption = f"Bands: 95 % intervals (paired bootstrap).{_cut(len(lines))}{unseen} ({evaluation_id})"
    return [Picture(kind=key, name=f"{key}-{short_id(evaluation_id)}", figure=figure, caption=caption)]


def _trade_off(texts: TextSet, suffix: str) -> Picture | None:
    rows = [row for row in texts.different if row["target_drop"] is not None]
    if len(rows) < 2:
        return None
    families = families_of(rows)
    figure = trade_offs(
        families[:MAX_LINES],
        whole=whole_neurons(texts.rows),
        title="Erased against spared",
        about=_listed(common(rows), about_texts(texts)),
    )
    several = any(not family.is_path for family in families[:MAX_LINES])
    caption = (
        "Further right, more of the target is erased; further down, the others are spared. Compare lines at the same "
        f"place across.{_joined(several)} Bars: 95 % intervals.{_cut(len(families))} ({about_texts(texts)}, "
        f"{len(rows)} settings)"
    )
    return Picture(kind="trade-off", name=f"trade-off{suffix}", figure=figure, caption=caption)


def _joined(several: bool) -> str:
    if not several:
        return " A line follows the key that varies."
    return (
        " Where one key varies, a line follows it; where several do, it joins the settings that no other on it beats, "
        "and the rest are pale."
    )


def _concepts(
    con: "duckdb.DuckDBPyConnection", texts: TextSet, colours: Mapping[str, str], suffix: str
) -> Picture | None:
    best = texts.best()
    if best is None:
        return None
    found = run_file(con, "report_sweep_concepts", evaluation_id=best["evaluation_id"], setting=best["setting"])
    rows = [row for row in found.to_pylist() if row["condition"] == "range" and row["target_drop"] is not None]
    shown, cut = _extremes(rows)
    figure = _dumbbells(
        [*shown, {**best, "concept": "mean of all"}],
        names=[*(row["concept"] for row in shown), "mean of all"],
        colours=[*(colours.get(row["concept"], LINE) for row in shown), LINE],
        title="Concept by concept",
        about=_listed(_setting(best), about_texts(texts)),
        n_apart=1,
    )
    caption = (
        "A row is a target. Filled: what it loses; hollow: what the others lose meanwhile; bars: 95 % intervals. The "
        f"setting is the one with the highest selectivity on these texts.{cut} ({best['evaluation_id']})"
    )
    return Picture(kind="concepts", name=f"concepts{suffix}", figure=figure, caption=caption)


def _controls(texts: TextSet, suffix: str) -> Picture | None:
    best = texts.best(controlled=True)
    if best is None:
        return None
    beside = texts.beside(best)
    rows = [beside[condition] for condition in ("range", "neuron", *CONTROLS) if condition in beside]
    figure = _dumbbells(
        rows,
        names=[CONDITION_NAMES[row["condition"]] for row in rows],
        colours=[CONDITIONS.get(row["condition"], (PALE_INK, ""))[0] for row in rows],
        title="A range and its controls",
        about=_listed(_setting(best), about_texts(texts)),
    )
    caption = (
        "Means over concepts. Filled: what the target loses; hollow: what the others lose; bars: 95 % intervals. What "
        "a control erases is not due to the range. Of the settings with controls, it is that with the highest "
        "selectivity. "
        f"({best['evaluation_id']})"
    )
    return Picture(kind="controls", name=f"controls{suffix}", figure=figure, caption=caption)


def _dumbbells(
    rows: Sequence[Row], *, names: Sequence[str], colours: Sequence[str], title: str, about: str, n_apart: int = 0
) -> "Figure":
    return dumbbells(
        names,
        Spread.of(rows, "target_drop"),
        Spread.of(rows, "complement_drop"),
        colours=colours,
        title=title,
        about=about,
        n_apart=n_apart,
    )


def _extremes(rows: Sequence[Row]) -> tuple[Sequence[Row], str]:
    """At most MAX_ROWS rows, those with the highest and the lowest selectivity, in the order given."""
    if len(rows) <= MAX_ROWS:
        return rows, ""
    order = numbers(rows, "selectivity").argsort()
    kept = {*order[: MAX_ROWS // 2].tolist(), *order[-MAX_ROWS // 2 :].tolist()}
    cut = f" {MAX_ROWS} of {len(rows)} concepts are drawn: those with the highest and the lowest selectivity."
    return [row for i, row in enumerate(rows) if i in kept], cut


def _setting(row: Row) -> str:
    return common([row])


def _cut(n: int) -> str:
    return "" if n <= MAX_LINES else f" {MAX_LINES} of {n} lines are drawn: those with the highest selectivity."


def _listed(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def short_id(evaluation_id: str) -> str:
    """The hash that the name of an evaluation's file ends with."""
    return "".join(c if c.isalnum() else "_" for c in evaluation_id.rpartition(".")[2])
