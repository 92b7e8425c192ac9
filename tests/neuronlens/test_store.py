"""The commit protocol and verification of a store, on a disk and in memory."""

import json
import multiprocessing
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neuronlens.errors import RunFailed, UsageError
from neuronlens.store import FORMAT_VERSION, Store, content_hash, new_attempt, receipt_of
from tests.faults import Fault, break_storage, n_times

SCHEMA = pa.schema([("x", pa.int64())])


def write(store: Store, kind: str = "partials", rows: int = 5):
    path = f"{kind}/shard-00000.{new_attempt()}.parquet"
    tables = [pa.table({"x": pa.array(range(n), pa.int64())}) for n in (rows, 1)]
    return store.write_parquet(kind, path, SCHEMA, lambda: tables)


def commit(store: Store, *files, shard: int = 0) -> bool:
    return store.create_json(f"commits/shard-{shard:05d}.json", receipt_of(files, shard=shard, attempt="a"))


def test_store__counts_only_files_that_a_receipt_names(tmp_path):
    store = Store(str(tmp_path))
    committed, orphan = write(store), write(store)
    commit(store, committed)
    assert store.file_lists()["partials"] == [store.path(committed.path)]
    assert Path(store.path(orphan.path)).exists()


@pytest.mark.parametrize("n_merged", [0, 1, 2])
def test_file_lists__have_merged_histograms_where_every_layer_has_them(n_merged, tmp_path):
    store = Store(str(tmp_path))
    shards = [write(store, "histograms") for _ in range(2)]
    for number, file in enumerate(shards):
        commit(store, file, shard=number)
    layers = [[write(store, "merged_histograms") if n < n_merged else write(store, "moments")] for n in range(2)]
    for number, files in enumerate(layers):
        store.create_json(f"statistics/mlp_post.{number:03d}.json", receipt_of(files, layer=number))
    lists = store.file_lists()
    assert lists["shard_histograms"] == [store.path(file.path) for file in shards]
    merged = [store.path(file.path) for files in layers for file in files]
    assert lists["histograms"] == (merged if n_merged == 2 else lists["shard_histograms"])
    assert "merged_histograms" not in lists


def test_store__describes_what_it_wrote(tmp_path):
    store = Store(str(tmp_path))
    file = write(store)
    path = Path(store.path(file.path))
    assert (file.n_bytes, file.n_rows) == (path.stat().st_size, 6)
    assert pq.ParquetFile(path).metadata.num_row_groups == 2
    assert store.adopt("partials", file.path) == file


def test_store__takes_the_first_receipt_only(tmp_path):
    store = Store(str(tmp_path))
    assert commit(store, write(store))
    before = store.read_json("commits/shard-00000.json")
    assert not commit(store, write(store))
    assert store.read_json("commits/shard-00000.json") == before
    assert store.names("commits") == ["shard-00000.json"], "no draft stays behind"


def _race(root, number, start, wins):
    start.wait()
    wins.put(Store(root).create_json("commits/shard-00000.json", {"winner": number}))


def test_store__lets_one_of_many_racing_processes_commit(tmp_path):
    context = multiprocessing.get_context("fork")
    start, wins = context.Event(), context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), n, start, wins)) for n in range(6)]
    for racer in racers:
        racer.start()
    start.set()
    assert sorted(wins.get(timeout=30) for _ in racers) == [False] * 5 + [True]
    for racer in racers:
        racer.join()


def test_store__finds_every_kind_of_damage(tmp_path):
    store = Store(str(tmp_path))
    files = [write(store) for _ in range(4)]
    for shard, file in enumerate(files):
        commit(store, file, shard=shard)
    assert store.faults() == []
    missing, truncated, flipped, _ = (Path(store.path(file.path)) for file in files)
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-10])
    damaged = bytearray(flipped.read_bytes())
    damaged[20] ^= 1
    flipped.write_bytes(damaged)
    faults = store.faults()
    assert len(faults) == 3
    for name, word in ((missing, "missing"), (truncated, "bytes"), (flipped, "BLAKE2b")):
        assert any(name.name in fault and word in fault for fault in faults)


def test_store__compares_sizes_only_where_files_are_trusted(tmp_path):
    store = Store(str(tmp_path))
    whole, flipped, cut = (write(store) for _ in range(3))
    for file, change in (
        (flipped, lambda content: content[:20] + b"?" + content[21:]),
        (cut, lambda content: content[:-1]),
    ):
        path = Path(store.path(file.path))
        path.write_bytes(change(path.read_bytes()))
    assert [fault is None for fault in store.faults_of([whole, flipped, cut])] == [True, False, False]
    assert [fault is None for fault in store.faults_of([whole, flipped, cut], digests=False)] == [True, True, False]


def test_store__writes_again_what_arrived_by_half(tmp_path, monkeypatch):
    monkeypatch.setattr("neuronlens.retry.FIRST_PAUSE_SECONDS", 0.01)
    break_storage(tmp_path, Fault("half", "partials/", times=2), Fault("raise", "partials/", times=1))
    store = Store(f"faulty://{tmp_path}/store")
    file = write(store)
    assert store.fault_of(file) is None
    assert n_times(tmp_path) == 3


def test_store__leaves_nothing_behind_where_it_cannot_write(tmp_path, monkeypatch):
    monkeypatch.setattr("neuronlens.retry.FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("neuronlens.retry.MAX_TRIES", 2)
    break_storage(tmp_path, Fault("half", "partials/"))
    store = Store(f"faulty://{tmp_path}/store")
    with pytest.raises(RunFailed, match=r"bytes were written, 100 are there"):
        write(store)
    assert store.names("partials") == []


def test_store__works_on_any_fsspec_url():
    store = Store("memory://bucket/run")
    store.create_json("store.json", {"format_version": 1})
    assert commit(store, write(store))
    assert store.faults() == []
    assert store.describe()["format_version"] == 1
    store.fs.rm("/bucket", recursive=True)


def test_store__says_when_there_is_none_or_another_format(tmp_path):
    with pytest.raises(UsageError, match=r"store\.json is missing"):
        Store(str(tmp_path)).describe()
    Store(str(tmp_path)).create_json("store.json", {"format_version": 99, "versions": {"neuronlens": "7.2.1"}})
    with pytest.raises(UsageError, match=r"store format 99, .* up to \d+\. Update neuronlens: version 7\.2\.1 made"):
        Store(str(tmp_path)).describe()


@pytest.mark.parametrize("versions", [None, [], "0.9", {}, {"neuronlens": None}])
def test_store__refuses_a_newer_format_whatever_else_it_says(tmp_path, versions):
    Store(str(tmp_path)).create_json("store.json", {"format_version": FORMAT_VERSION + 1, "versions": versions})
    with pytest.raises(UsageError, match="Update neuronlens: version unknown"):
        Store(str(tmp_path)).describe()


@pytest.mark.parametrize(
    "content", [{}, [], "text", 7, None, *({"format_version": v} for v in (None, "1", 1.5, True, [1], {}, 0, -1))]
)
def test_store__says_in_a_sentence_that_store_json_has_no_format(tmp_path, content):
    (tmp_path / "store.json").write_text(json.dumps(content))
    found = content.get("format_version") if isinstance(content, dict) else None
    with pytest.raises(
        UsageError, match=f"gives {re.escape(repr(found))} as its format_version, expected a whole number"
    ):
        Store(str(tmp_path)).describe()


def test_store__says_which_receipt_is_damaged(tmp_path):
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits" / "shard-00000.json").write_text('{"shard": ')
    with pytest.raises(RunFailed, match=r"shard-00000\.json is not JSON"):
        Store(str(tmp_path)).receipts("commits")


def test_content_hash__does_not_depend_on_the_order_of_keys():
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1}) != content_hash({"a": 1, "b": [3]})
