"""The commands that ask a store: sql, views."""

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from neuronlens.cli.app import StoreArgument, app, open_store
from neuronlens.console import stderr
from neuronlens.errors import UsageError


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


@app.command(
    epilog='Example: `neuronlens sql STORE "select layer, median(kurtosis) from moments group by all" --format csv` · '
    "`neuronlens sql STORE < query.sql` · `neuronlens sql STORE` for a prompt"
)
def sql(
    store: StoreArgument,
    query: Annotated[
        str | None,
        typer.Argument(help="SQL, or a question from sql/ by name. Without it: a prompt, or SQL from a pipe."),
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="How to print the answer.")] = Format.table,
    params: Annotated[list[str] | None, typer.Option("--param", help="name=value for a $name in the query.")] = None,
) -> None:
    """Ask the store in SQL, read only. `describe VIEW` says what the columns mean; `neuronlens views STORE --list`
    what there is to ask."""
    from neuronlens.answers import answer
    from neuronlens.lens import Lens

    given = dict(_assignment(param) for param in params or [])
    with Lens(open_store(store)) as lens:
        if query is None and sys.stdin.isatty():
            from neuronlens.shell import open_shell

            open_shell(lens, stderr())
            return
        text = query if query is not None else sys.stdin.read().strip()
        if not text:
            raise UsageError(
                "There is no query: none was given, and nothing came from the pipe. Expected SQL or the name of a "
                "question; neuronlens views STORE --list shows what there is."
            )
        answer(lens, text, output.value, given)


@app.command(epilog="Example: `neuronlens views STORE > views.sql`, then `duckdb -init views.sql`")
def views(
    store: StoreArgument,
    names: Annotated[
        bool, typer.Option("--list", help="Instead, list views, table macros and ready questions.")
    ] = False,
) -> None:
    """Print SQL that makes the same views in any DuckDB client: the plain shell, Python, R, DBeaver."""
    from rich.console import Console

    from neuronlens.answers import list_questions, list_views
    from neuronlens.lens import Lens, view_script

    opened = open_store(store)
    if not names:
        typer.echo(view_script(opened), nl=False)
        return
    with Lens(opened) as lens:
        console = Console()
        list_views(lens, console)
        list_questions(console)


def _assignment(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UsageError(f"--param {text!r} is not of the form name=value, for example --param layer=3.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
