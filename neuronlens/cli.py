"""The command line. What a script reads goes to stdout, what a person reads to stderr.

neuronlens --help
"""

import contextlib
import json
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from neuronlens.console import ConsoleReporter, command_line, print_json, stderr
from neuronlens.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from neuronlens.recipe import Recipe
    from neuronlens.store import Store
    from pipeline.driver import Summary

app = typer.Typer(
    name="neuronlens",
    help="Which values does each neuron take under each concept, and what happens when you take just those away?",
    epilog="Start with: neuronlens demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


_WATCH_SECONDS = 5.0
_N_SHOWN = 20

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
StoreArgument = Annotated[str, typer.Argument(help="A store: the directory that a run printed.", show_default=False)]
StoreOption = Annotated[str | None, typer.Option("--store", help="Where the store goes [default: neuronlens-runs/].")]
ChangesOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change a recipe key: section.key=value. May be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line on stdout.")]
TableOption = Annotated[str | None, typer.Option("--table", help="A range table's id, where the store has several.")]


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


def main() -> None:
    """The entry point."""
    command_line(app)


@app.command(
    epilog="Example: `neuronlens demo` · then `neuronlens sql neuronlens-runs/demo-... 'from moments limit 5'`"
)
def demo(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Run the whole job on the model and the corpus that the package ships: about a minute, no GPU, no network."""
    from neuronlens.recipe import load_recipe

    recipe = load_recipe(Path(__file__).parent / "demo" / "recipe.yaml")
    summary = _run(recipe, name="demo", store=store)
    _print_summary(recipe, summary)
    stderr().print(_next_commands(summary.store), highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print_json(summary.as_dict())


@app.command(epilog="Example: `neuronlens run recipe.yaml --set ranges.tau=2.0`. The same command again resumes.")
def run(
    recipe: RecipeArgument,
    store: StoreOption = None,
    changes: ChangesOption = None,
    allow_partial: PartialOption = False,
    trust_files: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Collect statistics, make a range table and, where the recipe has a test, evaluate it."""
    from neuronlens.recipe import load_recipe

    loaded = load_recipe(recipe, changes)
    summary = _run(loaded, name=recipe.stem, store=store, allow_partial=allow_partial, trust_files=trust_files)
    _print_summary(loaded, summary)
    if as_json:
        print_json(summary.as_dict())


@app.command(epilog="Example: `neuronlens plan recipe.yaml --set collect.raw=all`")
def plan(recipe: RecipeArgument, changes: ChangesOption = None, as_json: JsonOption = False) -> None:
    """Say what a run will take: shards, tokens, bytes on disk, memory. Runs nothing, writes nothing."""
    from neuronlens.recipe import load_recipe
    from pipeline.plan import make_plan

    planned = make_plan(load_recipe(recipe, changes))
    estimate = planned.estimate
    numbers = {
        "shards": len(planned.shards),
        "batches": sum(shard.n_batches for shard in planned.shards),
        "samples": planned.n_samples,
        "tokens": planned.n_tokens,
        "truncated": planned.description["dataset"]["n_truncated"],
        "neurons": sum(width * len(planned.description["layers"]) for width in planned.description["widths"].values()),
        "disk_bytes": estimate.disk_bytes | {"total": estimate.total_disk_bytes},
        "worker_memory_bytes": estimate.worker_memory_bytes | {"total": estimate.total_worker_memory_bytes},
        "raw": estimate.raw_note,
    }
    stderr().print(_plan_table(numbers))
    stderr().print(estimate.raw_note, highlight=False)
    if as_json:
        print_json(numbers)


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

    answer(_open(store), query, output.value, dict(_assignment(param) for param in params or []))


@app.command(epilog="Example: `neuronlens ranges STORE --tau 2.0 --top-fraction 0.5`")
def ranges(
    store: StoreArgument,
    tau: Annotated[float, typer.Option(help="Half width of a range in standard deviations.")] = 2.5,
    top_fraction: Annotated[float, typer.Option(help="Share of a layer's neurons that count as salient.")] = 0.3,
    salience: Annotated[str, typer.Option(help="mean_abs, cohens_d or selectivity.")] = "mean_abs",
    as_json: JsonOption = False,
) -> None:
    """Make another range table from the same statistics: no forward pass, seconds."""
    from neuronlens.recipe import RangesSection, parse_section
    from pipeline.emit import emit_table

    asked = parse_section(
        RangesSection, {"tau": tau, "top_fraction": top_fraction, "salience": salience}, origin="ranges"
    )
    table = emit_table(_open(store), tau=asked.tau, top_fraction=asked.top_fraction, salience=asked.salience)
    stderr().print(f"{table.id}: {table.rows.num_rows:,} ranges, tau {tau:g}, top {top_fraction:.0%} by {salience}")
    if as_json:
        print_json({"range_table": table.id, "rows": table.rows.num_rows})


@app.command(epilog="Example: `neuronlens evaluate STORE --table tbl_0123456789abcdef --json`")
def evaluate(
    store: StoreArgument,
    table: TableOption = None,
    layers: Annotated[list[int] | None, typer.Option("--layer", help="Only in this layer. Repeatable.")] = None,
    action: Annotated[str, typer.Option(help="zero, mean, dampen, adaptive or set.")] = "zero",
    factor: Annotated[float | None, typer.Option(help="What dampen and adaptive multiply by.")] = None,
    value: Annotated[float | None, typer.Option(help="What set puts in place.")] = None,
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """What do the ranges erase, and what do they spare? Against the bare model and whole-neuron masking."""
    from neuronlens.programs import Edit
    from neuronlens.recipe import parse_section
    from neuronlens.report import erasure_table
    from pipeline.driver import ray_session
    from pipeline.emit import load_table
    from pipeline.erasure import evaluate_table, recipe_of

    opened = _open(store)
    chosen, recipe = load_table(opened, table), recipe_of(opened, changes)
    asked = {"action": action, "factor": factor, "value": value, "layers": tuple(layers) if layers else None}
    edit = parse_section(Edit, {key: given for key, given in asked.items() if given is not None}, origin="evaluate")
    with ray_session():
        rows = evaluate_table(recipe, opened, chosen, ConsoleReporter(stderr()), edit)
    stderr().print(erasure_table(rows))
    if as_json:
        print_json({"rows": rows})


@app.command(epilog="Example: `neuronlens verify STORE --json`")
def verify(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Read every committed file again: is it there, are its bytes and rows what its receipt says? Exit code 1 if
    not."""

    opened = _open(store)
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


@app.command(
    epilog="Example: `neuronlens submit recipe.yaml --address http://head:8265 --store s3://bucket/run --wait`"
)
def submit(
    recipe: RecipeArgument,
    store: Annotated[str, typer.Option("--store", help="A URL, or a folder on a disk that all nodes share.")],
    address: AddressOption = None,
    changes: ChangesOption = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="A folder to send along, with the recipe in it [default: the recipe alone].")
    ] = None,
    allow_partial: PartialOption = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the log until the job ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe as a job of a Ray cluster. Prints the job's id on stdout."""
    from neuronlens.recipe import load_recipe
    from pipeline.submit import follow, submit_run

    if address is None:
        raise UsageError("No cluster was named. Give --address http://head:8265, or set RAY_API_SERVER_ADDRESS.")
    load_recipe(recipe, changes)
    job = submit_run(
        address,
        recipe,
        store=store,
        changes=changes or (),
        working_dir=working_dir,
        flags=["--allow-partial"] if allow_partial else [],
    )
    status = "SUBMITTED"
    if wait:
        stderr().print(f"following {job}; Ctrl-C leaves it running", style="dim", highlight=False)
        try:
            status = follow(address, job, lambda text: stderr().out(text, end="", highlight=False))
        except KeyboardInterrupt:
            wait = False
    if not wait:
        next_commands = f"  neuronlens status {job} --address {address}\n  ray job stop {job} --address {address}"
        stderr().print(f"Next:\n{next_commands}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print_json({"job": job, "store": store, "status": status})
    else:
        typer.echo(job)
    if wait and status != "SUCCEEDED":
        raise RunFailed(
            f"{job} ended as {status}; expected SUCCEEDED. Its log is above; the same command goes on from what was "
            "committed."
        )


@app.command(epilog="Example: `neuronlens status s3://bucket/run` or `neuronlens status raysubmit_... --address URL`")
def status(
    what: Annotated[str, typer.Argument(help="A store, or the id of a submitted job.", show_default=False)],
    address: AddressOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 5 s until the run ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How far is a run: shards done, running, failed and quarantined, tokens a second, what failed and why."""
    from neuronlens.report import status_table
    from neuronlens.store import Store
    from pipeline.status import status_of
    from pipeline.submit import FINISHED, job_of

    while True:
        job = job_of(address, what) if what.startswith("raysubmit_") else None
        root = job["store"] if job else what
        found = status_of(Store(root)) if job is None or Store(root).exists("store.json") else None
        if job:
            stderr().print(f"{job['job']}: {job['status']}. {job['message'] or ''}", highlight=False, markup=False)
        if found:
            stderr().print(status_table(found))
        elif job:
            stderr().print(f"{root} holds nothing yet.", highlight=False, markup=False)
        ended = job["status"] in FINISHED if job else found is None or found["state"] != "running"
        if ended or not watch:
            break
        time.sleep(_WATCH_SECONDS)
    if as_json:
        print_json({"job": job, **(found or {})} if job else found or {})


@app.command(epilog="Example: `neuronlens clean STORE --dry-run`")
def clean(
    store: StoreArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove files that do not count: what attempts left behind that died or came second. Refuses while a driver works
    on the store."""
    from pipeline.clean import clean as remove
    from pipeline.clean import orphans
    from pipeline.lease import Lease

    opened, console = _open(store), stderr()
    with contextlib.nullcontext() if dry_run else Lease(opened, "neuronlens clean", console.print):
        found = orphans(opened)
        if not dry_run:
            with ConsoleReporter(console).stage("clean", len(found), "files") as advance:
                remove(opened, found, lambda _: advance(1))
    n_bytes = sum(orphan.n_bytes for orphan in found)
    for orphan in found[:_N_SHOWN]:
        console.print(f"  {orphan.path}", highlight=False, markup=False, soft_wrap=True)
    if len(found) > _N_SHOWN:
        console.print(f"  and {len(found) - _N_SHOWN:,} more")
    console.print(f"{len(found):,} files, {n_bytes:,} bytes, {'would be ' if dry_run else ''}removed", highlight=False)
    if as_json:
        print_json({"files": [orphan.path for orphan in found], "bytes": n_bytes, "removed": not dry_run})


def _run(
    recipe: "Recipe", *, name: str, store: str | None, allow_partial: bool = False, trust_files: bool = False
) -> "Summary":
    from pipeline.driver import ray_session
    from pipeline.driver import run as run_job

    stderr().print("starting Ray", style="dim")
    with ray_session():
        return run_job(
            recipe,
            name=name,
            store_root=store,
            reporter=ConsoleReporter(stderr()),
            allow_partial=allow_partial,
            trust_files=trust_files,
            owns_process=True,
        )


def _open(store: str) -> "Store":
    from neuronlens.store import Store

    opened = Store(store)
    opened.describe()
    return opened


def _print_summary(recipe: "Recipe", summary: "Summary") -> None:
    from neuronlens.report import activity_line, coverage_line, erasure_table

    console = stderr()
    if summary.erasure:
        console.print(erasure_table(summary.erasure))
    elif recipe.test is None:
        console.print("The recipe has no test section: nothing was evaluated.")
    spent = activity_line(summary.collector_seconds)
    partial = coverage_line(summary.coverage)
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary.stages.items())
    lines = [
        f"store        {summary.store}",
        f"range table  {summary.range_table}   (ranges/{summary.range_table}/ in the store)",
        f"data         {summary.n_samples:,} samples, {summary.n_tokens:,} tokens",
        f"time         {summary.seconds:.1f} s: {stages}",
        *([f"collectors   {spent}"] if spent else []),
        *([f"coverage     {partial}"] if partial else []),
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _next_commands(store: str) -> str:
    shown = os.path.relpath(store) if Path(store).is_relative_to(Path.cwd()) else store
    return "\n".join(
        [
            "\nNext:",
            f"  neuronlens sql {shown} separable_pairs",
            f"  neuronlens ranges {shown} --tau 1.5 --salience cohens_d",
            f"  neuronlens verify {shown}",
        ]
    )


def _plan_table(numbers: dict[str, Any]) -> Table:
    table = Table("what", "amount", title="The run will take")
    table.columns[1].justify = "right"
    for key, value in numbers.items():
        if isinstance(value, int):
            table.add_row(key, f"{value:,}")
    for key in ("disk_bytes", "worker_memory_bytes"):
        table.add_section()
        for kind, n_bytes in numbers[key].items():
            table.add_row(f"{'disk' if key == 'disk_bytes' else 'memory a worker'}: {kind}", f"{n_bytes / 1e6:,.1f} MB")
    return table


def _assignment(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UsageError(f"--param {text!r} is not of the form name=value, for example --param layer=3.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
