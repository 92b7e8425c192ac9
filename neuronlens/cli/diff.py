"""The command that compares two stores: diff."""

import sys
from typing import Annotated

import typer

from neuronlens.cli.app import JsonOption, app, open_store
from neuronlens.cli.ask import Format
from neuronlens.console import print_json, stderr
from neuronlens.errors import UsageError


@app.command(
    epilog="Examples: `neuronlens diff STORE_A STORE_B` · every neuron, for a script: `neuronlens diff STORE_A STORE_B "
    "--all --format parquet > drift.parquet`"
)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A store.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The store to hold beside it.", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="How many rows of each table are shown.")] = 20,
    salience: Annotated[str, typer.Option(help="The method whose changes of rank are shown.")] = "mean_abs",
    top_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a layer's neurons that count as salient.")
    ] = 0.3,
    every: Annotated[bool, typer.Option("--all", help="With --format: a row per neuron, not one per layer.")] = False,
    output: Annotated[Format, typer.Option("--format", help="How to print the drift.")] = Format.table,
    as_json: JsonOption = False,
) -> None:
    """How far did mean and standard deviation of every neuron move between two stores, in units of their standard
    error, and do the same neurons stay salient?

    Halves of one data set, other data, another checkpoint: what kind of comparison it is, and what weakens it, is said
    first."""
    from neuronlens.answers import finite, print_rows
    from neuronlens.diff import compared
    from neuronlens.diff_tables import say_comparison, say_terms

    _check_form(output, every=every, as_json=as_json)
    console = stderr()
    with compared(open_store(a), open_store(b)) as comparison:
        if output is not Format.table:
            say_terms(console, comparison.terms)
            rows = comparison.drift() if every else comparison.drift_groups().to_reader()
            print_rows(rows, output.value)
            return
        found = comparison.summary(top=top, salience=salience, top_fraction=top_fraction)
    say_comparison(console, found, top=top, salience=salience)
    if as_json:
        print_json(finite(found))


def _check_form(output: Format, *, every: bool, as_json: bool) -> None:
    if as_json and output is not Format.table:
        raise UsageError("--json and --format both want stdout; give one of them.")
    if every and output is Format.table:
        raise UsageError("--all gives a row per neuron, too many to read; add --format csv, json or parquet.")
    if output is Format.parquet and sys.stdout.isatty():
        raise UsageError("Parquet is not for a terminal. Send it to a file: add > drift.parquet")
