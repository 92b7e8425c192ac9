"""What every figure is drawn on: the house style, places in pixels, texts that fit, pictures as files and in pages.

    @styled
    def figure_of(...) -> Figure:
        figure = sheet(WIDTH, 200)
        axes = axes_at(figure, 50, 32, 296, 120)
    save(figure, "x.png", "png")
    html = inline_svg(figure, name="x", description="...")

Names come from other people's data: nothing in them is taken for mathematics (`$`), and what cannot be printed becomes
a dot.
"""

import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import IO, Any, Literal, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator
from rich.cells import cell_len

from neuronlens.labels import printable

P = ParamSpec("P")
T = TypeVar("T")

WIDTH = 360
"""CSS pixels: what a phone shows."""
PALETTE = ("#332288", "#CC6677", "#117733", "#E69F00", "#56B4E9", "#882255", "#44AA99", "#999933", "#AA4499", "#D55E00")
"""Told apart by colour-blind readers too: Paul Tol's muted scheme, its palest colours replaced by Okabe and Ito's."""
CONDITIONS = {"base": ("#555555", "o"), "neuron": ("#D55E00", "s"), "range": ("#0072B2", "D")}
"""Colour and marker of conditions of the erasure evaluation."""
CONDITION_NAMES = {
    "base": "no intervention",
    "neuron": "whole neuron",
    "range": "range",
    "random": "random neurons",
    "wrong_concept": "another concept's range",
    "shuffled": "range of shuffled labels",
    "length_matched": "range, others as long",
}

INK, PALE_INK, GRID = "#1c1c1c", "#5f5f5f", "#dddddd"
LINE = "#0072B2"
PX = 1 / 96
"""Inches."""
TEXT_PT, SMALL_PT = 8.25, 7.5
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": TEXT_PT,
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "axes.edgecolor": PALE_INK,
    "axes.labelcolor": PALE_INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": PALE_INK,
    "ytick.color": PALE_INK,
    "xtick.labelsize": SMALL_PT,
    "ytick.labelsize": SMALL_PT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Our style while a figure is drawn. Matplotlib knows no other place for it than its global settings."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


# --- pieces ----------------------------------------------------------------------------------------------------------


def sheet(width: float, height: float) -> Figure:
    return Figure(figsize=(width * PX, height * PX), dpi=1 / PX)


def size_px(figure: Figure) -> tuple[float, float]:
    width, height = figure.get_size_inches() / PX
    return float(width), float(height)


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in pixels from the figure's top left corner."""
    full_width, full_height = size_px(figure)
    bottom = full_height - top - height
    return figure.add_axes(
        (left / full_width, bottom / full_height, width / full_width, height / full_height), facecolor="none"
    )


def axes_px(axes: Axes) -> float:
    """How wide the axes are, in pixels."""
    return float(axes.get_position().width * size_px(axes.get_figure(root=True))[0])  # type: ignore[arg-type]


def write_title(figure: Figure, text: str) -> None:
    _, height = size_px(figure)
    figure.text(8 / WIDTH, 1 - 12 / height, printable(text), ha="left", va="center", fontsize=9, fontweight="bold")


def names_px(names: Sequence[str]) -> float:
    return 16 + max(map(text_px, names), default=0)


@functools.cache
def text_px(text: str) -> float:
    """How wide a label is, in pixels: as matplotlib's own font draws it, and half a line for every column that wide
    characters (CJK) take, which that font has not."""
    font = FontProperties(family=["DejaVu Sans"], size=TEXT_PT)
    default = font_manager.findfont(font)
    known = "".join(c for c in text if c.isascii() or _has(default, c))
    width, _, _ = text_to_path.get_text_width_height_descent(known, font, False)
    return max(width / (72 * PX), cell_len(text) * 5.5)


def write_beside(
    axes: Axes, x_px: float, y: float, text: str, *, ha: str = "left", colour: str = INK, size: float = TEXT_PT
) -> None:
    """Text beside a row: x in pixels from the axes' left edge, y in rows."""
    axes.annotate(
        text, (0, y), xytext=(x_px * 72 * PX, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha=ha, va="center", color=colour, fontsize=size, annotation_clip=False,
    )  # fmt: skip


def wrapped(items: Sequence[T], px_of: Callable[[T], float], width: float) -> list[list[T]]:
    """The items in rows that are no wider; an item that is wider alone has a row of its own."""
    rows: list[list[T]] = []
    taken = math.inf
    for item in items:
        if taken + px_of(item) > width:
            rows.append([])
            taken = 0.0
        rows[-1].append(item)
        taken += px_of(item)
    return rows


def listed_lines(text: str) -> list[str]:
    """Small text in lines as wide as a figure, broken after the commas of an enumeration."""
    *parts, last = text.split(", ")
    ended = [*(f"{part}," for part in parts), last]
    lines = wrapped(ended, lambda part: text_px(part) * SMALL_PT / TEXT_PT + 3, WIDTH - 16)
    return [" ".join(line) for line in lines]


def layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    axes.set_xlabel("layer")
    step = math.ceil(len(layers) / 12)
    axes.set_xticks(layers[::step])
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)


def log_where_it_spans_decades(axes: Axes, which: Literal["x", "y"], values: np.ndarray) -> None:
    """A logarithmic axis for positive numbers of which the largest is more than 30 times the smallest; zeros are below
    it then."""
    finite = values[np.isfinite(values) & (values > 0)]
    if not finite.size or finite.max() <= 30 * finite.min():
        return
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    if finite.max() < 300 * finite.min():
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))
    axes.minorticks_off()


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
        _write(figure, path, format=form, dpi=2 / PX, metadata={"Date": None} if form == "svg" else None)


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
