"""Each test does damage to a run and demands the tables of an undisturbed one, or a clear refusal."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from neuronlens.errors import RunFailed, UsageError
from neuronlens.models import load_model
from neuronlens.ranges import RangeTable
from neuronlens.retry import StorageFailed, StoreUnusable
from neuronlens.store import Store
from pipeline import driver
from pipeline.clean import clean, orphans
from pipeline.collect import CollectSpec, commit_shard, run_shard
from pipeline.frozen import load_shards, read_samples
from pipeline.status import status_of
from tests.faults import Fault, break_storage, n_times
from tests.pipeline.runs import TWO_WORKERS, assert_same_tables, recipe, run, table_of

pytestmark = pytest.mark.usefixtures("ray_cluster", "small_shards", "one_thread_each")


class Notes:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def stage(self, name, total, unit):
        return driver.Silent().stage(name, total, unit)

    def say(self, line):
        self.lines.append(line)


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory, ray_cluster):
    patch = pytest.MonkeyPatch()
    patch.setattr("pipeline.plan.MIN_SHARD_TOKENS", 150)
    root = tmp_path_factory.mktemp("undisturbed") / "store"
    run(place, root, test=None, compute=TWO_WORKERS)
    patch.undo()
    return root


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr("neuronlens.retry.FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("pipeline.pool.NODE_DEATH_SECONDS", 0.5)


def faulty(folder):
    return f"faulty://{folder}/store"


def test_run__goes_on_when_a_collector_is_killed_in_the_middle_of_a_shard(place, tmp_path, undisturbed):
    break_storage(tmp_path, Fault("kill", r"raw/.*shard-00002", times=1), Fault("kill", r"partials/.*05\.", times=1))
    notes = Notes()
    run(place, faulty(tmp_path), test=None, reporter=notes, compute=TWO_WORKERS)
    assert n_times(tmp_path) == 2
    assert any("its worker died" in line for line in notes.lines)
    assert_same_tables(faulty(tmp_path), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "raise"])
def test_run__quarantines_a_shard_that_fails_every_time(place, tmp_path, undisturbed, action):
    break_storage(tmp_path, Fault(action, r"partials/shard-00002"))
    with pytest.raises(RunFailed, match=r"1 of \d+ shards failed") as raised:
        run(place, faulty(tmp_path), test=None, compute=TWO_WORKERS)
    store = Store(faulty(tmp_path))
    rows = read_samples(store, load_shards(store)[2])["row"].to_pylist()
    message = str(raised.value)
    assert re.search(r"shard-00002 \(concept anger, \d+ texts\): failed 3 times", message)
    told = re.search(r"rows of the data: ([\d, ]+)", message).group(1)
    assert [int(row) for row in told.split(", ")] == rows
    assert len(store.names("commits")) == len(load_shards(store)) - 1, "the others finished"
    status = status_of(store)
    assert status["shards"]["quarantined"] == 1
    assert status["quarantined"][0]["rows"] == rows
    assert len(status["quarantined"][0]["reasons"]) == 3

    break_storage(tmp_path)
    run(place, faulty(tmp_path), test=None)
    assert_same_tables(faulty(tmp_path), undisturbed)
    assert status_of(store)["shards"]["quarantined"] == 0


@pytest.mark.slow
def test_run__stamps_the_coverage_where_it_may_go_on_without_a_shard(place, tmp_path):
    break_storage(tmp_path, Fault("raise", r"partials/shard-00002"))
    notes = Notes()
    summary = run(place, faulty(tmp_path), allow_partial=True, reporter=notes)
    store = Store(faulty(tmp_path))
    shards = load_shards(store)
    coverage = {
        "n_shards": len(shards) - 1,
        "n_planned_shards": len(shards),
        "n_samples": 120 - shards[2].n_samples,
        "n_planned_samples": 120,
    }
    assert summary.coverage == coverage
    assert RangeTable.load(f"{tmp_path}/store/ranges/{summary.range_table}").header.coverage == coverage
    [evaluation] = store.receipts("evaluations")
    assert evaluation["coverage"] == coverage
    assert all(receipt["coverage"] == coverage for receipt in store.receipts("statistics"))
    assert any("shard-00002" in line for line in notes.lines)
    n = table_of(faulty(tmp_path), "moments", "all").to_pandas().query("neuron == 0 and layer == 0")["n"].sum()
    assert n == coverage["n_samples"]


def test_statistics__of_a_part_need_leave(place, tmp_path, undisturbed):
    copy = tmp_path / "store"
    shutil.copytree(undisturbed, copy)
    next((copy / "commits").iterdir()).unlink()
    with pytest.raises(UsageError, match=r"holds \d+ of \d+ planned shards.*--allow-partial"):
        driver.Driver(recipe=recipe(place)).statistics(Store(str(copy)))


def test_commit__is_one_of_two_attempts_that_race(place, tmp_path, undisturbed):
    copy = tmp_path / "store"
    shutil.copytree(undisturbed, copy)
    store = Store(str(copy))
    shard = load_shards(store)[1]
    receipt = store.read_json(f"commits/{shard.name}.json")
    store.remove(f"commits/{shard.name}.json")
    left_behind = {file["path"] for file in receipt["files"]}
    spec = CollectSpec.of(store.describe(), None)
    loaded = load_model(str(place / "model"))
    collected = [run_shard(loaded, spec, shard, read_samples(store, shard)) for _ in range(4)]
    barrier, receipts = threading.Barrier(4), []

    def commit(one):
        barrier.wait()
        receipts.append(commit_shard(spec, store, one))

    racers = [threading.Thread(target=commit, args=(one,)) for one in collected]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len({receipt["attempt"] for receipt in receipts}) == 1, "all are told the attempt that counts"
    assert {orphan.path for orphan in orphans(store)} == left_behind, "the losers took their files away"
    run(place, copy, test=None)
    assert_same_tables(copy, undisturbed)


def test_orphans__are_ignored_and_cleaned(place, tmp_path, undisturbed):
    copy = tmp_path / "store"
    shutil.copytree(undisturbed, copy)
    store = Store(str(copy))
    planted = ["partials/shard-00001.abcdefabcdef.parquet", "raw/hook_point=mlp_post/layer=0/shard-00000.0123.parquet"]
    for path in planted:
        shutil.copy(next((copy / "partials").iterdir()), copy / path)
    (copy / "commits" / ".shard-00000.json.123abc").write_text("half a rec")
    (copy / "my notes.txt").write_text("not a file of ours")
    run(place, copy, test=None)
    assert_same_tables(copy, undisturbed)
    found = orphans(store)
    assert {orphan.path for orphan in found} == {*planted, "commits/.shard-00000.json.123abc"}
    clean(store, found)
    assert orphans(store) == []
    assert (copy / "my notes.txt").exists()
    assert store.faults() == []
    assert_same_tables(copy, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "folder"),
    [
        ("truncate", "partials"),
        ("flip", "partials"),
        ("flip", "raw"),
        ("remove", "histograms"),
        ("receipt", "partials"),
    ],
)
def test_run__collects_a_damaged_shard_again_and_no_other(place, tmp_path, undisturbed, damage, folder):
    copy = tmp_path / "store"
    shutil.copytree(undisturbed, copy)
    store = Store(str(copy))
    receipt = store.read_json("commits/shard-00003.json")
    victim = copy / next(file["path"] for file in receipt["files"] if file["kind"] == folder)
    content = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 3] ^= 4
        victim.write_bytes(content)
    elif damage == "remove":
        victim.unlink()
    else:
        (copy / "commits/shard-00003.json").write_text('{"shard": 3, "fil')
    if damage != "receipt":
        [fault] = store.faults()
        assert victim.name in fault
    before = {path.name: path.read_text() for path in (copy / "commits").iterdir() if "00003" not in path.name}
    run(place, copy, test=None)
    assert {name: (copy / "commits" / name).read_text() for name in before} == before
    assert store.read_json("commits/shard-00003.json")["attempt"] != receipt["attempt"]
    assert store.faults() == []
    assert_same_tables(copy, undisturbed)


@pytest.mark.slow
def test_run__outlives_storage_that_fails_now_and_then(place, tmp_path, undisturbed):
    break_storage(
        tmp_path,
        Fault("raise", r"(partials|raw)/.*[02468]\.", times=8),
        Fault("half", r"(partials|histograms|raw)/.*[13579]\.", times=8),
        Fault("raise", r"samples/", times=2),
    )
    run(place, faulty(tmp_path), test=None, compute=TWO_WORKERS)
    assert n_times(tmp_path) == 18
    assert Store(faulty(tmp_path)).faults() == []
    assert_same_tables(faulty(tmp_path), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["raise", "half"])
def test_run__never_commits_without_its_files(place, tmp_path, action):
    break_storage(tmp_path, Fault(action, r"histograms/"))
    with pytest.raises(StorageFailed, match=r"could not write .*histograms.*failed 6 times"):
        run(place, faulty(tmp_path), test=None, compute=TWO_WORKERS)
    assert Store(faulty(tmp_path)).names("commits") == []
    # The seventh failure ends it; meanwhile two workers may have three more shards in hand.
    assert n_times(tmp_path) <= 6 * (7 + 3), "storage that is down ends the run, not each shard in its turn"


@pytest.mark.slow
@pytest.mark.parametrize(("action", "said"), [("full", "no room left"), ("readonly", "does not let us")])
def test_run__stops_at_once_where_nothing_can_be_written(place, tmp_path, undisturbed, action, said):
    break_storage(tmp_path, Fault(action, r"partials/shard-0000[0-4]"))
    with pytest.raises(StoreUnusable, match=said):
        run(place, faulty(tmp_path), test=None, compute=TWO_WORKERS)
    assert n_times(tmp_path) <= 4, "what cannot work is not tried again"
    break_storage(tmp_path)
    run(place, faulty(tmp_path), test=None)
    assert_same_tables(faulty(tmp_path), undisturbed)


@pytest.mark.slow
def test_run__does_not_mind_clocks_that_disagree(place, tmp_path, undisturbed):
    """Receipts from machines whose clocks are decades off, and a dead driver's lease from one of them."""
    copy = tmp_path / "store"
    shutil.copytree(undisturbed, copy)
    for year, path in zip(range(1971, 2200, 7), sorted((copy / "commits").iterdir()), strict=False):
        receipt = json.loads(path.read_text())
        path.write_text(json.dumps(receipt | {"finished_at": f"{year}-01-01T00:00:00+00:00"}))
        os.utime(path, (86400 * 365 * (year - 1970),) * 2)
    (copy / "commits" / "shard-00001.json").unlink()
    run(place, copy, test=None)
    assert_same_tables(copy, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [1, 7])
def test_run__gives_the_same_for_any_number_of_workers(place, tmp_path, undisturbed, n_workers):
    run(place, tmp_path, compute={"workers": n_workers}, test=None)
    assert_same_tables(tmp_path, undisturbed)


@pytest.mark.slow
def test_run__drops_what_a_signalled_collector_had_in_hand(place, tmp_path, undisturbed):
    """SIGTERM to a collector, as a node that is taken away sends it: gone within 10 s, its shard done elsewhere."""
    break_storage(tmp_path, Fault("slow", r"partials/", seconds=0.5), Fault("slow", r"shard-00004", 1, seconds=30))
    gone_after = []

    def terminate():
        store = Store(faulty(tmp_path))
        while not (store.exists("progress.json") and store.read_json("progress.json")["running"].get("shard-00004")):
            time.sleep(0.1)
        worker = store.read_json("progress.json")["running"]["shard-00004"]["worker"]
        pid = int(worker.rpartition(" ")[2])
        os.kill(pid, signal.SIGTERM)
        started = time.monotonic()
        while Path(f"/proc/{pid}").exists() and time.monotonic() - started < 40:
            time.sleep(0.05)
        gone_after.append(time.monotonic() - started)

    other = threading.Thread(target=terminate)
    other.start()
    run(place, faulty(tmp_path), test=None, compute=TWO_WORKERS)
    other.join()
    assert gone_after[0] < 10
    assert_same_tables(faulty(tmp_path), undisturbed)
