"""What a grid means: its values, its settings, and the tables that they need."""

from typing import Any

import pytest

from neuronlens.errors import UsageError
from neuronlens.programs import Edit
from neuronlens.ranges import RangeTable
from neuronlens.report import SETTING_COLUMNS
from neuronlens.sweep import Setting, WantedTable, parse_grid, settings_of, wanted_tables
from tests.range_tables import pieces, row, table_of

TABLE = table_of([row("joy", 0, 0.0, 1.0), row("joy", 1, 0.0, 1.0, layer=3)], top_fraction=0.3)


def hpd_table() -> RangeTable:
    return table_of(pieces("joy", 0, [(0.0, 1.0, 0.5)]), top_fraction=0.3, method="hpd", options={"mass": 0.9})


def settings(*sweeps: str, table: RangeTable = TABLE, edit: Edit | None = None) -> list[Setting]:
    base = Setting.of(table, edit)
    return settings_of(parse_grid(sweeps), base, table, layers=(0, 3), hook_points=("mlp_post", "resid_post"))


def edits(*sweeps: str, **more: Any) -> list[dict[str, Any]]:
    return [one.edit.model_dump(exclude_none=True) for one in settings(*sweeps, **more)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2", [2.0]),
        ("0.5:4:0.5", [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]),
        ("0.1:0.3:0.1", [0.1, 0.2, 0.3]),
        ("1:2:0.4", [1.0, 1.4, 1.8]),
        ("3:1:-1", [3.0, 2.0, 1.0]),
        ("2:2:1", [2.0]),
        ("1, 0.25,1", [1.0, 0.25]),
        ("4,1:2:1", [4.0, 1.0, 2.0]),
    ],
)
def test_parse_grid__reads_numbers_exactly(text: str, expected: list[float]) -> None:
    assert parse_grid([f"tau={text}"]) == {"tau": tuple(expected)}


def test_parse_grid__reads_places_and_names() -> None:
    grid = parse_grid(["layers=each,all,5+0,2", "hook_points=each,mlp_post+attn_out", "action = zero,mean"])
    assert grid["layers"] == ("each", "all", (0, 5), (2,))
    assert grid["hook_points"] == ("each", ("attn_out", "mlp_post"))
    assert grid["action"] == ("zero", "mean")


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["tau"], "'tau' is not key=values"),
        (["tao=1"], "The keys: tau, top_fraction, mass"),
        (["tau= "], "is not key=values"),
        (["tau=1", "tau=2"], "gives tau twice"),
        (["tau=a"], "--sweep tau has 'a'; expected a number"),
        (["tau=inf"], "--sweep tau has 'inf'"),
        (["tau=1:2"], "has '1:2'; expected a number, or start:stop:step"),
        (["tau=1:2:0"], "with a step that leads from start to stop"),
        (["tau=1:2:-1"], "with a step that leads from start to stop"),
        (["layers=-1"], "layers has '-1'; expected each, all"),
        (["layers=0+a"], r"layers has '0\+a'"),
    ],
)
def test_parse_grid__says_what_is_wrong(sweeps: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_grid(sweeps)


def test_settings_of__are_every_combination_the_first_key_slowest() -> None:
    found = edits("tau=1,2", "top_fraction=0.1,0.5", "layers=each,all")
    assert [(e["tau"], e["top_fraction"], e.get("layers")) for e in found] == [
        (tau, fraction, layers) for tau in (1.0, 2.0) for fraction in (0.1, 0.5) for layers in ((0,), (3,), None)
    ]
    assert [e["hook_points"] for e in edits("hook_points=each")] == [("mlp_post",), ("resid_post",)]


def test_settings_of__take_the_rest_from_the_edit_and_the_table() -> None:
    edit = Edit(action="dampen", factor=0.25, layers=(3,))
    [one] = edits("tau=1", edit=edit)
    assert one == {"action": "dampen", "factor": 0.25, "layers": (3,), "tau": 1.0, "top_fraction": 0.3}
    [one] = edits("positions=last")
    assert one == {"action": "zero", "tau": TABLE.header.tau, "top_fraction": 0.3}
    assert settings("positions=last")[0].positions == "last"
    assert edits("layers=all", edit=edit) == [{"action": "dampen", "factor": 0.25, "tau": 2.5, "top_fraction": 0.3}]


def test_settings_of__leave_out_what_does_not_apply_at_a_point() -> None:
    found = settings("method=paper,hpd,likelihood_ratio", "tau=1,2", "mass=0.8,0.9")
    told = [(one.method, one.edit.tau, one.options, one.edit.top_fraction) for one in found]
    assert told == [
        ("paper", 1.0, (), 0.3),
        ("paper", 2.0, (), 0.3),
        ("hpd", None, (("mass", 0.8),), 0.3),
        ("hpd", None, (("mass", 0.9),), 0.3),
        # It chooses neurons by itself, so among all; its own option is at its default.
        ("likelihood_ratio", None, (("penalty", 3.0),), 1.0),
    ]
    assert [e.get("factor") for e in edits("action=zero,dampen,adaptive", "factor=0.5")] == [None, 0.5, 0.5]


def test_settings_of__take_the_method_that_a_number_belongs_to() -> None:
    assert settings("penalty=1,3") == settings("method=likelihood_ratio", "penalty=1,3")
    assert settings("tau=1,2", "mass=0.8") == settings("method=paper,hpd", "tau=1,2", "mass=0.8")
    assert [(one.method, one.edit.tau) for one in settings("tau=1", table=hpd_table())] == [("paper", 1.0)]


def test_settings_of__of_a_table_by_another_method_keep_its_bounds() -> None:
    table = hpd_table()
    [one] = settings("layers=all", table=table)
    assert (one.method, one.options, one.edit.tau) == ("hpd", (("mass", 0.9),), None)
    assert [s.edit.tau for s in settings("method=hpd,paper", table=table)] == [None, table.header.tau]
    assert one.columns(table)["tau"] is None
    assert one.columns(table)["mass"] == 0.9


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["method=paper", "mass=0.5"], "--sweep mass changes nothing at any point of the grid: only method hpd has it"),
        (["method=hpd", "tau=1,2"], "--sweep tau changes nothing at any point of the grid: only method paper has it"),
        (["factor=0.5"], "only the actions dampen and adaptive have it"),
        (["value=1"], "only the action set has it"),
        (["action=dampen"], "dampen multiplies by factor, and no factor was given"),
        (["action=erase"], "action"),
        (["salience=best"], "salience"),
        (["method=best"], "method"),
        (["top_fraction=2"], "top_fraction"),
        (["positions=first"], "positions has 'first'; expected all or last"),
    ],
)
def test_settings_of__refuses_what_cannot_be(sweeps: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(*sweeps)


def test_setting__says_all_that_a_row_needs() -> None:
    columns = Setting.of(TABLE).columns(TABLE)
    assert columns.keys() == {"table_id", *SETTING_COLUMNS}
    assert (columns["tau"], columns["top_fraction"], columns["layers"], columns["mass"]) == (2.5, 0.3, None, None)
    [one] = settings("tau=1", "layers=0+3")
    assert (one.columns(TABLE)["tau"], one.columns(TABLE)["layers"]) == (1.0, [0, 3])


def test_wanted_tables__are_as_large_as_the_largest_setting_of_their_kind() -> None:
    def wanted(*sweeps: str) -> list[tuple[str, str, float]]:
        return [(w.method, w.salience, w.top_fraction) for w in wanted_tables(settings(*sweeps), TABLE)]

    assert wanted("top_fraction=0.5,0.1") == [("paper", "mean_abs", 0.5)] * 2
    assert wanted("salience=mean_abs,cohens_d") == [("paper", "mean_abs", 0.3), ("paper", "cohens_d", 0.3)]
    assert wanted("method=hpd,budget", "top_fraction=0.1,0.5") == [
        *[("hpd", "mean_abs", 0.5)] * 2,
        # A budget's neurons depend on each other.
        ("budget", "mean_abs", 0.1),
        ("budget", "mean_abs", 0.5),
    ]


def test_wanted_table__is_served_by_a_table_of_its_kind_that_is_large_enough() -> None:
    def served(table: RangeTable, **fields: Any) -> bool:
        asked = {"salience": "mean_abs", "method": "paper", "options": (), "top_fraction": 0.3, **fields}
        return WantedTable(**asked).is_served_by(table)

    assert served(TABLE)
    assert served(TABLE, top_fraction=0.1)
    assert not served(TABLE, top_fraction=0.31)
    assert not served(TABLE, salience="cohens_d")
    assert not served(TABLE, method="hpd", options=(("mass", 0.9),))
    table = hpd_table()
    assert served(table, method="hpd", options=(("mass", 0.9),), top_fraction=0.2)
    assert not served(table, method="hpd", options=(("mass", 0.8),))
    budget = table_of(pieces("joy", 0, [(0.0, 1.0, 0.5)]), top_fraction=0.3, method="budget", options={"budget": 0.1})
    assert served(budget, method="budget", options=(("budget", 0.1),))
    assert not served(budget, method="budget", options=(("budget", 0.1),), top_fraction=0.2)
