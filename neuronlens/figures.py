"""The figures of the report and of `neuronlens show`: numbers in, a matplotlib Figure out. No SQL, no files.

    figure = distributions(card, colours=concept_colours(concepts))

Every figure is drawn at the width of a phone, so that its text is as large there as the text around it; a wide screen
shows several side by side. Those of sweeps are in `neuronlens.sweep_figures`; `neuronlens.canvas` writes them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from neuronlens.canvas import (
    CONDITIONS,
    GRID,
    INK,
    LINE,
    PALE_INK,
    PALETTE,
    SMALL_PT,
    TEXT_PT,
    WIDTH,
    axes_at,
    axes_px,
    layer_axis,
    listed_lines,
    log_where_it_spans_decades,
    names_px,
    sheet,
    size_px,
    styled,
    text_px,
    write_beside,
    write_title,
)
from neuronlens.cards import Card
from neuronlens.labels import short

N_STEPS = 96
"""Into how many steps the axis of a neuron's values is cut."""

_ROW_PX = 26
"""Of a concept with a mark per condition."""
_EMPTY, _NONE = "#ececec", "#d5d5d5"
_MAP = "YlGnBu"


# --- names and colours -----------------------------------------------------------------------------------------------


def concept_colours(concepts: Iterable[str]) -> dict[str, str]:
    """The colour of each concept, by its place in the order of names; beyond ten they come again."""
    return {concept: PALETTE[i % len(PALETTE)] for i, concept in enumerate(sorted(concepts))}


# --- one neuron ------------------------------------------------------------------------------------------------------


@styled
def distributions(
    card: Card, *, colours: Mapping[str, str], title: str | None = None, explained: bool = False
) -> Figure:
    """A row per concept over one axis: how its values are spread, its range as a band, or one for each of its pieces,
    its mean as a triangle.

    Every row is scaled to its own highest step. Without a histogram, the Gaussian of the same mean and std is drawn
    with a dashed outline. On the right, the concept that shares the most of its values, and how much. With
    `explained`, a line below says so, for a figure that stands alone.
    """
    names = [short(bump.concept) for bump in card.bumps]
    nearest = [_nearest(bump.nearest, bump.nearest_ovl) for bump in card.bumps]
    said = listed_lines(_explained(card)) if explained else []
    left, right = names_px(names), max(88, 12 + max(map(text_px, nearest), default=0))
    row_px, top, bottom = 34, 36, 38 + 5 * bool(said) + 13 * len(said)
    height = top + row_px * max(1, len(card.bumps)) + bottom
    figure = sheet(WIDTH, height)
    write_title(figure, card.name if title is None else title)
    axes = axes_at(figure, left, top, WIDTH - left - right, row_px * max(1, len(card.bumps)))
    axes.set(xlim=card.limits(), ylim=(max(1, len(card.bumps)), 0), yticks=[], autoscale_on=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("activation")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    figure.text(1 - 6 / WIDTH, 1 - 26 / height, "overlaps most", ha="right", va="center", fontsize=SMALL_PT, c=PALE_INK)
    for i, line in enumerate(reversed(said)):
        figure.text(8 / WIDTH, (9 + 13 * i) / height, line, ha="left", va="center", fontsize=SMALL_PT, c=PALE_INK)
    edges = np.linspace(*card.limits(), N_STEPS + 1)
    for i, (bump, name, beside) in enumerate(zip(card.bumps, names, nearest, strict=True)):
        base, colour = i + 0.92, colours[bump.concept]
        write_beside(axes, -8, i + 0.62, name, ha="right", colour=INK)
        write_beside(axes, axes_px(axes) + 6, i + 0.62, beside, colour=PALE_INK)
        if bump.is_empty:
            write_beside(axes, 6, i + 0.62, "no values", colour=PALE_INK)
            continue
        for ends in bump.intervals:
            low, high = np.clip(ends, *axes.get_xlim())
            axes.add_patch(
                Rectangle((low, i + 0.08), high - low, 0.84, color=colour, alpha=0.17, linewidth=0, gid="range")
            )
            axes.vlines(ends, i + 0.08, base, color=colour, linewidth=0.8)
        shares = bump.shares(edges)
        heights = base - 0.8 * shares / max(shares.max(), np.finfo(float).tiny)
        axes.stairs(heights, edges, baseline=base, fill=True, facecolor=colour, alpha=0.75)
        if bump.histogram is None:
            axes.stairs(heights, edges, baseline=None, color=INK, linewidth=0.7, linestyle="--")
        axes.hlines(base, *axes.get_xlim(), color=GRID, linewidth=0.5)
        axes.plot([bump.mean], [base + 0.04], marker="^", color=INK, markersize=4.2, markeredgewidth=0, clip_on=False)
    return figure


def _explained(card: Card) -> str:
    curve = "" if card.has_histograms else ", curve: Gaussian"
    band = f"mean ± {card.tau:g} std" if card.table is None else f"range of {card.table}"
    return f"band: {band}, triangle: mean{curve}, right: largest overlap"


def _nearest(concept: str | None, ovl: float | None) -> str:
    return "" if concept is None or ovl is None else f"{ovl:.2f} {short(concept, 7)}"


# --- layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A number per layer, and between which two most of what it stands for lies; NaN where there is none."""

    layers: Sequence[int]
    middle: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@styled
def layer_band(
    band: Band,
    *,
    title: str,
    inside: tuple[float, float] | None = None,
    ends: tuple[float, float | None] | None = None,
    percent: bool = False,
) -> Figure:
    """A line over the layers with its band; the title names the number.

    `inside` is marked by two dashed lines: within them is good. `ends` are those of the axis, where they are known;
    without them, the axis is linear near 0 and logarithmic beyond where the band spans decades.
    """
    figure = sheet(WIDTH, 230)
    write_title(figure, title)
    axes = axes_at(figure, 50, 32, WIDTH - 50 - 14, 156)
    if band.low is not None and band.high is not None:
        if len(band.layers) > 1:
            axes.fill_between(band.layers, band.low, band.high, color=LINE, alpha=0.2, linewidth=0)
        else:
            axes.vlines(band.layers, band.low, band.high, color=LINE, alpha=0.35, linewidth=6)
    marker = "o" if len(band.layers) <= 16 else None
    axes.plot(band.layers, band.middle, color=LINE, linewidth=1.6, marker=marker, markersize=4)
    for limit in inside or ():
        axes.axhline(limit, color=PALE_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    layer_axis(axes, band.layers)
    axes.grid(axis="y", color=GRID, linewidth=0.5)
    if ends is None:
        _level_axis(axes, band)
    else:
        axes.set_ylim(ends[0], None if ends[1] is None else ends[0] + 1.03 * (ends[1] - ends[0]))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    return figure


def _level_axis(axes: Axes, band: Band) -> None:
    numbers = np.array([x for part in (band.middle, band.low, band.high) if part is not None for x in part], float)
    finite = numbers[np.isfinite(numbers)]
    reach = float(np.abs(finite).max(initial=0))
    if reach > 20:
        axes.set_yscale("symlog", linthresh=1)
        decades = [10.0**k for k in range(math.ceil(math.log10(reach)) + 1)]
        below = [-d for d in reversed(decades) if finite.min() < -0.5 and d <= max(1, 10 * -finite.min())]
        axes.set_yticks([*below, 0, *decades], [_brief(y) for y in (*below, 0, *decades)])
        axes.minorticks_off()


def _brief(y: float) -> str:
    """A power of ten in few characters."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(y) >= size:
            return f"{y / size:.0f}{letter}".replace("-", "−")
    return f"{y:.0f}".replace("-", "−")


@styled
def layer_shares(layers: Sequence[int], shares_GL: np.ndarray, names: Sequence[str], *, title: str) -> Figure:
    """A bar per layer, cut into G groups, the first, in grey, at the bottom; shares_GL sums to 1 in each layer."""
    figure = sheet(WIDTH, 230)
    write_title(figure, title)
    right = 24 + max(map(text_px, names))
    axes = axes_at(figure, 50, 32, WIDTH - 50 - right, 156)
    tones = [_NONE, *matplotlib.colormaps[_MAP](np.linspace(0.15, 0.98, len(names) - 1))]
    bottom = np.zeros(len(layers))
    for tone, share in zip(tones, shares_GL, strict=True):
        axes.bar(layers, share, bottom=bottom, width=0.8, color=tone, edgecolor="white", linewidth=0.3)
        bottom += share
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    layer_axis(axes, layers)
    _legend(figure, reversed(list(zip(names, tones, strict=True))), WIDTH - right + 6, 40)
    return figure


# --- maps ------------------------------------------------------------------------------------------------------------


@styled
def pair_map(names: Sequence[str], value_CC: np.ndarray, *, limits: tuple[float, float], title: str) -> Figure:
    """The pairs of at least two concepts as the lower half of a table. NaN is an empty cell. Up to eight concepts have
    their numbers written out."""
    rows, columns = [short(name, 13) for name in names[1:]], [short(name, 13) for name in names[:-1]]
    n = len(rows)
    left, right, top = names_px(rows), 12, 40
    cell = (WIDTH - left - right) / n
    row_px = min(max(cell, 13), 34)
    upright = max(map(text_px, columns)) < cell
    bottom = 22 if upright else 14 + max(map(text_px, columns))
    figure = sheet(WIDTH, top + n * row_px + bottom)
    write_title(figure, title)
    axes = axes_at(figure, left, top, WIDTH - left - right, n * row_px)
    shown = np.where(np.tri(n, dtype=bool), value_CC[1:, :-1], np.nan)
    _cells(axes, shown, limits)
    for i, j in zip(*np.nonzero(np.isnan(value_CC[1:, :-1]) & np.tri(n, dtype=bool)), strict=True):
        axes.add_patch(Rectangle((j, i), 1, 1, facecolor=_EMPTY, hatch="////", edgecolor="white", linewidth=0))
    size = TEXT_PT if row_px >= 15 else SMALL_PT - 0.5
    for i, name in enumerate(rows):
        write_beside(axes, -6, i + 0.5, name, ha="right", size=size)
    for j, name in enumerate(columns):
        axes.text(
            *(j + 0.5, n + 5 / row_px),
            name,
            rotation=0 if upright else 90,
            ha="center",
            va="top",
            fontsize=size if upright or cell >= 14 else SMALL_PT - 0.5,
        )
    if n < 8:
        _write_numbers(axes, shown, limits)
    _colour_bar(figure, limits)
    return figure


@styled
def layer_map(
    names: Sequence[str], layers: Sequence[int], value_CL: np.ndarray, *, limits: tuple[float, float], title: str
) -> Figure:
    """A row per concept, a column per layer, shares between 0 and 1. NaN is an empty cell."""
    rows = [short(name) for name in names]
    left, right, top, row_px = names_px(rows), 12, 40, 17
    figure = sheet(WIDTH, top + row_px * len(rows) + 40)
    write_title(figure, title)
    axes = axes_at(figure, left, top, WIDTH - left - right, row_px * len(rows))
    _cells(axes, value_CL, limits)
    for i, name in enumerate(rows):
        write_beside(axes, -6, i + 0.5, name, ha="right")
    axes.spines["bottom"].set_visible(False)
    step = max(1, math.ceil(len(layers) / 12))
    axes.set_xticks(np.arange(0, len(layers), step) + 0.5, [str(layer) for layer in layers[::step]])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("layer")
    if len(layers) <= 6:
        _write_numbers(axes, value_CL, limits)
    _colour_bar(figure, limits)
    return figure


def similar_together(value_CC: np.ndarray) -> list[int]:
    """An order in which concepts with a high value between them stand close: that of the Fiedler vector of the values.
    A pair without a value counts as 0."""
    weight_CC = np.nan_to_num(value_CC.astype(float))
    np.fill_diagonal(weight_CC, 0)
    laplacian_CC = np.diag(weight_CC.sum(axis=0)) - weight_CC
    fiedler_C = np.linalg.eigh(laplacian_CC)[1][:, min(1, len(weight_CC) - 1)].round(9)
    order = sorted(range(len(fiedler_C)), key=lambda i: (fiedler_C[i], i))
    return order if order[0] <= order[-1] else order[::-1]


def _cells(axes: Axes, value_RC: np.ndarray, limits: tuple[float, float]) -> None:
    n_rows, n_columns = value_RC.shape
    axes.imshow(
        np.ma.masked_invalid(value_RC),
        cmap=_MAP,
        vmin=limits[0],
        vmax=limits[1],
        extent=(0, n_columns, n_rows, 0),
        aspect="auto",
        interpolation="none",
    )
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_numbers(axes: Axes, value_RC: np.ndarray, limits: tuple[float, float]) -> None:
    span = (limits[1] - limits[0]) or 1
    for (i, j), value in np.ndenumerate(value_RC):
        if not math.isnan(value):
            ink = _ink_on(matplotlib.colormaps[_MAP]((value - limits[0]) / span))
            axes.text(j + 0.5, i + 0.5, _share(value), ha="center", va="center", color=ink, fontsize=SMALL_PT)


def _ink_on(colour: tuple[float, float, float, float]) -> str:
    """What can be read on it: by WCAG's relative luminance, where both inks have the same contrast at 0.18."""
    linear = np.array(colour[:3]) ** 2.2
    return "white" if linear @ (0.2126, 0.7152, 0.0722) < 0.18 else INK


def _share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1.0"


def _colour_bar(figure: Figure, limits: tuple[float, float]) -> None:
    width, top = 72, 10
    axes = axes_at(figure, WIDTH - 12 - width, top, width, 9)
    axes.imshow([np.linspace(0, 1, 64)], cmap=_MAP, aspect="auto", extent=(0, 1, 0, 1))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    for x, value, side in ((0, limits[0], "left"), (1, limits[1], "right")):
        axes.text(x, -0.25, f"{value:.1f}", ha=side, va="top", fontsize=SMALL_PT, color=PALE_INK)


# --- the erasure evaluation ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A number per concept under one condition, with its 95 % interval where there is one; NaN where it was not
    measured."""

    condition: str
    name: str
    value_C: np.ndarray
    low_C: np.ndarray | None = None
    high_C: np.ndarray | None = None


@styled
def conditions(
    concepts: Sequence[str], measured: Sequence[Measured], *, title: str, unit: str, share: bool = True
) -> Figure:
    """A row per concept, a mark per condition. Shares have the axis 0 to 1, other numbers one of their own."""
    rows = [short(concept) for concept in concepts]
    left, top = names_px(rows), 52
    figure = sheet(WIDTH, top + _ROW_PX * len(rows) + 42)
    write_title(figure, title)
    axes = axes_at(figure, left, top, WIDTH - left - 14, _ROW_PX * len(rows))
    axes.set_xlabel(unit)
    if share:
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        log_where_it_spans_decades(axes, "x", np.concatenate([one.value_C for one in measured]))
    _name_rows(axes, rows)
    _draw_conditions(axes, measured)
    _marks(figure, [(one.condition, one.name) for one in measured], 10, 34)
    return figure


@styled
def conditions_beside(
    concepts: Sequence[str],
    panels: Mapping[str, Sequence[Measured]],
    *,
    title: str,
    unit: str,
    n_apart: int = 0,
) -> Figure:
    """A row per concept, a mark per condition, in panels side by side: shares of several kinds, each under its heading.
    The last `n_apart` rows stand below a line."""
    rows = [short(concept) for concept in concepts]
    left, top, gap = names_px(rows), 68, 18
    figure = sheet(WIDTH, top + _ROW_PX * len(rows) + 42)
    write_title(figure, title)
    width = (WIDTH - left - 14 - gap * (len(panels) - 1)) / len(panels)
    for k, (heading, measured) in enumerate(panels.items()):
        axes = axes_at(figure, left + k * (width + gap), top, width, _ROW_PX * len(rows))
        axes.set_title(heading, loc="left", pad=5, fontsize=TEXT_PT)
        axes.set_xlabel(unit)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
        _name_rows(axes, rows if k == 0 else [""] * len(rows))
        _draw_conditions(axes, measured)
        if n_apart:
            axes.axhline(len(rows) - n_apart, color=PALE_INK, linewidth=0.6)
    _marks(figure, [(one.condition, one.name) for one in next(iter(panels.values()))], 10, 34)
    return figure


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Rows from the top, each with its name on the left and a pale line through its middle."""
    axes.set(ylim=(len(names), 0), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    for i, name in enumerate(names):
        write_beside(axes, -8, i + 0.5, name, ha="right")
        axes.axhline(i + 0.5, color=GRID, linewidth=0.5, zorder=0)


def _draw_conditions(axes: Axes, measured: Sequence[Measured]) -> None:
    """In every row a mark per condition, one below the other, with its interval."""
    for k, one in enumerate(measured):
        colour, marker = CONDITIONS.get(one.condition, (PALETTE[k % len(PALETTE)], "^"))
        y = np.arange(len(one.value_C)) + 0.5 + 0.2 * (k - (len(measured) - 1) / 2)
        if one.low_C is not None and one.high_C is not None:
            axes.hlines(y, one.low_C, one.high_C, color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(one.value_C, y, linestyle="", marker=marker, color=colour, markersize=4.6, label=one.name)


@styled
def trade_off(target: Sequence[Measured], others: Sequence[Measured], *, unit: str) -> Figure:
    """Per condition and concept: what the others lose (across) against what the target loses (up), as differences from
    the first condition. Up and left is good."""
    figure = sheet(WIDTH, 300)
    write_title(figure, "What is erased against what it costs")
    axes = axes_at(figure, 52, 52, WIDTH - 52 - 14, 206)
    lost = [target[0].value_C - one.value_C for one in target[1:]]
    cost = [others[0].value_C - one.value_C for one in others[1:]]
    if len(lost) == 2:
        for x, y in zip(np.transpose(cost), np.transpose(lost), strict=True):
            axes.plot(x, y, color=GRID, linewidth=0.8, zorder=1)
    for one, x_C, y_C in zip(target[1:], cost, lost, strict=True):
        colour, marker = CONDITIONS.get(one.condition, (INK, "^"))
        axes.plot(x_C, y_C, linestyle="", marker=marker, color=colour, markersize=6, alpha=0.85, label=one.name)
    axes.axhline(0, color=PALE_INK, linewidth=0.6)
    axes.axvline(0, color=PALE_INK, linewidth=0.6)
    axes.set(xlabel=f"{unit} that the others lose", ylabel=f"{unit} that the target loses")
    axes.grid(color=GRID, linewidth=0.5)
    axes.margins(0.12)
    _marks(figure, [(one.condition, one.name) for one in target[1:]], 10, 34)
    return figure


# --- time ------------------------------------------------------------------------------------------------------------


@styled
def stacked_bars(rows: Sequence[str], parts: Mapping[str, Sequence[float]], *, title: str, unit: str) -> Figure:
    """A bar per row, cut into its parts."""
    names = [short(row, 20) for row in rows]
    left, row_px = names_px(names), min(26, max(13, 330 // max(1, len(names))))
    legend_rows = math.ceil(len(parts) / 3)
    top = 34 + 18 * legend_rows
    figure = sheet(WIDTH, top + row_px * len(names) + 42)
    write_title(figure, title)
    axes = axes_at(figure, left, top, WIDTH - left - 20, row_px * len(names))
    axes.set(ylim=(len(names), 0), yticks=[], xlabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _brief(x) if x >= 1e4 else f"{x:g}"))
    axes.grid(axis="x", color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    done = np.zeros(len(names))
    y = np.arange(len(names)) + 0.5
    for k, (part, numbers) in enumerate(parts.items()):
        axes.barh(y, numbers, left=done, height=0.7, color=PALETTE[k % len(PALETTE)], label=part)
        done += np.asarray(numbers, float)
    for i, name in enumerate(names):
        write_beside(axes, -6, i + 0.5, name, ha="right")
    for k, part in enumerate(parts):
        _swatch(figure, 10 + 116 * (k % 3), 34 + 18 * (k // 3), part, PALETTE[k % len(PALETTE)])
    return figure


def _legend(figure: Figure, entries: Iterable[tuple[str, Any]], left: float, top: float) -> None:
    for k, (name, colour) in enumerate(entries):
        _swatch(figure, left, top + 18 * k, name, colour)


def _swatch(figure: Figure, left: float, top: float, name: str, colour: Any) -> None:
    width, height = size_px(figure)
    place = (left / width, 1 - (top + 5) / height)
    patch = Patch(facecolor=colour, edgecolor="none")
    figure.add_artist(
        Rectangle(place, 10 / width, 10 / height, transform=figure.transFigure, facecolor=patch.get_facecolor())
    )
    figure.text((left + 15) / width, 1 - top / height, name, ha="left", va="center", fontsize=SMALL_PT)


def _marks(figure: Figure, entries: Sequence[tuple[str, str]], left: float, top: float) -> None:
    """Names of conditions in a line, each after its mark."""
    width, height = size_px(figure)
    for condition, name in entries:
        colour, marker = CONDITIONS.get(condition, (INK, "^"))
        figure.text((left + 12) / width, 1 - top / height, name, ha="left", va="center", fontsize=SMALL_PT)
        axes = axes_at(figure, left, top - 5, 10, 10)
        axes.set_axis_off()
        axes.plot([0.5], [0.5], marker=marker, color=colour, markersize=5)
        left += 24 + text_px(name)
