"""What a person reads: tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table


def erasure_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `neuronlens.evaluation.erasure_rows`, a section a concept, and the mean of each condition at the end.

    Accuracies stand with their 95 % interval; `changed` is the share of the tested activations that was replaced. In
    a terminal of 80 columns the intervals take a line of their own.
    """
    table = Table(
        title="What each intervention erases (target) and what it spares (others)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("concept", overflow="fold")
    table.add_column("case", no_wrap=True)
    for side in ("target", "others"):
        table.add_column(f"{side} acc. (95 %)", justify="right", min_width=len("(0.00–0.00)"))
        table.add_column(f"{side} conf.", justify="right", width=len(side))
    for heading in ("perplexity", "changed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for concept in dict.fromkeys(row["concept"] for row in rows):
        for i, row in enumerate(row for row in rows if row["concept"] == concept):
            table.add_row(concept if i == 0 else "", *_cells(row))
        table.add_section()
    for i, condition in enumerate(dict.fromkeys(row["condition"] for row in rows)):
        mean = _mean([row for row in rows if row["condition"] == condition])
        table.add_row("mean" if i == 0 else "", *_cells(mean), style="bold")
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["condition"],
        _accuracy(row, "target"),
        _number(row["target_confidence"], ".3f"),
        _accuracy(row, "complement"),
        _number(row["complement_confidence"], ".3f"),
        _number(row["perplexity"], ",.2f"),
        _number(row["changed"] / row["tested"] if row["tested"] else None, ".1%"),
    ]


def _accuracy(row: Mapping[str, Any], side: str) -> str:
    low, high = row.get(f"{side}_accuracy_low"), row.get(f"{side}_accuracy_high")
    interval = "" if low is None or high is None else f" ({low:.2f}–{high:.2f})"
    return _number(row[f"{side}_accuracy"], ".3f") + interval


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over concepts, each counting once; counts of activations are summed. A mean has no interval."""
    mean: dict[str, Any] = {"condition": rows[0]["condition"]}
    for key in ("target_accuracy", "target_confidence", "complement_accuracy", "complement_confidence", "perplexity"):
        values = [row[key] for row in rows if row[key] is not None]
        mean[key] = sum(values) / len(values) if values else None
    return {**mean, "tested": sum(row["tested"] for row in rows), "changed": sum(row["changed"] for row in rows)}
