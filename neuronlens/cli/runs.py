"""The commands that run jobs: demo, run, plan, submit, status, clean."""

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from neuronlens.cli.app import (
    AddressOption,
    ChangesOption,
    JsonOption,
    PartialOption,
    RecipeArgument,
    StoreArgument,
    StoreOption,
    TrustOption,
    app,
    open_store,
)
from neuronlens.console import ConsoleReporter, print_json, stderr
from neuronlens.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from neuronlens.recipe import Recipe
    from pipeline.driver import Summary

_WATCH_SECONDS = 5.0
_N_SHOWN = 20


@app.command(
    epilog="Example: `neuronlens demo` · then `neuronlens sql neuronlens-runs/demo-... 'from moments limit 5'`"
)
def demo(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Run the whole job on the model and the corpus that the package ships: about a minute, no GPU, no network."""
    from neuronlens.recipe import load_recipe

    recipe = load_recipe(Path(__file__).parents[1] / "demo" / "recipe.yaml")
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

    opened, console = open_store(store), stderr()
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
            f"  neuronlens report {shown}",
            f"  neuronlens sql {shown}",
            f"  neuronlens ranges {shown} --tau 1.5 --salience f_ratio",
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
