"""Figures by what stands on them: artists, places, names."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Text

from neuronlens import canvas, figures
from neuronlens.figures import Band, Measured
from tests.cards_by_hand import bump_of, card_of, joy_and_law

RED, BLUE = "#ff0000", "#0000ff"


def texts_of(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def rectangles(axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def curves(axes) -> list[StepPatch]:
    return [patch for patch in axes.patches if isinstance(patch, StepPatch)]


@pytest.fixture
def two_bumps():
    return joy_and_law()


# --- one neuron ---


def test_distributions__shades_each_concepts_range_in_its_colour(two_bumps):
    [axes] = figures.distributions(two_bumps, colours={"joy": RED, "law": BLUE}).axes
    bands = [patch for patch in rectangles(axes) if patch.get_gid() == "range"]
    assert len(bands) == 2
    for i, (band, bump, colour) in enumerate(zip(bands, two_bumps.bumps, (RED, BLUE), strict=True)):
        assert band.get_x() == pytest.approx(bump.mean - 2.5 * bump.std)
        assert band.get_x() + band.get_width() == pytest.approx(bump.mean + 2.5 * bump.std)
        assert i <= band.get_y() < band.get_y() + band.get_height() <= i + 1
        assert band.get_facecolor()[:3] == ((1, 0, 0) if colour == RED else (0, 0, 1))


def test_distributions__shades_every_piece_of_a_range(two_bumps):
    joy, law = two_bumps.bumps
    card = replace(two_bumps, bumps=(replace(joy, pieces=((-1.0, 0.0), (1.0, 1.5))), replace(law, pieces=())))
    [axes] = figures.distributions(card, colours={"joy": RED, "law": BLUE}).axes
    bands = [patch for patch in rectangles(axes) if patch.get_gid() == "range"]
    spans = [(band.get_x(), pytest.approx(band.get_x() + band.get_width())) for band in bands]
    assert spans == [(-1.0, 0.0), (1.0, 1.5)]
    assert len(curves(axes)) == 2


def test_distributions__draws_each_row_to_its_own_height_with_its_mean_below(two_bumps):
    [axes] = figures.distributions(two_bumps, colours={"joy": RED, "law": BLUE}).axes
    assert len(curves(axes)) == 2
    for i, (curve, bump) in enumerate(zip(curves(axes), two_bumps.bumps, strict=True)):
        data = curve.get_data()
        heights = data.baseline - data.values
        np.testing.assert_allclose(heights.max(), 0.8)
        shares = bump.shares(data.edges)
        np.testing.assert_allclose(heights / heights.sum(), shares / shares.sum(), atol=1e-9)
        [mean] = [line for line in axes.lines if i < line.get_ydata()[0] < i + 1 and line.get_marker() == "^"]
        assert mean.get_xdata()[0] == pytest.approx(bump.mean)
    assert axes.get_ylim() == (2, 0)


def test_distributions__names_concept_title_and_nearest_overlap(two_bumps):
    texts = texts_of(figures.distributions(two_bumps, colours={"joy": RED, "law": BLUE}))
    assert {"mlp_post, layer 3, neuron 7", "joy", "law", "0.12 law", "0.12 joy", "activation"} <= set(texts)
    explained = texts_of(figures.distributions(two_bumps, colours={"joy": RED, "law": BLUE}, explained=True))
    assert any("mean ± 2.5 std" in text for text in explained)


def test_distributions__dashes_the_gaussian_where_there_is_no_histogram():
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    card = card_of(bump_of(x, histogram=False))
    [axes] = figures.distributions(card, colours={"joy": RED}, explained=True).axes
    filled, outline = curves(axes)
    assert outline.get_linestyle() == "--"
    assert filled.get_fill()
    assert any("Gaussian" in text for text in texts_of(axes.figure))


def test_distributions__says_no_values_for_an_empty_bump(two_bumps):
    empty = bump_of(np.zeros(1, np.float32), "none")
    empty = type(empty)(
        **{k: getattr(empty, k) for k in empty.__slots__} | {"n": 0, "mean": math.nan, "histogram": None}
    )
    figure = figures.distributions(card_of(*two_bumps.bumps, empty), colours={"joy": RED, "law": BLUE, "none": RED})
    assert "no values" in texts_of(figure)
    assert len(curves(figure.axes[0])) == 2


# --- names and colours ---


def test_concept_colours__are_fixed_by_name_and_differ():
    names = [f"c{i}" for i in range(10)]
    colours = figures.concept_colours(names)
    assert len(set(colours.values())) == 10
    assert figures.concept_colours(reversed(names)) == colours
    assert len(figures.concept_colours(map(str, range(200)))) == 200


# --- layers ---


def test_layer_band__draws_line_band_and_limits():
    band = Band(layers=[0, 1, 2], middle=[0.5, 0.25, 0.0], low=[-1, -2, -3], high=[1, 2, 3])
    [axes] = figures.layer_band(band, title="Skewness", inside=(-1, 1)).axes
    line, *limits = axes.lines
    assert line.get_xdata().tolist() == [0, 1, 2]
    assert line.get_ydata().tolist() == [0.5, 0.25, 0.0]
    assert [limit.get_ydata()[0] for limit in limits] == [-1, 1]
    [shade] = axes.collections
    assert {tuple(p) for p in shade.get_paths()[0].vertices} >= {(0, -1), (2, 3), (1, 2)}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2"]


def test_layer_band__takes_the_axis_that_is_asked_for():
    [axes] = figures.layer_band(Band(layers=[0, 1], middle=[0.4, 0.5]), title="x", ends=(0, 1), percent=True).axes
    assert axes.get_ylim() == pytest.approx((0, 1.03))
    axes.figure.canvas.draw()
    assert "100 %" in [tick.get_text() for tick in axes.get_yticklabels()]
    [open_axes] = figures.layer_band(Band(layers=[0, 1], middle=[30, 50]), title="x", ends=(0, None)).axes
    assert open_axes.get_ylim()[0] == 0
    assert open_axes.get_ylim()[1] > 50


def test_layer_band__of_one_layer_shows_a_mark_and_its_whole_number():
    [axes] = figures.layer_band(Band(layers=[7], middle=[0.5], low=[0.1], high=[0.9]), title="x").axes
    assert axes.lines[0].get_marker() == "o"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["7"]
    [bar] = axes.collections
    assert bar.get_paths()[0].vertices.tolist() == [[7, 0.1], [7, 0.9]]


def test_layer_band__is_linear_near_zero_and_logarithmic_beyond_where_it_spans_decades():
    [axes] = figures.layer_band(Band(layers=[0, 1], middle=[1, 2], low=[-1, -1], high=[30, 1e5]), title="k").axes
    assert axes.get_yscale() == "symlog"
    assert {"0", "1", "100k"} <= {tick.get_text() for tick in axes.get_yticklabels()}
    [small] = figures.layer_band(Band(layers=[0, 1], middle=[1, 2], low=[-1, -1], high=[3, 4]), title="k").axes
    assert small.get_yscale() == "linear"


@pytest.mark.parametrize("values", [[math.nan, math.nan], [1e30, -1e30], [0.0, 0.0]])
def test_layer_band__draws_whatever_the_numbers_are(values):
    figure = figures.layer_band(Band(layers=[0, 1], middle=values, low=values, high=values), title="x")
    assert canvas.inline_svg(figure, name="x", description="").startswith("<svg")


def test_layer_shares__stacks_to_one():
    share_GL = np.array([[0.5, 0.25], [0.3, 0.25], [0.2, 0.5]])
    [axes] = figures.layer_shares([0, 1], share_GL, ["0", "1", "2–3"], title="x").axes
    bars = rectangles(axes)
    assert [bar.get_height() for bar in bars] == pytest.approx(share_GL.ravel())
    tops = [bar.get_y() + bar.get_height() for bar in bars[-2:]]
    assert tops == pytest.approx([1, 1])
    assert {"0", "1", "2–3"} <= set(texts_of(axes.figure))


# --- maps ---


def _pairs(*rows) -> np.ndarray:
    return np.array(rows, float)


def test_pair_map__shows_the_lower_half_on_the_given_scale():
    value_CC = _pairs([9, 0.1, 0.2], [0.1, 9, 0.3], [0.2, 0.3, 9])
    axes, bar = figures.pair_map(["a", "b", "c"], value_CC, limits=(0, 0.4), title="layer 0").axes
    [image] = axes.images
    shown = image.get_array()
    assert shown.mask.tolist() == [[False, True], [False, False]]
    np.testing.assert_allclose(shown.compressed(), [0.1, 0.2, 0.3])
    assert image.get_clim() == (0, 0.4)
    texts = [text.get_text() for text in axes.texts]
    assert [texts.count(name) for name in "abc"] == [1, 2, 1]
    assert {".10", ".20", ".30"} <= set(texts)
    assert {"0.0", "0.4"} == {text.get_text() for text in bar.texts}


def test_pair_map__hatches_a_pair_without_a_value():
    value_CC = _pairs([1, math.nan, 0.2], [math.nan, 1, 0.3], [0.2, 0.3, 1])
    axes, _ = figures.pair_map(["a", "b", "c"], value_CC, limits=(0, 1), title="x").axes
    [hatched] = rectangles(axes)
    assert (hatched.get_x(), hatched.get_y(), hatched.get_hatch()) == (0, 0, "////")


@pytest.mark.parametrize("n", [2, 3, 24])
def test_pair_map__fits_the_width_with_every_name(n):
    names = [f"concept number {i:02d}" for i in range(n)]
    figure = figures.pair_map(names, np.full((n, n), 0.5), limits=(0, 1), title="x")
    axes = figure.axes[0]
    box = axes.get_position()
    assert 0 < box.x0 < box.x1 < 1
    assert 0 < box.y0 < box.y1 < 1
    labels = [text for text in axes.texts if "…" in text.get_text()]
    assert len(labels) == 2 * (n - 1)
    assert all(
        text.get_text().endswith(f"{i:02d}") for text, i in zip(labels, [*range(1, n), *range(n - 1)], strict=True)
    )
    assert min(text.get_fontsize() for text in labels) >= 6.5


def test_pair_map__writes_numbers_that_can_be_read_on_their_cells():
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for value in np.linspace(0, 1, 21):
        value_CC = np.full((2, 2), value)
        axes, _ = figures.pair_map(["a", "b"], value_CC, limits=(0, 1), title="x").axes
        [number] = [text for text in axes.texts if text.get_text() not in "ab"]
        light, dark = sorted(
            (luminance(number.get_color()), luminance(colormaps[axes.images[0].get_cmap().name](value)[:3]))
        )[::-1]
        assert (light + 0.05) / (dark + 0.05) >= 4, value


def test_layer_map__places_each_share():
    value_CL = _pairs([0.1, 0.2, math.nan], [0.4, 0.5, 0.6])
    axes, _ = figures.layer_map(["a", "b"], [0, 5, 7], value_CL, limits=(0, 1), title="x").axes
    np.testing.assert_allclose(axes.images[0].get_array().filled(-1), [[0.1, 0.2, -1], [0.4, 0.5, 0.6]])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "5", "7"]


def test_similar_together__puts_two_groups_side_by_side():
    value_CC = np.full((6, 6), 0.1)
    group = [0, 3, 4]
    for members in (group, [1, 2, 5]):
        value_CC[np.ix_(members, members)] = 0.9
    order = figures.similar_together(value_CC)
    assert sorted(order) == [0, 1, 2, 3, 4, 5]
    assert {frozenset(order[:3]), frozenset(order[3:])} == {frozenset(group), frozenset({1, 2, 5})}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_similar_together__takes_any_number_and_missing_pairs(n):
    assert sorted(figures.similar_together(np.full((n, n), np.nan))) == list(range(n))


# --- erasure and time ---


def _measured(condition: str, *values: float, spread: float | None = None) -> Measured:
    value_C = np.array(values)
    ends = {} if spread is None else {"low_C": value_C - spread, "high_C": value_C + spread}
    return Measured(condition=condition, name=condition.upper(), value_C=value_C, **ends)


def test_conditions__marks_each_condition_with_its_interval():
    measured = [_measured("base", 0.9, 0.8, spread=0.05), _measured("range", 0.4, 0.3, spread=0.1)]
    figure = figures.conditions(["joy", "law"], measured, title="x", unit="accuracy")
    axes = figure.axes[0]
    marks = {line.get_label(): line for line in axes.lines if line.get_label() in ("BASE", "RANGE")}
    assert marks["BASE"].get_xdata().tolist() == [0.9, 0.8]
    assert marks["RANGE"].get_xdata().tolist() == [0.4, 0.3]
    assert [int(y) for y in marks["RANGE"].get_ydata()] == [0, 1]
    assert marks["BASE"].get_marker() != marks["RANGE"].get_marker()
    spans = [path.vertices[:, 0].tolist() for lines in axes.collections for path in lines.get_paths()]
    np.testing.assert_allclose(spans, [[0.85, 0.95], [0.75, 0.85], [0.3, 0.5], [0.2, 0.4]])
    assert {"joy", "law", "BASE", "RANGE"} <= set(texts_of(figure))


def test_conditions__takes_a_logarithmic_axis_for_numbers_over_decades():
    measured = [_measured("base", 3.0), _measured("neuron", 4000.0)]
    assert (
        figures.conditions(["joy"], measured, title="x", unit="perplexity", share=False).axes[0].get_xscale() == "log"
    )
    near = [_measured("base", 3.0), _measured("neuron", 40.0)]
    assert figures.conditions(["joy"], near, title="x", unit="perplexity", share=False).axes[0].get_xscale() == "linear"


def test_conditions_beside__gives_each_kind_a_panel_over_the_same_rows():
    target = [_measured("base", 0.9, 0.8, spread=0.05), _measured("range", 0.4, 0.3)]
    others = [_measured("base", 0.7, 0.6), _measured("range", 0.65, 0.55)]
    figure = figures.conditions_beside(
        ["joy", "mean"], {"target": target, "others": others}, title="x", unit="probability", n_apart=1
    )
    left, right = figure.axes[:2]
    assert [axes.get_title(loc="left") for axes in (left, right)] == ["target", "others"]
    assert left.get_position().x1 < right.get_position().x0
    assert (left.get_position().y0, left.get_ylim()) == (right.get_position().y0, right.get_ylim())
    for axes, expected in ((left, {"BASE": [0.9, 0.8], "RANGE": [0.4, 0.3]}), (right, {"RANGE": [0.65, 0.55]})):
        marks = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
        assert {name: marks[name] for name in expected} == expected
        assert 1.0 in [line.get_ydata()[0] for line in axes.lines if len(line.get_ydata()) == 2]
    spans = [path.vertices[:, 0].tolist() for lines in left.collections for path in lines.get_paths()]
    np.testing.assert_allclose(spans[:2], [[0.85, 0.95], [0.75, 0.85]])
    written = texts_of(figure)
    assert [written.count(name) for name in ("joy", "mean", "BASE", "RANGE")] == [1, 1, 1, 1]


def test_trade_off__plots_the_losses_against_each_other():
    target = [_measured("base", 0.9), _measured("neuron", 0.2), _measured("range", 0.3)]
    others = [_measured("base", 0.8), _measured("neuron", 0.4), _measured("range", 0.75)]
    axes = figures.trade_off(target, others, unit="accuracy").axes[0]
    marks = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines}
    assert marks["NEURON"] == pytest.approx((0.4, 0.7))
    assert marks["RANGE"] == pytest.approx((0.05, 0.6))


def test_stacked_bars__adds_the_parts_up():
    axes = figures.stacked_bars(
        ["layer 0", "layer 1"], {"moments": [1, 2], "overlap": [3, 4]}, title="x", unit="s"
    ).axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in rectangles(axes)] == [(0, 1), (0, 2), (1, 3), (2, 4)]
    assert {"layer 0", "layer 1", "moments", "overlap"} <= set(texts_of(axes.figure))


# --- all of them ---

LONG = [f"{c * 30} {i}" for i, c in enumerate("wmWM愛日")]


def _every_figure() -> dict:
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    card = card_of(*(bump_of(x, name, nearest=LONG[0], nearest_ovl=0.5) for name in LONG))
    square = np.full((6, 6), 0.5)
    pair = [_measured("base", *[0.9] * 6), _measured("neuron", *[0.2] * 6), _measured("range", *[0.3] * 6)]
    spread = Band(layers=range(32), middle=[1] * 32, low=[-1e5] * 32, high=[1e5] * 32)
    return {
        "distributions": figures.distributions(card, colours=figures.concept_colours(LONG), explained=True),
        "layer_band": figures.layer_band(spread, title="Distance to the fitted Gaussian (KS)"),
        "layer_shares": figures.layer_shares([0, 31], np.full((3, 2), 1 / 3), ["0", "1", "128–200"], title="x"),
        "pair_map": figures.pair_map(LONG, square, limits=(0, 1), title="layer 31"),
        "layer_map": figures.layer_map(LONG, range(6), square, limits=(0, 1), title="Near-Gaussian share"),
        "conditions": figures.conditions(LONG, pair, title="Accuracy on the target", unit="accuracy"),
        "conditions_beside": figures.conditions_beside(
            LONG, {"target": pair, "others": pair}, title="What continuations speak of", unit="probability"
        ),
        "trade_off": figures.trade_off(pair, pair, unit="confidence"),
        "stacked_bars": figures.stacked_bars(LONG, {"wait for storage": [1e5] * 6}, title="x", unit="seconds"),
    }


def _ticks_out_of_view(figure) -> set:
    """Labels that matplotlib keeps and does not draw."""
    found = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        found |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    return found


@pytest.mark.parametrize("name", list(_every_figure()))
def test_figure__keeps_its_text_within_it(name):
    """In matplotlib's own font, which is wider than most that a page is shown in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _every_figure()[name]
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that no font here has
        canvas.draw()
        width, height = canvas.get_width_height()
        for text in set(figure.findobj(Text)) - _ticks_out_of_view(figure):
            if text.get_text() and text.get_visible():
                box = text.get_window_extent()
                inside = box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1
                assert inside, (text.get_text(), box)
