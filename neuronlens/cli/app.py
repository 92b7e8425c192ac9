"""What the commands share: the application, their arguments and options, and how they open a store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from neuronlens.store import Store

app = typer.Typer(
    name="neuronlens",
    help="Which values does each neuron take under each concept, and what happens when you take just those away?",
    epilog="Start with: neuronlens demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
StoreArgument = Annotated[str, typer.Argument(help="A store: the directory that a run printed.", show_default=False)]
StoreOption = Annotated[str | None, typer.Option("--store", help="Where the store goes [default: neuronlens-runs/].")]
ChangesOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change a recipe key: section.key=value. May be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line on stdout.")]
TableOption = Annotated[str | None, typer.Option("--table", help="A range table's id, where the store has several.")]
PublishOption = Annotated[
    str | None, typer.Option("--publish", help="Upload the table to this running server, such as http://host:8000.")
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="The server's key, in a file [default: the variables NEURONLENS_WRITE_KEY, NEURONLENS_API_KEY].",
    ),
]
AddressOption = Annotated[
    str | None, typer.Option(help="The Ray dashboard, such as http://head:8265.", envvar="RAY_API_SERVER_ADDRESS")
]
PartialOption = Annotated[
    bool,
    typer.Option("--allow-partial", help="Go on without shards that failed; every output says its coverage."),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-files", help="On a resume, compare only the sizes of committed files, not their checksums."),
]


def open_store(store: str) -> "Store":
    """The store, once it is known to be one."""
    from neuronlens.store import Store

    opened = Store(store)
    opened.describe()
    return opened
