"""The range tables of an evaluation: those that its settings and controls ask for are made from the store's statistics,
without the model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from neuronlens.controls import SEED, Control, ControlTables, randomly_ranked, shuffled_table
from neuronlens.query import connect, run_file
from neuronlens.ranges import RangeTable
from neuronlens.recipe import CHOOSY_METHODS, RangesSection
from neuronlens.store import Store
from neuronlens.sweep import Setting, WantedTable, wanted_tables
from pipeline.emit import emit_table

if TYPE_CHECKING:
    from pipeline.driver import Reporter

_SITE = ["hook_point", "layer"]
RAW, POOLED = "raw values", "pooled moments"


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingTables:
    """A setting's own range table, and those of its controls."""

    own: RangeTable
    controls: ControlTables


def tables_of(
    store: Store,
    table: RangeTable,
    settings: Sequence[Setting],
    controls: Sequence[Control],
    reporter: "Reporter",
) -> list[SettingTables]:
    """The tables of each setting: `table` where it serves, else one that is made and kept in the store. Ranges from
    shuffled labels are kept nowhere.

    Raises UsageError where the store cannot give a table.
    """
    made: dict[WantedTable, RangeTable] = {}
    controls_of: dict[str, ControlTables] = {}
    found = []
    for wanted in wanted_tables(settings, table):
        own = table if wanted.is_served_by(table) else _made(made, wanted, store, table, reporter)
        if own.id not in controls_of:
            controls_of[own.id] = _control_tables(store, own, wanted, controls, made, reporter)
        found.append(SettingTables(own=own, controls=controls_of[own.id]))
    return found


def _made(
    made: dict[WantedTable, RangeTable], wanted: WantedTable, store: Store, table: RangeTable, reporter: "Reporter"
) -> RangeTable:
    if wanted not in made:
        asked = {
            "method": wanted.method,
            **dict(wanted.options),
            "tau": table.header.tau,
            "top_fraction": wanted.top_fraction,
            "salience": wanted.salience,
        }
        made[wanted] = emit_table(store, RangesSection.model_validate(asked), reporter)
        reporter.say(
            f"{made[wanted].id}: made for this, top {wanted.top_fraction:.0%} by {wanted.salience}, method "
            f"{wanted.method}"
        )
    return made[wanted]


def _control_tables(
    store: Store,
    own: RangeTable,
    wanted: WantedTable,
    controls: Sequence[Control],
    made: dict[WantedTable, RangeTable],
    reporter: "Reporter",
) -> ControlTables:
    in_random_order, shuffled, shuffled_from = None, None, None
    if "random" in controls:
        everything = _of_all_neurons(wanted)
        of_all_neurons = own if everything.is_served_by(own) else _made(made, everything, store, own, reporter)
        in_random_order = randomly_ranked(of_all_neurons)
    if "shuffled" in controls:
        moments, shuffled_from = shuffled_moments(store, own)
        shuffled = shuffled_table(own, moments)
    return ControlTables(in_random_order=in_random_order, shuffled=shuffled, shuffled_from=shuffled_from)


def _of_all_neurons(wanted: WantedTable) -> WantedTable:
    """The table that random neurons are drawn from. A method that leaves neurons out gives most of them no range: drawn
    ones have the shortest that holds most of the concept's values instead."""
    method, options = wanted.method, wanted.options
    if method in CHOOSY_METHODS:
        method, options = "hpd", tuple(RangesSection(method="hpd").options.items())
    return WantedTable(salience=wanted.salience, method=method, options=options, top_fraction=1.0)


def shuffled_moments(store: Store, table: RangeTable) -> tuple[pa.Table, str]:
    """Mean and std of the table's neurons under shuffled labels, and from what they were computed: the store's raw
    values where it has all of them, else the moments of all concepts together."""
    sites = sorted((row["hook_point"], row["layer"]) for row in _distinct(table.rows, _SITE))
    with connect(store.file_lists(), fs=store.fs, views="stored") as con:
        pooled = pa.concat_tables([run_file(con, "pooled_moments", hook_point=h, layer=n) for h, n in sites])
        shuffled = pa.concat_tables(
            [run_file(con, "shuffled_moments", hook_point=h, layer=n, seed=SEED) for h, n in sites]
        )
    return (shuffled, RAW) if _has_all(shuffled, pooled, table) else (pooled, POOLED)


def _has_all(shuffled: pa.Table, pooled: pa.Table, table: RangeTable) -> bool:
    """Whether the shuffled moments of every neuron of the table are made of as many values as the pooled ones."""
    n_values = {_key(row): row["n"] for row in _distinct(pooled, [*_SITE, "neuron", "n"])}
    n_shuffled: Counter[tuple[str, int, int]] = Counter()
    for row in shuffled.select([*_SITE, "neuron", "n"]).to_pylist():
        n_shuffled[_key(row)] += row["n"]
    return all(n_shuffled[_key(row)] == n_values[_key(row)] for row in _distinct(table.rows, [*_SITE, "neuron"]))


def _distinct(rows: pa.Table, columns: list[str]) -> list[dict[str, Any]]:
    return rows.group_by(columns).aggregate([]).to_pylist()


def _key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["hook_point"], row["layer"], row["neuron"]
