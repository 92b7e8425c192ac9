"""The commands that show a store: report, figures, show."""

import contextlib
import time
import webbrowser
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from neuronlens.cli.app import JsonOption, StoreArgument, app, open_store
from neuronlens.console import print_json, stderr
from neuronlens.errors import RunFailed, UsageError


class PictureForm(StrEnum):
    """What --format takes."""

    png = "png"
    svg = "svg"
    both = "both"

    @property
    def endings(self) -> list[str]:
        return ["png", "svg"] if self is PictureForm.both else [self.value]


@app.command(epilog="Example: `neuronlens report STORE -o report.html --open`")
def report(
    store: StoreArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file; one that is there is written over.")] = Path(
        "report.html"
    ),
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML file that shows what the store holds: Gaussianity, overlap, salience, single neurons, erasure,
    timing. It needs no network. Prints its path on stdout."""
    from neuronlens.show import check_folder

    check_folder(output)
    opened = open_store(store)
    started = time.perf_counter()
    from neuronlens.page import write_report

    with _failures_in_words(opened.root, output):
        written = write_report(opened, output)
    for warning in written.warnings:
        stderr().print(warning, style="yellow", highlight=False, markup=False, soft_wrap=True)
    seconds = time.perf_counter() - started
    size = f"{written.n_figures} figures, {written.n_bytes / 1e6:.1f} MB, {seconds:.1f} s"
    stderr().print(size, style="dim", highlight=False)
    path = written.path.resolve()
    if as_json:
        print_json({"report": str(path), "figures": written.n_figures, "bytes": written.n_bytes})
    else:
        typer.echo(str(written.path))
    if open_it and not webbrowser.open(path.as_uri()):
        stderr().print(f"No browser was found. Open {path} in one.", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: `neuronlens figures STORE -o figures --format both`")
def figures(
    store: StoreArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder; files of the same names are written over.")
    ] = Path("figures"),
    form: Annotated[PictureForm, typer.Option("--format", help="png, svg or both.")] = PictureForm.png,
    table: Annotated[
        str | None,
        typer.Option(
            help="Draw the ranges of this range table [default: of the best setting that was evaluated, else of the "
            "only table, else mean ± tau std]."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw every figure that the store has data for, one file each: distributions with ranges, sweeps, layers, what is
    erased against what it costs, concepts, controls. Prints their paths on stdout, and on stderr what lacks data."""
    from neuronlens.gallery import write_figures

    opened = open_store(store)
    with _failures_in_words(opened.root, output):
        gallery = write_figures(opened, output, forms=form.endings, table=table)
    if as_json:
        drawn = [
            {"figure": one.kind, "files": [str(file.resolve()) for file in one.files], "caption": one.caption}
            for one in gallery.drawn
        ]
        missing = [{"figure": kind, "command": command} for kind, command in gallery.missing.items()]
        print_json({"figures": drawn, "missing": missing})
    else:
        for one in gallery.drawn:
            for file in one.files:
                typer.echo(str(file))
    for kind, command in gallery.missing.items():
        stderr().print(f"no data for {kind}: {command}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: `neuronlens show STORE 3 7 --tau 2 -o neuron.svg`")
def show(
    store: StoreArgument,
    layer: Annotated[int, typer.Argument(help="The layer, from 0.", show_default=False)],
    neuron: Annotated[int, typer.Argument(help="The neuron in its layer, from 0.", show_default=False)],
    hook_point: Annotated[str | None, typer.Option(help="Where the store has several.")] = None,
    concepts: Annotated[
        list[str] | None, typer.Option("--concept", help="Only this concept [default: at most 8]. Repeatable.")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="Half width of a range in standard deviations [default: 2.5].")
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="Draw the ranges of this range table, in place of mean ± tau std.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Also draw it into this file: .png or .svg.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw one neuron: how its values are spread under each concept, and each concept's range."""
    from neuronlens.show import MAX_BUMPS, TAU, card_of, card_rows, check_picture, check_site, print_card, save_picture

    if tau is not None and table is not None:
        raise UsageError("--tau and --table both say where ranges end. Give one of them.")
    tau = TAU if tau is None else tau
    if not tau > 0:
        raise UsageError(f"--tau is {tau:g}, expected a number above 0, such as 2.5.")
    form = check_picture(output) if output else None
    opened = open_store(store)
    description = opened.describe()
    meant = check_site(description, layer, neuron, hook_point)
    with _failures_in_words(opened.root, output):
        card = card_of(opened, hook_point=meant, layer=layer, neuron=neuron, tau=tau, table=table)
        drawn = card.of(concepts) if concepts else card.of_most_salient(MAX_BUMPS)
        if output and form:
            save_picture(drawn, output, form, [bump.concept for bump in card.bumps])
    if output:
        stderr().print(f"written to {output}", style="dim", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        ends = {"tau": tau if tau != float("inf") else None} if table is None else {"table": table}
        site = {"hook_point": meant, "layer": layer, "neuron": neuron, **ends}
        rows = card_rows(drawn if concepts else card)
        print_json({**site, "rows": rows, "picture": str(output.resolve()) if output else None})
    else:
        print_card(Console(), drawn)


@contextlib.contextmanager
def _failures_in_words(root: str, output: Path | None) -> Iterator[None]:
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunFailed(f"{root} cannot be read ({reason}). 'neuronlens verify {root}' names damaged files.") from error
    except OSError as error:
        if output is None or error.filename is None or not Path(error.filename).is_relative_to(output):
            raise
        raise RunFailed(f"{output} cannot be written ({error.strerror}). Choose another -o.") from error
