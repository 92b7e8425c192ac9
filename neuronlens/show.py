"""One neuron, drawn in the terminal or as a picture.

neuronlens show STORE 3 7
neuronlens show STORE 3 7 --hook-point resid_post --concept joy --concept anger -o neuron.svg
neuronlens show STORE 3 7 --table tbl_0123456789abcdef
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len
from rich.text import Text

from neuronlens.cards import Bump, Card, read_card
from neuronlens.errors import UsageError
from neuronlens.hookpoints import parse_hook_point
from neuronlens.labels import short
from neuronlens.query import connect

if TYPE_CHECKING:
    from rich.console import Console

    from neuronlens.store import Store

MAX_BUMPS = 8
TAU = 2.5
FORMS = ("png", "svg")
"""Of pictures: the ending of the file says which."""

_COLOURS = ("bright_blue", "yellow", "green", "magenta", "cyan", "red")
_NAME_CELLS = 18
_MIN_AXIS, _MAX_AXIS = 20, 100
_FINE, _PLAIN = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
_FINE_RANGE, _PLAIN_RANGE = ("├", "─", "┤", "┼"), ("|", "-", "|", "+")


def check_site(description: Mapping[str, Any], layer: int, neuron: int, hook_point: str | None) -> str:
    """The hook point that is meant, once it, the layer and the neuron are known to be in the store.

    `description` is store.json. Raises UsageError that names what there is.
    """
    there: Sequence[str] = description["hook_points"]
    if hook_point is None and len(there) > 1:
        raise UsageError(f"The store has several hook points. Name one of them: --hook-point {' or '.join(there)}.")
    meant = there[0] if hook_point is None else _known(hook_point, there, layer)
    layers: Sequence[int] = description["layers"]
    if layer not in layers:
        raise UsageError(f"There is no layer {layer} in this store. Layers: {', '.join(map(str, layers))}.")
    width = description["widths"][meant]
    if not 0 <= neuron < width:
        raise UsageError(f"There is no neuron {neuron} at {meant}. Neurons: 0 to {width - 1}.")
    return meant


def _known(hook_point: str, there: Sequence[str], layer: int) -> str:
    try:
        meant, its_layer = parse_hook_point(hook_point)
    except UsageError:
        meant, its_layer = hook_point, None
    if meant not in there:
        raise UsageError(f"There is no hook point {hook_point!r} in this store. Hook points: {', '.join(there)}.")
    if its_layer not in (None, layer):
        raise UsageError(f"{hook_point} is in layer {its_layer}, and layer {layer} was asked for. Name one layer only.")
    return meant


def check_picture(path: Path) -> str:
    """The form of a picture by its file's ending. Raises UsageError for another ending, or a folder that is not
    there."""
    form = path.suffix.lower().removeprefix(".")
    if form not in FORMS:
        raise UsageError(f"{path} does not end in .png or .svg: these are the pictures that can be drawn.")
    check_folder(path)
    return form


def check_folder(path: Path) -> None:
    """Raise UsageError where no file can be written at `path`."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Name a file in it, such as {path / 'report.html'}.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {path.parent}. Make it first, or choose another -o.")


def card_of(
    store: "Store", *, hook_point: str, layer: int, neuron: int, tau: float = TAU, table: str | None = None
) -> Card:
    """One neuron of a store, with the ranges of one of its range tables or of mean -+ tau * std. Raises UsageError
    where the store has no statistics of it, or no such table."""
    ids = store.table_ids()
    if table is not None and table not in ids:
        raise UsageError(f"{store.root} has no table {table}. Its tables: {', '.join(ids) or 'none'}.")
    with connect(store.file_lists(), fs=store.fs) as con:
        return read_card(con, hook_point=hook_point, layer=layer, neuron=neuron, tau=tau, table=table)


def save_picture(card: Card, path: Path, form: str, concepts: Sequence[str]) -> None:
    """Draw the card into a file. `concepts` are all of the store, which decide the colours."""
    from neuronlens import canvas, figures

    figure = figures.distributions(card, colours=figures.concept_colours(concepts), explained=True)
    canvas.save(figure, str(path), form)


# --- the terminal ----------------------------------------------------------------------------------------------------


def print_card(console: "Console", card: Card) -> None:
    """Two lines a concept, over one axis: how its values are spread, and its range with the mean."""
    names = [short(bump.concept, _NAME_CELLS) for bump in card.bumps]
    name_cells = max(map(cell_len, names))
    notes = [_notes(bump) for bump in card.bumps]
    note_cells = max(cell_len(line) for pair in notes for line in pair)
    width = min(_MAX_AXIS, max(_MIN_AXIS, console.width - name_cells - note_cells - 4))
    is_fine = console.encoding.lower().startswith("utf")
    ranges = f"mean {'±' if is_fine else '+-'} {card.tau:g} std" if card.table is None else f"that of {card.table}"
    console.print(f"{card.name}: range = {ranges}", style="bold", highlight=False)
    edges = np.linspace(*card.limits(), width + 1)
    for i, (bump, name, (beside, below)) in enumerate(zip(card.bumps, names, notes, strict=True)):
        colour = _COLOURS[i % len(_COLOURS)]
        indent = " " * (name_cells - cell_len(name))
        bars = _bars(bump, edges, _FINE if is_fine else _PLAIN)
        marks = _range_line(bump, edges, _FINE_RANGE if is_fine else _PLAIN_RANGE)
        first = Text.assemble(name, indent, "  ", (bars, colour), "  ", beside)
        second = Text.assemble(" " * name_cells, "  ", (marks, "bold"), "  ", (below, "dim"))
        for row in (first, second):
            row.rstrip()
            console.print(row, soft_wrap=True, highlight=False, markup=False)
    console.print(_axis_line(card, name_cells, width), style="dim", soft_wrap=True, highlight=False, markup=False)
    for line in _remarks(card):
        console.print(line, style="dim", highlight=False, markup=False)


def _notes(bump: Bump) -> tuple[str, str]:
    if bump.is_empty:
        return "no values", ""
    beside = f"n {bump.n:,}"
    if bump.nearest is not None and bump.nearest_ovl is not None:
        beside += f", {bump.nearest_ovl:.2f} {short(bump.nearest, _NAME_CELLS)}"
    return beside, f"{100 * bump.share_in_range():.1f} % in range" if bump.intervals else "not salient"


def _bars(bump: Bump, edges_G: np.ndarray, levels: str) -> str:
    """A block a step, as high as its share; a share that is not zero is never invisible."""
    shares = bump.shares(edges_G)
    highest = shares.max(initial=0)
    if not highest > 0:
        return " " * len(shares)
    return "".join(
        levels[math.ceil(share / highest * (len(levels) - 1) - 1e-9) if share > 1e-9 else 0] for share in shares
    )


def _range_line(bump: Bump, edges_G: np.ndarray, marks: tuple[str, str, str, str]) -> str:
    """The range over the same steps, and the mean in it."""
    n = len(edges_G) - 1
    if bump.is_empty:
        return " " * n
    left, line, right, mean = marks

    def step(value: float) -> int:
        return int(np.clip(np.searchsorted(edges_G, value, side="right") - 1, 0, n - 1))

    drawn = [" "] * n
    for lower, upper in bump.intervals:
        first, last = step(lower), step(upper)
        drawn[first : last + 1] = [line] * (last - first + 1)
        drawn[first], drawn[last] = left, right
    drawn[step(bump.mean)] = mean
    return "".join(drawn)


def _axis_line(card: Card, name_cells: int, width: int) -> Text:
    low, high = card.limits()
    ends = f"{low:.3g}", f"{(low + high) / 2:.3g}", f"{high:.3g}"
    gap = width - sum(map(len, ends))
    left = max(1, width // 2 - len(ends[0]) - len(ends[1]) // 2)
    return Text(" " * (name_cells + 2) + ends[0] + " " * left + ends[1] + " " * max(1, gap - left) + ends[2])


def _remarks(card: Card) -> list[str]:
    remarks = []
    if len(card.bumps) < card.n_concepts:
        remarks.append(
            f"{len(card.bumps)} of {card.n_concepts} concepts, those for which the neuron ranks highest; others with "
            "--concept NAME."
        )
    if not card.has_histograms:
        remarks.append("The store has no histograms: Gaussians with the measured mean and std are drawn.")
    if any(bump.nearest for bump in card.bumps):
        remarks.append("Beside n: the largest overlap with another concept (1: the same values).")
    return remarks


def card_rows(card: Card) -> list[dict[str, Any]]:
    """The card as rows for JSON, which knows no number that is not finite: null stands in its place."""
    return [{name: _for_json(value) for name, value in bump.row.items()} for bump in card.bumps]


def _for_json(value: Any) -> Any:
    if isinstance(value, list):  # of pieces
        return [{name: _for_json(part) for name, part in piece.items()} for piece in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
