"""pipeline/pieces.py: tables by other methods than the paper's, against the values that the store was made from."""

import json

import numpy as np
import pytest

from neuronlens.errors import UsageError
from neuronlens.ranges import PIECES_SCHEMA, RangeTable
from neuronlens.recipe import RangesSection
from pipeline.driver import Silent
from pipeline.emit import emit_table
from tests.synthetic_store import Shard, add_statistics, write_store
from tests.warm import run_warm

CONCEPTS = ("fear", "joy", "love")
N_NEURONS = 12
METHODS = {"hpd": {"mass": 0.8}, "likelihood_ratio": {"penalty": 2.0}, "budget": {"budget": 0.06}, "posterior": {}}


def _values() -> dict[str, np.ndarray]:
    """Concept -> [layers, samples, neurons]; each concept has its own three neurons, one of them on both sides."""
    rng = np.random.default_rng(5)
    x = {concept: rng.normal(size=(2, 300 + 50 * i, N_NEURONS)) for i, concept in enumerate(CONCEPTS)}
    for i, concept in enumerate(CONCEPTS):
        x[concept][:, :, 3 * i] += 3
        x[concept][:, ::2, 3 * i + 1] -= 4
        x[concept][:, 1::2, 3 * i + 1] += 4
        x[concept][:, :, 3 * i + 2] *= 0.2
    return {concept: values.astype(np.float32) for concept, values in x.items()}


VALUES = _values()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("pieces") / "store"
    write_store(root, [Shard(concept=concept, x_LSN=VALUES[concept]) for concept in CONCEPTS], raw=False)
    return add_statistics(root)


def table_by(store, method: str, **changes) -> RangeTable:
    asked = {"top_fraction": 1.0, "method": method, **METHODS[method], **changes}
    return emit_table(store, RangesSection(**asked), Silent())


def others(concept: str, layer: int, neuron: int) -> np.ndarray:
    return np.concatenate([VALUES[c][layer, :, neuron] for c in CONCEPTS if c != concept])


def share(x: np.ndarray, rows: list[dict]) -> float:
    return float(np.mean([any(row["lower"] <= value <= row["upper"] for row in rows) for value in x]))


def of_neurons(table: RangeTable) -> dict[tuple[str, int, int], list[dict]]:
    found: dict[tuple[str, int, int], list[dict]] = {}
    for row in table.rows.to_pylist():
        found.setdefault((row["concept"], row["layer"], row["neuron"]), []).append(row)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_pieces__say_of_the_stores_values_what_the_values_say_themselves(store, method):
    table = table_by(store, method)
    assert table.rows.schema == PIECES_SCHEMA
    assert (table.header.method, table.header.options) == (method, METHODS[method])
    for (concept, layer, neuron), rows in of_neurons(table).items():
        own, rest = VALUES[concept][layer, :, neuron], others(concept, layer, neuron)
        for row in rows:
            t, o = share(own, [row]), share(rest, [row])
            assert row["posterior"] == pytest.approx(t / (t + o))
            assert row["mean_others"] == pytest.approx(rest.astype(np.longdouble).mean(), abs=1e-6)
            assert row["mean"] == pytest.approx(own.astype(np.longdouble).mean(), abs=1e-6)
        if method == "hpd":
            assert share(own, rows) >= 0.8
        if method == "likelihood_ratio":
            assert share(own, rows) > 2 * share(rest, rows)


def test_pieces__of_a_concept_on_both_sides_are_two(store):
    sides = of_neurons(table_by(store, "likelihood_ratio"))["joy", 0, 4]
    assert [row["piece"] for row in sides] == [0, 1]
    assert sides[0]["upper"] < -1 < 1 < sides[1]["lower"]


def test_budget__is_kept_by_every_concept_and_mostly_spent(store):
    found = of_neurons(table_by(store, "budget"))
    for concept in CONCEPTS:
        spent = [
            share(others(concept, layer, neuron), found.get((concept, layer, neuron), []))
            for layer in range(2)
            for neuron in range(N_NEURONS)
        ]
        # What is left over are single bins of the neurons of noise, more than two intervals hold.
        assert 0.6 * 0.06 <= np.mean(spent) <= 0.06


def test_budget__gives_more_of_the_concept_than_any_single_penalty_within_it(store):
    """Of tables by likelihood_ratio that cost no more, none has more of the concept."""

    def totals(table: RangeTable) -> tuple[float, float]:
        found = of_neurons(table)
        gained = sum(share(VALUES[c][layer, :, neuron], rows) for (c, layer, neuron), rows in found.items())
        return gained, sum(share(others(c, layer, neuron), rows) for (c, layer, neuron), rows in found.items())

    gained, spent = totals(table_by(store, "budget"))
    for penalty in (1.0, 2.0, 4.0, 8.0):
        other_gained, other_spent = totals(table_by(store, "likelihood_ratio", penalty=penalty))
        assert other_spent > spent or other_gained <= gained * 1.02


def test_pieces__are_of_the_salient_neurons_alone(store):
    table = table_by(store, "hpd", top_fraction=0.25)
    assert set(table.rows["rank"].to_pylist()) == {1, 2, 3}
    paper = emit_table(store, RangesSection(top_fraction=0.25), Silent())
    assert set(of_neurons(table)) == set(of_neurons(paper))


def test_pieces__give_the_same_table_again_and_another_for_other_options(store):
    assert table_by(store, "hpd").id == table_by(store, "hpd").id
    assert table_by(store, "hpd").id != table_by(store, "hpd", mass=0.7).id


def test_pieces__without_histograms_are_refused_with_the_way_to_them(tmp_path):
    shards = [Shard(concept=concept, x_LSN=VALUES[concept][:, :20]) for concept in CONCEPTS]
    write_store(tmp_path / "store", shards, raw=False, histograms=False)
    with pytest.raises(UsageError, match=r"no merged histograms of mlp_post, layer 0.*collect\.histograms true"):
        table_by(add_statistics(tmp_path / "store"), "hpd")


def test_ranges__takes_a_method_and_only_its_own_option(store):
    made = run_warm("neuronlens", "ranges", store.root, "--method", "likelihood_ratio", "--penalty", "2", "--json")
    assert json.loads(made.stdout)["range_table"] == table_by(store, "likelihood_ratio").id
    wrong = run_warm("neuronlens", "ranges", store.root, "--method", "hpd", "--budget", "0.1")
    assert wrong.returncode == 2
    assert "belongs to the method budget" in wrong.stderr
