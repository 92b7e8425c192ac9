"""The command that cuts a store again: recut."""

import os
from pathlib import Path
from typing import Annotated

import typer

from neuronlens.cli.app import JsonOption, StoreArgument, app, open_store
from neuronlens.console import ConsoleReporter, print_json, stderr


@app.command(
    epilog='Examples: `neuronlens recut STORE -o short --where "n_tokens < 20"` · `--where correct` · a random half, '
    "the same one wherever the same data was collected: `--where \"md5(row::varchar) < '8'\"`, and the other half: "
    "`>= '8'` · every other shard: `--shards \"shard % 2 = 0\"`. The same command again resumes."
)
def recut(
    store: StoreArgument,
    output: Annotated[str, typer.Option("--output", "-o", help="Where the new store goes.", show_default=False)],
    where: Annotated[
        str | None,
        typer.Option(help="Which samples to keep: SQL over the columns of the view samples. Needs raw values."),
    ] = None,
    shards: Annotated[
        str | None, typer.Option(help="Which shards to keep: SQL over the columns of the view shards.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a new store of some of a store's samples, without the model: the same numbers as a run on these alone.

    `--where` needs the raw values of all neurons, unless it keeps or drops whole shards."""
    opened = open_store(store)
    from neuronlens.store import Store
    from pipeline.recut import recut as cut

    summary = cut(opened, Store(output), where=where, shards=shards, reporter=ConsoleReporter(stderr()))
    shown = os.path.relpath(summary.store) if Path(summary.store).is_relative_to(Path.cwd()) else summary.store
    lines = [
        f"store        {summary.store}",
        f"data         {summary.n_samples:,} samples, {summary.n_shards:,} shard{'' if summary.n_shards == 1 else 's'}",
        f"time         {summary.seconds:.1f} s",
        "\nNext:",
        f"  neuronlens sql {shown} separable_pairs",
        f"  neuronlens ranges {shown}",
        f"  neuronlens verify {shown}",
    ]
    stderr().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print_json(summary.as_dict())
