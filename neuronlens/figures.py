"""The figures of the report and of `neuronlens show`: numbers in, a matplotlib Figure out. No SQL, no files.

    figure = distributions(card, colours=concept_colours(concepts))
    html = inline_svg(figure, name="neuron-3-7")
    save(figure, "neuron.png")

Every figure is drawn at the width of a phone, so that its text is as large there as the text around it; a wide screen
shows several side by side. Names come from other people's data: nothing in them is taken for mathematics (`$`), and
what cannot be printed becomes a dot.
"""

import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.cells import cell_len

from neuronlens.cards import Card
from neuronlens.labels import printable, short

P = ParamSpec("P")

WIDTH = 360
"""CSS pixels: what a phone shows."""
PALETTE = ("#332288", "#CC6677", "#117733", "#E69F00", "#56B4E9", "#882255", "#44AA99", "#999933", "#AA4499", "#D55E00")
"""Told apart by colour-blind readers too: Paul Tol's muted scheme, its palest colours replaced by Okabe and Ito's."""
CONDITIONS = {"base": ("#555555", "o"), "neuron": ("#D55E00", "s"), "range": ("#0072B2", "D")}
"""Colour and marker of each condition of the erasure evaluation."""
N_STEPS = 96
"""Into how many steps the axis of a neuron's values is cut."""

_INK, _PALE_INK, _GRID, _EMPTY, _NONE = "#1c1c1c", "#5f5f5f", "#dddddd", "#ececec", "#d5d5d5"
_LINE = "#0072B2"
_MAP = "YlGnBu"
_PX = 1 / 96
_TEXT_PT, _SMALL_PT = 8.25, 7.5
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": _TEXT_PT,
    "text.color": _INK,
    "text.parse_math": False,
    "text.usetex": False,
    "axes.edgecolor": _PALE_INK,
    "axes.labelcolor": _PALE_INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": _PALE_INK,
    "ytick.color": _PALE_INK,
    "xtick.labelsize": _SMALL_PT,
    "ytick.labelsize": _SMALL_PT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
}


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Our style while a figure is drawn. Matplotlib knows no other place for it than its global settings."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


# --- names and colours -----------------------------------------------------------------------------------------------


def concept_colours(concepts: Iterable[str]) -> dict[str, str]:
    """The colour of each concept, by its place in the order of names; beyond ten they come again."""
    return {concept: PALETTE[i % len(PALETTE)] for i, concept in enumerate(sorted(concepts))}


# --- one neuron ------------------------------------------------------------------------------------------------------


@_styled
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
    left, right = _names_px(names), max(88, 12 + max(map(_text_px, nearest), default=0))
    row_px, top, bottom = 34, 36, 56 if explained else 38
    height = top + row_px * max(1, len(card.bumps)) + bottom
    figure = _figure(WIDTH, height)
    _title(figure, card.name if title is None else title)
    axes = _axes(figure, left, top, WIDTH - left - right, row_px * max(1, len(card.bumps)))
    axes.set(xlim=card.limits(), ylim=(max(1, len(card.bumps)), 0), yticks=[], autoscale_on=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("activation")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color=_GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    figure.text(
        1 - 6 / WIDTH, 1 - 26 / height, "overlaps most", ha="right", va="center", fontsize=_SMALL_PT, c=_PALE_INK
    )
    if explained:
        curve = "" if card.has_histograms else ", curve: Gaussian"
        band = f"mean ± {card.tau:g} std" if card.table is None else f"range of {card.table}"
        said = f"band: {band}, triangle: mean{curve}, right: largest overlap"
        figure.text(8 / WIDTH, 9 / height, said, ha="left", va="center", fontsize=_SMALL_PT, c=_PALE_INK)
    edges = np.linspace(*card.limits(), N_STEPS + 1)
    for i, (bump, name, beside) in enumerate(zip(card.bumps, names, nearest, strict=True)):
        base, colour = i + 0.92, colours[bump.concept]
        _row_text(axes, -8, i + 0.62, name, ha="right", colour=_INK)
        _row_text(axes, axes_px(axes) + 6, i + 0.62, beside, colour=_PALE_INK)
        if bump.is_empty:
            _row_text(axes, 6, i + 0.62, "no values", colour=_PALE_INK)
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
            axes.stairs(heights, edges, baseline=None, color=_INK, linewidth=0.7, linestyle="--")
        axes.hlines(base, *axes.get_xlim(), color=_GRID, linewidth=0.5)
        axes.plot([bump.mean], [base + 0.04], marker="^", color=_INK, markersize=4.2, markeredgewidth=0, clip_on=False)
    return figure


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


@_styled
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
    figure = _figure(WIDTH, 230)
    _title(figure, title)
    axes = _axes(figure, 50, 32, WIDTH - 50 - 14, 156)
    if band.low is not None and band.high is not None:
        if len(band.layers) > 1:
            axes.fill_between(band.layers, band.low, band.high, color=_LINE, alpha=0.2, linewidth=0)
        else:
            axes.vlines(band.layers, band.low, band.high, color=_LINE, alpha=0.35, linewidth=6)
    marker = "o" if len(band.layers) <= 16 else None
    axes.plot(band.layers, band.middle, color=_LINE, linewidth=1.6, marker=marker, markersize=4)
    for limit in inside or ():
        axes.axhline(limit, color=_PALE_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    _layer_axis(axes, band.layers)
    axes.grid(axis="y", color=_GRID, linewidth=0.5)
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


@_styled
def layer_shares(layers: Sequence[int], shares_GL: np.ndarray, names: Sequence[str], *, title: str) -> Figure:
    """A bar per layer, cut into G groups, the first, in grey, at the bottom; shares_GL sums to 1 in each layer."""
    figure = _figure(WIDTH, 230)
    _title(figure, title)
    right = 24 + max(map(_text_px, names))
    axes = _axes(figure, 50, 32, WIDTH - 50 - right, 156)
    tones = [_NONE, *matplotlib.colormaps[_MAP](np.linspace(0.15, 0.98, len(names) - 1))]
    bottom = np.zeros(len(layers))
    for tone, share in zip(tones, shares_GL, strict=True):
        axes.bar(layers, share, bottom=bottom, width=0.8, color=tone, edgecolor="white", linewidth=0.3)
        bottom += share
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    _layer_axis(axes, layers)
    _legend(figure, reversed(list(zip(names, tones, strict=True))), WIDTH - right + 6, 40)
    return figure


# --- maps ------------------------------------------------------------------------------------------------------------


@_styled
def pair_map(names: Sequence[str], value_CC: np.ndarray, *, limits: tuple[float, float], title: str) -> Figure:
    """The pairs of at least two concepts as the lower half of a table. NaN is an empty cell. Up to eight concepts have
    their numbers written out."""
    rows, columns = [short(name, 13) for name in names[1:]], [short(name, 13) for name in names[:-1]]
    n = len(rows)
    left, right, top = _names_px(rows), 12, 40
    cell = (WIDTH - left - right) / n
    row_px = min(max(cell, 13), 34)
    upright = max(map(_text_px, columns)) < cell
    bottom = 22 if upright else 14 + max(map(_text_px, columns))
    figure = _figure(WIDTH, top + n * row_px + bottom)
    _title(figure, title)
    axes = _axes(figure, left, top, WIDTH - left - right, n * row_px)
    shown = np.where(np.tri(n, dtype=bool), value_CC[1:, :-1], np.nan)
    _cells(axes, shown, limits)
    for i, j in zip(*np.nonzero(np.isnan(value_CC[1:, :-1]) & np.tri(n, dtype=bool)), strict=True):
        axes.add_patch(Rectangle((j, i), 1, 1, facecolor=_EMPTY, hatch="////", edgecolor="white", linewidth=0))
    size = _TEXT_PT if row_px >= 15 else _SMALL_PT - 0.5
    for i, name in enumerate(rows):
        _row_text(axes, -6, i + 0.5, name, ha="right", size=size)
    for j, name in enumerate(columns):
        axes.text(
            *(j + 0.5, n + 5 / row_px),
            name,
            rotation=0 if upright else 90,
            ha="center",
            va="top",
            fontsize=size if upright or cell >= 14 else _SMALL_PT - 0.5,
        )
    if n < 8:
        _write_numbers(axes, shown, limits)
    _colour_bar(figure, limits)
    return figure


@_styled
def layer_map(
    names: Sequence[str], layers: Sequence[int], value_CL: np.ndarray, *, limits: tuple[float, float], title: str
) -> Figure:
    """A row per concept, a column per layer, shares between 0 and 1. NaN is an empty cell."""
    rows = [short(name) for name in names]
    left, right, top, row_px = _names_px(rows), 12, 40, 17
    figure = _figure(WIDTH, top + row_px * len(rows) + 40)
    _title(figure, title)
    axes = _axes(figure, left, top, WIDTH - left - right, row_px * len(rows))
    _cells(axes, value_CL, limits)
    for i, name in enumerate(rows):
        _row_text(axes, -6, i + 0.5, name, ha="right")
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
            axes.text(j + 0.5, i + 0.5, _share(value), ha="center", va="center", color=ink, fontsize=_SMALL_PT)


def _ink_on(colour: tuple[float, float, float, float]) -> str:
    """What can be read on it: by WCAG's relative luminance, where both inks have the same contrast at 0.18."""
    linear = np.array(colour[:3]) ** 2.2
    return "white" if linear @ (0.2126, 0.7152, 0.0722) < 0.18 else _INK


def _share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1.0"


def _colour_bar(figure: Figure, limits: tuple[float, float]) -> None:
    width, top = 72, 10
    axes = _axes(figure, WIDTH - 12 - width, top, width, 9)
    axes.imshow([np.linspace(0, 1, 64)], cmap=_MAP, aspect="auto", extent=(0, 1, 0, 1))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    for x, value, side in ((0, limits[0], "left"), (1, limits[1], "right")):
        axes.text(x, -0.25, f"{value:.1f}", ha=side, va="top", fontsize=_SMALL_PT, color=_PALE_INK)


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


@_styled
def conditions(
    concepts: Sequence[str], measured: Sequence[Measured], *, title: str, unit: str, share: bool = True
) -> Figure:
    """A row per concept, a mark per condition. Shares have the axis 0 to 1, other numbers one of their own."""
    rows = [short(concept) for concept in concepts]
    left, top, row_px = _names_px(rows), 52, 26
    figure = _figure(WIDTH, top + row_px * len(rows) + 42)
    _title(figure, title)
    axes = _axes(figure, left, top, WIDTH - left - 14, row_px * len(rows))
    axes.set(ylim=(len(rows), 0), yticks=[], xlabel=unit)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=_GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    if share:
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _log_where_it_spans_decades(axes, np.concatenate([one.value_C for one in measured]))
    for i, name in enumerate(rows):
        _row_text(axes, -8, i + 0.5, name, ha="right")
        axes.axhline(i + 0.5, color=_GRID, linewidth=0.5, zorder=0)
    for k, one in enumerate(measured):
        colour, marker = CONDITIONS.get(one.condition, (PALETTE[k % len(PALETTE)], "^"))
        y = np.arange(len(rows)) + 0.5 + 0.2 * (k - (len(measured) - 1) / 2)
        if one.low_C is not None and one.high_C is not None:
            axes.hlines(y, one.low_C, one.high_C, color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(one.value_C, y, linestyle="", marker=marker, color=colour, markersize=4.6, label=one.name)
    _marks(figure, [(one.condition, one.name) for one in measured], 10, 34)
    return figure


def _log_where_it_spans_decades(axes: Axes, values: np.ndarray) -> None:
    finite = values[np.isfinite(values) & (values > 0)]
    if finite.size and finite.max() > 30 * finite.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
        axes.minorticks_off()


@_styled
def trade_off(target: Sequence[Measured], others: Sequence[Measured], *, unit: str) -> Figure:
    """Per condition and concept: what the others lose (across) against what the target loses (up), as differences from
    the first condition. Up and left is good."""
    figure = _figure(WIDTH, 300)
    _title(figure, "What is erased against what it costs")
    axes = _axes(figure, 52, 52, WIDTH - 52 - 14, 206)
    lost = [target[0].value_C - one.value_C for one in target[1:]]
    cost = [others[0].value_C - one.value_C for one in others[1:]]
    if len(lost) == 2:
        for x, y in zip(np.transpose(cost), np.transpose(lost), strict=True):
            axes.plot(x, y, color=_GRID, linewidth=0.8, zorder=1)
    for one, x_C, y_C in zip(target[1:], cost, lost, strict=True):
        colour, marker = CONDITIONS.get(one.condition, (_INK, "^"))
        axes.plot(x_C, y_C, linestyle="", marker=marker, color=colour, markersize=6, alpha=0.85, label=one.name)
    axes.axhline(0, color=_PALE_INK, linewidth=0.6)
    axes.axvline(0, color=_PALE_INK, linewidth=0.6)
    axes.set(xlabel=f"{unit} that the others lose", ylabel=f"{unit} that the target loses")
    axes.grid(color=_GRID, linewidth=0.5)
    axes.margins(0.12)
    _marks(figure, [(one.condition, one.name) for one in target[1:]], 10, 34)
    return figure


# --- time ------------------------------------------------------------------------------------------------------------


@_styled
def stacked_bars(rows: Sequence[str], parts: Mapping[str, Sequence[float]], *, title: str, unit: str) -> Figure:
    """A bar per row, cut into its parts."""
    names = [short(row, 20) for row in rows]
    left, row_px = _names_px(names), min(26, max(13, 330 // max(1, len(names))))
    legend_rows = math.ceil(len(parts) / 3)
    top = 34 + 18 * legend_rows
    figure = _figure(WIDTH, top + row_px * len(names) + 42)
    _title(figure, title)
    axes = _axes(figure, left, top, WIDTH - left - 20, row_px * len(names))
    axes.set(ylim=(len(names), 0), yticks=[], xlabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _brief(x) if x >= 1e4 else f"{x:g}"))
    axes.grid(axis="x", color=_GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    done = np.zeros(len(names))
    y = np.arange(len(names)) + 0.5
    for k, (part, numbers) in enumerate(parts.items()):
        axes.barh(y, numbers, left=done, height=0.7, color=PALETTE[k % len(PALETTE)], label=part)
        done += np.asarray(numbers, float)
    for i, name in enumerate(names):
        _row_text(axes, -6, i + 0.5, name, ha="right")
    for k, part in enumerate(parts):
        _swatch(figure, 10 + 116 * (k % 3), 34 + 18 * (k // 3), part, PALETTE[k % len(PALETTE)])
    return figure


# --- pieces ----------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width * _PX, height * _PX), dpi=1 / _PX)


def _size_px(figure: Figure) -> tuple[float, float]:
    width, height = figure.get_size_inches() / _PX
    return float(width), float(height)


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in pixels from the figure's top left corner."""
    full_width, full_height = _size_px(figure)
    bottom = full_height - top - height
    return figure.add_axes(
        (left / full_width, bottom / full_height, width / full_width, height / full_height), facecolor="none"
    )


def axes_px(axes: Axes) -> float:
    """How wide the axes are, in pixels."""
    return float(axes.get_position().width * _size_px(axes.get_figure(root=True))[0])  # type: ignore[arg-type]


def _title(figure: Figure, text: str) -> None:
    _, height = _size_px(figure)
    figure.text(8 / WIDTH, 1 - 12 / height, printable(text), ha="left", va="center", fontsize=9, fontweight="bold")


def _names_px(names: Sequence[str]) -> float:
    return 16 + max(map(_text_px, names), default=0)


@functools.cache
def _text_px(text: str) -> float:
    """How wide a label is, in pixels: as matplotlib's own font draws it, and half a line for every column that wide
    characters (CJK) take, which that font has not."""
    font = FontProperties(family=["DejaVu Sans"], size=_TEXT_PT)
    default = font_manager.findfont(font)
    known = "".join(c for c in text if c.isascii() or _has(default, c))
    width, _, _ = text_to_path.get_text_width_height_descent(known, font, False)
    return max(width / (72 * _PX), cell_len(text) * 5.5)


def _row_text(
    axes: Axes, x_px: float, y: float, text: str, *, ha: str = "left", colour: str = _INK, size: float = _TEXT_PT
) -> None:
    """Text beside a row: x in pixels from the axes' left edge, y in rows."""
    axes.annotate(
        text, (0, y), xytext=(x_px * 72 * _PX, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha=ha, va="center", color=colour, fontsize=size, annotation_clip=False,
    )  # fmt: skip


def _layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    axes.set_xlabel("layer")
    step = math.ceil(len(layers) / 12)
    axes.set_xticks(layers[::step])
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)


def _legend(figure: Figure, entries: Iterable[tuple[str, Any]], left: float, top: float) -> None:
    for k, (name, colour) in enumerate(entries):
        _swatch(figure, left, top + 18 * k, name, colour)


def _swatch(figure: Figure, left: float, top: float, name: str, colour: Any) -> None:
    width, height = _size_px(figure)
    place = (left / width, 1 - (top + 5) / height)
    patch = Patch(facecolor=colour, edgecolor="none")
    figure.add_artist(
        Rectangle(place, 10 / width, 10 / height, transform=figure.transFigure, facecolor=patch.get_facecolor())
    )
    figure.text((left + 15) / width, 1 - top / height, name, ha="left", va="center", fontsize=_SMALL_PT)


def _marks(figure: Figure, entries: Sequence[tuple[str, str]], left: float, top: float) -> None:
    """Names of conditions in a line, each after its mark."""
    width, height = _size_px(figure)
    for condition, name in entries:
        colour, marker = CONDITIONS.get(condition, (_INK, "^"))
        figure.text((left + 12) / width, 1 - top / height, name, ha="left", va="center", fontsize=_SMALL_PT)
        axes = _axes(figure, left, top - 5, 10, 10)
        axes.set_axis_off()
        axes.plot([0.5], [0.5], marker=marker, color=colour, markersize=5)
        left += 24 + _text_px(name)


# --- out -------------------------------------------------------------------------------------------------------------


def inline_svg(figure: Figure, *, name: str, description: str) -> str:
    """The figure as an <svg> element to stand in an HTML page.

    Text stays text, in the page's font. `name`, unique in the page, keeps this figure's references apart from those of
    other figures; `description` is what a screen reader says.
    """
    drawn = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        _write(figure, drawn, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_html(drawn.getvalue(), description)


def save(figure: Figure, path: str | IO[bytes], form: str) -> None:
    """Write a picture: `form` is png (at twice the size, for dense screens) or svg."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "neuronlens"}):
        _write(figure, path, format=form, dpi=2 / _PX, metadata={"Date": None} if form == "svg" else None)


def _write(figure: Figure, target: Any, **options: Any) -> None:
    _use_fonts_that_have_the_characters(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ ")
        figure.savefig(target, **options)


def _for_html(svg: str, description: str) -> str:
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;?\s?", "", svg)
    svg = re.sub(r"font: (?:(bold|\d+) )?([\d.]+px)[^;\"]*", _font_size, svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
    return opening + re.sub(r"\s*\n\s*", " ", svg[svg.index(">") + 1 :])


def _font_size(match: re.Match[str]) -> str:
    """Matplotlib before 3.11 writes weight, size and family in one."""
    return f"font-size: {match[2]}" + (f"; font-weight: {match[1]}" if match[1] else "")


def _use_fonts_that_have_the_characters(figure: Figure) -> None:
    texts = [artist for artist in figure.findobj(Text) if isinstance(artist, Text)]
    characters = {c for text in texts for c in text.get_text() if not c.isascii()}
    default = font_manager.findfont("DejaVu Sans")
    missing = frozenset(c for c in characters if not _has(default, c))
    if missing:
        families = ["DejaVu Sans", *_fallback_fonts(missing)]
        for text in texts:
            text.set_fontfamily(families)


@functools.cache
def _fallback_fonts(missing: frozenset[str]) -> tuple[str, ...]:
    """Installed fonts which together have those of the characters that any has, those without serifs first."""
    fonts = {font.name: font.fname for font in font_manager.fontManager.ttflist if font.style == "normal"}
    chosen: list[str] = []
    left = set(missing)
    for family in sorted(fonts, key=lambda family: ("Sans" not in family, family)):
        found = {c for c in left if "Last Resort" not in family and _has(fonts[family], c)}
        if found:
            chosen.append(family)
            left -= found
        if not left:
            break
    return tuple(chosen)


def _has(path: str, character: str) -> bool:
    try:
        return _font(path).get_char_index(ord(character)) != 0
    except (OSError, RuntimeError):  # a font of bitmaps, which cannot be drawn with
        return False


@functools.cache
def _font(path: str) -> FT2Font:
    return FT2Font(path)
