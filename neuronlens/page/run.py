"""What was run: model, data, what of it counts, range tables."""

from collections.abc import Mapping
from typing import Any

from neuronlens.page.desk import Desk, decimal, layers_text, percent
from neuronlens.page.elements import Part, Query, Section, Table
from neuronlens.page.facts import Facts


def section(desk: Desk) -> Section:
    answered = {row["concept"]: row for row in desk.rows("report_answers")}
    queries = [Query(name="coverage"), *([Query(name="report_answers")] if answered else [])]
    return Section(
        anchor="run",
        title="What was run",
        lead="The model, the data and what of it counts. In the commands on this page, STORE is the store's folder or "
        "URL.",
        parts=(
            Part(table=_run_table(desk.facts)),
            Part(title="Concepts", lead=_lead(answered), table=_concepts(desk, answered), queries=tuple(queries)),
            Part(
                title="Range tables",
                table=_tables(desk.facts) if desk.facts.tables else None,
                note="" if desk.facts.tables else "There are none yet. Make one with: neuronlens ranges STORE",
            ),
        ),
    )


def _lead(answered: Mapping[str, Any]) -> str:
    lead = "A concept keeps its colour on the whole page."
    if answered:
        lead += " Answered right: how many of the texts' most probable answers are the concept's; confidence: the mean "
        lead += "probability of the right answer."
    return lead


def _run_table(facts: Facts) -> Table:
    description = facts.description
    model, dataset, raw = (description.get(key, {}) for key in ("model", "dataset", "raw"))
    revision = f", revision {model['revision']}" if model.get("revision") else ""
    kept = ["moments", *(["histograms"] if facts.has_histograms else [])]
    if facts.has_raw:
        kept.append(f"raw values (layers {raw.get('layers', 'all')}, neurons {raw.get('neurons', 'all')})")
    rows = {
        "model": f"{model.get('id', '?')}{revision}",
        "architecture": f"{model.get('architecture', '?')}, {model.get('dtype', '?')}",
        "data": f"{dataset.get('source', '?')}, split {dataset.get('split', '?')}, {dataset.get('n_rows', 0):,} rows",
        "prompt": dataset.get("prompt", "?"),
        "hook points": ", ".join(f"{name} ({description['widths'][name]:,} neurons)" for name in facts.hook_points),
        "layers": layers_text(facts.layers),
        "unit": description.get("unit", "?"),
        "which texts count": "those answered right" if description.get("only_correct") else "all",
        "shards": (
            f"{len(facts.commits):,} of {facts.n_planned_shards:,} committed, {len(facts.quarantined):,} given up"
        ),
        "kept": ", ".join(kept),
        "ranges": f"mean ± {facts.tau:g} std (tau {facts.tau:g})",
        "store": f"{description.get('store_hash', '?')[:16]}, begun {description.get('created_at', '?')}",
    }
    return Table(columns=("what", "value"), rows=tuple((key, str(value)) for key, value in rows.items()), wraps=True)


def _concepts(desk: Desk, answered: Mapping[str, Mapping[str, Any]]) -> Table:
    facts = desk.facts
    samples, tokens, counted = facts.by_concept("n_samples"), facts.by_concept("n_tokens"), facts.n_counted()
    columns = ["concept", "texts planned", "texts collected", "texts counted", "tokens"]
    columns += ["answered right", "confidence"] if answered else []
    rows = []
    for concept, planned in facts.n_planned.items():
        row = [concept, *(f"{n:,}" for n in (planned, samples[concept], counted[concept], tokens[concept]))]
        if answered:
            found = answered.get(concept, {})
            row += [percent(found.get("accuracy")), decimal(found.get("confidence"))]
        rows.append(tuple(row))
    return Table(
        columns=tuple(columns),
        rows=tuple(rows),
        numbers=frozenset(range(1, len(columns))),
        colours=tuple(desk.colours[concept] for concept in facts.n_planned),
    )


def _tables(facts: Facts) -> Table:
    return Table(
        columns=("id", "method", "tau", "salient by", "top fraction", "rows"),
        rows=tuple(map(_table, facts.tables)),
        numbers=frozenset({2, 4, 5}),
    )


def _table(header: Mapping[str, Any]) -> tuple[str, ...]:
    options = [f"{name} {value:g}" for name, value in header.get("options", {}).items()]
    method = ", ".join([header.get("method", "paper"), *options])
    numbers = f"{header['tau']:g}", header["salience"], f"{header['top_fraction']:g}", f"{header['rows']:,}"
    return header["id"], method, *numbers
