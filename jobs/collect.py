"""The collecting stage alone: texts through the model, partials into the store. For nodes with GPUs.

    python -m jobs.collect recipe.yaml --store s3://bucket/run

The same command again goes on where it stopped. Then jobs.statistics, on any nodes.
"""

import typer

from neuronlens.cli.app import (
    ChangesOption,
    JsonOption,
    PartialOption,
    RecipeArgument,
    StoreOption,
    TrustOption,
)
from neuronlens.console import ConsoleReporter, command_line, print_json, stderr
from neuronlens.recipe import load_recipe
from pipeline.driver import Driver, ray_session
from pipeline.workers import Spares

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog="Example: python -m jobs.collect recipe.yaml --store s3://bucket/run")
def main(
    recipe: RecipeArgument,
    store: StoreOption = None,
    changes: ChangesOption = None,
    allow_partial: PartialOption = False,
    trust_files: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Collect the shards of a recipe that the store does not hold yet."""
    loaded = load_recipe(recipe, changes)
    driver = Driver(
        recipe=loaded,
        reporter=ConsoleReporter(stderr()),
        allow_partial=allow_partial,
        trust_files=trust_files,
        owns_process=True,
    )
    with ray_session(), driver, Spares(loaded.compute, loaded.model.backend) as spares:
        plan, opened = driver.plan(name=recipe.stem, store_root=store)
        with driver.holding(opened, "jobs.collect") as lease:
            driver.collect(plan, opened, lease, spares)
    stderr().print(f"collected into {opened.root}\nNext:\n  python -m jobs.statistics {opened.root}", highlight=False)
    if as_json:
        print_json(driver.summary.as_dict())


if __name__ == "__main__":
    command_line(app)
