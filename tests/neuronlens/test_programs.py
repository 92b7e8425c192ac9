"""Rules and the arrays that they compile to."""

import math

import numpy as np
import pytest

from neuronlens.errors import UsageError
from neuronlens.programs import Edit, Program, Rule, first_conflict
from neuronlens.ranges import RangeTable
from tests.range_tables import pieces, row, table_of

INF = math.inf


@pytest.fixture
def table() -> RangeTable:
    return table_of(
        [
            row("joy", 2, 0.5, 0.25),
            row("joy", 0, -1.0, 0.0, rank=2),
            row("anger", 1, 3.0, 1.0),
            row("joy", 1, 1.5, 0.5, layer=3),
            row("joy", 5, 4.0, 2.0, layer=3, hook_point="resid_post"),
        ],
        widths={"mlp_post": 4, "resid_post": 8},
    )


def test_compile__puts_each_rows_range_at_its_site(table: RangeTable) -> None:
    program = Program.compile(table, [Rule(concept="joy")])
    assert [(site.hook_point, site.layer, site.width) for site in program.sites] == [
        ("mlp_post", 0, 4),
        ("mlp_post", 3, 4),
        ("resid_post", 3, 8),
    ]
    first, second, third = program.sites
    np.testing.assert_array_equal(first.lower_RN, [[-1.0, INF, -0.125, INF]])
    np.testing.assert_array_equal(first.upper_RN, [[-1.0, -INF, 1.125, -INF]])
    np.testing.assert_array_equal(second.lower_RN, [[INF, 0.25, INF, INF]])
    np.testing.assert_array_equal(third.upper_RN, [[-INF] * 5 + [9.0] + [-INF] * 2])
    np.testing.assert_array_equal(first.named_N, [True, False, True, False])
    assert (program.hook_points, program.layers) == (("mlp_post", "resid_post"), (0, 3))
    assert (program.table_id, program.config_hash) == (table.id, "c" * 16)


@pytest.mark.parametrize(
    ("rule", "a", "b", "constant"),
    [
        ({"action": "zero"}, [0, 0, 0, 0], [0, 0, 0, 0], True),
        ({"action": "mean"}, [0, 0, 0, 0], [-1.0, 0, 0.5, 0], True),
        ({"action": "set", "value": 7}, [0, 0, 0, 0], [7, 0, 7, 0], True),
        ({"action": "dampen", "factor": 0.25}, [0.25, 0, 0.25, 0], [0, 0, 0, 0], False),
        ({"action": "dampen", "factor": 0}, [0, 0, 0, 0], [0, 0, 0, 0], True),
    ],
    ids=lambda value: value["action"] if isinstance(value, dict) else "",
)
def test_compile__gives_every_action_its_affine_form(
    table: RangeTable, rule: dict, a: list, b: list, constant: bool
) -> None:
    site = Program.compile(table, [{"concept": "joy", "layers": [0], **rule}]).sites[0]
    np.testing.assert_array_equal(site.a_RN, [a])
    np.testing.assert_array_equal(site.b_RN, [b])
    assert site.g_RN is None
    assert site.centre_RN is None
    assert site.constant_R.tolist() == [constant]


def test_compile__adaptive_has_a_slope_and_a_centre(table: RangeTable) -> None:
    site = Program.compile(table, [Rule(concept="joy", action="adaptive", layers=(0,))]).sites[0]
    assert site.g_RN is not None
    np.testing.assert_array_equal(site.g_RN, [[0, 0, 0.125 / 0.625, 0]])  # half width 2.5 * 0.25; a point has no slope
    np.testing.assert_array_equal(site.centre_RN, [[-1.0, 0, 0.5, 0]])
    assert site.constant_R.tolist() == [False]
    half = Program.compile(table, [Rule(concept="joy", action="adaptive", factor=0.5, tau=1, layers=(3,))]).sites[0]
    assert half.g_RN is not None
    assert half.g_RN[0, 1] == 0.5 / 0.5


def test_compile__adaptive_refuses_a_range_without_end() -> None:
    table = table_of([row("joy", 2, 0.5, 0.25, upper=INF)])
    with pytest.raises(UsageError, match="has no end"):
        Program.compile(table, [Rule(concept="joy", action="adaptive")])


def test_compile__takes_the_rules_tau_or_the_tables_bounds() -> None:
    table = table_of([row("joy", 2, 0.5, 0.25, lower=0.1, upper=0.2), row("joy", 0, 1.0, 0.0, rank=2)])

    def bounds(tau: float | None) -> list[list[float]]:
        site = Program.compile(table, [Rule(concept="joy", tau=tau)]).sites[0]
        return [site.lower_RN[0, [2, 0]].tolist(), site.upper_RN[0, [2, 0]].tolist()]

    assert bounds(None) == [[0.1, 1.0], [0.2, 1.0]]
    assert bounds(2) == [[0.0, 1.0], [1.0, 1.0]]
    assert bounds(INF) == [[-INF, -INF], [INF, INF]]


def test_compile__stacks_rules_in_the_order_given(table: RangeTable) -> None:
    rules = [Rule(concept="anger", action="set", value=1), Rule(concept="joy", action="adaptive"), Rule(concept="joy")]
    program = Program.compile(table, rules)
    assert program.rules == tuple(rules)
    site = program.sites[0]
    np.testing.assert_array_equal(site.lower_RN != INF, [[0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]])
    np.testing.assert_array_equal(site.b_RN[0], [0, 1, 0, 0])
    assert site.g_RN is not None
    np.testing.assert_array_equal(site.g_RN[0], 0)
    assert site.constant_R.tolist() == [True, False, True]
    assert [len(site.lower_RN) for site in program.sites] == [3, 2, 2]


@pytest.fixture
def with_pieces() -> RangeTable:
    rows = [
        *pieces("joy", 2, [(-1.0, -0.5, 0.75), (0.25, 0.5, 0.5)]),
        *pieces("joy", 0, [(0.0, 2.0, 1.0)], mean=1.0, rank=2),
        *pieces("anger", 2, [(-4.0, -3.0, 0.25), (-2.0, -1.5, 0.25), (3.0, 4.0, 0.25)]),
    ]
    return table_of(rows, method="likelihood_ratio")


def test_compile__gives_every_piece_of_a_rule_its_row(with_pieces: RangeTable) -> None:
    program = Program.compile(with_pieces, [{"concept": "joy", "action": "soften"}, {"concept": "anger"}])
    (site,) = program.sites
    assert site.rule_R.tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_array_equal(site.lower_RN[:2], [[0.0, INF, -1.0, INF], [INF, INF, 0.25, INF]])
    np.testing.assert_array_equal(site.upper_RN[:2], [[2.0, -INF, -0.5, -INF], [-INF, -INF, 0.5, -INF]])
    np.testing.assert_array_equal(site.a_RN, [[0, 0, 0.25, 0], [0, 0, 0.5, 0], *[[0] * 4] * 3])
    np.testing.assert_array_equal(site.lower_RN[2:, 2], [-4, -2, 3])
    assert site.constant_R.tolist() == [False, False, True, True, True]
    assert site.named_N.tolist() == [True, False, True, False]


def test_compile__takes_a_neuron_with_pieces_once_where_the_rule_has_a_tau(with_pieces: RangeTable) -> None:
    (site,) = Program.compile(with_pieces, [{"concept": "joy", "tau": 2}]).sites
    np.testing.assert_array_equal(site.lower_RN, [[0.0, INF, -0.5, INF]])
    np.testing.assert_array_equal(site.upper_RN, [[2.0, -INF, 1.5, -INF]])


def test_compile__adaptive_has_the_centre_of_each_piece(with_pieces: RangeTable) -> None:
    (site,) = Program.compile(with_pieces, [{"concept": "joy", "action": "adaptive", "factor": 1}]).sites
    assert site.centre_RN is not None
    assert site.g_RN is not None
    np.testing.assert_array_equal(site.centre_RN, [[1.0, 0, -0.75, 0], [0, 0, 0.375, 0]])
    np.testing.assert_array_equal(site.g_RN, [[1.0, 0, 4, 0], [0, 0, 8, 0]])


def test_first_conflict__is_between_rules_never_between_pieces_of_one(with_pieces: RangeTable) -> None:
    def of(*rules: dict) -> tuple[int, int, int] | None:
        found = first_conflict(Program.compile(with_pieces, list(rules)))
        return None if found is None else (found.first, found.second, found.neuron)

    joy, anger = {"concept": "joy"}, {"concept": "anger"}
    assert of(joy, anger) is None
    assert of(anger, anger) == (0, 1, 2)
    assert of(anger, joy, {"concept": "anger", "tau": 1.5}) == (1, 2, 2)  # [-0.25, 1.25] and joy's [0.25, 0.5]
    table = table_of(pieces("joy", 0, [(0.0, 1.0, 0.5), (1.0 + 2**-40, 2.0, 0.5)]), method="hpd")
    assert first_conflict(Program.compile(table, [joy])) is None


def test_compile__takes_the_most_salient_alone_when_asked(table: RangeTable) -> None:
    site = Program.compile(table, [Rule(concept="joy", layers=(0,), top_fraction=0.25)]).sites[0]
    np.testing.assert_array_equal(site.named_N, [False, False, True, False])


def test_compile__refuses_a_rule_that_names_no_neuron() -> None:
    table = table_of([row("joy", 2, 0.5, 0.25, rank=2)])  # the most salient neuron had no finite value
    with pytest.raises(UsageError, match="has no neuron for the rule"):
        Program.compile(table, [Rule(concept="joy", top_fraction=0.25)])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "No rule was given"),
        ([{"concept": "fear"}], "no concept fear. It has: anger, joy"),
        ([{"concept": "joy", "layers": [2]}], "no layer 2 for joy. It has: 0, 3"),
        (
            [{"concept": "joy", "hook_points": ["attn_out"]}],
            "no hook point attn_out for joy. It has: mlp_post, resid_post",
        ),
        ([{"concept": "joy", "top_fraction": 0.9}], "at most 0.5"),
        ([{"concept": "anger", "layers": [3]}], "no layer 3 for anger. It has: 0"),
        ([{"concept": "joy", "strength": 2}], "strength: Extra inputs are not permitted"),
        ([{"concept": "joy", "action": "erase"}], "the actions are zero, mean, others, dampen, adaptive, set, soften"),
        ([{"action": "zero"}], "concept: Field required"),
        ([{"concept": "joy", "action": "dampen"}], "no factor was given"),
        ([{"concept": "joy", "action": "dampen", "factor": 1.5}], "factor: .* less than or equal to 1"),
        ([{"concept": "joy", "action": "dampen", "factor": math.nan}], "factor"),
        ([{"concept": "joy", "factor": 0.5}], "action zero takes no factor, found 0.5"),
        ([{"concept": "joy", "action": "set"}], "no value was given"),
        ([{"concept": "joy", "action": "set", "value": INF}], "value: .* finite"),
        ([{"concept": "joy", "action": "mean", "value": 2}], "action mean takes no value, found 2.0"),
        ([{"concept": "joy", "action": "adaptive", "tau": INF}], "with tau inf there is none"),
        ([{"concept": "joy", "action": "soften"}], "table tbl_.* has none: .* ranges STORE --method likelihood_ratio"),
        ([{"concept": "joy", "action": "soften", "tau": 2}], "tau 2 makes others, which have none; leave tau out"),
        ([{"concept": "joy", "action": "soften", "factor": 0.5}], "action soften takes no factor"),
        ([{"concept": "joy", "tau": 0}], "tau: .* greater than 0"),
        ([{"concept": "joy", "tau": math.nan}], "tau"),
        ([{"concept": "joy", "layers": []}], "layers is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compile__refuses_with_a_sentence(table: RangeTable, rules: list[dict], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Program.compile(table, rules)


def test_program_id__is_the_hash_of_what_is_done(table: RangeTable) -> None:
    def of(**fields: object) -> str:
        return Program.compile(table, [{"concept": "joy", **fields}]).id

    assert of() == of(tau=2.5) == of(layers=[3, 0]) == of(action="dampen", factor=0)
    others = [of(tau=2), of(layers=[0]), of(action="mean"), of(action="adaptive"), of(tau=INF), of(top_fraction=0.25)]
    assert len({of(), *others}) == 7
    assert of().startswith("prg_")


def test_program_id__follows_the_order_of_rules(table: RangeTable) -> None:
    rules = [Rule(concept="joy"), Rule(concept="joy", action="mean", tau=1)]
    assert Program.compile(table, rules).id != Program.compile(table, rules[::-1]).id


def test_rule__survives_json_with_an_infinite_tau() -> None:
    rule = Rule(concept="joy", tau=INF, layers=(1, 2))
    assert Rule.model_validate_json(rule.model_dump_json()) == rule


def test_rule__of_an_edit_has_its_fields() -> None:
    edit = Edit(action="dampen", factor=0.5, layers=(1,), tau=2)
    assert Rule.of(edit, "joy") == Rule(concept="joy", action="dampen", factor=0.5, layers=(1,), tau=2)
