"""A run on a real S3 API: the same tables as in a folder, and the same damage survived."""

import json
import threading

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from neuronlens.cli import app
from neuronlens.errors import RunFailed, UsageError
from neuronlens.query import connect
from neuronlens.retry import StoreUnusable
from neuronlens.store import Store
from pipeline.frozen import load_shards
from pipeline.lease import Lease, StoreHeld
from tests.pipeline.runs import assert_same_tables, recipe_file
from tests.s3 import S3Server
from tests.warm import run_warm


@pytest.fixture(scope="module")
def server():
    patch = pytest.MonkeyPatch()
    with S3Server() as server:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.make_bucket("bucket")
        yield server
    patch.undo()


@pytest.fixture
def s3(server):
    """The module's server, with no requests counted and no failures due."""
    server.forget()
    yield server
    server.forget()
    server.terse = False


@pytest.fixture(scope="module")
def recipe_path(place, tmp_path_factory):
    return recipe_file(place, tmp_path_factory.mktemp("recipe"), compute={"workers": 1}, test=None)


@pytest.fixture(scope="module")
def whole(server, recipe_path):
    """A whole run, by the command that a person types: Ray's workers know the server by the environment alone."""
    summary = run_command(recipe_path, "s3://bucket/whole")
    assert summary["store"] == "s3://bucket/whole"
    return Store("s3://bucket/whole")


@pytest.fixture
def copy(s3, whole, request):
    """A copy of the whole run that a test may damage."""
    name = request.node.name.partition("[")[0]
    s3.copy("whole", name)
    return Store(f"s3://bucket/{name}")


def run_command(recipe_path, store):
    done = run_warm("tests.faulty_cli", "run", recipe_path, "--store", store, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def answer(*arguments):
    return json.loads(invoke(*arguments, "--json").splitlines()[-1])


def attempts(store):
    return {receipt["shard"]: receipt["attempt"] for receipt in store.receipts("commits")}


@pytest.mark.slow
def test_run__gives_on_s3_what_it_gives_in_a_folder(tmp_path, recipe_path, whole):
    """By the same command: on some CPUs torch rounds differently with another number of threads."""
    run_command(recipe_path, str(tmp_path / "store"))
    assert_same_tables(whole.root, tmp_path / "store")
    assert len(load_shards(whole)) > 5
    assert whole.faults() == []


@pytest.mark.slow
def test_run__makes_on_s3_only_the_shard_again_whose_receipt_is_gone(s3, recipe_path, whole, copy):
    before = attempts(copy)
    copy.remove("commits/shard-00003.json")
    s3.forget()
    run_command(recipe_path, copy.root)
    after = attempts(copy)
    assert {shard for shard in before if after[shard] != before[shard]} == {3}
    written = {one.path for one in s3.requests if one.method == "PUT" and "/partials/" in one.path}
    assert written == {f"/bucket/{copy.root.rpartition('/')[2]}/partials/shard-00003.{after[3]}.parquet"}
    assert_same_tables(copy.root, whole.root)


@pytest.mark.slow
def test_run__outlives_an_s3_that_fails_now_and_then(s3, recipe_path, whole, copy):
    for number in (1, 2, 3):
        copy.remove(f"commits/shard-{number:05d}.json")
    failures = [
        s3.fail(12, status=503, method="PUT", pattern=r"partials/shard-00001"),  # more than botocore itself tries
        s3.fail(2, status=500, method="PUT", pattern=r"histograms/shard-00002"),
        s3.fail(5, status=500, method="PUT", pattern=r"commits/shard-00003", after=True),  # each of botocore's tries
        s3.fail(12, status=503, method="GET", pattern=r"partials/shard-00004"),
    ]
    run_command(recipe_path, copy.root)
    assert [failure.times for failure in failures] == [0, 0, 0, 0]
    s3.forget()
    assert_same_tables(copy.root, whole.root)
    assert copy.faults() == []


@pytest.mark.slow
def test_verify__names_the_object_whose_bytes_were_flipped(copy):
    assert answer("verify", copy.root) == {"ok": True, "faults": []}
    victim = next(file.path for file in copy.committed_files() if file.kind == "partials")
    content = bytearray(copy.fs.cat_file(copy.path(victim)))
    content[len(content) // 3] ^= 4
    copy.fs.pipe_file(copy.path(victim), bytes(content))
    with pytest.raises(RunFailed, match="1 damaged file"):
        invoke("verify", copy.root)
    [fault] = copy.faults()
    assert victim in fault
    assert "the bytes were changed" in fault


@pytest.mark.slow
def test_commands__work_on_s3(whole, copy):
    n_rows = 2 * 40 * 3  # layers, neurons, concepts
    assert invoke("sql", copy.root, "select count(*) as n from moments", "--format", "csv").split() == [
        "n",
        str(n_rows),
    ]
    assert answer("ranges", copy.root, "--tau", "1.5")["range_table"] in copy.table_ids()
    status = answer("status", copy.root)
    assert (status["state"], status["shards"]["committed"]) == ("idle", len(load_shards(copy)))
    orphan = "partials/shard-00001.abcdefabcdef.parquet"
    copy.fs.pipe_file(copy.path(orphan), b"left behind")
    cleaned = {"files": [orphan], "bytes": 11}
    assert answer("clean", copy.root, "--dry-run") == cleaned | {"removed": False}
    assert copy.exists(orphan)
    assert answer("clean", copy.root) == cleaned | {"removed": True}
    assert not copy.exists(orphan)
    assert_same_tables(copy.root, whole.root)


@pytest.mark.parametrize("terse", [False, True])
def test_create_json__lets_one_of_eight_racers_win(s3, terse):
    s3.terse = terse
    store, barrier, won = Store(f"s3://bucket/race-{terse}"), threading.Barrier(8), {}

    def create(racer):
        barrier.wait()
        won[racer] = store.create_json("commits/shard-00000.json", {"attempt": racer})

    racers = [threading.Thread(target=create, args=(racer,)) for racer in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    [winner] = [racer for racer, first in won.items() if first]
    assert store.read_json("commits/shard-00000.json") == {"attempt": winner}
    assert len(won) == 8


def test_create_json__knows_its_own_write_that_was_reported_as_failed(s3):
    s3.fail(1, status=500, method="PUT", after=True)
    assert Store("s3://bucket/echo").create_json("store.json", {"by": "us"})
    assert not Store("s3://bucket/echo").create_json("store.json", {"by": "others"})
    assert [one.status for one in s3.requests if one.method == "PUT"] == [500, 412, 412]


def test_lease__refuses_a_second_driver_on_s3(s3):
    store = Store("s3://bucket/held")
    with (
        Lease(store, "neuronlens run"),
        pytest.raises(StoreHeld, match="s3://bucket/held is held by 'neuronlens run' of"),
        Lease(Store("s3://bucket/held"), "neuronlens clean"),
    ):
        pass
    assert store.names("leases") == []
    with Lease(store, "neuronlens clean"):
        assert store.names("leases") == ["00001.json"]


def test_store__does_not_make_a_bucket(s3):
    store = Store("s3://missing/run")
    with pytest.raises(UsageError, match=r"There is no store at s3://missing/run"):
        store.describe()
    for write in (store.create_json, store.replace_json):
        with pytest.raises(UsageError, match=r"s3://missing/run/store\.json cannot be written.*bucket.*make it first"):
            write("store.json", {})
    with pytest.raises(UsageError, match=r"plan\.parquet cannot be written.*bucket"):
        write_numbers(store, "plan.parquet", n_rows=3)
    assert [bucket["Name"] for bucket in s3.client().list_buckets()["Buckets"]] == ["bucket"]


def test_store__does_not_ask_again_where_it_is_refused(s3):
    s3.fail(100, status=403)
    with pytest.raises(StoreUnusable, match="credentials"):
        Store("s3://bucket/refused").create_json("store.json", {})
    assert sum(one.method == "PUT" for one in s3.requests) == 1


def test_connect__reads_from_s3_just_what_a_query_needs(s3):
    """Four columns of which one is asked for, 40 row groups of which two are."""
    store = Store("s3://bucket/numbers")
    size = write_numbers(store, "numbers.parquet", n_rows=400_000).n_bytes
    query = "select sum(a)::bigint from read_parquet('s3://bucket/numbers/numbers.parquet')"
    for condition, expected, share in (
        ("", sum(range(400_000)), 0.3),
        (" where a between 200_005 and 210_004", sum(range(200_005, 210_005)), 0.06),
    ):
        s3.forget()
        with connect(fs=store.fs, threads=4) as con:
            assert con.sql(query + condition).fetchall() == [(expected,)]
        assert s3.n_bytes_read("numbers.parquet") < share * size


def test_verify__reads_a_file_on_s3_once(s3):
    store = Store("s3://bucket/numbers")
    file = write_numbers(store, "numbers.parquet", n_rows=400_000)
    s3.forget()
    assert store.fault_of(file) is None
    assert s3.n_bytes_read("numbers.parquet") < 1.1 * file.n_bytes


def write_numbers(store, name, n_rows):
    rng = np.random.default_rng(0)
    numbers = pa.table({"a": np.arange(n_rows)} | {key: rng.integers(0, 2**62, n_rows) for key in "bcd"})
    groups = [numbers.slice(start, 10_000) for start in range(0, n_rows, 10_000)]
    return store.write_parquet("plan", name, numbers.schema, lambda: iter(groups))
