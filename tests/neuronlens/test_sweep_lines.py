"""What is drawn of the rows of evaluations."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronlens.sweep_lines import (
    Line,
    common,
    families_of,
    frontier,
    lines_along,
    lines_along_layers,
    text_sets,
    whole_neurons,
)
from tests.report_stores import sweep_row


def row(setting: int, condition: str = "range", drops=(0.5, 0.1), kl: float = 0.1, **more) -> dict:
    told = {"evaluation_id": "sweep.1", "texts": 1, "n_texts": 60, "bare_confidence": 0.9}
    return sweep_row(condition, *drops, kl, setting=setting, **told | more)


def points(line: Line) -> list[tuple[float, float, float, float]]:
    values = (line.x_P, line.target.value_P, line.others.value_P, line.kl_P)
    return [tuple(point) for point in np.transpose(values).round(6).tolist()]


# --- lines ---


def test_lines_along__are_in_the_order_of_the_key_with_drops_and_divergences():
    rows = [row(i, tau=tau, drops=(tau / 10, tau / 100), kl=tau) for i, tau in enumerate((3.0, 1.0, 2.0))]
    [line] = lines_along(rows, "tau")
    assert points(line) == [(1, 0.1, 0.01, 1), (2, 0.2, 0.02, 2), (3, 0.3, 0.03, 3)]
    np.testing.assert_allclose(line.target.low_P, [0.08, 0.18, 0.28])
    np.testing.assert_allclose(line.others.high_P, [0.03, 0.04, 0.05])
    assert line.best == pytest.approx(0.27)
    assert (line.name, line.whole) == ("ranges", None)


def test_lines_along__are_one_for_each_value_of_the_other_keys_the_best_first():
    grid = list(itertools.product((1.0, 2.0), (0.1, 0.3), ("zero", "others")))
    rows = [
        row(i, tau=tau, top_fraction=top, action=action, drops=(tau * top, 0.0))
        for i, (tau, top, action) in enumerate(grid)
        if (top, action) != (0.1, "others")
    ]
    lines = lines_along(rows, "tau")
    assert [line.name for line in lines[-1:]] == ["top_fraction 0.1, action zero"]
    assert {line.name for line in lines[:2]} == {"top_fraction 0.3, action zero", "top_fraction 0.3, action others"}
    assert points(lines[-1]) == [(1, 0.1, 0, 0.1), (2, 0.2, 0, 0.1)]


def test_lines_along__leave_out_settings_without_the_key_and_lines_of_one_point():
    rows = [row(i, method="hpd", tau=None, mass=mass) for i, mass in enumerate((0.5, 0.9))]
    rows += [row(2, tau=1.0), row(3, tau=2.0), row(4, tau=2.0, action="others")]
    [of_tau], [of_mass] = lines_along(rows, "tau"), lines_along(rows, "mass")
    assert of_tau.x_P.tolist() == [1, 2]
    assert of_mass.x_P.tolist() == [0.5, 0.9]
    assert lines_along(rows, "penalty") == []


def test_lines_along__have_whole_neurons_of_the_same_settings_beside_them():
    rows = [
        row(i, condition, tau=tau, drops=(drop, 0.2), kl=drop)
        for i, tau in enumerate((2.0, 1.0))
        for condition, drop in (("range", tau / 10), ("neuron", tau / 2))
    ]
    [line] = lines_along(rows, "tau")
    assert line.whole is not None
    assert points(line.whole) == [(1, 0.5, 0.2, 0.5), (2, 1.0, 0.2, 1.0)]
    [without] = lines_along(rows[:-1], "tau")
    assert without.whole is None


def test_lines_along_layers__keep_all_layers_apart():
    rows = [
        row(layer, condition, layers=[layer], drops=(drop, drop / 4), kl=2 * drop)
        for layer in (4, 0, 2)
        for condition, drop in (("range", layer / 10), ("neuron", layer / 5))
    ]
    rows += [row(8, condition, layers=None, drops=(0.9, 0.5), kl=3.0) for condition in ("range", "neuron")]
    rows += [row(9, layers=[0, 2], drops=(0.8, 0.0))]
    [line] = lines_along_layers(rows)
    np.testing.assert_array_equal(line.x_P, [0, 2, 4, math.nan, 5.5])
    np.testing.assert_allclose(line.target.value_P, [0, 0.2, 0.4, math.nan, 0.9])
    np.testing.assert_allclose(line.target.low_P, [-0.02, 0.18, 0.38, math.nan, 0.88])
    np.testing.assert_allclose(line.others.value_P, [0, 0.05, 0.1, math.nan, 0.5])
    np.testing.assert_allclose(line.kl_P, [0, 0.4, 0.8, math.nan, 3])
    assert line.whole is not None
    np.testing.assert_allclose(line.whole.target.value_P, [0, 0.4, 0.8, math.nan, 0.9])


def test_lines_along_layers__are_none_without_single_layers():
    assert lines_along_layers([row(0, layers=None), row(1, layers=[0, 1])]) == []


def test_lines_along_layers__are_one_a_hook_point():
    rows = [
        row(i, layers=[layer], hook_points=[hook_point])
        for i, (layer, hook_point) in enumerate(itertools.product((0, 1), ("mlp_post", "resid_post")))
    ]
    assert sorted(line.name for line in lines_along_layers(rows)) == ["mlp_post", "resid_post"]


# --- families ---


def test_families_of__follow_the_one_key_that_varies():
    rows = [row(i, method="hpd", tau=None, mass=mass, drops=(mass, 0)) for i, mass in enumerate((0.9, 0.5, 0.7))]
    rows += [row(9, method="hpd", tau=None, mass=0.5, action="others", drops=(0.1, 0))]
    first, second = families_of(rows)
    assert (first.name, first.varied, second.name, second.varied) == (
        *("hpd, action zero", ("mass",)),
        *("hpd, action others", ()),
    )
    assert first.target.value_P.tolist() == [0.5, 0.7, 0.9]
    assert first.joined(np.array([3.0, 1.0, 2.0])).tolist() == [0, 1, 2]


def test_families_of__join_what_no_other_beats_where_several_keys_vary():
    drops = {(1.0, 0.1): (0.2, 0.1), (1.0, 0.5): (0.5, 0.2), (2.0, 0.1): (0.4, 0.3), (2.0, 0.5): (0.8, 0.4)}
    rows = [row(i, tau=tau, top_fraction=top, drops=pair) for i, ((tau, top), pair) in enumerate(drops.items())]
    [family] = families_of(rows)
    assert set(family.varied) == {"tau", "top_fraction"}
    joined = family.joined(family.others.value_P)
    assert family.target.value_P[joined].tolist() == [0.2, 0.5, 0.8]


def test_families_of__name_hook_points_and_positions_only_where_they_differ():
    rows = [row(0, hook_points=["mlp_post"]), row(1, hook_points=None, positions="last")]
    assert {family.name for family in families_of(rows)} == {
        "paper, action zero, mlp_post, all positions",
        "paper, action zero, all hook points, last position",
    }


def test_whole_neurons__are_one_family_with_each_result_once():
    rows = [row(i, "neuron", tau=tau, drops=(0.6, 0.3), kl=2.0) for i, tau in enumerate((1.0, 2.0))]
    rows += [row(2, "neuron", action="others", drops=(0.5, 0.1), kl=1.0), row(3)]
    family = whole_neurons(rows)
    assert family is not None
    assert sorted(family.target.value_P.tolist()) == [0.5, 0.6]
    assert whole_neurons([row(0)]) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_frontier__holds_what_no_other_beats(pairs):
    gain_P, cost_P = np.array(pairs, float).T
    kept = [pairs[i] for i in frontier(gain_P, cost_P)]
    unbeaten = {
        (gain, cost)
        for gain, cost in pairs
        if not any((g >= gain and c < cost) or (g > gain and c <= cost) for g, c in pairs)
    }
    assert kept == sorted(unbeaten)


def test_frontier__leaves_out_what_is_not_known():
    assert frontier(np.array([1.0, math.nan, 2.0]), np.array([1.0, 0.0, math.nan])).tolist() == [0]


# --- sets of texts ---


def test_text_sets__find_the_best_setting_and_what_stands_beside_it():
    rows = [row(0, drops=(0.5, 0.1)), row(1, drops=(0.9, 0.7)), row(0, "random", drops=(0.1, 0.1))]
    rows += [row(0, drops=(0.8, 0.1), evaluation_id="sweep.2"), row(5, drops=(0.9, 0.0), texts=2)]
    first, second = text_sets(rows)
    best, controlled = first.best(), first.best(controlled=True)
    assert best is not None
    assert (best["evaluation_id"], best["setting"]) == ("sweep.2", 0)
    assert controlled is not None
    assert (controlled["evaluation_id"], controlled["setting"]) == ("sweep.1", 0)
    assert first.beside(controlled).keys() == {"range", "random"}
    assert second.best(controlled=True) is None
    assert len(first.different) == 1  # all of them say the same of their setting


def test_text_sets__know_whether_there_are_right_answers():
    [without] = text_sets([row(0, drops=(None, None))])
    assert (without.has_drops, without.best()) == (False, None)
    [with_answers] = text_sets([row(0)])
    assert with_answers.has_drops


# --- words ---


def test_common__says_what_all_settings_share_but_what_goes_without_saying():
    rows = [row(0, tau=1.0, layers=[5], positions="last"), row(1, tau=2.0, layers=[5], positions="last")]
    assert common(rows) == "paper, action zero, top_fraction 0.3, layer 5, last position"
    assert common(rows[:1], but="layers") == "paper, action zero, tau 1, top_fraction 0.3, last position"
    assert common([row(0, layers=[0, 5], hook_points=["mlp_post"], salience="probe")]) == (
        "paper, action zero, tau 2.5, top_fraction 0.3, layers 0+5, mlp_post, salience probe"
    )
