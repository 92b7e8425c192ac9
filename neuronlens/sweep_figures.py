"""The figures of sweeps: lines over a setting, what is erased against what it costs, and dumbbells.

    figure = sweep(lines_along(rows, "tau"), title="Sweep of tau", about="paper, zero", x_label="tau")

Numbers in, a matplotlib Figure out, as in `neuronlens.figures`. Each stands alone: its settings are named below the
title. Filled marks are the target, hollow ones the others; what bands and bars span are 95 % intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from neuronlens.canvas import (
    CONDITIONS,
    GRID,
    INK,
    PALE_INK,
    PALETTE,
    SMALL_PT,
    WIDTH,
    axes_at,
    axes_px,
    listed_lines,
    log_where_it_spans_decades,
    names_px,
    sheet,
    size_px,
    styled,
    text_px,
    wrapped,
    write_beside,
    write_title,
)
from neuronlens.labels import short
from neuronlens.sweep_lines import Family, Line, Spread

MAX_WHOLE = 4
"""With more lines, those of whole neurons beside each could not be told apart."""

_LEFT, _RIGHT = 46, 14
_MARKERS = "oD^vPX<>"
_DASHES = (0, (5, 2))
_LINE_PX, _SAMPLE_PX = 16, 18
_NAME_CELLS = 44
_STEPS = (1, 2, 5, 10)
_SMALL_LOSS = 0.01
"""Of confidence: below it, the axis of what others lose is linear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """An entry of a legend: how the line looks, and what it is."""

    name: str
    colour: str
    marker: str = ""
    is_hollow: bool = False
    dashes: Any = "-"


_TARGET = _Sample(name="target", colour=INK, marker="o")
_OTHERS = _Sample(name="others", colour=INK, marker="o", is_hollow=True)
_RANGES = _Sample(name="ranges", colour=INK)
_WHOLE = _Sample(name="whole neurons", colour=INK, dashes=_DASHES)


# --- lines over a setting --------------------------------------------------------------------------------------------


@styled
def sweep(
    lines: Sequence[Line], *, title: str, about: str, x_label: str, ticks: Mapping[float, str] | None = None
) -> Figure:
    """What target and others lose of confidence, above, and the divergence of the others' answers, below, over one
    setting; a colour a line, at most as many as PALETTE has.

    The x axis is logarithmic where it spans more than a decade; `ticks` name places on it, which are then all.
    Dashed are whole neurons, as `whole_beside` says. Without confidences, the divergence stands alone.
    """
    beside = whole_beside(lines)
    names = [_Sample(name=line.name, colour=PALETTE[k]) for k, line in enumerate(lines)] if len(lines) > 1 else []
    sheet_of = _Sheet.of(title, about, [names, [_TARGET, _OTHERS, *((_RANGES, _WHOLE) if beside else ())]])
    has_drops = any(np.isfinite(line.target.value_P).any() for line in lines)
    figure, panels = sheet_of.draw([150, 100] if has_drops else [150], ["confidence lost", "KL on others, nats"])
    for k, line in enumerate(lines):
        if has_drops:
            _draw_spread(panels[0], line, line.target, PALETTE[k], _TARGET)
            _draw_spread(panels[0], line, line.others, PALETTE[k], _OTHERS)
        _draw_values(panels[-1], line, line.kl_P, PALETTE[k], _OTHERS)
    for whole, colour in beside:
        if has_drops:
            _draw_values(panels[0], whole, whole.target.value_P, colour, _TARGET, is_whole=True)
            _draw_values(panels[0], whole, whole.others.value_P, colour, _OTHERS, is_whole=True)
        _draw_values(panels[-1], whole, whole.kl_P, colour, _OTHERS, is_whole=True)
    if has_drops:
        panels[0].axhline(0, color=PALE_INK, linewidth=0.6, zorder=1)
    _level_by_divergence(panels[-1], [line.kl_P for line in (*lines, *(whole for whole, _ in beside))])
    x_X = np.unique(np.concatenate([line.x_P[np.isfinite(line.x_P)] for line in lines]))
    for axes in panels:
        _x_axis(axes, x_X, ticks)
        axes.tick_params(labelbottom=axes is panels[-1])
    panels[-1].set_xlabel(x_label)
    return figure


def whole_beside(lines: Sequence[Line]) -> list[tuple[Line, str]]:
    """The lines of whole neurons that are drawn beside these, with their colours: one where they are the same for all,
    else one each for at most MAX_WHOLE lines."""
    whole = [(line.whole, PALETTE[k]) for k, line in enumerate(lines) if line.whole is not None]
    if len(whole) == len(lines) > 1 and all(_are_alike(one, whole[0][0]) for one, _ in whole):
        return [(replace(whole[0][0], name=_WHOLE.name), PALE_INK)]
    if len(lines) > MAX_WHOLE:
        return []
    return [(replace(one, name=f"{one.name}: {_WHOLE.name}"), colour) for one, colour in whole]


def _are_alike(one: Line, other: Line) -> bool:
    return np.array_equal(one.x_P, other.x_P, equal_nan=True) and all(
        np.allclose(a_P, b_P, rtol=0, atol=1e-6, equal_nan=True)
        for a_P, b_P in ((one.target.value_P, other.target.value_P), (one.kl_P, other.kl_P))
    )


def _draw_spread(axes: Axes, line: Line, spread: Spread, colour: str, sample: _Sample) -> None:
    """A line with its band; where a point has no neighbour to make a band with, a bar."""
    x_P, known_P = line.x_P, np.isfinite(line.x_P) & np.isfinite(spread.value_P)
    beside_P = np.concatenate([[False], known_P[:-1]]) | np.concatenate([known_P[1:], [False]])
    axes.fill_between(x_P, spread.low_P, spread.high_P, color=colour, alpha=0.14, linewidth=0)
    alone = np.flatnonzero(known_P & ~beside_P)
    axes.vlines(x_P[alone], spread.low_P[alone], spread.high_P[alone], color=colour, alpha=0.4, linewidth=2)
    _draw_values(axes, line, spread.value_P, colour, sample)


def _draw_values(
    axes: Axes, line: Line, value_P: np.ndarray, colour: str, sample: _Sample, *, is_whole: bool = False
) -> None:
    axes.plot(
        *(line.x_P, value_P),
        color=colour,
        linewidth=1 if is_whole else 1.4,
        linestyle=_DASHES if is_whole else "-",
        label=f"{line.name}: {sample.name}",
        **_mark("o", colour, is_hollow=sample.is_hollow, size=2.6 if is_whole else 4),
    )


# --- what is erased against what it costs ----------------------------------------------------------------------------


@styled
def trade_offs(families: Sequence[Family], *, whole: Family | None, title: str, about: str) -> Figure:
    """How much the others change (up) against what the target loses (across), a line a family: their divergence above,
    their lost confidence below. Every setting is a dot, those that the line joins are marks with bars.

    The axis of what others lose is logarithmic beyond _SMALL_LOSS where some lose ten times as much.
    """
    samples = [
        _Sample(name=family.name, colour=PALETTE[k], marker=_MARKERS[k % len(_MARKERS)])
        for k, family in enumerate(families)
    ]
    drawn = list(zip(families, samples, strict=True))
    if whole is not None:
        colour, marker = CONDITIONS["neuron"]
        drawn.append((whole, _Sample(name=whole.name, colour=colour, marker=marker, dashes=_DASHES)))
    sheet_of = _Sheet.of(title, about, [[sample for _, sample in drawn]])
    figure, panels = sheet_of.draw([170, 130], ["KL on others, nats", "confidence that others lose"])
    above, below = panels
    for family, sample in drawn:
        nothing = Spread(value_P=family.kl_P, low_P=family.kl_P, high_P=family.kl_P)
        _draw_family(above, family, nothing, sample)
        _draw_family(below, family, family.others, sample)
    _level_by_divergence(above, [family.kl_P for family, _ in drawn])
    below.axhline(0, color=PALE_INK, linewidth=0.6, zorder=1)
    _level_by_loss(below, np.concatenate([family.others.value_P for family, _ in drawn]))
    ends = below.get_xlim()
    for axes in panels:
        axes.set_xlim(ends)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        axes.tick_params(labelbottom=axes is below)
    below.set_xlabel("confidence that the target loses")
    return figure


def _draw_family(axes: Axes, family: Family, cost: Spread, sample: _Sample) -> None:
    gain, order = family.target, family.joined(cost.value_P)
    axes.plot(
        *(gain.value_P, cost.value_P),
        linestyle="",
        marker=sample.marker,
        markersize=2.4,
        markeredgewidth=0,
        color=sample.colour,
        alpha=0.35,
        label=f"{family.name}: all",
    )
    bars: dict[str, Any] = {"color": sample.colour, "alpha": 0.3, "linewidth": 1}
    axes.vlines(gain.value_P[order], cost.low_P[order], cost.high_P[order], **bars)
    axes.hlines(cost.value_P[order], gain.low_P[order], gain.high_P[order], **bars)
    axes.plot(
        *(gain.value_P[order], cost.value_P[order]),
        color=sample.colour,
        linewidth=1.3,
        linestyle=sample.dashes,
        label=family.name,
        **_mark(sample.marker, sample.colour),
    )


# --- dumbbells -------------------------------------------------------------------------------------------------------


@styled
def dumbbells(
    names: Sequence[str],
    target: Spread,
    others: Spread,
    *,
    colours: Sequence[str],
    title: str,
    about: str,
    n_apart: int = 0,
) -> Figure:
    """A row a name: what the target loses of confidence and what the others lose, with their intervals. The last
    `n_apart` rows stand below a line."""
    rows = [short(name, 24) for name in names]
    row_px = 24
    sheet_of = _Sheet.of(title, about, [[_TARGET, _OTHERS]], left=names_px(rows))
    figure, [axes] = sheet_of.draw([row_px * len(rows)], [""])
    axes.set(ylim=(len(rows), 0), yticks=[], xlabel="confidence lost")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
    for i, (name, colour) in enumerate(zip(rows, colours, strict=True)):
        y, ends = i + 0.5, (target.value_P[i], others.value_P[i])
        write_beside(axes, -8, y, name, ha="right")
        axes.plot(ends, (y, y), color=GRID, linewidth=2.5, zorder=1.5)
        for spread, is_hollow in ((others, True), (target, False)):
            axes.hlines(y, spread.low_P[i], spread.high_P[i], color=colour, linewidth=1.4, alpha=0.6)
            side = "others" if is_hollow else "target"
            axes.plot(
                [spread.value_P[i]], [y], label=f"{names[i]}: {side}", **_mark("o", colour, is_hollow=is_hollow, size=5)
            )
    axes.axvline(0, color=PALE_INK, linewidth=0.6, zorder=1)
    if n_apart:
        axes.axhline(len(rows) - n_apart, color=PALE_INK, linewidth=0.6)
    return figure


# --- pieces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sheet:
    """What stands above the panels: title, the settings in words, legends."""

    title: str
    about: Sequence[str]
    legend: Sequence[Sequence[_Sample]]
    left: float

    @classmethod
    def of(cls, title: str, about: str, legends: Sequence[Sequence[_Sample]], *, left: float = _LEFT) -> "_Sheet":
        rows = [row for legend in legends for row in wrapped(legend, _sample_px, WIDTH - 16)]
        return cls(title=title, about=listed_lines(about), legend=rows, left=left)

    def draw(self, heights_px: Sequence[float], headings: Sequence[str]) -> tuple[Figure, list[Axes]]:
        """The sheet with panels below each other, each under its heading."""
        top: float = 28 + 13 * len(self.about) + _LINE_PX * len(self.legend)
        heading_px = [18 if heading else 6 for heading in headings[-len(heights_px) :]]
        figure = sheet(WIDTH, top + sum(heights_px) + sum(heading_px) + 40)
        write_title(figure, self.title)
        for i, line in enumerate(self.about):
            _write(figure, 8, 28 + 13 * i, line, PALE_INK)
        for i, row in enumerate(self.legend):
            left = 8.0
            for sample in row:
                _draw_sample(figure, left, 28 + 13 * len(self.about) + _LINE_PX * i + 4, sample)
                left += _sample_px(sample)
        panels = []
        for height, space, heading in zip(heights_px, heading_px, headings[-len(heights_px) :], strict=True):
            _write(figure, 8, top + space / 2 + 1, heading, PALE_INK)
            axes = axes_at(figure, self.left, top + space, WIDTH - self.left - _RIGHT, height - 4)
            axes.grid(color=GRID, linewidth=0.5)
            axes.set_axisbelow(True)
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
            panels.append(axes)
            top += space + height
        return figure, panels


def _sample_px(sample: _Sample) -> float:
    return _SAMPLE_PX + 6 + text_px(short(sample.name, _NAME_CELLS)) + 10


def _draw_sample(figure: Figure, left: float, top: float, sample: _Sample) -> None:
    width, height = size_px(figure)
    y = 1 - top / height
    figure.add_artist(
        Line2D(
            [left / width, (left + _SAMPLE_PX / 2) / width, (left + _SAMPLE_PX) / width],
            [y] * 3,
            color=sample.colour,
            linewidth=1.4,
            linestyle=sample.dashes,
            markevery=[1],
            transform=figure.transFigure,
            **_mark(sample.marker, sample.colour, is_hollow=sample.is_hollow),
        )
    )
    _write(figure, left + _SAMPLE_PX + 4, top, short(sample.name, _NAME_CELLS), INK)


def _write(figure: Figure, left: float, top: float, text: str, colour: str) -> None:
    width, height = size_px(figure)
    figure.text(left / width, 1 - top / height, text, ha="left", va="center", fontsize=SMALL_PT, color=colour)


def _mark(marker: str, colour: str, *, is_hollow: bool = False, size: float = 4) -> dict[str, Any]:
    return {
        "marker": marker,
        "markersize": size,
        "markeredgecolor": colour,
        "markerfacecolor": "white" if is_hollow else colour,
        "markeredgewidth": 1.1,
    }


def _level_by_divergence(axes: Axes, every_kl: Sequence[np.ndarray]) -> None:
    log_where_it_spans_decades(axes, "y", np.concatenate(every_kl))
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)


def _level_by_loss(axes: Axes, every_loss: np.ndarray) -> None:
    if np.nanmax(np.abs(every_loss), initial=0) <= 10 * _SMALL_LOSS:
        return
    axes.set_yscale("symlog", linthresh=_SMALL_LOSS, linscale=0.5)
    ticks = [-1, -0.1, -0.01, 0, 0.01, 0.1, 1]
    low, high = axes.get_ylim()
    seen = [y for y in ticks if low <= y <= high]
    axes.set_yticks(seen, [f"{y:g}".replace("-", "−") for y in seen])
    axes.minorticks_off()


def _x_axis(axes: Axes, x_X: np.ndarray, ticks: Mapping[float, str] | None) -> None:
    """Logarithmic where positive values span more than a decade; named are values that lie far enough apart."""
    if ticks is None and x_X[0] > 0 and x_X[-1] > 10 * x_X[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
    names = {float(x): f"{x:g}" for x in x_X} if ticks is None else dict(ticks)
    low, high = axes.get_xlim()
    place = axes.transAxes.inverted().transform
    at_px = {x: float(place(axes.transData.transform((x, axes.get_ylim()[0])))[0]) * axes_px(axes) for x in names}
    kept: list[float] = []
    for x in names:
        if not kept or at_px[x] - at_px[kept[-1]] >= (text_px(names[x]) + text_px(names[kept[-1]])) / 2 + 4:
            kept.append(x)
    axes.set_xticks(kept, [names[x] for x in kept])
    axes.set_xlim(low, high)
