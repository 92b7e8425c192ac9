"""The controls of an evaluation: what they take, neuron by neuron."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from neuronlens.controls import (
    CONTROLS,
    ControlTables,
    parse_controls,
    plan_controls,
    random_rules,
    randomly_ranked,
    shuffled_table,
)
from neuronlens.errors import UsageError
from neuronlens.evaluation import EvaluationPlan, plan_conditions
from neuronlens.programs import Edit, Program
from neuronlens.ranges import RangeTable
from tests.range_tables import TAU, pieces, row, table_of

WIDTH = 40
CONCEPTS = ("joy", "anger", "fear")
WIDTHS = {"mlp_post": WIDTH}


def made_table(n_salient: int, *, seed: int = 0) -> RangeTable:
    """The `n_salient` first neurons of a shuffled order in two layers, with ranges of their own for every concept."""
    rng = np.random.default_rng(seed)
    moments = rng.uniform(0.1, 0.5, (2, len(CONCEPTS), WIDTH, 2))
    order = rng.permuted(np.tile(np.arange(WIDTH), (2, len(CONCEPTS), 1)), axis=2)
    return table_of(
        [
            row(concept, int(n), *moments[layer, c, n].tolist(), layer=layer, rank=rank)
            for layer in (0, 1)
            for c, concept in enumerate(CONCEPTS)
            for rank, n in enumerate(order[layer, c, :n_salient], start=1)
        ],
        widths=WIDTHS,
        top_fraction=n_salient / WIDTH,
    )


TABLE, ALL = made_table(10), made_table(WIDTH)
SHUFFLED = randomly_ranked(ALL)


def planned(edit: Edit, controls: Any, **more: Any) -> tuple[EvaluationPlan, dict[tuple[str, str], Any]]:
    plan = EvaluationPlan()
    ranged = plan_conditions(plan, 0, TABLE, edit, CONCEPTS)
    plan_controls(plan, 0, TABLE, edit, ranged, controls, ControlTables(**more))
    return plan, {(case.concept, case.condition): case for case in plan.cases}


def program_of(plan: EvaluationPlan, number: int) -> Program:
    return plan.at_work(slice(number - 1, number))[0].program


def test_parse_controls__keeps_our_order() -> None:
    assert parse_controls(None) == parse_controls("") == ()
    assert parse_controls("shuffled, random") == ("random", "shuffled")
    assert parse_controls(",".join(CONTROLS)) == CONTROLS
    with pytest.raises(UsageError, match=r"Unknown control 'rnd'. There are: random, wrong_concept"):
        parse_controls("random,rnd")


@pytest.mark.parametrize("edit", [Edit(), Edit(layers=(1,), tau=1.0, action="dampen", factor=0.5)])
def test_random__takes_as_many_neurons_of_each_layer_with_ranges_of_their_own(edit: Edit) -> None:
    plan, cases = planned(edit, ["random"], in_random_order=SHUFFLED)
    tau = edit.tau or TAU
    for concept in CONCEPTS:
        own = program_of(plan, cases[concept, "range"].number)
        drawn = program_of(plan, cases[concept, "random"].number)
        assert [(s.hook_point, s.layer) for s in drawn.sites] == [(s.hook_point, s.layer) for s in own.sites]
        for mine, site in zip(own.sites, drawn.sites, strict=True):
            assert mine.named_N.sum() == site.named_N.sum() == 10
            assert (mine.named_N != site.named_N).any()
            rows = ALL.select(concept, layers=[site.layer]).to_pylist()
            for r in rows:
                if site.named_N[r["neuron"]]:
                    low, high = r["mean"] - tau * r["std"], r["mean"] + tau * r["std"]
                    n = [site.lower_RN[:, r["neuron"]].min(), site.upper_RN[:, r["neuron"]].max()]
                    assert n == [pytest.approx(low), pytest.approx(high)]
            assert set(site.a_RN[:, site.named_N].max(axis=0)) == {edit.factor or 0.0}


def drawn(program: Program, table: RangeTable, concept: str) -> list[set[int]]:
    """The neurons that random rules name, site by site."""
    found = Program.compile(table, random_rules(program, table, Edit(), concept))
    return [set(np.flatnonzero(site.named_N).tolist()) for site in found.sites]


def test_random__draws_the_same_again_and_more_of_the_same() -> None:
    few, more = (Program.compile(made_table(n), [{"concept": "joy"}]) for n in (4, 9))
    assert drawn(few, SHUFFLED, "joy") == drawn(few, randomly_ranked(ALL), "joy")
    assert [len(there) for there in drawn(few, SHUFFLED, "joy")] == [4, 4]
    assert all(a < b for a, b in zip(drawn(few, SHUFFLED, "joy"), drawn(more, SHUFFLED, "joy"), strict=True))
    assert drawn(few, SHUFFLED, "joy") != drawn(few, SHUFFLED, "anger")
    assert len({frozenset(there) for there in drawn(few, SHUFFLED, "joy")}) == 2
    everything = Program.compile(ALL, [{"concept": "joy"}])
    assert drawn(everything, SHUFFLED, "joy") == [set(range(WIDTH))] * 2
    # Any neuron may be drawn: over many concepts, about equally often.
    many = randomly_ranked(
        table_of([row(f"c{c}", n, 0.0, 1.0) for c in range(300) for n in range(WIDTH)], widths=WIDTHS)
    )
    ten = Program.compile(table_of([row("c0", n, 0.0, 1.0) for n in range(10)], widths=WIDTHS), [{"concept": "c0"}])
    times_N = np.bincount([n for c in range(300) for n in drawn(ten, many, f"c{c}")[0]], minlength=WIDTH)
    assert times_N.sum() == 3000
    assert 40 < times_N.min() < times_N.max() < 115  # 75 each, give or take 5 standard deviations


def test_randomly_ranked__keeps_the_pieces_of_a_neuron_together() -> None:
    rows = [piece for n in range(6) for piece in pieces("joy", n, [(0.0, 1.0, 0.5), (2.0, 3.0, 0.25)], rank=n + 1)]
    own = table_of(rows, widths={"mlp_post": 6}, method="hpd", options={"mass": 0.9}, top_fraction=1.0)
    found = randomly_ranked(own).rows.to_pylist()
    ranks = {row["neuron"]: row["rank"] for row in found}
    assert sorted(ranks.values()) == list(range(1, 7))
    assert list(ranks) != sorted(ranks)
    assert [(row["neuron"], row["rank"]) for row in found] == [
        (neuron, rank) for neuron, rank in sorted(ranks.items(), key=lambda item: item[1]) for _ in range(2)
    ]


def test_random__refuses_a_table_that_has_too_few() -> None:
    with pytest.raises(UsageError, match=r"draws 10 neurons of mlp_post, layer 0, and table tbl_.* has 4 of joy there"):
        planned(Edit(), ["random"], in_random_order=randomly_ranked(made_table(4)))


def test_wrong_concept__is_the_next_ones_range_and_takes_no_pass_of_its_own() -> None:
    plan, cases = planned(Edit(), ["wrong_concept"])
    assert plan.n_passes == 1 + 2 * len(CONCEPTS)
    for concept, other in (("anger", "fear"), ("fear", "joy"), ("joy", "anger")):
        case = cases[concept, "wrong_concept"]
        assert (case.number, case.control) == (cases[other, "range"].number, other)
    alone = EvaluationPlan()
    ranged = plan_conditions(alone, 0, TABLE, Edit(), ["joy"])
    with pytest.raises(UsageError, match="needs another concept than joy"):
        plan_controls(alone, 0, TABLE, Edit(), ranged, ["wrong_concept"], ControlTables())


def test_length_matched__is_scored_on_the_ranges_own_pass() -> None:
    plan, cases = planned(Edit(), ["length_matched"])
    assert plan.n_passes == 1 + 2 * len(CONCEPTS)
    for concept in CONCEPTS:
        assert cases[concept, "length_matched"].number == cases[concept, "range"].number


def test_shuffled__keeps_the_neurons_and_takes_other_ranges() -> None:
    rng = np.random.default_rng(4)
    keys = ALL.rows.select(["hook_point", "layer", "neuron", "concept"]).to_pylist()
    moments = [{**key, "mean": rng.normal(), "std": rng.uniform(0.1, 1)} for key in rng.permutation(keys).tolist()]
    table = shuffled_table(TABLE, pa.Table.from_pylist(moments))
    by_key = {(m["layer"], m["neuron"], m["concept"]): m for m in moments}
    own = {(r["layer"], r["neuron"], r["concept"]): r for r in TABLE.rows.to_pylist()}
    found = {(r["layer"], r["neuron"], r["concept"]): r for r in table.rows.to_pylist()}
    assert found.keys() == own.keys()
    for key, r in found.items():
        mean, std = by_key[key]["mean"], by_key[key]["std"]
        assert (r["mean"], r["std"]) == (mean, std)
        assert (r["lower"], r["upper"]) == (pytest.approx(mean - TAU * std), pytest.approx(mean + TAU * std))
        assert (r["rank"], r["n"], r["salience"]) == tuple(own[key][name] for name in ("rank", "n", "salience"))

    plan, cases = planned(Edit(tau=1.5), ["shuffled"], shuffled=table, shuffled_from="thin air")
    for concept in CONCEPTS:
        ranged, other = (program_of(plan, cases[concept, name].number) for name in ("range", "shuffled"))
        assert cases[concept, "shuffled"].control == "thin air"
        for a, b in zip(ranged.sites, other.sites, strict=True):
            np.testing.assert_array_equal(a.named_N, b.named_N)
            assert not np.array_equal(a.lower_RN, b.lower_RN)
            n = int(np.flatnonzero(b.named_N)[0])
            m = by_key[b.layer, n, concept]
            assert b.upper_RN[0, n] == pytest.approx(m["mean"] + 1.5 * m["std"])
    assert all(math.isfinite(r["lower"]) for r in table.rows.to_pylist())


def test_controls__of_an_intervention_without_neurons_are_the_bare_model() -> None:
    plan = EvaluationPlan()
    edit = Edit(hook_points=("resid_post",))
    ranged = plan_conditions(plan, 0, TABLE, edit, CONCEPTS)
    tables = ControlTables(in_random_order=SHUFFLED, shuffled=TABLE, shuffled_from="nothing")
    plan_controls(plan, 0, TABLE, edit, ranged, CONTROLS, tables)
    assert len(plan.cases) == 3 * (3 + 4)
    assert {case.number for case in plan.cases} == {0}
