"""The statistics stage alone: what was collected becomes moments, histograms, overlap and salience. For CPU nodes.

    python -m jobs.statistics s3://bucket/run

Needs neither the model nor the texts. The same command again makes only the layers that are missing or out of date.
"""

import typer

from neuronlens.cli.app import ChangesOption, JsonOption, PartialOption, StoreArgument
from neuronlens.console import ConsoleReporter, command_line, print_json, stderr
from neuronlens.store import Store
from pipeline.driver import Driver, ray_session
from pipeline.erasure import recipe_of

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog="Example: python -m jobs.statistics s3://bucket/run --set overlap.keep=top")
def main(
    store: StoreArgument,
    changes: ChangesOption = None,
    allow_partial: PartialOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge the committed shards of a store, a Ray task a layer."""
    opened = Store(store)
    driver = Driver(
        recipe=recipe_of(opened, changes),
        reporter=ConsoleReporter(stderr()),
        allow_partial=allow_partial,
        owns_process=True,
    )
    driver.summary.store = opened.root
    with ray_session(), driver, driver.holding(opened, "jobs.statistics"):
        driver.statistics(opened)
    stderr().print(f"Next:\n  python -m jobs.ranges {opened.root}", highlight=False)
    if as_json:
        print_json(driver.summary.as_dict())


if __name__ == "__main__":
    command_line(app)
