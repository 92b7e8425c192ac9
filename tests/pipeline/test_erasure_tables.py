"""The tables that an evaluation asks a store for: shuffled labels and pooled moments against numpy, made tables."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from neuronlens.programs import Edit
from neuronlens.query import connect, run_file
from neuronlens.ranges import RangeTable
from neuronlens.recipe import RangesSection
from neuronlens.store import Store
from neuronlens.sweep import Setting
from pipeline.driver import Silent
from pipeline.emit import emit_table
from pipeline.erasure_tables import POOLED, RAW, shuffled_moments, tables_of
from tests.synthetic_store import Shard, add_statistics, write_store

WIDTH, N_LAYERS = 7, 2
N_OF = {"joy": 30, "anger": 20, "fear": 25}


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        concept: (rng.normal(size=(N_LAYERS, n, WIDTH)) + 3 * i).astype(np.float32)
        for i, (concept, n) in enumerate(N_OF.items())
    }


def made(root: Path, *, raw: bool = True) -> Store:
    write_store(root, [Shard(concept=c, x_LSN=x) for c, x in values().items()], raw=raw)
    return add_statistics(root)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made(tmp_path_factory.mktemp("erasure-tables") / "store")


@pytest.fixture(scope="module")
def table(store: Store) -> RangeTable:
    return emit_table(store, RangesSection(tau=2.0, top_fraction=0.5), Silent())


def test_shuffled_moments__are_those_of_labels_dealt_out_by_a_hash(store: Store) -> None:
    x_LSN = np.concatenate(list(values().values()), axis=1).astype(float)
    labels = [concept for concept, n in N_OF.items() for _ in range(n)]
    order = sorted(range(len(labels)), key=lambda i: (hashlib.md5(f"7 {i}".encode()).hexdigest(), i))
    dealt = dict(zip(order, labels, strict=True))
    with connect(store.file_lists(), fs=store.fs) as con:
        rows = run_file(con, "shuffled_moments", hook_point="mlp_post", layer=1, seed=7).to_pylist()
        again = run_file(con, "shuffled_moments", hook_point="mlp_post", layer=1, seed=7).to_pylist()
        others = run_file(con, "shuffled_moments", hook_point="mlp_post", layer=1, seed=8).to_pylist()
    assert rows == again != others
    assert len(rows) == WIDTH * len(N_OF)
    for row in rows:
        x_S = x_LSN[1, [i for i, concept in dealt.items() if concept == row["concept"]], row["neuron"]]
        assert row["n"] == len(x_S) == N_OF[row["concept"]]
        assert (row["mean"], row["std"]) == (pytest.approx(x_S.mean()), pytest.approx(x_S.std()))
    # The concepts' own means are 3 apart; those of shuffled labels are close together.
    means = {concept: np.mean([r["mean"] for r in rows if r["concept"] == concept]) for concept in N_OF}
    assert max(means.values()) - min(means.values()) < 1.5


def test_pooled_moments__are_those_of_all_values_together(store: Store) -> None:
    x_SN = np.concatenate(list(values().values()), axis=1)[0].astype(float)
    with connect(store.file_lists(), fs=store.fs) as con:
        rows = run_file(con, "pooled_moments", hook_point="mlp_post", layer=0).to_pylist()
    assert {(row["neuron"], row["concept"]) for row in rows} == {(n, c) for n in range(WIDTH) for c in N_OF}
    for row in rows:
        x_S = x_SN[:, row["neuron"]]
        assert row["n"] == len(x_S)
        assert (row["mean"], row["std"]) == (pytest.approx(x_S.mean()), pytest.approx(x_S.std()))


def test_shuffled_moments__come_from_the_pool_where_there_are_no_raw_values(
    store: Store, table: RangeTable, tmp_path: Path
) -> None:
    found, source = shuffled_moments(store, table)
    assert source == RAW
    assert len({row["mean"] for row in found.to_pylist() if (row["layer"], row["neuron"]) == (0, 0)}) == len(N_OF)
    bare = made(tmp_path / "bare", raw=False)
    found, source = shuffled_moments(bare, table)
    assert source == POOLED
    assert len({row["mean"] for row in found.to_pylist() if (row["layer"], row["neuron"]) == (0, 0)}) == 1


def test_tables_of__makes_one_where_the_table_does_not_serve(store: Store, table: RangeTable) -> None:
    def setting(salience: str = "mean_abs", **edit: float) -> Setting:
        return Setting(edit=Edit(**edit), salience=salience)

    settings = [
        setting(),
        setting(top_fraction=0.3, tau=1.0),
        setting(salience="cohens_d", top_fraction=0.5),
        setting(salience="cohens_d", top_fraction=0.8),
    ]
    plain = tables_of(store, table, settings[:2], [], Silent())
    assert [found.own for found in plain] == [table, table]
    assert plain[0].controls.in_random_order is plain[0].controls.shuffled is None
    found = tables_of(store, table, settings, ["random", "shuffled"], Silent())
    headers = [one.own.header for one in found]
    assert [header.top_fraction for header in headers] == [0.5, 0.5, 0.8, 0.8]
    assert [header.salience for header in headers] == ["mean_abs"] * 2 + ["cohens_d"] * 2
    assert found[2].own is found[3].own
    assert {found[i].own.id for i in range(4)} <= set(store.table_ids())
    for one in found:
        assert one.controls.in_random_order is not None
        assert one.controls.in_random_order.header.top_fraction == 1.0
        assert one.controls.in_random_order.rows.num_rows == N_LAYERS * WIDTH * len(N_OF)
        assert one.controls.shuffled is not None
        assert one.controls.shuffled.rows.num_rows == one.own.rows.num_rows
        assert one.controls.shuffled.id not in store.table_ids()
        assert one.controls.shuffled_from == RAW
