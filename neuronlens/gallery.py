"""Every figure that a store has data for, one file each.

    gallery = write_figures(Store("STORE"), Path("figures"), forms=["png", "svg"])

Distributions of the neurons that the report picks, sweeps, trade-offs, controls: what could not be drawn comes with the
command that makes its data.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neuronlens.canvas import save
from neuronlens.cards import read_card
from neuronlens.errors import UsageError
from neuronlens.figures import concept_colours, distributions
from neuronlens.page.facts import Facts
from neuronlens.query import connect, run_file
from neuronlens.sweep_lines import TextSet, text_sets
from neuronlens.sweep_pictures import Picture, comparisons, short_id, sweeps

if TYPE_CHECKING:
    import duckdb

    from neuronlens.store import Store

N_NEURONS = 3
"""Of each hook point: so many that keep concepts apart best, and as many of the most polysemantic ones."""
MAX_BUMPS = 8

_SWEEPS = {
    "tau": "--sweep method=paper --sweep tau=0.5:4:0.5",
    "top_fraction": "--sweep top_fraction=0.1,0.3,0.5,1",
    "layers": "--sweep layers=each,all",
    "penalty": "--sweep method=likelihood_ratio --sweep penalty=1,2,3,4,6",
    "mass": "--sweep method=hpd --sweep mass=0.5,0.7,0.85,0.95",
    "budget": "--sweep method=budget --sweep budget=0.01,0.03,0.1,0.3",
    "factor": "--sweep action=dampen --sweep factor=0,0.25,0.5,0.75",
    "trade-off": "--sweep method=paper,likelihood_ratio --sweep tau=1,2,3 --sweep penalty=1,3,9",
    "concepts": "",
    "controls": "--control random,wrong_concept,length_matched",
}
"""The options of `neuronlens evaluate` that make the data of each kind of figure."""
_OF_ANSWERS = ("trade-off", "concepts", "controls")
"""The kinds that need test texts with right answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A figure that was written: its kind, its files, one a form, and what one sees on it."""

    kind: str
    files: tuple[Path, ...]
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """What was written, and for each kind of figure that lacks data what would make it."""

    drawn: Sequence[Drawn]
    missing: dict[str, str]


def write_figures(store: "Store", folder: Path, *, forms: Sequence[str], table: str | None = None) -> Gallery:
    """Draw all into the folder, over files of the same names.

    forms: of png and svg. table: whose ranges the distributions show; without it that of the best setting that was
    evaluated, else the only one there is, else mean -+ tau * std.

    Raises UsageError where the store has no such table or the folder cannot be, duckdb.Error for a file that cannot be
    read.
    """
    _make(folder)
    facts = Facts.of(store)
    ids = store.table_ids()
    if table is not None and table not in ids:
        raise UsageError(f"{store.root} has no table {table}. Its tables: {', '.join(ids) or 'none'}.")
    drawn = []
    with connect(store.file_lists(), fs=store.fs) as con:
        sets = text_sets(run_file(con, "report_sweeps").to_pylist())
        for picture in _pictures(con, facts, sets, table or _table_shown(ids, sets)):
            files = tuple(folder / f"{picture.name}.{form}" for form in forms)
            for file, form in zip(files, forms, strict=True):
                save(picture.figure, str(file), form)
            drawn.append(Drawn(kind=picture.kind, files=files, caption=picture.caption))
    return Gallery(drawn=drawn, missing=_missing(store.root, facts, sets, {one.kind for one in drawn}))


def _make(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, expected a folder for the figures. Choose another -o.")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {folder.parent}. Make it first, or choose another -o.")
    folder.mkdir(exist_ok=True)


def _pictures(
    con: "duckdb.DuckDBPyConnection", facts: Facts, sets: Sequence[TextSet], table: str | None
) -> Iterator[Picture]:
    colours = concept_colours(facts.concepts)
    yield from _neurons(con, facts, colours, table)
    for texts in sets:
        suffix = "" if len(sets) == 1 else f"-{short_id(min(texts.evaluations))}"
        yield from comparisons(con, texts, colours=colours, suffix=suffix)
        yield from sweeps(texts)


def _neurons(
    con: "duckdb.DuckDBPyConnection", facts: Facts, colours: Mapping[str, str], table: str | None
) -> Iterator[Picture]:
    rows = [
        row
        for query in ("report_separable_neurons", "report_polysemantic_neurons")
        for row in run_file(con, query, n_neurons=N_NEURONS).to_pylist()
    ]
    sites = dict.fromkeys((row["hook_point"], row["layer"], row["neuron"]) for row in rows)
    for hook_point, layer, neuron in sites:
        card = read_card(con, hook_point=hook_point, layer=layer, neuron=neuron, tau=facts.tau, table=table)
        shown = card.of_most_salient(MAX_BUMPS)
        ranges = f"mean ± {facts.tau:g} std" if table is None else f"range table {table}"
        yield Picture(
            kind="distributions",
            name=f"neuron-{hook_point}-{layer}-{neuron}",
            figure=distributions(shown, colours=colours, explained=True),
            caption=f"{card.name} under {len(shown.bumps)} of {card.n_concepts} concepts; ranges: {ranges}.",
        )


def _table_shown(ids: Sequence[str], sets: Sequence[TextSet]) -> str | None:
    best = [row for row in (texts.best() for texts in sets) if row is not None and row["table_id"] in ids]
    if best:
        return str(max(best, key=lambda row: row["selectivity"])["table_id"])
    return ids[0] if len(ids) == 1 else None


def _missing(root: str, facts: Facts, sets: Sequence[TextSet], drawn: set[str]) -> dict[str, str]:
    """The command that makes the data of each kind that was not drawn."""
    root = shlex.quote(root)
    test = "" if facts.description.get("recipe", {}).get("test") else "--set test.source=test.jsonl"
    answers = "--set " + shlex.quote(f"data.answers={{{facts.concepts[0]}: TOKEN, ...}}")
    found = {}
    if "distributions" not in drawn:
        shown = "neuronlens show {} LAYER NEURON -o neuron.png" if facts.statistics else "python -m jobs.statistics {}"
        found["distributions"] = shown.format(root)
    for kind, options in _SWEEPS.items():
        if kind not in drawn:
            needs = answers if kind in _OF_ANSWERS and sets and not any(texts.has_drops for texts in sets) else ""
            found[kind] = " ".join(filter(None, ("neuronlens evaluate", root, options, test, needs)))
    return found
