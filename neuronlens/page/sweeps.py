"""Sweeps and controls: what every setting that was evaluated erases, and what it spares."""

import math

from neuronlens.canvas import CONDITION_NAMES
from neuronlens.page.desk import Desk, decimal, number, percent, with_interval
from neuronlens.page.elements import Part, Query, Section, Table
from neuronlens.report import setting_cell
from neuronlens.sweep_lines import CONTROLS, Row, TextSet, differing, text_sets
from neuronlens.sweep_pictures import about_texts, comparisons, sweeps

MAX_SETS = 4
MAX_SWEEPS = 12
MAX_ROWS = 60
"""Of a table of settings."""


def section(desk: Desk) -> Section | None:
    """None where there is no evaluation, or only such of old code, which have no means over concepts."""
    sets = text_sets(desk.rows("report_sweeps"))
    if not sets:
        return None
    parts = [_part(desk, texts) for texts in sets[:MAX_SETS]]
    if len(sets) > MAX_SETS:
        note = f"{MAX_SETS} of {len(sets)} sets of test texts are shown, the largest."
        parts.append(Part(note=note, queries=(Query(name="report_sweeps"),)))
    return Section(
        anchor="sweeps",
        title="Sweeps and controls",
        lead="A drop is the confidence in the right answer that is lost against the bare model, a mean over concepts; "
        "selectivity is how much more the target loses than the others. KL is how far the others' answers moved, in "
        "nats: it shows damage that no drop shows. Only evaluations on the same texts can be compared, so these stand "
        "together.",
        parts=tuple(parts),
    )


def _part(desk: Desk, texts: TextSet) -> Part:
    drawn = sweeps(texts)
    pictures = [*comparisons(desk.con, texts, colours=desk.colours), *drawn[:MAX_SWEEPS]]
    notes = []
    if len(drawn) > MAX_SWEEPS:
        notes.append(f"{MAX_SWEEPS} of {len(drawn)} sweeps are drawn. Draw all: neuronlens figures STORE")
    rows = sorted(texts.under("range"), key=lambda row: -_selectivity(row))
    if len(rows) > MAX_ROWS:
        notes.append(f"The table has {MAX_ROWS} of {len(rows)} settings, those with the highest selectivity.")
    return Part(
        title=f"On {about_texts(texts)}",
        drawings=tuple(desk.draw(picture.figure, picture.caption) for picture in pictures),
        table=_table(texts, rows[:MAX_ROWS]).without_empty_columns(),
        note=" ".join(notes),
        queries=_queries(texts),
    )


def _queries(texts: TextSet) -> tuple[Query, ...]:
    best = texts.best()
    if best is None:
        return (Query(name="report_sweeps"),)
    params = f" --param evaluation_id={best['evaluation_id']} --param setting={best['setting']}"
    return Query(name="report_sweeps"), Query(name="report_sweep_concepts", params=params)


def _table(texts: TextSet, rows: list[Row]) -> Table:
    keys = differing(rows)
    compared = {condition: f"selectivity, {CONDITION_NAMES[condition]}" for condition in ("neuron", *CONTROLS)}
    columns = (
        *(key.replace("_", " ") for key in keys),
        *("target drop", "others' drop", "selectivity (95 %)", "KL on others", "changed"),
        *compared.values(),
        *("off-task KL", "choices answered right"),
    )
    return Table(
        columns=columns,
        rows=tuple(
            (
                *(setting_cell(key, row[key], none="–") for key in keys),
                decimal(row["target_drop"], 3),
                decimal(row["complement_drop"], 3),
                with_interval(row, "selectivity"),
                decimal(row["kl_complement"], 4),
                percent(row["changed_share"]),
                *(decimal(texts.beside(row).get(condition, {}).get("selectivity"), 3) for condition in compared),
                decimal(row["off_task_kl"], 4),
                percent(row["choice_accuracy"]),
            )
            for row in rows
        ),
        numbers=frozenset(range(len(columns))) - {i for i, key in enumerate(keys) if key in _NAMED},
        caption="Changed: the share of the tested activations that was replaced. Beside the selectivity of the ranges "
        "stands that of other interventions in the same setting.",
    )


_NAMED = ("hook_points", "salience", "method", "action", "positions")


def _selectivity(row: Row) -> float:
    value = number(row["selectivity"])
    return -math.inf if math.isnan(value) else value
