"""The commands around range tables: ranges, publish, verify."""

from typing import Annotated

import typer

from neuronlens.cli.app import (
    JsonOption,
    KeyFileOption,
    PublishOption,
    StoreArgument,
    TableOption,
    app,
    open_store,
)
from neuronlens.console import ConsoleReporter, print_json, stderr
from neuronlens.errors import RunFailed, UsageError


@app.command(epilog="Example: `neuronlens ranges STORE --tau 2.0 --top-fraction 0.5`")
def ranges(
    store: StoreArgument,
    method: Annotated[
        str,
        typer.Option(
            help="paper (mean -+ tau std), hpd (the shortest interval with so much of the concept), likelihood_ratio "
            "(values likelier under the concept), budget (the same, for so much of the others' values) or posterior "
            "(for the action soften). See docs/method.md."
        ),
    ] = "paper",
    tau: Annotated[float, typer.Option(help="Method paper: half width of a range in standard deviations.")] = 2.5,
    mass: Annotated[float | None, typer.Option(help="Method hpd: share of the concept's values [0.9].")] = None,
    penalty: Annotated[
        float | None, typer.Option(help="Method likelihood_ratio: how many times likelier under the concept [3].")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Method budget: share of the others' values, the mean over neurons [0.1].")
    ] = None,
    top_fraction: Annotated[
        float | None,
        typer.Option(help="Share of a layer's neurons that count as salient [0.3; 1 where the method chooses]."),
    ] = None,
    salience: Annotated[
        str,
        typer.Option(
            help="mean_abs, mean, probeless, cohens_d, selectivity, f_ratio, mutual_information or, from raw values, "
            "probe: `neuronlens sql STORE 'describe salience'`."
        ),
    ] = "mean_abs",
    publish: PublishOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make another range table from the same statistics: no forward pass, seconds."""
    from neuronlens.recipe import RangesSection, parse_section
    from pipeline.emit import emit_table, publish_table

    opened = open_store(store)
    given = {
        "method": method,
        "tau": tau,
        "mass": mass,
        "penalty": penalty,
        "budget": budget,
        "top_fraction": top_fraction,
        "salience": salience,
    }
    asked = parse_section(
        RangesSection, {key: value for key, value in given.items() if value is not None}, origin="ranges"
    )
    table = emit_table(opened, asked, ConsoleReporter(stderr()))
    how = f"tau {asked.tau:g}" if method == "paper" else " ".join([method, *(f"{v:g}" for v in asked.options.values())])
    top = f"top {asked.top_fraction:.0%} by {asked.salience}"
    stderr().print(f"{table.id}: {table.rows.num_rows:,} ranges, {how}, {top}", highlight=False)
    if publish is not None:
        publish_table(table, to=publish, key_file=key_file, kept_in=opened.root)
        stderr().print(f"published to {publish}", highlight=False)
    if as_json:
        print_json({"range_table": table.id, "rows": table.rows.num_rows})


@app.command(epilog="Example: `neuronlens publish STORE --table tbl_0123456789abcdef --to http://host:8000`")
def publish(
    source: Annotated[
        str,
        typer.Argument(metavar="TABLE", help="The folder of a range table, or a store.", show_default=False),
    ],
    to: Annotated[str, typer.Option(help="A running server, such as http://host:8000.", show_default=False)],
    table: TableOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a range table to a running server. The same table again is no error."""
    from neuronlens.ranges import RangeTable
    from neuronlens.store import Store
    from pipeline.emit import load_table, publish_table

    place = Store(source)
    if place.exists("table.json"):
        if table is not None:
            raise UsageError(f"{source} is the folder of one range table; --table chooses from a store. Leave it out.")
        chosen = RangeTable.load(place.root, place.fs)
    elif place.exists("store.json"):
        chosen = load_table(open_store(source), table)
    else:
        raise UsageError(
            f"{source} has neither a table.json nor a store.json; expected the folder of a range table, "
            "STORE/ranges/tbl_..., or a store."
        )
    publish_table(chosen, to=to, key_file=key_file)
    stderr().print(f"{chosen.id}: {chosen.rows.num_rows:,} ranges published to {to}", highlight=False)
    if as_json:
        print_json({"range_table": chosen.id, "rows": chosen.rows.num_rows, "url": to})


@app.command(epilog="Example: `neuronlens verify STORE --json`")
def verify(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Read every committed file again: is it there, are its bytes and rows what its receipt says? Exit code 1 if
    not."""

    opened = open_store(store)
    n_bytes = sum(file.n_bytes for file in opened.committed_files())
    with ConsoleReporter(stderr()).stage("verify", n_bytes, "bytes") as advance:
        faults = opened.faults(on_file=lambda file: advance(file.n_bytes))
    for fault in faults:
        stderr().print(fault, style="red", highlight=False, markup=False, soft_wrap=True)
    stderr().print(f"{len(faults)} faults" if faults else f"All committed files are right ({n_bytes:,} bytes).")
    if as_json:
        print_json({"ok": not faults, "faults": faults})
    if faults:
        raise RunFailed(
            f"{opened.root} has {len(faults)} damaged files; expected none. Run the same recipe again to mend it."
        )
