"""The model that a recipe names, fine-tuned from a published one on the recipe's own texts.

    python -m jobs.finetune jobs/recipes/paper/ag_news_gpt2.yaml
    neuronlens run jobs/recipes/paper/ag_news_gpt2.yaml

The recipe's section `finetune` says from what and how; its model.id is the folder that is written. The same command
again goes on where it stopped.
"""

from dataclasses import asdict
from typing import Annotated

import typer

from neuronlens.cli.app import ChangesOption, JsonOption, RecipeArgument
from neuronlens.console import ConsoleReporter, command_line, print_json, stderr
from neuronlens.recipe import load_recipe

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog="Example: python -m jobs.finetune jobs/recipes/paper/ag_news_gpt2.yaml --set finetune.epochs=1")
def main(
    recipe: RecipeArgument,
    changes: ChangesOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another model in the same folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune the model of a recipe, and measure its accuracy on the recipe's test texts."""
    loaded = load_recipe(recipe, changes)
    from pipeline.finetune import finetune

    made = finetune(loaded, ConsoleReporter(stderr()), overwrite=overwrite)
    accuracy = "" if made.accuracy is None else f"accuracy {made.accuracy:.4f} on {made.n_test:,} test texts, "
    stderr().print(f"{made.model}: {accuracy}{made.seconds:.0f} s\nNext:\n  neuronlens run {recipe}", highlight=False)
    if as_json:
        print_json(asdict(made))


if __name__ == "__main__":
    command_line(app)
