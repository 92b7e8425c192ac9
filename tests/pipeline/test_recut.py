"""Cutting a store again: against long-double sums of the values that stay, and against a fresh run on their texts."""

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from neuronlens.cli import app
from neuronlens.errors import RunFailed, UsageError
from neuronlens.models import load_model
from neuronlens.query import connect
from neuronlens.recipe import RangesSection, parse_recipe
from neuronlens.store import Store
from pipeline import recut as module
from pipeline.collect import CollectSpec, collect_shard
from pipeline.driver import Silent
from pipeline.emit import emit_table
from pipeline.frozen import load_shards
from pipeline.lease import current
from pipeline.plan import freeze, make_plan
from pipeline.recut import recut
from pipeline.statistics import compute_statistics_here
from pipeline.status import status_of
from tests.pipeline.runs import content_of, table_of
from tests.synthetic_store import ATTEMPT, Shard, bins_of, moments_of, stored, write, write_store
from tests.tiny_models import save_tiny

ODD = ("a/b", "it's", "日本", '"')
WIDTH, N_LAYERS = 5, 2


def _values(concepts=ODD, *, n_each=2, n_samples=40, seed=0) -> list[Shard]:
    rng = np.random.default_rng(seed)
    shards = []
    for k, concept in enumerate(concepts):
        for _ in range(n_each):
            x_LSN = (k / 2 + rng.normal(size=(N_LAYERS, n_samples, WIDTH))).astype(np.float32)
            x_LSN[:, :, 0] += 1000
            shards.append(Shard(concept=concept, x_LSN=x_LSN))
    return shards


def _complete(root: Path, *, kinds=("partials", "histograms", "raw"), recipe=None, **changes) -> Store:
    """What `write_store` leaves out: a row group of samples a shard, of unlike lengths and in several batches; all keys
    of store.json, with `changes`; receipts that name the files of these kinds."""
    rows = pq.read_table(root / "samples" / "part-00000.parquet")
    number = np.arange(len(rows))
    rows = rows.set_column(rows.column_names.index("n_tokens"), "n_tokens", pa.array(_n_tokens(number), pa.int32()))
    rows = rows.set_column(rows.column_names.index("batch"), "batch", pa.array(number // 7, pa.int32()))
    rows = rows.set_column(rows.column_names.index("truncated"), "truncated", pa.array(number % 3 == 0))
    shard = rows["shard"].to_numpy()
    write(root / "samples" / "part-00000.parquet", [rows.filter(pa.array(shard == s)) for s in np.unique(shard)])
    description = json.loads((root / "store.json").read_text()) | {
        "store_hash": "5" * 64,
        "model": {"id": "there", "revision": None, "config_hash": "c", "modules": {}, "dtype": "float32"},
        "tokenizer_hash": "t",
        "dataset": {"source": "x.jsonl", "split": "train", "fingerprint": "f", "n_rows": len(rows), "n_truncated": 0},
        "histograms": "histograms" in kinds,
        "raw": {"policy": "kept" if "raw" in kinds else "none", "layers": "all", "neurons": "all"},
        "only_correct": False,
        "recipe": {"model": {"id": "there"}, "data": {"source": "x.jsonl"}, **(recipe or {})},
        "versions": {},
        "created_at": "2026-01-01T00:00:00+00:00",
        "files": [stored(root, "plan", "plan.parquet"), stored(root, "samples", "samples/part-00000.parquet")],
        **changes,
    }
    (root / "store.json").write_text(json.dumps(description))
    for path in (root / "commits").iterdir():
        paths = sorted(root.glob(f"*/**/{path.stem}.{ATTEMPT}.parquet"))
        relative = [str(file.relative_to(root)) for file in paths]
        files = [stored(root, name.partition("/")[0], name) for name in relative if name.partition("/")[0] in kinds]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"n_kept": 1, "n_tokens": 1, "files": files}))
    return Store(str(root))


def _n_tokens(sample_S: np.ndarray) -> np.ndarray:
    return 5 + (sample_S * 7) % 30


@pytest.fixture
def shards() -> list[Shard]:
    return _values()


@pytest.fixture
def store(shards, tmp_path) -> Store:
    write_store(tmp_path / "old", shards)
    return _complete(tmp_path / "old")


@pytest.fixture
def new(tmp_path) -> Store:
    return Store(str(tmp_path / "new"))


def _columns(shards: list[Shard], keep_S: np.ndarray) -> dict[tuple[int, int, str], np.ndarray]:
    """(layer, neuron, concept) -> the values of the samples that stay."""
    first, found = 0, {}
    for shard in shards:
        n = shard.x_LSN.shape[1]
        for layer, x_SN in enumerate(shard.x_LSN):
            for neuron, x_S in enumerate(x_SN[keep_S[first : first + n]].T):
                found.setdefault((layer, neuron, shard.concept), []).append(x_S)
        first += n
    columns = {key: np.concatenate(parts) for key, parts in found.items()}
    return {key: x_S for key, x_S in columns.items() if len(x_S)}


def _table(store: Store, view: str) -> pa.Table:
    return _tables(store, view)[view]


def _tables(store: Store, *views: str) -> dict[str, pa.Table]:
    """The rows of each view, sorted; counts summed over whatever files they stand in."""
    histograms = "select layer, hook_point, neuron, concept, bin, sum(n)::bigint as n from histograms group by all"
    with connect(store.file_lists(), fs=store.fs, views="stored") as con:
        queries = {view: histograms if view == "histograms" else f"from {view}" for view in views}
        return {view: con.sql(query).order("all").to_arrow_table() for view, query in queries.items()}


def _expect(store: Store, columns: dict[tuple[int, int, str], np.ndarray], *, rtol: float) -> None:
    """Moments, histograms, overlap and salience of the store are those of the values, summed in longdouble."""
    moments = {
        (row["layer"], row["neuron"], row["concept"]): row for row in table_of(store.root, "moments", "all").to_pylist()
    }
    assert moments.keys() == columns.keys()
    bins = {}
    for row in _table(store, "histograms").to_pylist():
        bins.setdefault((row["layer"], row["neuron"], row["concept"]), {})[row["bin"]] = row["n"]
    for key, x_S in columns.items():
        expected = moments_of(x_S)
        for name in ("n", "n_nonfinite", "min", "max"):
            assert moments[key][name] == expected[name], (key, name)
        for name in ("mean", "std", "skewness", "kurtosis", "mean_abs"):
            if expected[name] is None:
                assert moments[key][name] is None, (key, name)
            else:
                assert moments[key][name] == pytest.approx(expected[name], rel=rtol, abs=rtol), (key, name)
        assert bins.get(key, {}) == bins_of(x_S)
    for row in table_of(store.root, "overlap", "all").to_pylist():
        p, q = (columns[row["layer"], row["neuron"], row[side]] for side in ("concept_a", "concept_b"))
        p, q = ({b: n / sum(bins_of(x).values()) for b, n in bins_of(x).items()} for x in (p, q))
        assert row["ovl"] == pytest.approx(sum(min(p[b], q.get(b, 0)) for b in p), abs=1e-6)
    scores = table_of(store.root, "salience", "all").to_pylist()
    by_mean_abs = {(r["layer"], r["neuron"], r["concept"]): r["score"] for r in scores if r["method"] == "mean_abs"}
    assert by_mean_abs == {key: row["mean_abs"] for key, row in moments.items()}


# --- samples, from raw values ---


def test_recut__gives_the_numbers_of_the_samples_that_stay(shards, store, new):
    shards[0].x_LSN[1, 3, 2], shards[0].x_LSN[0, 4:6, 1] = np.nan, [np.inf, -np.inf]
    write_store(Path(store.root), shards)
    _complete(Path(store.root))
    sample_S = np.arange(320)
    keep_S = (_n_tokens(sample_S) < 20) & ((sample_S < 40) | (sample_S >= 80))
    made = recut(store, new, where="n_tokens < 20", shards="shard not in (1)")
    _expect(new, _columns(shards, keep_S), rtol=2e-6)
    assert (made.store, made.n_samples, made.n_shards) == (new.root, int(keep_S.sum()), 7)
    assert new.faults() == []
    kept = table_of(new.root, "samples", "sample")
    assert kept["sample"].to_pylist() == sample_S[keep_S].tolist()
    assert set(kept["n_tokens"].to_pylist()) <= set(range(20))
    raw = table_of(new.root, "activations", "layer, neuron, sample")
    expected = np.concatenate([s.x_LSN for s in shards], axis=1)[:, keep_S].transpose(0, 2, 1).ravel()
    np.testing.assert_array_equal(raw["value"].to_numpy(), expected)
    assert raw["position"].to_pylist()[:5] == [(int(s) % 40) % 7 for s in sample_S[keep_S][:5]]


def test_recut__describes_what_it_made(store, new):
    recut(store, new, where="n_tokens < 20")
    old, found = store.describe(), new.describe()
    assert found["recut"] == {"store_hash": "5" * 64, "where": "n_tokens < 20", "shards": None}
    assert found["store_hash"] not in (old["store_hash"], "")
    sample_S = np.arange(320)
    keep_S = _n_tokens(sample_S) < 20
    counts = {concept: int(keep_S[80 * k : 80 * k + 80].sum()) for k, concept in enumerate(ODD)}
    assert found["concepts"] == dict(sorted(counts.items()))
    assert found["dataset"]["n_rows"] == keep_S.sum()
    assert found["dataset"]["n_truncated"] == (keep_S & (sample_S % 3 == 0)).sum()
    assert {key: found[key] for key in ("unit", "layers", "widths", "raw", "recipe")} == {
        key: old[key] for key in ("unit", "layers", "widths", "raw", "recipe")
    }
    for shard, receipt in zip(load_shards(new), new.receipts("commits"), strict=True):
        mine_S = keep_S & (sample_S // 40 == shard.shard)
        tokens, batches = _n_tokens(sample_S)[mine_S].sum(), len(np.unique(sample_S[mine_S] // 7))
        assert (shard.n_samples, shard.n_tokens, shard.n_batches) == (mine_S.sum(), tokens, batches)
        assert (receipt["n_samples"], receipt["n_kept"], receipt["n_tokens"]) == (mine_S.sum(), mine_S.sum(), tokens)
        assert receipt["n_truncated"] == (mine_S & (sample_S % 3 == 0)).sum()
    assert [file["path"] for file in found["files"]] == ["samples/part-00000.parquet", "plan.parquet"]
    status = status_of(new)
    assert (status["state"], status["n_layers_with_statistics"], status["shards"]["committed"]) == ("idle", 2, 8)


def test_recut__leaves_a_store_that_all_commands_take(store, new, tmp_path):
    recut(store, new, where="n_tokens < 20")
    table = emit_table(new, RangesSection(top_fraction=0.5), Silent())
    assert set(table.concepts) == set(ODD)
    newer = Store(str(tmp_path / "newer"))
    made = recut(new, newer, where="n_tokens < 12", shards="shard >= 2")
    sample_S = np.arange(320)
    assert (
        table_of(newer.root, "samples", "sample")["sample"].to_pylist()
        == sample_S[(_n_tokens(sample_S) < 12) & (sample_S >= 80)].tolist()
    )
    assert made.n_shards == 6
    assert newer.describe()["recut"]["store_hash"] == new.describe()["store_hash"]
    assert newer.faults() == []


def test_recut__drops_concepts_that_end_with_no_sample(shards, store, new):
    recut(store, new, where="sample < 75 or sample % 80 = 79 and sample > 200")
    keep_S = np.arange(320) < 75
    keep_S[[239, 319]] = True
    assert list(new.describe()["concepts"]) == sorted([ODD[0], ODD[2], ODD[3]])
    columns = _columns(shards, keep_S)
    assert len(columns[0, 0, ODD[3]]) == 1
    _expect(new, columns, rtol=2e-6)


def test_recut__takes_the_layers_whose_raw_values_were_kept(shards, tmp_path, new):
    write_store(tmp_path / "old", shards)
    shutil.rmtree(tmp_path / "old" / "raw" / "hook_point=mlp_post" / "layer=0")
    store = _complete(tmp_path / "old", raw={"policy": "kept", "layers": [1], "neurons": "all"})
    recut(store, new, where="n_tokens < 20")
    assert (new.describe()["layers"], new.describe()["raw"]["layers"]) == ([1], "all")
    columns = _columns(shards, _n_tokens(np.arange(320)) < 20)
    _expect(new, {key: x_S for key, x_S in columns.items() if key[0] == 1}, rtol=2e-6)


@pytest.mark.slow
def test_recut__works_with_two_hundred_concepts(tmp_path, new):
    shards = _values([f"{ODD[k % 4]} {k}" for k in range(200)], n_each=1, n_samples=2)
    write_store(tmp_path / "old", [Shard(concept=s.concept, x_LSN=s.x_LSN[:1, :, :2]) for s in shards])
    store = _complete(tmp_path / "old", recipe={"overlap": {"keep": "top", "top": 3}})
    made = recut(store, new, where="sample % 2 = 0 or shard % 2 = 0")
    assert (made.n_samples, made.n_shards) == (300, 200)
    assert new.faults() == []
    assert sorted(table_of(new.root, "moments", "all")["n"].to_pylist()) == [1] * 200 + [2] * 200
    assert table_of(new.root, "overlap", "all").num_rows == 2 * 3
    with connect(new.file_lists()) as con:
        assert con.sql("select count(*) from samples where concept = '日本 2'").fetchall() == [(2,)]


def test_recut__without_histograms_has_none(shards, tmp_path, new):
    write_store(tmp_path / "old", shards, histograms=False)
    recut(_complete(tmp_path / "old", kinds=("partials", "raw")), new, where="n_tokens < 20")
    assert not (Path(new.root) / "histograms").exists()
    assert table_of(new.root, "moments", "all").num_rows == N_LAYERS * WIDTH * len(ODD)


def test_recut__of_a_random_half_and_the_other_keeps_every_sample_once(store, tmp_path):
    halves = [Store(str(tmp_path / name)) for name in ("low", "high")]
    for half, sign in zip(halves, ("<", ">="), strict=True):
        recut(store, half, where=f"md5(row::varchar) {sign} '8'")
    low, high = (table_of(half.root, "samples", "sample")["sample"].to_pylist() for half in halves)
    assert sorted(low + high) == list(range(320))
    assert 130 < len(low) < 190
    n = [table_of(half.root, "moments", "layer, neuron, concept")["n"].to_numpy() for half in halves]
    assert set((n[0] + n[1]).tolist()) == {80}


def test_recut__works_where_stores_are_not_local(shards, store, new):
    fs = fsspec.filesystem("memory")
    far = Store("memory://recut-old")
    fs.put(f"{store.root}/", f"{far.root}/", recursive=True)
    target = Store("memory://recut-new")
    recut(far, target, where="n_tokens < 20")
    recut(store, new, where="n_tokens < 20")
    assert target.faults() == []
    for view in ("moments", "histograms"):
        assert _table(target, view).equals(_table(new, view))


# --- whole shards, copied ---


def test_recut__of_shards_copies_what_was_written_of_them(shards, tmp_path, new):
    write_store(tmp_path / "old", shards, raw=False)
    store = _complete(tmp_path / "old", kinds=("partials", "histograms"))
    made = recut(store, new, shards="shard % 2 = 0")
    keep_S = np.arange(320) // 40 % 2 == 0
    _expect(new, _columns(shards, keep_S), rtol=1e-10)
    assert (made.n_samples, made.n_shards) == (160, 4)
    assert [shard.shard for shard in load_shards(new)] == [0, 2, 4, 6]
    assert new.faults() == []
    assert new.receipts("commits") == store.receipts("commits")[::2]
    for receipt in new.receipts("commits"):
        for file in receipt["files"]:
            assert Path(new.path(file["path"])).read_bytes() == Path(store.path(file["path"])).read_bytes()


def test_recut__by_samples_copies_too_where_no_shard_is_split(shards, tmp_path, new):
    write_store(tmp_path / "old", shards, raw=False)
    store = _complete(tmp_path / "old", kinds=("partials", "histograms"))
    recut(store, new, where="concept = 'it''s'")
    _expect(new, _columns(shards, np.arange(320) // 80 == 1), rtol=1e-10)
    assert new.describe()["concepts"] == {"it's": 80}


def test_recut__of_everything_gives_the_same(store, new):
    compute_statistics_here(store, tau=2.5, memory_limit=None, on_done=lambda _: None)
    recut(store, new, where="true")
    _assert_same_numbers(new, store, rtol=1e-12)
    assert _table(new, "samples").equals(_table(store, "samples"))


def test_recut__of_an_unfinished_store_says_its_coverage(store, new):
    for shard in (1, 4):
        Path(store.path(f"commits/shard-{shard:05d}.json")).unlink()
    made = recut(store, new, where="n_tokens < 20", shards="shard < 4")
    n_planned = int((_n_tokens(np.arange(160)) < 20).sum())
    [coverage, _] = [receipt["coverage"] for receipt in new.receipts("statistics")]
    assert (coverage["n_shards"], coverage["n_planned_shards"]) == (3, 4)
    assert (coverage["n_samples"], coverage["n_planned_samples"]) == (made.n_samples, n_planned)
    assert made.n_samples < n_planned


# --- what cannot be ---


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "Nothing says what to keep"),
        ({"where": "n_tokens < 0"}, "No sample of .* is left by --where 'n_tokens < 0'"),
        ({"where": "correct"}, "is left by --where 'correct'.* holds no predictions"),
        ({"where": "true", "shards": "shard > 99"}, "is left by --where 'true' and --shards 'shard > 99'"),
        ({"where": "tokens < 3"}, r'"tokens" not found .* Its columns: sample, shard, batch, concept, row'),
        ({"where": "n_tokens <"}, "syntax error"),
        ({"where": ""}, "--where ''"),
        ({"where": "n_tokens"}, "expected one that is true or false, found INTEGER"),
        ({"where": "true, false"}, "found BOOLEAN, BOOLEAN"),
        ({"where": "null"}, "true or false"),
        ({"where": "true limit 3"}, "modifiers"),
        ({"where": "true; drop view samples"}, "Parser Error"),
        ({"where": "count(*) > 3"}, "aggregates"),
        ({"where": "text::int > 3"}, "Could not convert"),
        ({"where": "random() < 0.5"}, r"other rows each time .*md5\(row::varchar\) < '8'"),
        ({"where": "exists(from '/etc/hosts')"}, "--where"),
        ({"where": "exists(from read_csv('/etc/hosts'))"}, "Permission Error"),
        ({"shards": "n_tokens / 2"}, "--shards 'n_tokens / 2' .*found DOUBLE"),
        ({"shards": "rows > 2"}, "Its columns: shard, concept, n_samples"),
    ],
)
def test_recut__refuses_what_is_no_subset(asked, said, store, new):
    with pytest.raises(UsageError, match=said) as refused:
        recut(store, new, **asked)
    assert "\n" not in str(refused.value)
    assert not Path(new.root).exists()


def test_recut__refuses_to_split_shards_without_raw_values(shards, tmp_path, new):
    write_store(tmp_path / "old", shards, raw=False)
    store = _complete(tmp_path / "old", kinds=("partials", "histograms"))
    with pytest.raises(UsageError, match=r"raw values, and .*old kept none. Keep or drop whole shards, by --shards"):
        recut(store, new, where="n_tokens < 20")
    write_store(tmp_path / "old", shards)
    store = _complete(tmp_path / "old", raw={"policy": "kept", "layers": "all", "neurons": [1, 3]})
    with pytest.raises(UsageError, match=r"all neurons, and .*old kept those of 2"):
        recut(store, new, where="n_tokens < 20")
    assert not Path(new.root).exists()


def test_recut__refuses_a_place_that_holds_something_else(store, new):
    with pytest.raises(UsageError, match="old holds a store of its own"):
        recut(store, store, where="n_tokens < 20")
    recut(store, new, shards="shard = 2")
    before = {path: path.stat().st_mtime_ns for path in Path(new.root).rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"new holds another cut \(shards 'shard = 2' of store 555555555555\)"):
        recut(store, new, shards="shard = 3")
    assert {path: path.stat().st_mtime_ns for path in Path(new.root).rglob("*") if path.is_file()} == before


def test_recut__names_a_file_that_was_damaged(store, new):
    path = Path(store.root) / "raw" / "hook_point=mlp_post" / "layer=1" / f"shard-00002.{ATTEMPT}.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for asked in ({"where": "n_tokens < 20"}, {"shards": "shard < 3"}):
        with pytest.raises(RunFailed, match=r"layer=1/shard-00002.* has BLAKE2b"):
            recut(store, Store(f"{new.root}-{len(asked)}-{next(iter(asked))}"), **asked)


# --- what was cut short ---


class Killed(BaseException):
    pass


class _Listening(Silent):
    def __init__(self, said: list[str]) -> None:
        self.say = said.append  # type: ignore[method-assign]


@pytest.fixture(
    scope="module",
    params=[{"where": "n_tokens < 20"}, pytest.param({"shards": "shard % 2 = 0"}, marks=pytest.mark.slow)],
)
def undisturbed(request, tmp_path_factory) -> tuple[Store, dict[str, str], Store]:
    """A store, what is asked of it, and the cut that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_store(folder / "old", _values())
    store, whole = _complete(folder / "old"), Store(str(folder / "whole"))
    recut(store, whole, **request.param)
    return store, request.param, whole


@pytest.mark.parametrize("step", ["write_plan", "read_whole", "create_receipt", "compute_statistics_here"])
def test_recut__goes_on_where_it_was_killed(undisturbed, step, new, monkeypatch):
    store, asked, whole = undisturbed
    calls = 0
    home = Store if step == "read_whole" else module
    original = getattr(home, step)

    def cut_short(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == (3 if step in ("read_whole", "create_receipt") else 1):
            if step == "write_plan":
                original(args[0], {"format_version": 0}, *args[2:])
                Path(args[0].path("store.json")).unlink()
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(home, step, cut_short)
    with pytest.raises(Killed):
        recut(store, new, **asked)
    monkeypatch.undo()
    assert not new.receipts("statistics")
    with pytest.raises(UsageError):
        emit_table(new, RangesSection(top_fraction=0.5), Silent())
    kept = {path: path.stat().st_mtime_ns for path in Path(new.root).glob("commits/*.json")}
    if step == "write_plan":
        assert not kept
        assert not new.exists("store.json")
    elif step == "compute_statistics_here":
        assert len(kept) == len(load_shards(new))
    else:
        assert len(kept) < len(load_shards(new))
    said: list[str] = []
    recut(store, new, **asked, reporter=_Listening(said))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert any(f"{len(kept)} of {len(load_shards(new))} shards are committed" in line for line in said) == bool(kept)
    _assert_same_numbers(new, whole, rtol=1e-12)
    assert _table(new, "samples").equals(_table(whole, "samples"))
    assert new.describe()["store_hash"] == whole.describe()["store_hash"]
    assert new.faults() == []
    assert current(new) == (0, None)


def test_recut__makes_a_shard_again_that_was_damaged_since(store, new):
    recut(store, new, where="n_tokens < 20")
    before = table_of(new.root, "moments", "all")
    [file] = [file for file in new.receipts("commits")[3]["files"] if file["kind"] == "partials"]
    Path(new.path(file["path"])).write_bytes(b"nothing")
    recut(store, new, where="n_tokens < 20")
    assert new.faults() == []
    assert table_of(new.root, "moments", "all").equals(before)


def test_recut__does_not_go_on_from_another_state_of_the_store(store, new):
    recut(store, new, where="text < 'text 3'")
    rows = pq.read_table(store.path("samples/part-00000.parquet"))
    texts = pa.array([text.upper() for text in rows["text"].to_pylist()])
    rows = rows.set_column(rows.column_names.index("text"), "text", texts)
    shard = rows["shard"].to_numpy()
    write(Path(store.path("samples/part-00000.parquet")), [rows.filter(pa.array(shard == s)) for s in range(8)])
    _complete(Path(store.root))
    with pytest.raises(UsageError, match="begun when that store gave other samples"):
        recut(store, new, where="text < 'text 3'")


# --- against a fresh run ---


def _collected(place: Path, root: Path, source: Path, **sections) -> Store:
    """A run on these texts, in this process."""
    content = content_of(place, data={"source": str(source)}, test=None)
    for section, values in sections.items():
        content[section] = {**(content.get(section) or {}), **values}
    recipe = parse_recipe(content)
    plan, store = make_plan(recipe), Store(str(root))
    loaded = load_model(recipe.model.id, dtype=recipe.model.dtype)
    for shard in freeze(plan, store):
        collect_shard(loaded, CollectSpec.of(plan.description, plan.answers), store, shard)
    compute_statistics_here(store, tau=2.5, memory_limit=None, on_done=lambda _: None)
    return store


@pytest.fixture
def texts(place, tmp_path, small_shards) -> Path:
    """Some of the place's texts: two shards or so a concept."""
    return _lines(place / "train.jsonl", range(60), tmp_path / "texts.jsonl")


def _lines(source: Path, rows, part: Path) -> Path:
    """A file of these rows of another."""
    lines = source.read_text().splitlines()
    part.write_text("".join(lines[row] + "\n" for row in sorted(rows)))
    return part


def _assert_same_numbers(ours: Store, theirs: Store, *, rtol: float) -> None:
    """Counts exactly, everything else to `rtol`."""
    views = ("histograms", "moments", "overlap", "salience")
    keys = ("layer", "hook_point", "neuron", "concept", "concept_a", "concept_b", "method", "bin")
    tables_a, tables_b = _tables(ours, *views), _tables(theirs, *views)
    for view in views:
        a, b = tables_a[view], tables_b[view]
        by = [(name, "ascending") for name in keys if name in a.column_names]
        a, b = a.sort_by(by), b.sort_by(by)
        assert a.column_names == b.column_names
        assert len(a) == len(b) > 0
        for name in a.column_names:
            if pa.types.is_floating(a.schema.field(name).type):
                x, y = (np.array(t[name].to_pylist(), dtype=float) for t in (a, b))
                np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol, err_msg=f"{view}.{name}")
            elif name != "rank":  # two neurons whose scores differ in the last bits may change places
                assert a[name].to_pylist() == b[name].to_pylist(), (view, name)


@pytest.mark.parametrize(("unit", "dtype"), [("last_token", "float32"), ("mean", "float32"), ("token", "bfloat16")])
def test_recut__equals_a_fresh_run_on_the_same_texts(unit, dtype, place, texts, tmp_path):
    """Text by text, so that the forward pass gives the same bits however texts are batched."""
    settings = {
        "collect": {"unit": unit, "hook_points": ["resid_post"] if unit == "mean" else ["mlp_post", "attn_out"]},
        "model": {"dtype": dtype},
        "compute": {"tokens_per_batch": 1},
    }
    store = _collected(place, tmp_path / "old", texts, **settings)
    new = Store(str(tmp_path / "new"))
    recut(store, new, where="n_tokens < 12 and row % 3 <> 2 or row % 4 = 1")
    assert len({shard.concept for shard in load_shards(new)}) < len(load_shards(new))
    rows = table_of(new.root, "samples", "all")["row"].to_pylist()
    fresh = _collected(place, tmp_path / "fresh", _lines(texts, rows, tmp_path / "part.jsonl"), **settings)
    _assert_same_numbers(new, fresh, rtol=1e-9)
    for name in ("concepts", "layers", "widths", "unit", "raw", "only_correct", "histograms"):
        assert new.describe()[name] == fresh.describe()[name]
    assert new.describe()["dataset"]["n_rows"] == fresh.describe()["dataset"]["n_rows"] == len(rows) < 60
    a, b = (table_of(s.root, "activations", "hook_point, layer, neuron, value")["value"] for s in (new, fresh))
    assert a.equals(b)


def test_recut__equals_a_fresh_run_in_other_batches(place, texts, tmp_path):
    store = _collected(place, tmp_path / "old", texts, compute={"tokens_per_batch": 200})
    new = Store(str(tmp_path / "new"))
    recut(store, new, where="n_tokens < 20")
    rows = table_of(new.root, "samples", "all")["row"].to_pylist()
    fresh = _collected(
        place, tmp_path / "fresh", _lines(texts, rows, tmp_path / "part.jsonl"), compute={"tokens_per_batch": 200}
    )
    _assert_same_numbers(new, fresh, rtol=2e-5)


def test_recut__gives_a_shard_that_keeps_all_its_samples_the_numbers_that_it_had(place, texts, tmp_path):
    store = _collected(place, tmp_path / "old", texts, collect={"unit": "token"}, compute={"tokens_per_batch": 40})
    new = Store(str(tmp_path / "new"))
    recut(store, new, where="sample <> 7")
    split = {7}
    changed = 0
    for shard in load_shards(store):
        samples = store.read_parquet(shard.samples_file, shard.row_group)["sample"].to_pylist()
        pair = [
            {
                f["kind"] + f["path"].partition("layer=")[2][:1]: f
                for f in s.read_json(f"commits/{shard.name}.json")["files"]
            }
            for s in (store, new)
        ]
        if split & set(samples):
            changed += 1
            continue
        for kind, file in pair[0].items():
            a, b = (s.read_parquet(files[kind]["path"]) for s, files in zip((store, new), pair, strict=True))
            assert a.equals(b), file["path"]
            assert file["path"] != pair[1][kind]["path"]
    assert changed == 1


def test_recut__of_correct_answers_equals_a_run_that_counts_only_those(place, texts, tmp_path):
    save_tiny(tmp_path / "model", "bert", head="classifier")
    settings = {
        "model": {"id": str(tmp_path / "model")},
        "data": {"prompt": "{text}", "answers": {name: name for name in ("joy", "anger", "fear")}},
        "collect": {"unit": "token", "predictions": True},
        "compute": {"tokens_per_batch": 1},
    }
    store = _collected(place, tmp_path / "old", texts, **settings)
    new = Store(str(tmp_path / "new"))
    made = recut(store, new, where="correct")
    settings["data"] = settings["data"] | {"only_correct": True}
    fresh = _collected(place, tmp_path / "fresh", texts, **settings)
    n_kept = [receipt["n_kept"] for receipt in fresh.receipts("commits")]
    assert 0 < made.n_samples == sum(n_kept) < 60
    with connect(fresh.file_lists()) as con:
        con.execute("create view counted as select distinct concept from activations")
        concepts = {row[0] for row in con.sql("from counted").fetchall()}
    assert set(new.describe()["concepts"]) == concepts
    assert table_of(new.root, "samples", "all")["correct"].to_pylist() == [True] * made.n_samples
    assert [receipt["n_correct"] for receipt in new.receipts("commits")] == [n for n in n_kept if n]
    ours, theirs = (table_of(s.root, "moments", "layer, neuron, concept") for s in (new, fresh))
    theirs = theirs.filter(pa.array([n > 0 for n in theirs["n"].to_pylist()]))
    assert ours["n"].to_pylist() == theirs["n"].to_pylist()
    np.testing.assert_allclose(ours["mean"].to_numpy(), theirs["mean"].to_numpy(), rtol=1e-9)
    assert _table(new, "histograms").equals(_table(fresh, "histograms"))


def test_recut__of_a_run_on_correct_answers_counts_those(place, texts, tmp_path):
    save_tiny(tmp_path / "model", "bert", head="classifier")
    store = _collected(
        place,
        tmp_path / "old",
        texts,
        model={"id": str(tmp_path / "model")},
        data={"prompt": "{text}", "answers": {n: n for n in ("joy", "anger", "fear")}, "only_correct": True},
    )
    new = Store(str(tmp_path / "new"))
    recut(store, new, where="n_tokens < 20")
    with connect(store.file_lists()) as con:
        counted = con.sql(
            "select concept, count(distinct sample) from activations semi join samples s using (sample) "
            "where sample in (select sample from samples where n_tokens < 20) group by concept order by concept"
        ).fetchall()
    moments = table_of(new.root, "moments", "concept").to_pandas().groupby("concept")["n"].max()
    assert {concept: n for concept, n in moments.items() if n} == dict(counted)
    assert sum(receipt["n_kept"] for receipt in new.receipts("commits")) == sum(n for _, n in counted)
    assert sum(receipt["n_samples"] for receipt in new.receipts("commits")) > sum(n for _, n in counted)


# --- the command ---


def test_recut__is_a_command_that_says_where_the_new_store_lies(store, new):
    done = CliRunner().invoke(app, ["recut", store.root, "-o", new.root, "--where", "n_tokens < 20", "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout.splitlines()[-1])
    assert made.keys() == {"store", "n_samples", "n_shards", "seconds"}
    assert (made["store"], made["n_samples"]) == (new.root, int((_n_tokens(np.arange(320)) < 20).sum()))
    for words in (f"store        {new.root}", "neuronlens sql", "neuronlens verify"):
        assert words in done.stderr
