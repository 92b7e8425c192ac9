"""The command evaluate: what ranges erase and what they spare, under one setting or a sweep of them."""

from functools import partial
from typing import Annotated

import typer

from neuronlens.cli.app import ChangesOption, JsonOption, StoreArgument, TableOption, app, open_store
from neuronlens.console import ConsoleReporter, print_json, stderr

_EXAMPLES = """
Examples:

`neuronlens evaluate STORE --table tbl_0123456789abcdef --json`

`neuronlens evaluate STORE --sweep tau=0.5:4:0.5 --sweep layers=each,all`

`neuronlens evaluate STORE --control random,wrong_concept,shuffled,length_matched`

`neuronlens evaluate STORE --set test.off_task=wiki.jsonl --set test.multiple_choice=mmlu.jsonl`
"""


@app.command(epilog=_EXAMPLES)
def evaluate(
    store: StoreArgument,
    table: TableOption = None,
    sweeps: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="KEY=VALUES",
            help="Evaluate every value: numbers as start:stop:step or 0.1,0.3; layers=each, all or 0+5; also "
            "top_fraction, hook_points, salience, method, mass, penalty, budget, action, factor, value and positions "
            "(all or last). A method's number, such as tau or penalty, implies it. "
            "Repeatable: every combination. What a table lacks is made from the statistics.",
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(help="Controls, with commas between: random, wrong_concept, shuffled, length_matched."),
    ] = None,
    perplexity: Annotated[
        bool | None,
        typer.Option(
            "--perplexity/--no-perplexity",
            help="Measure the perplexity of the prompts, which takes every token [default: only without --sweep].",
        ),
    ] = None,
    layers: Annotated[list[int] | None, typer.Option("--layer", help="Only in this layer. Repeatable.")] = None,
    action: Annotated[
        str | None,
        typer.Option(help="zero, mean, others, dampen, adaptive, soften or set [default: the recipe's test.action]."),
    ] = None,
    factor: Annotated[float | None, typer.Option(help="What dampen and adaptive multiply by.")] = None,
    value: Annotated[float | None, typer.Option(help="What set puts in place.")] = None,
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """What do the ranges erase, and what do they spare? Against the bare model and whole-neuron masking."""
    from neuronlens.controls import parse_controls
    from neuronlens.programs import Edit
    from neuronlens.recipe import parse_section
    from neuronlens.report import erasure_table, sweep_table
    from neuronlens.sweep import parse_grid
    from pipeline.driver import ray_session
    from pipeline.emit import load_table
    from pipeline.erasure import evaluate_sweep, evaluate_table, recipe_of, table_of_recipe
    from pipeline.workers import Spares

    opened, reporter = open_store(store), ConsoleReporter(stderr())
    recipe = recipe_of(opened, changes)
    action = action or (recipe.test.action if recipe.test is not None else None)
    asked = {"action": action, "factor": factor, "value": value, "layers": tuple(layers) if layers else None}
    edit = parse_section(Edit, {key: given for key, given in asked.items() if given is not None}, origin="evaluate")
    controls = parse_controls(control)
    stage = partial(evaluate_sweep, grid=parse_grid(sweeps)) if sweeps else evaluate_table
    chosen = table_of_recipe(opened, recipe) if sweeps and table is None else load_table(opened, table)
    with ray_session(), Spares(recipe.compute, at_most=1) as spares:
        rows = stage(
            recipe=recipe,
            store=opened,
            table=chosen,
            reporter=reporter,
            edit=edit,
            controls=controls,
            perplexity=not sweeps if perplexity is None else perplexity,
            spares=spares,
        )
    stderr().print(sweep_table(rows) if sweeps else erasure_table(rows))
    if as_json:
        print_json({"rows": rows})
