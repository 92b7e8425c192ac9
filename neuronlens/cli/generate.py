"""The command generate: what a model still writes of a concept without its neurons."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from neuronlens.cli.app import ChangesOption, JsonOption, StoreArgument, TableOption, app, open_store
from neuronlens.console import ConsoleReporter, print_json, stderr
from neuronlens.labels import printable

_EXAMPLES = """
Examples:

`neuronlens generate STORE --set test.generation.classifier=path/or/hub-id`

`neuronlens generate STORE --n-prompts 100 --layer 3 --action dampen --factor 0.2 --json`
"""


@app.command(epilog=_EXAMPLES)
def generate(
    store: StoreArgument,
    table: TableOption = None,
    n_prompts: Annotated[
        int | None, typer.Option(min=1, help="At most so many prompts, evenly of all concepts [default: the recipe's].")
    ] = None,
    layers: Annotated[list[int] | None, typer.Option("--layer", help="Only in this layer. Repeatable.")] = None,
    action: Annotated[str, typer.Option(help="zero, mean, others, dampen, adaptive, soften or set.")] = "zero",
    factor: Annotated[float | None, typer.Option(help="What dampen and adaptive multiply by.")] = None,
    value: Annotated[float | None, typer.Option(help="What set puts in place.")] = None,
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue the beginnings of test texts with and without each concept, and let a classifier say what of."""
    from neuronlens.programs import Edit
    from neuronlens.recipe import parse_section
    from pipeline.emit import load_table
    from pipeline.erasure import recipe_of
    from pipeline.generation import run_generation

    opened = open_store(store)
    n_prompts_change = [] if n_prompts is None else [f"test.generation.n_prompts={n_prompts}"]
    recipe = recipe_of(opened, [*(changes or []), *n_prompts_change])
    asked = {"action": action, "factor": factor, "value": value, "layers": tuple(layers) if layers else None}
    edit = parse_section(Edit, {key: given for key, given in asked.items() if given is not None}, origin="generate")
    rows = run_generation(opened, recipe, load_table(opened, table), edit, ConsoleReporter(stderr()))
    stderr().print(_scores(rows), "", _continuations(rows))
    if as_json:
        print_json({"rows": rows})


def _scores(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A section a concept, and the means over concepts at the end. In 80 columns the intervals take a line of their
    own."""
    shown = _table("Do continuations still speak of their concept? By the classifier")
    shown.add_column("concept", overflow="fold")
    shown.add_column("case", no_wrap=True)
    for side in ("target", "others"):
        shown.add_column(f"{side} prob.", justify="right", width=len(side))
        shown.add_column(f"{side} top (95 %)", justify="right", min_width=len("(0.00–0.00)"))
    for heading in ("ppl.", "dist2", "changed"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for concept in dict.fromkeys(row["concept"] for row in rows):
        shown.add_section()
        for i, row in enumerate(row for row in rows if row["concept"] == concept):
            name = "mean" if concept is None else printable(concept)
            cells = [
                *(_number(row["target_probability"], ".3f"), _share(row, "target")),
                *(_number(row["complement_probability"], ".3f"), _share(row, "complement")),
                *(_number(row["perplexity"], ",.1f"), _number(row["distinct_2"], ".2f")),
                _number(row["changed_share"], ".0%"),
            ]
            shown.add_row(name if i == 0 else "", row["condition"], *cells, style="bold" if concept is None else None)
    return shown


def _continuations(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What the first prompts of each concept became, with and without its ranges."""
    shown = _table("The first prompts of each concept, and how they go on")
    for heading, ratio in (("concept", None), ("prompt", 3), ("unmodified", 4), ("without the ranges", 4)):
        shown.add_column(heading, ratio=ratio, overflow="fold")
    of_case = {(row["concept"], row["condition"]): row["examples"] for row in rows}
    for concept in dict.fromkeys(row["concept"] for row in rows if row["concept"] is not None):
        shown.add_section()
        pairs = zip(of_case[concept, "base"], of_case[concept, "range"], strict=True)
        for i, (base, ranged) in enumerate(pairs):
            texts = (base["prompt"], base["continuation"], ranged["continuation"])
            shown.add_row(*map(printable, (concept if i == 0 else "", *texts)))
    return shown


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )


def _share(row: Mapping[str, Any], side: str) -> str:
    low, high = row[f"{side}_share_low"], row[f"{side}_share_high"]
    interval = "" if low is None else f" ({low:.2f}–{high:.2f})"
    return _number(row[f"{side}_share"], ".2f") + interval


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
