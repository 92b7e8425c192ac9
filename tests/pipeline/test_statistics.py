"""The statistics stage on stores written from arrays: what it leaves, when it works again, what it asks of nodes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from neuronlens.errors import RunFailed, UsageError
from neuronlens.query import connect
from neuronlens.recipe import OverlapSection, RangesSection, parse_recipe
from neuronlens.store import Store
from pipeline import statistics
from pipeline.coverage import coverage_of
from pipeline.driver import Silent
from pipeline.emit import emit_table
from pipeline.statistics import (
    Layer,
    Resources,
    Settings,
    compute_layer,
    compute_statistics,
    compute_statistics_here,
    kept_pairs,
    layers_of,
    memory_share,
    threads_a_layer,
)
from tests.synthetic_store import Shard, bins_of, moments_of, write_store

KINDS = ("moments", "merged_histograms", "distributions", "overlap", "salience")
METHODS = ["mean_abs", "mean", "probeless", "cohens_d", "selectivity", "f_ratio", "mutual_information"]
WIDTH, N_LAYERS = 11, 3
CONCEPTS = ("anger", "fear", "joy", "love")
GB = 10**9


def _shards(n_each: int = 2) -> list[Shard]:
    rng = np.random.default_rng(0)
    return [
        Shard(concept=c, x_LSN=(k / 2 + rng.normal(size=(N_LAYERS, 40, WIDTH))).astype(np.float32))
        for k, c in enumerate(CONCEPTS)
        for _ in range(n_each)
    ]


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path / "store", _shards(), raw=False)
    return Store(str(tmp_path / "store"))


def _compute(store: Store, layer: int = 1, commits=None, memory_bytes: int = GB, scratch=None, **overlap) -> dict:
    commits = store.receipts("commits") if commits is None else commits
    section = OverlapSection(**overlap)
    return compute_layer(
        store,
        Layer(hook_point="mlp_post", layer=layer, width=WIDTH),
        commits,
        settings=Settings(tau=2.5, overlap=kept_pairs(section, len(CONCEPTS))),
        coverage=coverage_of(store, commits),
        resources=Resources(n_threads=1, memory_bytes=memory_bytes, scratch=scratch or f"{store.root}-scratch"),
    )


def _table(store: Store, receipt: dict, kind: str) -> pa.Table:
    [file] = [file for file in receipt["files"] if file["kind"] == kind]
    return pq.read_table(store.path(file["path"]))


def _pairs(store: Store, receipt: dict) -> dict[tuple, dict]:
    rows = _table(store, receipt, "overlap").to_pylist()
    return {(row["neuron"], row["concept_a"], row["concept_b"]): row for row in rows}


def _attempts(store: Store) -> dict[str, list[str]]:
    return {
        f"{receipt['hook_point']}.{receipt['layer']}": [file["path"] for file in receipt["files"]]
        for receipt in store.receipts("statistics")
    }


# --- one layer ---


def test_compute_layer__equals_the_values_of_all_shards(store):
    receipt = _compute(store)
    x = {c: np.concatenate([s.x_LSN[1] for s in _shards() if s.concept == c]) for c in CONCEPTS}
    moments = _table(store, receipt, "moments").to_pylist()
    assert [(row["neuron"], row["concept"]) for row in moments] == [(n, c) for n in range(WIDTH) for c in CONCEPTS]
    for row in moments:
        expected = moments_of(x[row["concept"]][:, row["neuron"]])
        assert (row["n"], row["min"], row["max"]) == (80, expected["min"], expected["max"])
        np.testing.assert_allclose(
            [row[k] for k in ("mean", "std")], [expected[k] for k in ("mean", "std")], rtol=1e-12
        )
    pairs = _pairs(store, receipt)
    assert len(pairs) == receipt["n_pairs"] == receipt["n_pairs_kept"] == WIDTH * 6
    for (neuron, a, b), row in pairs.items():
        p, q = bins_of(x[a][:, neuron]), bins_of(x[b][:, neuron])
        assert row["ovl"] == pytest.approx(sum(min(p.get(k, 0), q.get(k, 0)) for k in p) / 80, abs=1e-6)
    scores = {
        (r["neuron"], r["concept"]): r
        for r in _table(store, receipt, "salience").to_pylist()
        if r["method"] == "selectivity"
    }
    for (neuron, concept), row in scores.items():
        mine = [row["ovl"] for key, row in pairs.items() if key[0] == neuron and concept in key]
        assert row["score"] == pytest.approx(1 - np.mean(mine, dtype=float))


@pytest.mark.parametrize("histograms", [True, False])
def test_compute_layer__gives_the_same_rows_in_blocks_of_any_size(histograms, tmp_path, monkeypatch):
    tables = []
    for n_neurons in (1, 4, WIDTH + 5):
        monkeypatch.setattr(statistics, "neurons_a_block", lambda _, n=n_neurons: n)
        root = tmp_path / str(n_neurons)
        write_store(root, _shards(), raw=False, histograms=histograms)
        receipt = _compute(Store(str(root)))
        kinds = [kind for kind in KINDS if histograms or kind != "merged_histograms"]
        tables.append({kind: _table(Store(str(root)), receipt, kind) for kind in kinds})
    assert tables[0]["overlap"].num_rows == WIDTH * 6
    assert (tables[0]["overlap"]["ovl"].null_count == 0) == histograms
    for other in tables[1:]:
        assert {kind: table.equals(tables[0][kind]) for kind, table in other.items()} == dict.fromkeys(other, True)


@pytest.mark.parametrize(("block_concepts", "row_group_rows"), [(16_384, 131_072), (4, 50), (12, 100)])
def test_compute_layer__keeps_the_histograms_of_all_shards_in_the_order_of_neurons(
    block_concepts, row_group_rows, store, monkeypatch
):
    monkeypatch.setattr("pipeline.histograms.BLOCK_CONCEPTS", block_concepts)
    monkeypatch.setattr("pipeline.histograms.ROW_GROUP_ROWS", row_group_rows)
    receipt = _compute(store)
    rows = _table(store, receipt, "merged_histograms")
    x = {c: np.concatenate([s.x_LSN[1] for s in _shards() if s.concept == c]) for c in CONCEPTS}
    expected = [
        (1, "mlp_post", neuron, concept, b, n)
        for neuron in range(WIDTH)
        for concept in CONCEPTS
        for b, n in sorted(bins_of(x[concept][:, neuron]).items())
    ]
    assert [tuple(row.values()) for row in rows.to_pylist()] == expected
    [path] = [file["path"] for file in receipt["files"] if file["kind"] == "merged_histograms"]
    metadata = pq.read_metadata(store.path(path))
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert max(sizes) <= 1.5 * row_group_rows
    assert len(sizes) > 1 or row_group_rows > len(expected)


def test_compute_layer__describes_the_distribution_of_all_shards(store):
    rows = _table(store, _compute(store), "distributions").to_pylist()
    assert [(row["neuron"], row["concept"]) for row in rows] == [(n, c) for n in range(WIDTH) for c in CONCEPTS]
    for row in rows:
        x = np.concatenate([s.x_LSN[1][:, row["neuron"]] for s in _shards() if s.concept == row["concept"]]).astype(
            float
        )
        assert (
            row["ks"] - 1e-6 <= stats.kstest(x, stats.norm(x.mean(), x.std()).cdf).statistic <= row["ks_bound"] + 1e-6
        )
        below, above = np.quantile(x, 0.5, method="lower"), np.quantile(x, 0.5, method="higher")
        assert below - abs(below) / 8 <= row["p50"] <= above + abs(above) / 8


def test_compute_layer__without_histograms_says_what_there_is(tmp_path):
    write_store(tmp_path, _shards(), raw=False, histograms=False)
    store = Store(str(tmp_path))
    receipt = _compute(store, scratch=str(tmp_path / "scratch"))
    assert [file["kind"] for file in receipt["files"]] == [kind for kind in KINDS if kind != "merged_histograms"]
    assert receipt["salience"] == METHODS[:-1]
    distributions = _table(store, receipt, "distributions")
    assert (distributions.num_rows, distributions["ks"].null_count, distributions["p50"].null_count) == (44, 44, 44)
    assert _compute(store, scratch=str(tmp_path / "scratch")) == receipt


@pytest.mark.parametrize("n_concepts", [1, 2])
def test_compute_layer__lists_the_methods_that_its_salience_holds(n_concepts, tmp_path):
    write_store(tmp_path, [s for s in _shards() if s.concept in CONCEPTS[:n_concepts]], raw=False)
    store = Store(str(tmp_path))
    receipt = _compute(store, scratch=str(tmp_path / "scratch"))
    held = set(_table(store, receipt, "salience")["method"].to_pylist())
    assert receipt["salience"] == [method for method in METHODS if method in held]
    assert ("selectivity" in held) == (n_concepts > 1)


@pytest.mark.parametrize("overlap", [{"keep": "top", "top": 2}, {"keep": "threshold", "threshold": 0.4}])
def test_compute_layer__keeps_what_filtering_all_pairs_gives(overlap, store, monkeypatch):
    monkeypatch.setattr(statistics, "neurons_a_block", lambda _: 4)
    everything = _compute(store, keep="all")
    pairs, salience = _pairs(store, everything), _table(store, everything, "salience")
    receipt = _compute(store, **overlap)
    if overlap["keep"] == "top":
        expected = {
            key
            for neuron in range(WIDTH)
            for key in sorted((k for k in pairs if k[0] == neuron), key=lambda k: (-pairs[k]["ovl"], k))[:2]
        }
    else:
        expected = {key for key, row in pairs.items() if row["ovl"] >= np.float32(0.4)}
    assert 0 < len(expected) < len(pairs)
    assert _pairs(store, receipt) == {key: pairs[key] for key in sorted(expected)}
    assert receipt["overlap"] == overlap
    assert (receipt["n_pairs"], receipt["n_pairs_kept"]) == (WIDTH * 6, len(expected))
    assert _table(store, receipt, "salience").equals(salience)


def test_compute_layer__does_the_same_on_storage_that_is_not_local(store):
    fs = fsspec.filesystem("memory")
    remote = Store("memory://statistics-test")
    fs.put(f"{store.root}/", f"{remote.root}/", recursive=True)
    receipt, local = _compute(remote, scratch=f"{store.root}-scratch"), _compute(store)
    assert receipt["files"][1]["path"] in {name.partition("statistics-test/")[2] for name in fs.find(remote.root)}
    for kind in KINDS:
        [path] = [file["path"] for file in receipt["files"] if file["kind"] == kind]
        assert pq.read_table(fs.open(remote.path(path))).equals(_table(store, local, kind)), kind


def test_compute_layer__of_one_concept_has_no_pairs(tmp_path):
    write_store(tmp_path / "store", [s for s in _shards() if s.concept == "joy"], raw=False)
    store = Store(str(tmp_path / "store"))
    receipt = _compute(store)
    assert receipt["n_pairs"] == _table(store, receipt, "overlap").num_rows == 0
    assert _table(store, receipt, "moments").num_rows == WIDTH


def test_compute_layer__stamps_the_coverage_into_receipt_and_files(store):
    commits = store.receipts("commits")[:5]
    receipt = _compute(store, commits=commits)
    expected = {"n_shards": 5, "n_planned_shards": 8, "n_samples": 200, "n_planned_samples": 320}
    assert receipt["coverage"] == expected == coverage_of(store, commits)
    assert coverage_of(store) == expected | {"n_shards": 8, "n_samples": 320}
    for file in receipt["files"]:
        metadata = pq.read_metadata(store.path(file["path"])).metadata
        assert json.loads(metadata[b"coverage"]) == expected
        assert json.loads(metadata[b"overlap"]) == {"keep": "all"}


def test_compute_layer__works_again_only_where_something_changed(store):
    first = _compute(store)
    assert _compute(store) == first
    assert _compute(store, keep="all") == first
    for change in (
        {"keep": "top", "top": 2},
        {"keep": "top", "top": 3},
        {"keep": "threshold", "threshold": 0.5},
        {"commits": store.receipts("commits")[1:]},
        {},
    ):
        again = _compute(store, **change)
        assert {f["path"] for f in again["files"]}.isdisjoint(f["path"] for f in first["files"])
        assert not any(Path(store.path(f["path"])).exists() for f in first["files"])
        assert _compute(store, **change) == again
        first = again


@pytest.mark.parametrize(
    "lacks", [{"salience": ["mean_abs", "cohens_d", "selectivity"]}, {"salience": None}, "distributions"]
)
def test_compute_layer__works_again_where_a_receipt_is_of_an_older_make(lacks, store):
    first = _compute(store)
    older = {key: value for key, value in first.items() if key != "salience"}
    if isinstance(lacks, dict):
        older |= {key: value for key, value in lacks.items() if value}
    else:
        older |= {"salience": METHODS, "files": [file for file in first["files"] if file["kind"] != lacks]}
    store.replace_json("statistics/mlp_post.001.json", older)
    again = _compute(store)
    assert {f["path"] for f in again["files"]}.isdisjoint(f["path"] for f in first["files"])
    assert again["salience"] == METHODS


def test_compute_statistics_here__upgrades_a_store_of_past_days(tmp_path):
    """Nothing but statistics changes: same receipts of shards, same range table for the same question."""
    store = Store(str(shutil.copytree(Path(__file__).parents[1] / "stores" / "version-1", tmp_path / "store")))
    lists, [table] = store.file_lists(), store.table_ids()
    assert lists["histograms"] == lists["shard_histograms"]
    done: list[dict] = []
    compute_statistics_here(store, tau=2.5, memory_limit=None, on_done=done.append)
    assert len(done) == 4
    assert store.faults() == []
    upgraded = store.file_lists()
    assert {kind: upgraded[kind] for kind in ("shard_histograms", "partials", "samples", "raw")} == {
        kind: lists[kind] for kind in ("shard_histograms", "partials", "samples", "raw")
    }
    assert len(upgraded["histograms"]) == len(upgraded["distributions"]) == 4
    assert set(upgraded["histograms"]).isdisjoint(upgraded["shard_histograms"])
    assert emit_table(store, RangesSection(), Silent()).id == table
    assert emit_table(store, RangesSection(salience="f_ratio"), Silent()).id != table


@pytest.mark.slow
def test_jobs_statistics__upgrades_a_store_of_past_days(tmp_path):
    folder = shutil.copytree(Path(__file__).parents[1] / "stores" / "version-1", tmp_path / "store")
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "jobs.statistics", str(folder)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, done.stderr
        store = Store(str(folder))
        assert {tuple(receipt["salience"]) for receipt in store.receipts("statistics")} == {tuple(METHODS)}
        assert len(store.file_lists()["distributions"]) == 4
        assert store.faults() == []


@pytest.mark.parametrize("step", ["write_merged", "distributions_of", "pairs_of"])
def test_compute_layer__leaves_no_scratch_and_no_half_files(step, store, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise duckdb.IOException("the wire was cut")

    monkeypatch.setattr(statistics, step, broken)
    with pytest.raises(duckdb.IOException, match="the wire was cut"):
        _compute(store)
    assert [store.names(folder) for folder in (*KINDS, "statistics")] == [[]] * 6
    assert list(Path(f"{store.root}-scratch").iterdir()) == []


@pytest.mark.parametrize(("n_errors", "succeeds"), [(1, True), (2, False)])
def test_compute_layer__tries_once_more_after_an_internal_error(n_errors, succeeds, store, monkeypatch):
    """DuckDB 2.0.0 has one that comes and goes; an error that stays must not make a loop."""
    run, errors = statistics.run_to_parquet, [duckdb.InternalException("Attempted to access index 3")] * n_errors

    def sometimes(*args, **kwargs):
        if errors:
            raise errors.pop()
        return run(*args, **kwargs)

    monkeypatch.setattr(statistics, "run_to_parquet", sometimes)
    if not succeeds:
        with pytest.raises(duckdb.InternalException, match="index 3"):
            _compute(store)
        return
    receipt = _compute(store)
    assert store.names("moments") == [Path(receipt["files"][0]["path"]).name]


def test_compute_layer__says_what_to_do_where_memory_does_not_suffice(store):
    with pytest.raises(RunFailed, match=r"0\.00 GB of memory with 1 threads do not suffice; set compute\.memory_limit"):
        _compute(store, memory_bytes=400_000)


def test_compute_layer__says_what_to_do_where_the_scratch_folder_is_full(store, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise duckdb.OutOfMemoryException(
            "Out of Memory Error: failed to offload data block of size 256.0 KiB (17.9 MiB/18.0 MiB used).\n"
            "This limit was set by the 'max_temp_directory_size' setting."
        )

    monkeypatch.setattr(statistics, "run_to_parquet", full)
    with pytest.raises(RunFailed, match=r"-scratch has [\d,]+ bytes free, too few .* set NEURONLENS_SCRATCH"):
        _compute(store)


def test_compute_layer__says_what_to_do_where_scratch_cannot_be_written(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match=r"nothing can be written to .*file \(.*\); set NEURONLENS_SCRATCH"):
        _compute(store, scratch=str(tmp_path / "file"))


# --- what is kept ---


@pytest.mark.parametrize(
    ("section", "n_concepts", "expected"),
    [
        ({}, 30, {"keep": "all"}),
        ({}, 31, {"keep": "top", "top": 100}),
        ({"top": 7}, 100, {"keep": "top", "top": 7}),
        ({"keep": "all"}, 100, {"keep": "all"}),
        ({"keep": "top"}, 2, {"keep": "top", "top": 100}),
        ({"keep": "threshold", "threshold": 0.25}, 100, {"keep": "threshold", "threshold": 0.25}),
    ],
)
def test_kept_pairs__are_all_up_to_30_concepts_unless_the_recipe_says_otherwise(section, n_concepts, expected):
    assert kept_pairs(OverlapSection(**section), n_concepts) == expected


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"keep": "some"}, r"overlap\.keep is 'some'"),
        ({"top": 0}, r"overlap\.top is 0"),
        ({"threshold": 1.5}, r"overlap\.threshold is 1\.5"),
        ({"best": 3}, r"overlap\.best does not exist.*keep, top, threshold"),
    ],
)
def test_recipe__refuses_an_overlap_section_that_cannot_be(section, message):
    with pytest.raises(UsageError, match=message):
        parse_recipe({"model": {"id": "m"}, "data": {"source": "d"}, "overlap": section})


def test_neurons_a_block__bounds_pairs_and_bins():
    for n_concepts in (1, 2, 14, 100, 1000):
        n = statistics.neurons_a_block(n_concepts)
        assert n >= 1
        assert n * n_concepts <= statistics.BLOCK_CONCEPTS
        assert n == 1 or n * n_concepts * (n_concepts - 1) / 2 <= statistics.BLOCK_PAIRS


# --- what tasks ask of nodes ---


@pytest.mark.parametrize(
    ("cpus", "n_layers", "expected"),
    [
        ([2], 32, 1),
        ([16], 6, 2),
        ([16], 1, 16),
        ([8, 2, 2], 4, 2),
        ([8, 2, 2], 1, 8),
        ([0, 4], 1, 4),
        ([1, 1, 1], 2, 1),
        ([64, 64], 32, 4),
        ([], 5, 1),
    ],
)
def test_threads_a_layer__let_all_layers_run_at_once_within_single_nodes(cpus, n_layers, expected):
    assert threads_a_layer(cpus, n_layers) == expected


@pytest.mark.parametrize("memory_limit", [None, GB, 1000 * GB])
def test_tasks__ask_for_no_more_than_a_node_has(memory_limit):
    nodes = [{"CPU": 16.0, "memory": 32.0 * GB}, {"CPU": 4.0, "memory": 64.0 * GB}, {"memory": 500.0 * GB}]
    options = statistics._task_options(nodes, 4, memory_limit)
    assert any(node.get("CPU", 0) >= options["num_cpus"] and node["memory"] >= options["memory"] for node in nodes)
    tasks_by_cpu = int(nodes[0]["CPU"] // options["num_cpus"])
    if memory_limit is None:
        assert tasks_by_cpu * options["memory"] <= nodes[0]["memory"]


def test_tasks__of_a_cluster_without_nodes_wait_for_one():
    assert statistics._task_options([{"memory": 1.0 * GB}], 4, None) == {"num_cpus": 1}


@pytest.mark.parametrize(
    ("node", "n_threads", "limit", "machine_gb", "expected_gb"),
    [
        ({"CPU": 4, "memory": 20 * GB}, 2, None, 100, 6),
        ({"CPU": 4, "memory": 20 * GB}, 2, None, 10, 3),  # a container smaller than what Ray believes
        ({"CPU": 4, "memory": 20 * GB}, 2, 2 * GB, 100, 2),
        ({"CPU": 4, "memory": 20 * GB}, 2, 50 * GB, 10, 10),  # more than there is
        ({"CPU": 64, "memory": 4 * GB}, 1, None, 100, 512 * 2**20 / GB),
    ],
)
def test_memory_share__is_that_of_the_threads_unless_the_recipe_says(node, n_threads, limit, machine_gb, expected_gb):
    assert memory_share(node, n_threads, limit, machine_bytes=machine_gb * GB) == pytest.approx(expected_gb * GB)


# --- all layers, on Ray ---


def _all(store: Store, **overlap) -> list[dict]:
    done: list[dict] = []
    compute_statistics(store, tau=2.5, memory_limit=None, on_done=done.append, overlap=OverlapSection(**overlap))
    return done


@pytest.mark.usefixtures("ray_cluster")
def test_compute_statistics__makes_every_layer_and_keeps_what_is_whole(store):
    done = _all(store)
    assert {receipt["layer"] for receipt in done} == {0, 1, 2}
    first = _attempts(store)
    _all(store)
    assert _attempts(store) == first
    assert store.faults() == []


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("damage", ["remove", "truncate", "flip"])
def test_compute_statistics__makes_a_damaged_layer_again_and_that_alone(damage, store):
    _all(store)
    first = _attempts(store)
    victim = Path(store.path(first["mlp_post.1"][1]))
    content = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    elif damage == "truncate":
        victim.write_bytes(content[:-10])
    else:
        content[20] ^= 1
        victim.write_bytes(content)
    _all(store)
    again = _attempts(store)
    assert {name for name in first if again[name] != first[name]} == {"mlp_post.1"}
    assert store.faults() == []


@pytest.mark.usefixtures("ray_cluster")
def test_compute_statistics__finishes_the_other_layers_and_names_the_one_that_failed(store):
    (Path(store.root) / "statistics").mkdir()
    Path(store.path("statistics/mlp_post.001.json")).write_text("{")
    with pytest.raises(RunFailed, match=r"1 of 3 layers failed.*\n  mlp_post\.001: .*is not JSON"):
        _all(store)
    assert sorted(store.names("statistics")) == ["mlp_post.000.json", "mlp_post.001.json", "mlp_post.002.json"]


@pytest.mark.usefixtures("ray_cluster")
def test_compute_statistics__survives_the_death_of_a_worker(store, tmp_path, monkeypatch):
    compute, marker = statistics._compute_layer_here, tmp_path / "died"

    def dies_once(store, layer, *args, **kwargs):
        if layer.layer == 2 and not marker.exists():
            marker.touch()
            os._exit(1)
        return compute(store, layer, *args, **kwargs)

    monkeypatch.setattr(statistics, "_compute_layer_here", dies_once)
    assert len(_all(store)) == 3
    assert marker.exists()
    assert store.faults() == []


@pytest.mark.slow
def test_compute_statistics__runs_on_nodes_of_different_sizes(store, tmp_path):
    """A head without CPUs and nodes of 1 and 3: in a process of its own, since Ray allows one cluster in each."""
    code = """
import sys
import ray
from ray.cluster_utils import Cluster
from neuronlens.store import Store
from pipeline.statistics import compute_statistics
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
cluster.add_node(num_cpus=1, memory=10**9)
cluster.add_node(num_cpus=3, memory=3 * 10**9)
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
done = []
compute_statistics(Store(sys.argv[1]), tau=2.5, memory_limit=None, on_done=done.append)
print(sorted(receipt["layer"] for receipt in done), flush=True)
ray.shutdown()
cluster.shutdown()
"""
    scratch = tmp_path / "node scratch"
    out = subprocess.run(
        [sys.executable, "-c", code, store.root],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"NEURONLENS_SCRATCH": str(scratch), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert out.stdout.strip().endswith("[0, 1, 2]"), out.stderr
    assert scratch.is_dir()
    assert list(scratch.iterdir()) == []


def test_layers_of__are_every_hook_point_of_every_layer_with_its_width():
    description = {"hook_points": ["mlp_post", "resid_post"], "layers": [2], "widths": {"mlp_post": 8, "resid_post": 4}}
    assert layers_of(description) == [
        Layer(hook_point="mlp_post", layer=2, width=8),
        Layer(hook_point="resid_post", layer=2, width=4),
    ]


def test_views__read_what_the_stage_wrote(store):
    _compute(store, layer=0, keep="top", top=2)
    with connect(store.file_lists()) as con:
        views = ("moments", "overlap", "salience")
        counts = [con.sql(f"select count(*) from {view}").fetchall()[0][0] for view in views]
        [(n_merged, n_in_shards)] = con.sql(
            "select (select sum(n) from histograms), (select sum(n) from shard_histograms where layer = 0)"
        ).fetchall()
        described = con.sql("select count(*) from distributions where ks <= ks_bound and p01 <= p99").fetchall()
    assert n_merged == n_in_shards == WIDTH * 320
    assert described == [(WIDTH * 4,)]
    assert counts == [WIDTH * 4, WIDTH * 2, WIDTH * 4 * 7]
