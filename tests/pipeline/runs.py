"""Runs on the tiny model, and what it means that two of them gave the same."""

import json

import numpy as np

from neuronlens.query import connect
from neuronlens.recipe import Recipe, parse_recipe
from neuronlens.store import Store
from pipeline import driver

ANSWERS = {"joy": "<joy>", "anger": "<anger>", "fear": "<fear>"}


def content_of(place, **sections) -> dict:
    """A recipe for the texts and the model of the `place` fixture, with sections changed or (None) left out."""
    content = {
        "model": {"id": str(place / "model")},
        "data": {"source": str(place / "train.jsonl"), "prompt": "{text}<sep>", "answers": ANSWERS},
        "test": {"source": str(place / "test.jsonl")},
        "compute": {"workers": 2},
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


def table_of(root, view, order):
    store = Store(str(root))
    with connect(store.file_lists(), fs=store.fs) as con:
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
