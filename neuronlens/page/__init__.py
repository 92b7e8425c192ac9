"""The report of a store: one HTML file that holds all it shows.

    report = write_report(Store("STORE"), Path("report.html"))

`facts` reads what was run, the sections ask SQL and draw, `elements` turns them into a page.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuronlens import figures
from neuronlens.errors import UsageError
from neuronlens.page import erasure, gaussianity, generations, neurons, overlap, run, salience, sweeps, timing
from neuronlens.page.desk import MAX_CONCEPTS, Desk, Rows, count, percent
from neuronlens.page.elements import Page, Tile, render
from neuronlens.page.erasure import Evaluation, evaluations_of
from neuronlens.page.facts import Facts
from neuronlens.query import connect, run_file

if TYPE_CHECKING:
    import duckdb

    from neuronlens.store import Store

_UNITS = {
    "last_token": "A text gives one value a neuron: the one at its last token.",
    "token": "Every token that is no pad and no special token gives one value a neuron.",
    "mean": "A text gives one value a neuron: the mean over its tokens.",
    "cls": "A text gives one value a neuron: the one at its first token.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A report as it was written."""

    path: Path
    n_bytes: int
    n_figures: int
    warnings: Sequence[str]


def write_report(store: "Store", path: Path) -> Report:
    """Write the report of a store, over what is at `path`.

    Raises UsageError where there is no store, or one without statistics; duckdb.Error for a file that cannot be read.
    """
    facts = Facts.of(store)
    with connect(store.file_lists(), fs=store.fs) as con:
        page = page_of(con, facts)
    html = render(page).encode()
    path.write_bytes(html)
    return Report(path=path, n_bytes=len(html), n_figures=page.n_drawings, warnings=page.warnings)


def page_of(con: "duckdb.DuckDBPyConnection", facts: Facts) -> Page:
    """The whole report, from a connection over a store's files and its receipts. Raises UsageError where the store has
    no statistics."""
    if not facts.statistics:
        raise UsageError(
            "The store has no statistics yet: none of its layers was merged. Run the same recipe again to finish it, "
            "or: python -m jobs.statistics STORE"
        )
    overlapping = [row["concept"] for row in run_file(con, "report_concepts", n_concepts=MAX_CONCEPTS).to_pylist()]
    desk = Desk(
        con=con,
        facts=facts,
        shown=tuple(overlapping or facts.concepts[:MAX_CONCEPTS]),
        colours=figures.concept_colours(facts.concepts),
    )
    shapes = desk.rows("report_gaussianity")
    by_layer = desk.rows("report_overlap_by_layer")
    evaluations = evaluations_of(facts)
    return Page(
        title=f"{facts.model_name} under {count(len(facts.concepts), 'concept')}",
        summary=_summary(facts),
        tiles=_tiles(facts, shapes, by_layer, evaluations),
        warnings=tuple(facts.warnings()),
        notes=tuple(facts.notes()),
        sections=tuple(
            section
            for section in (
                run.section(desk),
                gaussianity.section(desk, shapes),
                overlap.section(desk, by_layer),
                salience.section(desk),
                neurons.section(desk),
                erasure.section(desk, evaluations),
                sweeps.section(desk),
                generations.section(desk),
                timing.section(desk),
            )
            if section is not None
        ),
        footer=_footer(facts),
    )


def _summary(facts: Facts) -> str:
    widths = ", ".join(f"{facts.description['widths'][h]:,} neurons at {h}" for h in facts.hook_points)
    each = " in each" if len(facts.layers) > 1 else ""
    return (
        f"{count(len(facts.layers), 'layer')} with {widths}{each}, {facts.total('n_samples'):,} texts, "
        f"{facts.total('n_tokens'):,} tokens. {_UNITS.get(facts.description.get('unit', ''), '')}"
    )


def _tiles(facts: Facts, shapes: Rows, by_layer: Rows, evaluations: Sequence[Evaluation]) -> tuple[Tile, ...]:
    tiles = []
    if shapes:
        n = sum(row["n_bumps"] for row in shapes)
        share = sum(row["share_near_gaussian"] * row["n_bumps"] for row in shapes) / n
        tiles.append(Tile(number=percent(share), meaning="of the neurons' values under one concept are near-Gaussian"))
    if by_layer and not any(row["n_dropped"] for row in by_layer):
        tiles.append(_least_overlap(facts, by_layer))
    for evaluation in evaluations[:1]:
        tiles += _erased(evaluation, "target_accuracy", "on the concept to erase")
        tiles += _erased(evaluation, "complement_accuracy", "on all others")
    return tuple(tiles)


def _least_overlap(facts: Facts, by_layer: Rows) -> Tile:
    least: Mapping[str, Any] = min(by_layer, key=lambda row: row["mean_ovl"])
    where = f"layer {least['layer']}" + (f" ({least['hook_point']})" if len(facts.hook_points) > 1 else "")
    among = "" if len(facts.layers) == 1 else ", the lowest of all layers"
    return Tile(number=f"{least['mean_ovl']:.2f}", meaning=f"mean overlap of two concepts in {where}{among}")


def _erased(evaluation: Evaluation, column: str, whose: str) -> list[Tile]:
    base, neuron, inside = (evaluation.mean(condition, column) for condition in ("base", "neuron", "range"))
    if any(map(math.isnan, (base, neuron, inside))):
        return []
    meaning = f"accuracy {whose}, before and with its ranges silenced (whole neurons: {percent(neuron)})"
    return [Tile(number=f"{percent(base)} → {percent(inside)}", meaning=meaning)]


def _footer(facts: Facts) -> str:
    made = ", ".join(f"{name} {version}" for name, version in facts.description.get("versions", {}).items())
    return f"Store {facts.description.get('store_hash', '')[:16]}, made with {made}." if made else ""
