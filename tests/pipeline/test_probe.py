"""pipeline/probe.py: probes of a store, and the tables made from them."""

import json
from pathlib import Path

import numpy as np
import pytest

from neuronlens.errors import UsageError
from neuronlens.lens import Lens
from neuronlens.recipe import RangesSection
from neuronlens.store import Store
from pipeline.clean import orphans
from pipeline.driver import Silent
from pipeline.emit import emit_table
from pipeline.probe import make_probes
from tests.synthetic_store import Shard, add_statistics, write_store

CONCEPTS = ("b/joy", "a 'fear'", "c")


def _shards(n_layers: int = 2) -> list[Shard]:
    """Neuron k of layer 0 says whether the concept is the k-th; layer 1 is noise."""
    rng = np.random.default_rng(0)
    shards = []
    for number in range(6):
        x_LSN = rng.normal(size=(n_layers, 40, 8)).astype(np.float32)
        x_LSN[0, :, number % 3] += 4
        shards.append(Shard(concept=CONCEPTS[number % 3], x_LSN=x_LSN))
    return shards


@pytest.fixture
def store(tmp_path) -> Store:
    write_store(tmp_path / "store", _shards())
    return add_statistics(tmp_path / "store")


def _keep_raw_of(root: Path, **raw: object) -> None:
    """As if less had been kept."""
    description = json.loads((root / "store.json").read_text())
    description["raw"] |= raw
    (root / "store.json").write_text(json.dumps(description))


def test_make_probes__rank_the_neuron_that_tells_a_concept_first(store):
    receipts = make_probes(store, Silent())
    assert [receipt["layer"] for receipt in receipts] == [0, 1]
    assert receipts[0]["accuracy"] > 0.9 > 0.6 > receipts[1]["accuracy"]
    assert {receipt["n_rows"] for receipt in receipts} == {240}
    with Lens(store) as lens:
        first = lens.sql(
            "select concept, neuron from salience where method = 'probe' and layer = 0 and rank = 1"
        ).fetchall()
        n_rows = lens.sql("select count(*) from salience where method = 'probe'").fetchall()
        ranks = lens.sql(
            "select list(rank order by score desc, neuron) from salience where method = 'probe' group by layer, concept"
        ).fetchall()
    assert dict(first) == {concept: k for k, concept in enumerate(CONCEPTS)}
    assert n_rows == [(2 * 3 * 8,)]
    assert {tuple(of_one) for (of_one,) in ranks} == {tuple(range(1, 9))}


def test_emit_table__trains_what_salience_probe_needs_once(store):
    table = emit_table(store, RangesSection(top_fraction=0.2, salience="probe"), Silent())
    top = {(row["concept"], row["layer"]): row["neuron"] for row in table.rows.to_pylist()}
    assert {concept: neuron for (concept, layer), neuron in top.items() if layer == 0} == {
        concept: k for k, concept in enumerate(CONCEPTS)
    }
    files = sorted(store.names("salience"))
    assert emit_table(store, RangesSection(top_fraction=0.2, salience="probe"), Silent()).id == table.id
    assert sorted(store.names("salience")) == files
    assert store.faults() == []
    assert orphans(store) == []


def test_make_probes__train_again_where_a_file_was_damaged(store):
    [first, _] = make_probes(store, Silent())
    Path(store.path(first["files"][0]["path"])).write_bytes(b"nothing")
    [again, _] = make_probes(store, Silent())
    assert again["files"][0]["path"] != first["files"][0]["path"]
    assert again["files"][0]["n_rows"] == 24
    assert store.faults() == []


@pytest.mark.parametrize(
    ("raw", "lack"),
    [({"policy": "none"}, "no raw values"), ({"layers": [0]}, "some"), ({"neurons": [1, 2]}, "some")],
)
def test_make_probes__need_raw_values_of_every_neuron(store, raw, lack):
    _keep_raw_of(Path(store.root), **raw)
    with pytest.raises(UsageError, match=rf"{lack}.*collect\.raw=all"):
        make_probes(store, Silent())
    assert not store.exists("probes")
