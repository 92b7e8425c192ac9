"""The ranges stage: from a store's moments, salience and histograms to an immutable range table, and on to a server."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuronlens.client import Client, read_key
from neuronlens.errors import NeuronLensError, UsageError
from neuronlens.query import connect, run_file
from neuronlens.ranges import PAPER, RangeTable, TableModel
from neuronlens.recipe import RangesSection
from neuronlens.retry import retried
from neuronlens.store import Store
from pipeline.coverage import coverage_of
from pipeline.pieces import Method, with_pieces
from pipeline.probe import make_probes
from pipeline.statistics import inputs_hash

if TYPE_CHECKING:
    from pipeline.driver import Reporter

FIRST_METHODS = ("mean_abs", "cohens_d", "selectivity")
"""What the salience of a layer holds whose receipt has no list of methods: there were no others then."""


def emit_table(store: Store, asked: RangesSection, reporter: "Reporter") -> RangeTable:
    """Make, save and return the range table of a store. The same section gives the same table, with the same id.

    tau is what the ranges of method paper have; by any other method it only stands in the table.

    Salience `probe` trains the linear probes that the store does not hold yet. Raises UsageError where the store has no
    statistics yet, or none by that method of salience, or where no concept has a range.
    """
    description = store.describe()
    commits, statistics = store.receipts("commits"), store.receipts("statistics")
    if not statistics or any(receipt["inputs"] != inputs_hash(commits) for receipt in statistics):
        raise UsageError(
            f"{store.root} holds {len(commits)} shards, and {'no' if not statistics else 'older'} statistics. Expected "
            "statistics of these shards: make them with 'python -m jobs.statistics STORE', or let the same 'neuronlens "
            "run' command go on where it stopped."
        )
    if asked.salience == "probe":
        make_probes(store, reporter)
    else:
        _check_salience(store, statistics, asked.salience)
    choice = {"tau": asked.tau, "top_fraction": asked.top_fraction, "salience": asked.salience}
    with connect(store.file_lists(), fs=store.fs, views="stored") as con:
        rows = run_file(con, "ranges", **choice)
        if asked.method != PAPER:
            chosen = Method(name=asked.method, options=asked.options)
            with reporter.stage("ranges", chosen.n_passes * len(statistics), "layers") as advance:
                rows = with_pieces(con, store, rows, chosen, n_threads=os.cpu_count() or 1, advance=advance)
    model = description["model"]
    table = RangeTable.make(
        rows,
        **choice,
        store_hash=description["store_hash"],
        model=TableModel(id=model["id"], revision=model["revision"], config_hash=model["config_hash"]),
        unit=description["unit"],
        widths=description["widths"],
        coverage=coverage_of(store, commits),
        method=asked.method,
        options=asked.options,
    )
    retried(f"write the table {table.id} into {store.root}", lambda: table.save(store.root, store.fs))
    return table


def _check_salience(store: Store, statistics: Sequence[Mapping[str, Any]], method: str) -> None:
    """Raise UsageError where a layer's statistics were made before there was this method, or without it."""
    held = [receipt.get("salience", FIRST_METHODS) for receipt in statistics]
    common = [name for name in held[0] if all(name in methods for methods in held)]
    if method in common:
        return
    mend = "Its data do not give it: mutual_information needs histograms, selectivity two concepts or more."
    if any("salience" not in receipt for receipt in statistics):
        mend = (
            "Make the statistics again, which needs neither the model nor the texts: "
            f"python -m jobs.statistics {store.root}"
        )
    raise UsageError(f"{store.root} holds salience by {', '.join(common)}; {method!r} is not among them. {mend}")


def load_table(store: Store, table_id: str | None) -> RangeTable:
    """One table of a store by its id; without an id, the only one there is.

    Raises UsageError where there is no such table, or several to choose from.
    """
    ids = store.table_ids()
    if table_id is None and len(ids) == 1:
        table_id = ids[0]
    if table_id is None or table_id not in ids:
        found = f"has no table {table_id}" if table_id else f"has {len(ids)} tables"
        raise UsageError(
            f"{store.root} {found}. Its tables: {', '.join(ids) or 'none'}. Name one with --table, or make one with "
            f"'neuronlens ranges {store.root}'."
        )
    return RangeTable.load(store.path(f"ranges/{table_id}"), store.fs)


def publish_table(table: RangeTable, *, to: str, key_file: Path | None = None, kept_in: str | None = None) -> None:
    """Upload a table to the server at `to`, with the key in a file or in the environment. The same again is no error.

    Raises UsageError where the server refuses it, RunFailed where it fails; the sentence says how to go on with the
    table, which is kept in the store `kept_in`.
    """
    key = read_key(key_file, scope="write") if key_file is not None else None
    try:
        with Client(to, key) as client:
            client.publish(table)
    except NeuronLensError as error:
        if kept_in is None:
            raise
        raise type(error)(
            f"{error} {table.id} is kept; send it later: neuronlens publish {kept_in} --table {table.id} --to {to}"
        ) from error
