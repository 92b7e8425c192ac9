"""The figures of sweeps, by the numbers that stand on their axes."""

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from neuronlens import canvas
from neuronlens.sweep_figures import MAX_WHOLE, dumbbells, sweep, trade_offs, whole_beside
from neuronlens.sweep_lines import Family, Line, Spread
from tests.report_stores import NASTY


def spread(*values: float, reach: float = 0.02) -> Spread:
    value_P = np.array(values, float)
    return Spread(value_P=value_P, low_P=value_P - reach, high_P=value_P + reach)


def line(name: str = "ranges", x=(1, 2, 3), target=(0.2, 0.5, 0.8), others=(0.0, 0.1, 0.2), kl=(0.1, 0.2, 0.3), **more):
    return Line(
        name=name,
        x_P=np.array(x, float),
        target=spread(*target),
        others=spread(*others),
        kl_P=np.array(kl, float),
        best=0.0,
        **more,
    )


def family(name: str, target, others, kl, *, is_path: bool = True) -> Family:
    return Family(
        name=name,
        varied=("tau",),
        is_path=is_path,
        target=spread(*target),
        others=spread(*others),
        kl_P=np.array(kl, float),
        best=0.0,
    )


def drawn(axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line, by its label."""
    return {
        one.get_label(): [(float(x), float(y)) for x, y in zip(*one.get_data(), strict=True)]
        for one in axes.lines
        if not one.get_label().startswith("_")
    }


def texts_of(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def sweep_of(*lines: Line, **options):
    return sweep(lines, **{"title": "Sweep of tau", "about": "paper, 60 test texts", "x_label": "tau"} | options)


# --- lines over a setting ---


def test_sweep__draws_drops_above_and_divergences_below():
    above, below = sweep_of(line()).axes
    assert drawn(above) == {
        "ranges: target": [(1, 0.2), (2, 0.5), (3, 0.8)],
        "ranges: others": [(1, 0.0), (2, 0.1), (3, 0.2)],
    }
    assert drawn(below) == {"ranges: others": [(1, 0.1), (2, 0.2), (3, 0.3)]}
    assert below.get_xlabel() == "tau"
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["1", "2", "3"]


def test_sweep__fills_the_target_and_leaves_the_others_hollow():
    above, _ = sweep_of(line()).axes
    faces = {one.get_label(): to_hex(one.get_markerfacecolor()) for one in above.lines[:2]}
    assert faces == {"ranges: target": canvas.PALETTE[0].lower(), "ranges: others": "#ffffff"}


def test_sweep__shades_the_intervals_of_both_drops():
    above, below = sweep_of(line()).axes
    target, others = (one for one in above.collections if one.get_facecolor().size and len(one.get_paths()[0]) > 4)
    corners = {tuple(point) for point in target.get_paths()[0].vertices.round(6)}
    assert corners >= {(1, 0.18), (1, 0.22), (3, 0.78), (3, 0.82)}
    assert {tuple(point) for point in others.get_paths()[0].vertices.round(6)} >= {(2, 0.08), (2, 0.12)}
    assert not below.collections


def test_sweep__gives_a_bar_to_a_point_that_stands_alone():
    nan = math.nan
    alone = line(x=(0, 1, nan, 2.5), target=(0.1, 0.2, nan, 0.7), others=(0, 0, nan, 0), kl=(0.1, 0.1, nan, 0.1))
    above, below = sweep_of(alone, x_label="layer", ticks={0.0: "0", 1.0: "1", 2.5: "all"}).axes
    bars = [path.vertices.round(6).tolist() for one in above.collections for path in one.get_paths()]
    assert [[2.5, 0.68], [2.5, 0.72]] in bars
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["0", "1", "all"]


def test_sweep__dashes_whole_neurons_in_the_colour_of_their_line():
    others = {"target": (0.9, 0.9, 0.9), "others": (0.6, 0.6, 0.6), "kl": (3, 3, 3)}
    above, below = sweep_of(line("a", whole=line("a", **others)), line("b")).axes
    assert drawn(above)["a: whole neurons: target"] == [(1, 0.9), (2, 0.9), (3, 0.9)]
    assert drawn(above)["a: whole neurons: others"] == [(1, 0.6), (2, 0.6), (3, 0.6)]
    assert drawn(below)["a: whole neurons: others"] == [(1, 3), (2, 3), (3, 3)]
    whole = [one for one in above.lines if "whole" in one.get_label()]
    assert {one.get_color() for one in whole} == {canvas.PALETTE[0]}
    assert all(one.is_dashed() for one in whole)


def test_whole_beside__is_drawn_once_where_it_is_the_same_for_all():
    whole = line("whole", target=(0.9, 0.9, 0.9))
    many = [line(str(i), whole=replace(whole, name=str(i))) for i in range(MAX_WHOLE + 1)]
    [(one, colour)] = whole_beside(many)
    assert (one.name, colour) == ("whole neurons", canvas.PALE_INK)
    different = [*many[:-1], replace(many[-1], whole=line("x", target=(0.9, 0.9, 0.8)))]
    assert whole_beside(different) == []
    assert len(whole_beside(different[-2:])) == 2


def test_sweep__takes_a_logarithmic_axis_where_the_key_spans_more_than_a_decade():
    def scale(*x):
        return sweep_of(line(x=x)).axes[0].get_xscale()

    assert scale(0.01, 0.03, 0.3) == "log"
    assert scale(0.1, 0.5, 1.0) == "linear"
    assert scale(0, 1, 20) == "linear"


def test_sweep__takes_a_logarithmic_axis_for_divergences_over_decades():
    assert sweep_of(line(kl=(0.001, 0.1, 1))).axes[1].get_yscale() == "log"
    low, _ = sweep_of(line(kl=(0.1, 0.2, 0.3))).axes[1].get_ylim()
    assert low == 0


def test_sweep__draws_the_divergence_alone_where_there_are_no_answers():
    nothing = (math.nan,) * 3
    figure = sweep_of(line(target=nothing, others=nothing))
    [axes] = figure.axes
    assert drawn(axes) == {"ranges: others": [(1, 0.1), (2, 0.2), (3, 0.3)]}
    assert "KL on others, nats" in texts_of(figure)
    assert "confidence lost" not in texts_of(figure)


def test_sweep__names_lines_only_where_there_are_several():
    assert "ranges" not in texts_of(sweep_of(line()))
    assert {"tau 1", "tau 2"} <= set(texts_of(sweep_of(line("tau 1"), line("tau 2"))))


def test_sweep__leaves_out_ticks_that_would_overlap():
    x = [0.5, 0.501, 0.502, 4]
    axes = sweep_of(line(x=x, target=x, others=x, kl=x)).axes[1]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.5", "4"]


# --- trade-offs ---


def trade_offs_of(*families: Family, whole: Family | None = None):
    return trade_offs(families, whole=whole, title="Erased against spared", about="60 test texts")


def test_trade_offs__draw_costs_over_what_the_target_loses():
    path = family("hpd", (0.2, 0.5, 0.8), (0.0, 0.1, -0.01), (0.1, 0.2, 0.3))
    above, below = trade_offs_of(path).axes
    assert drawn(above)["hpd"] == drawn(above)["hpd: all"] == [(0.2, 0.1), (0.5, 0.2), (0.8, 0.3)]
    assert drawn(below)["hpd"] == [(0.2, 0.0), (0.5, 0.1), (0.8, -0.01)]
    assert above.get_xlim() == below.get_xlim()


def test_trade_offs__join_only_what_no_other_beats_where_several_keys_vary():
    mixed = family("paper", (0.8, 0.5, 0.2), (0.1, 0.2, 0.0), (0.1, 0.3, 0.2), is_path=False)
    above, below = trade_offs_of(mixed).axes
    assert drawn(above)["paper"] == [(0.8, 0.1)]
    assert drawn(below)["paper"] == [(0.2, 0.0), (0.8, 0.1)]
    assert drawn(below)["paper: all"] == [(0.8, 0.1), (0.5, 0.2), (0.2, 0.0)]


def test_trade_offs__span_the_intervals_of_the_settings_that_are_joined():
    above, below = trade_offs_of(family("hpd", (0.2, 0.5), (0.0, 0.1), (0.1, 0.2))).axes
    bars = [path.vertices.round(6).tolist() for one in below.collections for path in one.get_paths()]
    assert [[0.2, -0.02], [0.2, 0.02]] in bars
    assert [[0.48, 0.1], [0.52, 0.1]] in bars
    across = [path.vertices.round(6).tolist() for one in above.collections for path in one.get_paths()]
    assert [[0.18, 0.1], [0.22, 0.1]] in across


def test_trade_offs__stretch_small_losses_where_some_are_large():
    small = family("a", (0.2, 0.5), (-0.005, 0.01), (0.1, 0.2))
    assert trade_offs_of(small).axes[1].get_yscale() == "linear"
    whole = family("whole neurons", (0.9,), (0.6,), (3.0,), is_path=False)
    below = trade_offs_of(small, whole=whole).axes[1]
    assert below.get_yscale() == "symlog"
    assert drawn(below)["whole neurons"] == [(0.9, 0.6)]
    assert {"0", "0.01", "0.1"} <= {tick.get_text() for tick in below.get_yticklabels()}


def test_trade_offs__tell_families_apart_by_colour_and_mark():
    families = [family(f"f{i}", (0.1,), (0.0,), (0.1,)) for i in range(8)]
    above, _ = trade_offs_of(*families).axes
    looks = {(one.get_color(), one.get_marker()) for one in above.lines if ": all" not in one.get_label()}
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 8


# --- dumbbells ---


def test_dumbbells__mark_both_drops_with_their_intervals():
    figure = dumbbells(
        ["joy", "law", "mean"],
        spread(0.5, 0.6, 0.55),
        spread(0.1, -0.1, 0.0),
        colours=["#ff0000", "#00ff00", "#0000ff"],
        title="x",
        about="y",
        n_apart=1,
    )
    [axes] = figure.axes
    marks = drawn(axes)
    assert (marks["joy: others"], marks["joy: target"]) == ([(0.1, 0.5)], [(0.5, 0.5)])
    assert (marks["law: others"], marks["law: target"]) == ([(-0.1, 1.5)], [(0.6, 1.5)])
    assert (marks["mean: others"], marks["mean: target"]) == ([(0.0, 2.5)], [(0.55, 2.5)])
    bars = [path.vertices.round(6).tolist() for one in axes.collections for path in one.get_paths()]
    assert [[0.48, 0.5], [0.52, 0.5]] in bars
    assert [[-0.12, 1.5], [-0.08, 1.5]] in bars
    assert axes.get_ylim() == (3, 0)
    [divider] = [one for one in axes.lines if list(one.get_ydata()) == [2, 2]]
    assert divider.get_xdata() == [0, 1]
    assert {"joy", "law", "mean"} <= set(texts_of(figure))


# --- all of them ---

LONG = "likelihood_ratio, action others, top_fraction 0.05, penalty 12.5, all hook points, last position"
ABOUT = "likelihood_ratio, action others, layers 0+1+2+3+4+5+6+7+8+9+10+11, resid_post, 2,000 test texts (bare 0.880)"


def _every_figure() -> dict:
    eight = [line(f"{LONG} {i}", whole=line(f"{i}", target=(0.1 * i,) * 3)) for i in range(8)]
    families = [family(f"{LONG} {i}", (0.1, 0.5), (0, 1e-9), (1e-9, 100)) for i in range(8)]
    nothing = family("nothing known", *[(math.nan, math.nan)] * 3)
    names = ["w" * 40, "another concept's range", "日本語の概念 と 愛", "$x^2$", *NASTY]
    same = spread(*[0.5] * len(names))
    return {
        "sweep": sweep_of(*eight, about=ABOUT),
        "sweep of one": sweep_of(line(kl=(0, 0, 0), whole=line()), about=""),
        "sweep of nothing": sweep_of(line(target=[math.nan] * 3, others=[math.nan] * 3, kl=[math.nan] * 3)),
        "trade_offs": trade_offs(families, whole=families[0], title="x", about=ABOUT),
        "trade_offs of nothing": trade_offs_of(nothing, whole=nothing),
        "dumbbells": dumbbells(names, same, same, colours=["#ff0000"] * len(names), title="x", about=ABOUT),
    }


def labels_in_view(axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


@pytest.mark.parametrize(
    "name",
    ["sweep", "sweep of one", "sweep of nothing", "trade_offs", "trade_offs of nothing", "dumbbells"],
)
def test_figure__keeps_its_text_within_it_and_apart(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r"Glyph \d+ ")  # of characters that no font here has
        figure = _every_figure()[name]
        painter = FigureCanvasAgg(figure)
        painter.draw()
    width, height = painter.get_width_height()
    seen = [text for text in figure.texts if text.get_text()]
    for axes in figure.axes:
        ticks = [label for axis in (axes.xaxis, axes.yaxis) for label in labels_in_view(axis)]
        seen += [text for text in (*ticks, axes.xaxis.label) if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in seen if text.get_visible()]
    for text, box in boxes:
        assert box.x0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y0 >= -1, text
        assert box.y1 <= height + 1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across < 2 or up < 3, (one, other)
