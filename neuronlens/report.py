"""What a person reads: tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table

METHOD_OPTIONS = ("mass", "penalty", "budget")
SETTING_COLUMNS = (
    *("tau", "top_fraction", "layers", "hook_points", "salience", "method", *METHOD_OPTIONS),
    *("action", "factor", "value", "positions"),
)
"""What a row of an evaluation says of its setting, besides the table's id."""


BEST = "best"
_TERMINAL_COLUMNS = 80


def erasure_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The rows of `neuronlens.erasure.erasure_rows` for one setting, a section a concept, and the mean of each
    condition at the end; below, what those means say of drops and divergences, where that was measured.

    Accuracies stand with their 95 % interval; `changed` is the share of the tested activations that was replaced. In
    a terminal of 80 columns the intervals take a line of their own.
    """
    table = _table("What each intervention erases (target) and what it spares (others)")
    table.add_column("concept", overflow="fold")
    table.add_column("case", no_wrap=True)
    for side in ("target", "others"):
        table.add_column(f"{side} acc. (95 %)", justify="right", min_width=len("(0.00–0.00)"))
        table.add_column(f"{side} conf.", justify="right", width=len(side))
    for heading in ("perplexity", "changed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for concept in dict.fromkeys(row["concept"] for row in rows):
        table.add_section()
        for i, row in enumerate(row for row in rows if row["concept"] == concept):
            name = "mean" if concept is None else concept
            table.add_row(name if i == 0 else "", *_cells(row), style="bold" if concept is None else None)
    means = [row for row in rows if row["concept"] is None and row["condition"] != "base"]
    if not any(_is_known(row, "kl_complement") for row in means):
        return table
    lines = [{"case": row["condition"], **_measures(row, means)} for row in means]
    return Group(table, "", _lines("What is lost, means over concepts (drops of confidence; KL in nats)", lines))


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of a sweep, a line a setting: what tells it from the others, then the means over concepts under `range`.
    The setting with the highest selectivity is marked."""
    ranged = [row for row in rows if row["concept"] is None and row["condition"] == "range"]
    ranged_settings = [_setting_cells(row) for row in ranged]
    keys = [key for key in ranged_settings[0] if len({cells[key] for cells in ranged_settings}) > 1]
    best = max((row["selectivity"] for row in ranged if row["selectivity"] is not None), default=None)
    lines = []
    for row, cells in zip(ranged, ranged_settings, strict=True):
        line = {key.replace("_", " "): cells[key] for key in keys} | _measures(row, ranged)
        line.pop("off-task perplexity", None)  # its divergence says the same more finely
        if best is not None:
            line[""] = BEST if row["selectivity"] == best else ""
        lines.append(line)
    return _lines("What ranges take from the target and from others, means over concepts", lines)


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


def _table(title: str, padding: int = 1) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, padding, 0, 0),
    )


def _lines(title: str, lines: Sequence[Mapping[str, str]]) -> Table:
    """A table of lines that have the same keys, its headings; the best one stands out. Headings may be broken, within
    words only where the terminal is narrow; cells are not."""
    table = _table(title, padding=0)
    cells = {heading: max(len(line[heading]) for line in lines) for heading in lines[0]}
    whole = {heading: max(n, *map(len, heading.split() or [""])) for heading, n in cells.items()}
    widths = whole if sum(whole.values()) + len(whole) <= _TERMINAL_COLUMNS else cells
    for heading, width in widths.items():
        justify: JustifyMethod = "left" if heading in ("", "case") else "right"
        table.add_column(heading, justify=justify, width=max(1, width), overflow="fold")
    for line in lines:
        table.add_row(*line.values(), style="bold" if line.get("") == BEST else None)
    return table


def _measures(row: Mapping[str, Any], all_rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of a mean over concepts, what was measured in any of the rows."""
    low, high = row["selectivity_low"], row["selectivity_high"]
    interval = "" if low is None else f" ({low:.2f}–{high:.2f})"
    cells = {
        "target_drop": ("target drop", _number(row["target_drop"], ".3f")),
        "complement_drop": ("others drop", _number(row["complement_drop"], ".3f")),
        "selectivity": ("selectivity (95 %)", _number(row["selectivity"], ".3f") + interval),
        "kl_complement": ("others KL", _number(row["kl_complement"], ".4f")),
        "off_task_kl": ("off-task KL", _number(row["off_task_kl"], ".4f")),
        "off_task_perplexity": ("off-task perplexity", _number(row["off_task_perplexity"], ",.5g")),
        "choice_accuracy": ("choices", _number(row["choice_accuracy"], ".3f")),
        "changed_share": ("changed", _number(row["changed_share"], ".1%")),
    }
    return {heading: cell for key, (heading, cell) in cells.items() if any(_is_known(one, key) for one in all_rows)}


def _setting_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """What a row says of its setting; the method's own option stands behind its name."""
    options = " ".join(f"{row[key]:g}" for key in METHOD_OPTIONS if row[key] is not None)
    cells = {key: setting_cell(key, row[key]) for key in SETTING_COLUMNS if key not in METHOD_OPTIONS}
    return cells | {"method": f"{cells['method']} {options}".strip()}


def setting_cell(key: str, value: Any, *, none: str = "-") -> str:
    """A key of a sweep's setting as a person reads it; `none` where it does not apply."""
    if value is None:
        return "all" if key in ("layers", "hook_points") else none
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_known(row: Mapping[str, Any], key: str) -> bool:
    return row[key] is not None


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
