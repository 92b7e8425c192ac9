"""Runs on the tiny model, and what it means that two of them gave the same."""

import json
from typing import Any, ClassVar

import numpy as np

from neuronlens.models import load_model
from neuronlens.query import connect
from neuronlens.recipe import Recipe, parse_recipe
from neuronlens.store import Store
from pipeline import driver
from pipeline.collect import CollectSpec, collect_shard
from pipeline.plan import freeze
from pipeline.statistics import compute_statistics_here
from pipeline.workers import Spares

ANSWERS = {"joy": "<joy>", "anger": "<anger>", "fear": "<fear>"}


TWO_WORKERS = {"workers": 2}
"""Where it matters that there are several: each is a process that imports torch and transformers for 9 s of a core."""


class KeptSpares(Spares):
    """Spares that the next run of this process takes over."""

    _kept: ClassVar[list[Any]] = []

    def _started(self, n_workers: int) -> list[Any]:
        taken = [self._kept.pop() for _ in range(min(n_workers, len(self._kept)))]
        return taken + super()._started(n_workers - len(taken))

    def end(self) -> None:
        self._kept.extend(self._idle)
        self._idle.clear()


def content_of(place, **sections) -> dict:
    """A recipe of one worker for the texts and the model of the `place` fixture, with sections changed or (None) left
    out."""
    content = {
        "model": {"id": str(place / "model")},
        "data": {"source": str(place / "train.jsonl"), "prompt": "{text}<sep>", "answers": ANSWERS},
        "test": {"source": str(place / "test.jsonl")},
        "compute": {"workers": 1},
    }
    for section, values in sections.items():
        content[section] = values if values is None else {**(content.get(section) or {}), **values}
    return content


def recipe(place, **sections) -> Recipe:
    return parse_recipe(content_of(place, **sections))


def recipe_file(place, folder, **sections):
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content_of(place, **sections)))
    return path


def run(place, root, *, allow_partial=False, reporter=None, **sections) -> driver.Summary:
    return driver.run(
        recipe(place, **sections), name="test", store_root=str(root), allow_partial=allow_partial, reporter=reporter
    )


def run_here(place, root, **sections) -> None:
    """The stages up to the statistics, in this process: what a run leaves in its store, without Ray."""
    asked = recipe(place, **sections)
    plan, store = driver.Driver(recipe=asked).plan(name="test", store_root=str(root))
    loaded, spec = load_model(asked.model.id), CollectSpec.of(plan.description, plan.answers)
    for shard in freeze(plan, store):
        collect_shard(loaded, spec, store, shard)
    compute_statistics_here(store, tau=asked.ranges.tau, memory_limit=None, on_done=lambda _: None)


def table_of(root, view, order):
    store = Store(str(root))
    with connect(store.file_lists(), fs=store.fs, views="stored") as con:
        return con.sql(f"from {view} order by {order}").to_arrow_table()


def assert_same_tables(ours, theirs) -> None:
    """Counts and histograms exactly, moments to 1e-12 relative; nothing is missing, nothing is double."""
    assert table_of(ours, "histograms", "all").equals(table_of(theirs, "histograms", "all"))
    ours, theirs = (table_of(root, "moments", "hook_point, layer, neuron, concept") for root in (ours, theirs))
    assert ours.column_names == theirs.column_names
    for name in ours.column_names:
        a, b = ours[name].to_numpy(), theirs[name].to_numpy()
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=1e-12)
        else:
            np.testing.assert_array_equal(a, b)
