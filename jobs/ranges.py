"""The ranges stage alone: a range table from a store's statistics, as its recipe asks. For any laptop.

python -m jobs.ranges s3://bucket/run --set ranges.tau=2.0 --publish http://host:8000

Starts no Ray and loads no model.
"""

import typer

from neuronlens.cli.app import ChangesOption, JsonOption, KeyFileOption, PublishOption, StoreArgument
from neuronlens.console import ConsoleReporter, command_line, print_json, stderr
from neuronlens.report import coverage_line
from neuronlens.store import Store
from pipeline.emit import emit_table, publish_table
from pipeline.erasure import recipe_of

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog="Example: python -m jobs.ranges s3://bucket/run --set ranges.tau=2.0")
def main(
    store: StoreArgument,
    changes: ChangesOption = None,
    publish: PublishOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the range table of a store. The same settings give the same table, under the same id."""
    opened = Store(store)
    table = emit_table(opened, recipe_of(opened, changes).ranges, ConsoleReporter(stderr()))
    stderr().print(f"{table.id}: {table.rows.num_rows:,} ranges. {coverage_line(table.header.coverage) or ''}")
    if publish is not None:
        publish_table(table, to=publish, key_file=key_file, kept_in=opened.root)
        stderr().print(f"Published to {publish}.", highlight=False)
    stderr().print(f"Next:\n  python -m jobs.evaluate {opened.root} --table {table.id}", highlight=False)
    if as_json:
        print_json({"range_table": table.id, "rows": table.rows.num_rows, "coverage": table.header.coverage})


if __name__ == "__main__":
    command_line(app)
