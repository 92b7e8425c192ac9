"""How long the work took, and what the store weighs."""

from collections.abc import Mapping

from neuronlens import figures
from neuronlens.page.desk import Desk, evenly
from neuronlens.page.elements import Drawing, Part, Section, Table
from neuronlens.page.facts import ACTIVITIES, Facts
from neuronlens.report import duration

_MAX_LAYERS = 32
_NAMES = {
    "forward": "forward pass",
    "statistics": "statistics",
    "storage_wait": "wait for storage",
    "work_wait": "wait for work",
}


def section(desk: Desk) -> Section:
    seconds = desk.facts.collector_seconds()
    return Section(
        anchor="timing",
        title="Timing and size",
        lead="Seconds of the work itself, summed over machines; waiting for a free machine is not in them. They come "
        "from the store's receipts (commits/ and statistics/); the view shards has those of each shard.",
        parts=(Part(drawings=(*_collectors(desk, seconds), *_statistics(desk)), table=_table(desk.facts, seconds)),),
    )


def _collectors(desk: Desk, seconds: Mapping[str, float]) -> list[Drawing]:
    if not any(seconds.values()):
        return []
    parts = {_NAMES[activity]: [seconds[activity], 0.0] for activity in ACTIVITIES}
    parts["writing"] = [0.0, seconds["write"]]
    figure = figures.stacked_bars(["collecting", "beside it"], parts, title="Collectors", unit="seconds")
    return [desk.draw(figure, "What the collectors' time went into; writing goes on beside the model.")]


def _statistics(desk: Desk) -> list[Drawing]:
    layers = [receipt for receipt in desk.facts.statistics if receipt.get("seconds")]
    if not layers:
        return []
    stages = [stage for stage in dict.fromkeys(s for one in layers for s in one["seconds"]) if stage != "total"]
    shown = evenly(layers, _MAX_LAYERS)
    figure = figures.stacked_bars(
        [desk.at(one["hook_point"], f"layer {one['layer']}") for one in shown],
        {stage: [float(one["seconds"].get(stage, 0.0)) for one in shown] for stage in stages},
        title="Statistics of each layer",
        unit="seconds",
    )
    cut = "" if len(shown) == len(layers) else f" {len(shown)} of {len(layers)} layers are drawn."
    return [desk.draw(figure, f"What merging, overlap and salience took.{cut}")]


def _table(facts: Facts, seconds: Mapping[str, float]) -> Table:
    rows = [("collectors", duration(sum(seconds[activity] for activity in ACTIVITIES)))]
    if seconds["forward"]:
        rows.append(("tokens a second of forward pass", f"{facts.total('n_tokens') / seconds['forward']:,.0f}"))
    rows.append(("statistics", duration(sum(one.get("seconds", {}).get("total", 0.0) for one in facts.statistics))))
    finished = sorted(receipt["finished_at"] for receipt in facts.commits if receipt.get("finished_at"))
    if finished:
        rows += [("first shard committed (UTC)", _moment(finished[0])), ("last shard committed", _moment(finished[-1]))]
    by_kind = facts.bytes_by_kind()
    rows += [("size of the store", _size(sum(by_kind.values())))]
    rows += [(f"of which {kind.replace('_', ' ')}", _size(n_bytes)) for kind, n_bytes in by_kind.items()]
    return Table(columns=("what", "amount"), rows=tuple(rows), numbers=frozenset({1}))


def _moment(iso: str) -> str:
    return iso.partition("+")[0].replace("T", " ")


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.0f} kB"
