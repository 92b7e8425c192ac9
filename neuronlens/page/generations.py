"""What the model still writes of each concept, and of the others, by a classifier."""

from collections.abc import Mapping, Sequence
from typing import Any

from neuronlens import figures
from neuronlens.canvas import CONDITION_NAMES
from neuronlens.labels import short
from neuronlens.page.desk import Desk, Rows, count, decimal, excerpt, percent, with_interval
from neuronlens.page.elements import Drawing, Part, Query, Section, Table
from neuronlens.page.erasure import Evaluation, edit_text

MAX_GENERATIONS = 4
PROMPT_CHARACTERS, CONTINUATION_CHARACTERS = 120, 200

_MEAN = "mean of all"
_CLASSIFIER_CELLS = 32
_QUERIES = (Query(name="report_generations"),)


def section(desk: Desk) -> Section | None:
    """None where nothing was generated."""
    by_file: dict[str, Rows] = {}
    for row in desk.rows("report_generations"):
        by_file.setdefault(row["generation_id"], []).append(row)
    if not by_file:
        return None
    generations = [Evaluation(title=_title(rows[0]), rows=rows) for rows in by_file.values()]
    parts = [
        part
        for one in generations[:MAX_GENERATIONS]
        for part in (_means(desk, one), _by_concept(one), *_examples(desk, one))
    ]
    if len(generations) > MAX_GENERATIONS:
        note = f"{MAX_GENERATIONS} of {len(generations)} evaluations of what is written are shown."
        parts.append(Part(note=note, queries=_QUERIES))
    return Section(
        anchor="generations",
        title="What it still writes",
        lead="For every concept in turn, the model continues the beginnings of texts: as it is, with the concept's "
        "salient neurons edited whole, and with them edited inside the concept's ranges only. A classifier says what "
        "the continuations speak of. A good intervention keeps the model from writing of the target, and lets it write "
        "of the others as before.",
        parts=tuple(parts),
    )


def _title(row: Mapping[str, Any]) -> str:
    done = edit_text({**row, "tau": row["edit_tau"], "top_fraction": row["edit_top_fraction"]})
    amount = f"{count(row['n_prompts'], 'prompt')} continued by up to {count(row['max_tokens'], 'token')}"
    drawn = f", temperature {row['temperature']:g}" if row["temperature"] else ""
    return f"{row['table_id']}: {done}, {amount}{drawn}, judged by {_name_of(row['classifier'])}"


def _name_of(classifier: str) -> str:
    """Of a path or a hub id, the last part that says anything."""
    parts = [part for part in classifier.replace("\\", "/").split("/") if part]
    return short(parts[-1] if parts else classifier, _CLASSIFIER_CELLS)


def _means(desk: Desk, generation: Evaluation) -> Part:
    concepts, cut = desk.drawable(generation.concepts)
    return Part(
        title=generation.title,
        drawings=_drawings(desk, generation, concepts),
        table=_table_of_means([row for row in generation.rows if row["concept"] is None]),
        note=cut,
        queries=_QUERIES,
    )


def _drawings(desk: Desk, generation: Evaluation, concepts: Sequence[str]) -> tuple[Drawing, ...]:
    kinds = {"target": "target_probability", "others": "complement_probability"}
    panels = {
        heading: generation.measured(column, [*concepts, None])
        for heading, column in kinds.items()
        if generation.has(column)
    }
    if not panels:
        return ()
    figure = figures.conditions_beside(
        [*concepts, _MEAN], panels, title="What continuations speak of", unit="probability", n_apart=1
    )
    caption = (
        "A row is a target. Left: the probability of the target in the continuations of its own prompts. To be erased: "
        "further left is better. Right: the probability of their own concept in all other continuations. To be spared: "
        "nearer to no intervention is better. Bars are 95 % intervals."
    )
    return (desk.draw(figure, caption),)


def _table_of_means(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """A line a number, the interventions side by side; numbers that were not measured are left out."""
    measured = zip(_NUMBERS, *map(_cells, rows), strict=True)
    lines = tuple(line for line in measured if set(line[1:]) != {"–"})
    if not lines:
        return None
    return Table(
        columns=(_MEAN, *(_name(row["condition"]) for row in rows)),
        rows=lines,
        numbers=frozenset(range(1, 1 + len(rows))),
        caption="Target and others: probabilities. A drop is what was lost against no intervention; selectivity is how "
        "much more the target lost. Perplexity: that of the continuations under the unmodified model. Different "
        "bigrams: the share of a continuation's pairs of tokens that are different ones, low where the model repeats "
        "itself. Changed: the share of the activations compared with a range that was replaced.",
    )


def _by_concept(generation: Evaluation) -> Part:
    rows = [row for row in generation.rows if row["concept"] is not None]
    table = Table(
        columns=("concept", "intervention", *_NUMBERS),
        rows=tuple((row["concept"], _name(row["condition"]), *_cells(row)) for row in rows),
        numbers=frozenset(range(2, 2 + len(_NUMBERS))),
    )
    return Part(lead="The same concept by concept:", table=table.without_empty_columns())


_NUMBERS = (
    *("target", "others", "target drop (95\u00a0%)", "others' drop (95\u00a0%)", "selectivity (95\u00a0%)"),
    *("perplexity", "different bigrams", "changed"),
)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What _NUMBERS name."""
    return (
        *(decimal(row[f"{side}_probability"], 3) for side in ("target", "complement")),
        *(with_interval(row, column) for column in ("target_drop", "complement_drop", "selectivity")),
        decimal(row["perplexity"], 1),
        percent(row["distinct_2"]),
        percent(row["changed_share"]),
    )


def _name(condition: str) -> str:
    return CONDITION_NAMES.get(condition, condition)


def _examples(desk: Desk, generation: Evaluation) -> list[Part]:
    first = {(row["concept"], row["condition"]): row["examples"][0] for row in generation.rows if row["examples"]}
    conditions = generation.conditions
    every = [concept for concept in generation.concepts if all((concept, one) in first for one in conditions)]
    concepts, cut = desk.drawable(every)
    if not concepts:
        return []
    rows = [
        (
            concept,
            excerpt(first[concept, conditions[0]]["prompt"], PROMPT_CHARACTERS),
            *(_continuation(first[concept, condition]) for condition in conditions),
        )
        for concept in concepts
    ]
    table = Table(
        columns=("concept", "prompt", *map(_name, conditions)),
        rows=tuple(rows),
        texts=frozenset(range(1, 2 + len(conditions))),
    )
    lead = "How the first prompt of a concept goes on, and the probability of the concept by the classifier:"
    return [Part(lead=lead, table=table, note=f"{len(concepts)} of {len(every)} concepts." if cut else "")]


def _continuation(example: Mapping[str, Any]) -> str:
    text = excerpt(example["continuation"], CONTINUATION_CHARACTERS) or "–"
    return f"{text} ({decimal(example['probability'])})"
