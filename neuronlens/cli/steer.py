"""The command that tries an intervention on one text: steer."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuronlens.cli.app import JsonOption, StoreArgument, TableOption, app, open_store
from neuronlens.console import ConsoleReporter, print_json, stderr
from neuronlens.errors import UsageError
from neuronlens.labels import printable

if TYPE_CHECKING:
    from neuronlens.programs import Program
    from neuronlens.ranges import RangeTable
    from neuronlens.steer import Compared

_N_TOKENS = 30


@app.command(
    epilog='Examples: `neuronlens steer STORE --concept joy "i feel so"` · `neuronlens steer STORE --concept joy '
    '--action dampen --factor 0.2 --layer 5 --max-tokens 40 "i feel so"` · several concepts: `--concept joy --concept '
    "love`, the first whose range has the value decides."
)
def steer(
    store: StoreArgument,
    text: Annotated[str, typer.Argument(help="The text to continue.", show_default=False)],
    concepts: Annotated[list[str], typer.Option("--concept", help="Whose ranges. Repeatable.")],
    action: Annotated[str, typer.Option(help="zero, mean, others, dampen, adaptive, set or soften.")] = "zero",
    factor: Annotated[float | None, typer.Option(help="What dampen and adaptive multiply by.")] = None,
    value: Annotated[float | None, typer.Option(help="What set puts in place.")] = None,
    tau: Annotated[float | None, typer.Option(help="Half width of a range [default: the table's]; inf: all.")] = None,
    top_fraction: Annotated[float | None, typer.Option(help="Share of neurons [default: the table's].")] = None,
    layers: Annotated[list[int] | None, typer.Option("--layer", help="Only in this layer. Repeatable.")] = None,
    neurons: Annotated[list[int] | None, typer.Option("--neuron", help="Only this one. Repeatable.")] = None,
    hook_points: Annotated[list[str] | None, typer.Option("--hook-point", help="Only there. Repeatable.")] = None,
    phases: Annotated[
        list[str] | None, typer.Option("--phase", help="Only prompt, or only generation [default: both].")
    ] = None,
    table: TableOption = None,
    model: Annotated[str | None, typer.Option(help="A folder or a hub id [default: the store's].")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")] = "cpu",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help=f"How far to go on [default: {_N_TOKENS}, or what the window has room for]."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0,
    seed: Annotated[int, typer.Option(help="Of both texts' draws.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Continue a text with a concept's ranges silenced, and without, side by side."""
    from neuronlens.programs import Program
    from pipeline.emit import load_table

    opened = open_store(store)
    chosen = load_table(opened, table)
    given = {
        "action": action,
        "factor": factor,
        "value": value,
        "tau": tau,
        "top_fraction": top_fraction,
        "layers": tuple(layers) if layers else None,
        "neurons": tuple(neurons) if neurons else None,
        "hook_points": tuple(hook_points) if hook_points else None,
    }
    rule = {name: asked for name, asked in given.items() if asked is not None}
    program = Program.compile(chosen, [{**rule, "concept": concept} for concept in concepts])
    if unknown := sorted(set(phases or ()) - {"prompt", "generation"}):
        raise UsageError(f"--phase is {', '.join(unknown)}; expected prompt or generation.")

    from neuronlens.identity import model_identity
    from neuronlens.models import load_model
    from neuronlens.serving.engine import Phase, Sampling
    from neuronlens.steer import check_model, compare

    named = opened.describe()["model"]
    identity = model_identity(model or named["id"], None if model else named["revision"])
    check_model(chosen, identity)
    loaded = load_model(identity.id, revision=identity.revision, device=device)
    n_most = max_tokens or max(1, min(_N_TOKENS, loaded.window - len(loaded.tokenizer(text)["input_ids"])))
    sampling = Sampling(max_tokens=n_most, temperature=temperature, seed=seed)
    at_work: list[Phase] = [phase for phase in ("prompt", "generation") if not phases or phase in phases]
    with ConsoleReporter(stderr()).stage("steer", 2 * n_most, "tokens") as advance:
        compared = compare(
            loaded,
            program,
            text,
            sampling,
            phases=frozenset(at_work),
            overrides=named.get("modules"),
            on_token=advance,
        )
    _show(stderr() if as_json else Console(), text, compared, program, chosen)
    if as_json:
        intervention = {
            "id": program.id,
            "table": chosen.id,
            "layers": list(program.layers),
            "tested": compared.counts.tested,
            "changed": compared.counts.changed,
        }
        print_json({"baseline": compared.baseline, "steered": compared.steered, "intervention": intervention})


def _show(console: Console, text: str, compared: "Compared", program: "Program", table: "RangeTable") -> None:
    def answer(continuation: str) -> Text:
        return Text.assemble((printable(text), "dim"), printable(continuation))

    shown = Table(expand=True)
    shown.add_column("without", ratio=1)
    shown.add_column("steered", ratio=1)
    shown.add_row(answer(compared.baseline), answer(compared.steered))
    console.print(shown)
    counts = compared.counts
    share = counts.changed / counts.tested if counts.tested else 0.0
    same = "the same text; try more layers, a larger --tau or --top-fraction" * (compared.baseline == compared.steered)
    lines = [
        f"{counts.changed:,} of {counts.tested:,} activations were inside their ranges and changed ({share:.1%}), in "
        f"layers {', '.join(map(str, program.layers))} of {', '.join(program.hook_points)}; range table {table.id}",
        *([same] if same else []),
    ]
    stderr().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
