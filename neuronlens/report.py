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


def status_table(status: Mapping[str, Any]) -> Table:
    """What `pipeline.status.status_of` found, a line a subject."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("store", status["store"])
    age = status["reported_seconds_ago"]
    fresh = "" if age is None else f", last word {age:.0f} s ago"
    table.add_row("state", status["state"] + (f": {status['holder']}{fresh}" if status["holder"] else ""))
    counts = ", ".join(f"{n} {state}" for state, n in status["shards"].items() if n)
    table.add_row("shards", f"{status['n_shards']}: {counts}")
    share = status["n_tokens_committed"] / status["n_tokens"] if status["n_tokens"] else 1.0
    tokens = f"{status['n_tokens_committed']:,} of {status['n_tokens']:,} ({share:.0%})"
    if status["tokens_per_second"]:
        tokens += f", {status['tokens_per_second']:,.0f} a second, about {duration(status['eta_seconds'])} left"
    table.add_row("tokens", tokens)
    if status["workers"]:
        table.add_row("workers", ", ".join(f"{n} {state}" for state, n in status["workers"].items() if n) or "none")
    for name, shard in status["running"].items():
        table.add_row("running", f"{name} on {shard['worker']}, since {shard['since']}")
    for name, reason in status["retrying"].items():
        table.add_row("tried again", f"{name}: {reason}")
    for shard in status["quarantined"]:
        table.add_row(
            "quarantined",
            f"{shard['shard']} (concept {shard['concept']}, {len(shard['rows'])} texts, "
            f"{len(shard['reasons'])} tries): {shard['reasons'][-1]}",
        )
    spent = activity_line(status["collector_seconds"])
    if spent:
        table.add_row("collectors", spent)
    table.add_row("statistics", f"{status['n_layers_with_statistics']} of {status['n_layers']} layers")
    table.add_row("tables", ", ".join(status["range_tables"]) or "none yet")
    return table


def activity_line(seconds: Mapping[str, float]) -> str:
    """What the collectors' time went into. Writing goes on beside the forward pass, so it stands apart."""
    beside = ("forward", "statistics", "storage_wait", "work_wait")
    total = sum(seconds.get(activity, 0.0) for activity in beside)
    if not total:
        return ""
    shares = ", ".join(f"{activity.replace('_', ' ')} {seconds.get(activity, 0.0) / total:.1%}" for activity in beside)
    return f"{shares} of {duration(total)}; writing beside it {duration(seconds.get('write', 0.0))}"


def coverage_line(coverage: Mapping[str, int]) -> str | None:
    """A warning where a part of the plan is missing, None where nothing is."""
    if coverage.get("n_shards") == coverage.get("n_planned_shards"):
        return None
    return (
        f"PARTIAL: {coverage['n_shards']:,} of {coverage['n_planned_shards']:,} shards, {coverage['n_samples']:,} of "
        f"{coverage['n_planned_samples']:,} samples."
    )


def duration(seconds: float) -> str:
    """A length of time as a person says it."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


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
