"""The commands that ask a store: sql."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from neuronlens.cli.app import StoreArgument, app, open_store
from neuronlens.errors import UsageError


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


@app.command(
    epilog='Example: `neuronlens sql STORE "select layer, median(kurtosis) from moments group by all" --format csv`'
)
def sql(
    store: StoreArgument,
    query: Annotated[
        str | None, typer.Argument(help="SQL, or a question from sql/ by name. Without it: what there is.")
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="How to print the answer.")] = Format.table,
    params: Annotated[list[str] | None, typer.Option("--param", help="name=value for a $name in the query.")] = None,
) -> None:
    """Ask the store in SQL. Views: samples, shards, partials, histograms, moments, overlap, concept_overlap, salience,
    ranges, activations."""
    from neuronlens.answers import answer

    answer(open_store(store), query, output.value, dict(_assignment(param) for param in params or []))


def _assignment(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UsageError(f"--param {text!r} is not of the form name=value, for example --param layer=3.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
