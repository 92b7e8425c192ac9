"""What a person reads of two stores beside each other: lines and tables for the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuronlens.diff import BEYOND_2, BEYOND_3, MEDIAN_Z, Terms

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]
"""A heading, and what stands under it. A space at its end tells two headings apart."""


def say_terms(console: Console, terms: Terms) -> None:
    """What kind of comparison it is, what weakens it, and what is left out."""
    _say_terms(console, terms.kind, terms.warnings, terms.left_out)


def say_comparison(console: Console, found: Mapping[str, Any], *, top: int, salience: str) -> None:
    """What `neuronlens.diff.diff` found: the terms, `top` rows of each table, the verdict at the end."""
    for name in "ab":
        console.print(f"{name.upper()}  {found[name]['store']}", highlight=False, markup=False, soft_wrap=True)
    _say_terms(console, found["comparison"], found["warnings"], found["left_out"])
    console.print()
    every = {**found["overall"], "hook_point": "all", "layer": None, "concept": ""}
    _say_table(console, _DRIFT_TITLE, found["drift"], _DRIFT, top, ahead=[_CHANCE, every])
    _say_table(console, "Neurons that drifted most", found["largest"], _LARGEST, top)
    agreement = [row for row in found["salience"] if row["method"] == salience]
    _say_table(console, f"Salience by {salience}, those that agree least first", agreement, _AGREEMENT, top)
    changes = found["rank_changes"]
    _say_table(console, f"Salient neurons whose rank by {salience} changed most", changes, _CHANGES, top)
    for line in found["verdict"]:
        console.print(line, style="bold", highlight=False, markup=False, soft_wrap=True)


def _say_terms(console: Console, kind: str, warnings: Sequence[str], left_out: Sequence[str]) -> None:
    console.print(kind, style="bold", highlight=False, markup=False, soft_wrap=True)
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    for line in left_out:
        console.print(f"left out: {line}", highlight=False, markup=False, soft_wrap=True)


def _say_table(
    console: Console, title: str, rows: Sequence[Row], columns: Columns, top: int, *, ahead: Sequence[Row] = ()
) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in columns:
        if heading in _WORDS:
            table.add_column(heading, overflow="fold", min_width=len("concept"))
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for row in [*ahead, *rows[:top]]:
        table.add_row(*(Text(cell(row)) for cell in columns.values()))
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(table)
    if len(rows) > top:
        console.print(f"and {len(rows) - top:,} rows more: --top N", style="dim", highlight=False)
    console.print()


def _where(row: Row) -> str:
    return str(row["hook_point"]) if row["layer"] is None else f"{row['hook_point']} {row['layer']}"


def _key(name: str) -> Callable[[Row], str]:
    return lambda row: str(row[name])


def _number(name: str, form: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else format(row[name], form)


def _both(name: str, form: str) -> Callable[[Row], str]:
    first, second = _number(f"{name}_a", form), _number(f"{name}_b", form)
    return lambda row: f"{first(row)} → {second(row)}"


_WORDS = ("where", "concept")
_DRIFT_TITLE = (
    "Drift, the most first. Shares of neurons with |z| above 2 and 3, median |z|,\n"
    "median move: of means in standard deviations, of those as a factor"
)
_CHANCE = {
    "hook_point": "by chance",
    "layer": None,
    "concept": "",
    "median_shift": None,
    "median_factor": None,
    **{f"{what}_share_beyond_2": BEYOND_2 for what in ("mean", "std")},
    **{f"{what}_share_beyond_3": BEYOND_3 for what in ("mean", "std")},
    **{f"{what}_median_z": MEDIAN_Z for what in ("mean", "std")},
}
_SITE: Columns = {"where": _where, "concept": _key("concept")}
_DRIFT: Columns = {
    **_SITE,
    "mean > 2": _number("mean_share_beyond_2", ".1%"),
    "> 3": _number("mean_share_beyond_3", ".1%"),
    "|z|": _number("mean_median_z", ".2f"),
    "move": _number("median_shift", ".2g"),
    "std > 2": _number("std_share_beyond_2", ".1%"),
    "> 3 ": _number("std_share_beyond_3", ".1%"),
    "|z| ": _number("std_median_z", ".2f"),
    "factor": _number("median_factor", ".3g"),
}
_LARGEST: Columns = {
    **_SITE,
    "neuron": _key("neuron"),
    "mean": _both("mean", ".3g"),
    "z": _number("z_mean", "+.1f"),
    "std": _both("std", ".3g"),
    "z ": _number("z_std", "+.1f"),
}
_AGREEMENT: Columns = {
    **_SITE,
    "neurons": _number("n_neurons", ",d"),
    "Spearman": _number("spearman", ".3f"),
    "salient": _number("n_salient", ",d"),
    "in both": _number("n_both", ",d"),
    "Jaccard": _number("jaccard", ".3f"),
}
_CHANGES: Columns = {
    **_SITE,
    "neuron": _key("neuron"),
    "rank": _both("rank", ",d"),
    "change": _number("change", "+,d"),
}
