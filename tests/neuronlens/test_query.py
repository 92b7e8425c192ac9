"""neuronlens/query.py: views over the files that receipts name, and the queries as files."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from neuronlens import query
from neuronlens.errors import UsageError
from neuronlens.query import (
    KINDS,
    attach,
    attach_rows,
    connect,
    questions,
    read_query,
    run_file,
    run_to_parquet,
    sql_folder,
)
from tests.synthetic_store import Shard, write_store

VIEWS = (
    *("samples", "shards", "partials", "shard_histograms", "histograms", "activations", "moments", "distributions"),
    *("quantiles", "gaussianity", "overlap", "concept_overlap", "concept_information", "overlap_by_layer", "salience"),
    *("salient_overlap", "polysemantic", "ranges", "evaluations", "generations"),
)
LAYER_1 = {"hook_point": "mlp_post", "layer": 1}
ALL_NEURONS = {"first_neuron": 0, "last_neuron": 5}
PARAMS = {
    "merge": LAYER_1,
    "moments_from_raw": LAYER_1,
    "pooled_moments": LAYER_1,
    "shuffled_moments": LAYER_1 | {"seed": 0},
    "merged_histograms": LAYER_1 | {"concept": "joy"},
    "overlap": LAYER_1 | ALL_NEURONS | {"tau": 2.5},
    "layer_moments": LAYER_1,
    "kept_pairs": LAYER_1 | {"top": 2, "threshold": None},
    "salience": LAYER_1,
    "ranges": {"tau": 2.5, "top_fraction": 0.3, "salience": "mean_abs"},
    "coverage": {},
    "gaussianity_by_layer": {},
    "most_polysemantic": {"salience": "cohens_d", "top_fraction": 0.5},
    "separable_pairs": {},
    "top_samples": LAYER_1 | {"neuron": 2},
    "neuron_card": LAYER_1 | {"neuron": 2, "tau": 2.5},
    "neuron_cards": LAYER_1 | ALL_NEURONS,
    "neuron_ranges": LAYER_1 | {"neuron": 2, "table_id": "tbl_0123456789abcdef"},
    "neuron_pairs": LAYER_1 | ALL_NEURONS,
    "neuron_histogram": LAYER_1 | {"neuron": 2},
    "probe_rows": LAYER_1,
    "probe_values": LAYER_1,
    "report_answers": {},
    "report_concepts": {"n_concepts": 9},
    "report_evaluations": {},
    "report_generations": {},
    "report_gaussianity": {},
    "report_gaussianity_by_concept": {},
    "report_overlap": {"concepts": ["anger", "joy"]},
    "report_overlap_by_layer": {},
    "report_polysemantic": {},
    "report_polysemantic_neurons": {"n_neurons": 2},
    "report_salient_overlap": {"concepts": ["anger", "joy"]},
    "report_separable_neurons": {"n_neurons": 2},
    "report_sweep_concepts": {"evaluation_id": "sweep.0123456789ab", "setting": 0},
    "report_sweeps": {},
}
NOT_HERE = (
    *("report_answers", "report_evaluations", "report_generations", "report_sweep_concepts", "report_sweeps"),
    "neuron_ranges",
)
"""Their answer is empty: the store here has neither answers of the model, evaluations nor range tables."""


def _shards() -> list[Shard]:
    rng = np.random.default_rng(0)
    concepts = ("joy", "fear", "joy", "anger")
    return [Shard(concept=c, x_LSN=rng.normal(k, 1, (3, 40, 6)).astype(np.float32)) for k, c in enumerate(concepts)]


def _add_statistics(files: dict[str, list[str]], root: Path) -> dict[str, list[str]]:
    """The files of the SQL stages, one a layer and kind, made as the statistics stage makes them."""
    files = {kind: list(paths) for kind, paths in files.items()} | {"moments": [], "overlap": [], "salience": []}
    for layer in range(3):
        with connect({kind: files[kind] for kind in ("partials", "histograms")}, threads=1) as con:
            for kind, name, extra in (
                ("moments", "merge", {}),
                ("overlap", "overlap", {"tau": 2.5} | ALL_NEURONS),
                ("salience",) * 2 + ({},),
            ):
                path = str(root / f"{kind}.{layer}.parquet")
                run_to_parquet(con, name, path, hook_point="mlp_post", layer=layer, **extra)
                attach(con, kind, [path])
                files[kind].append(path)
    return files


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    return _add_statistics(write_store(root, _shards()), root)


@pytest.fixture
def con(store):
    with connect(store, threads=1) as con:
        yield con


# --- views ---


def test_connect__without_files_gives_every_view_empty_and_typed(store):
    with connect(threads=1) as empty, connect(store, threads=1) as full:
        for view in VIEWS:
            columns = empty.sql(f"select column_name, column_type from (describe {view})").fetchall()
            assert columns == full.sql(f"select column_name, column_type from (describe {view})").fetchall(), view
            assert empty.sql(f"from {view}").fetchall() == []


def test_connect__takes_an_empty_list_as_no_files(store):
    with connect(store | {"raw": [], "histograms": []}, threads=1) as con:
        assert con.execute("select count(*) from activations").fetchone() == (0,)
        assert con.execute("select count(*) from histograms").fetchone() == (0,)
        assert con.execute("select count(*) from partials").fetchone() == (4 * 3 * 6,)


@pytest.mark.parametrize("missing", ["raw", "histograms", "overlap", "salience", "moments", "commits", "samples"])
def test_queries__run_where_a_kind_of_file_is_missing(store, missing):
    with connect(store | {missing: []}, threads=1) as con:
        for name, params in PARAMS.items():
            run_file(con, name, **params)


def test_connect__names_the_kinds_for_an_unknown_one():
    with pytest.raises(UsageError, match=r"'momments'.*plan, samples, commits, partials"):
        connect({"momments": ["x.parquet"]})


def test_connect__reads_nothing_but_the_files_given(tmp_path):
    files = write_store(tmp_path, _shards())
    with connect(files | {"partials": files["partials"][:1]}, threads=1) as con:
        assert con.sql("select distinct concept, count(*) over () from partials").fetchall() == [("joy", 18)]


def test_shards__say_which_of_the_plan_are_committed(store):
    with connect(store | {"commits": store["commits"][1:3]}, threads=1) as con:
        rows = con.sql(
            "select shard, concept, n_samples, committed, attempt, seconds from shards order by shard"
        ).fetchall()
        coverage = run_file(con, "coverage").to_pylist()
        [(finished,)] = con.sql("select distinct finished_at::varchar from shards where committed").fetchall()
    assert rows == [
        (0, "joy", 40, False, None, None),
        (1, "fear", 40, True, "0123456789ab", 1.5),
        (2, "joy", 40, True, "0123456789ab", 1.5),
        (3, "anger", 40, False, None, None),
    ]
    assert finished == "2026-03-04 05:06:07"
    counts = {
        row["concept"]: (row["n_shards"], row["n_committed"], row["n_samples_committed"], row["missing"])
        for row in coverage
    }
    assert counts == {"anger": (1, 0, 0, [3]), "fear": (1, 1, 40, []), "joy": (2, 1, 40, [0])}


def test_shards__read_a_shard_named_in_words(store, tmp_path):
    path = tmp_path / "shard-00003.json"
    path.write_text('{"shard": "shard-00003", "attempt": "a", "files": [], "unknown": {"x": 1}}')
    with connect(store | {"commits": [str(path)]}, threads=1) as con:
        assert con.sql("select shard from shards where committed").fetchall() == [(3,)]


@pytest.mark.parametrize(("view", "n_files"), [("activations", 4), ("histograms", 4), ("partials", 4), ("moments", 3)])
def test_views__pass_filters_on_to_the_files(con, view, n_files):
    """Of 12 raw files only those of the layer are opened; of the others only the row groups of the layer are read."""
    plan = con.sql(f"explain analyze select * from {view} where hook_point = 'mlp_post' and layer = 2 and neuron = 3")
    text = plan.fetchall()[0][1]
    assert int(re.search(r"Total Files Read: (\d+)", text)[1]) == n_files
    n_read, n_groups = map(int, re.search(r"Row Groups Scanned: (\d+) / (\d+)", text).groups())
    assert (n_read, n_groups) == {"activations": (4, 4), "moments": (1, 3)}.get(view, (4, 12))


def test_activations__are_the_values(con):
    rows = con.sql(
        "select value from activations where layer = 2 and neuron = 4 and concept = 'fear' order by sample"
    ).fetchall()
    np.testing.assert_array_equal(np.array(rows)[:, 0].astype(np.float32), _shards()[1].x_LSN[2, :, 4])


def test_connect__serves_cursors_in_threads(con):
    def count(layer: int) -> int:
        return (
            con.cursor()
            .execute("select count(*) from activations where layer = $layer", {"layer": layer})
            .fetchone()[0]
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(count, [0, 1, 2, 3])) == [960, 960, 960, 0]


def test_connect__reads_a_store_through_fsspec(store, tmp_path):
    fs = fsspec.filesystem("memory")
    files: dict[str, list[str]] = {}
    for kind, paths in store.items():
        files[kind] = []
        for path in paths:
            part = path.partition("raw/")[2] if kind == "raw" else Path(path).name
            remote = f"/{tmp_path.name}/{kind}/{part}"
            fs.pipe(remote, Path(path).read_bytes())
            files[kind].append(f"memory:/{remote}" if kind == "moments" else remote)
    with connect(files, fs=fs, threads=2) as con, connect(store, threads=1) as local:
        for name, params in PARAMS.items():
            here, there = run_file(local, name, **params), run_file(con, name, **params)
            assert here.num_rows == there.num_rows, name
        n = run_to_parquet(con, "merge", str(tmp_path / "out.parquet"), **LAYER_1)
    assert pq.read_table(tmp_path / "out.parquet").num_rows == n == 18


def test_connect__installs_no_extension(con):
    con.sql("from moments").fetchall()
    with pytest.raises(query.Error, match="httpfs"):
        con.sql("from 's3://bucket/moments.parquet'")


def test_connect__prints_no_progress_bar():
    """DuckDB takes `python -c` for a person at a prompt."""
    code = (
        "from neuronlens.query import connect\n"
        "print(connect().execute(\"select current_setting('enable_progress_bar')\").fetchone())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "(False,)"


def test_connect__keeps_to_its_memory_and_spills_where_told(tmp_path):
    spill = tmp_path / "spill" / "here"
    con = connect(memory_limit="100MB", threads=1, temp_directory=str(spill))
    con.execute("create table big as select range as i, hash(range) as h, hash(range + 1) as g from range(8_000_000)")
    assert sum(f.stat().st_size for f in spill.rglob("*") if f.is_file()) > 10_000_000
    assert con.execute("select current_setting('memory_limit')").fetchone() == ("95.3 MiB",)
    con.close()
    assert list(spill.rglob("*")) == []


def test_connect__two_connections_do_not_share_spilled_files(tmp_path):
    with connect(temp_directory=str(tmp_path)) as one, connect(temp_directory=str(tmp_path)) as other:
        folders = {c.execute("select current_setting('temp_directory')").fetchone() for c in (one, other)}
    assert len(folders) == 2


# --- queries ---


def test_run_file__names_missing_and_unknown_parameters(con):
    with pytest.raises(UsageError, match=r"'salience' takes the parameters hook_point, layer; given: layer"):
        run_file(con, "salience", layer=1)
    with pytest.raises(UsageError, match=r"'gaussianity_by_layer' takes the parameters none; given: layer"):
        run_file(con, "gaussianity_by_layer", layer=1)


def test_run_file__names_the_queries_for_an_unknown_one(con):
    with pytest.raises(UsageError, match=r"no query named 'moment'.*gaussianity.*merge"):
        run_file(con, "moment")


@pytest.mark.parametrize("name", ["macros", "schema", "views", "analysis", "functions", "comments"])
def test_run_file__refuses_the_files_that_set_a_session_up(con, name):
    with pytest.raises(UsageError, match=r"holds \d+ statements"):
        run_file(con, name)


def test_run_to_parquet__writes_what_run_file_returns_in_its_order(con, tmp_path):
    path = str(tmp_path / "it's.parquet")
    expected = run_file(con, "salience", **LAYER_1)
    assert run_to_parquet(con, "salience", path, **LAYER_1) == expected.num_rows > 0
    assert pq.read_table(path).to_pydict() == expected.to_pydict()


def test_run_to_parquet__compresses_and_splits_floats(tmp_path):
    """A dictionary is for repeated values; 3,000 different ones are split into streams of bytes."""
    x_LSN = np.random.default_rng(1).normal(size=(1, 3, 3000)).astype(np.float32)
    files = write_store(tmp_path, [Shard(concept="joy", x_LSN=x_LSN)], raw=False, histograms=False)
    path = str(tmp_path / "moments.parquet")
    with connect(files, threads=1) as con:
        run_to_parquet(con, "merge", path, hook_point="mlp_post", layer=0)
    row_group = pq.ParquetFile(path).metadata.row_group(0)
    columns = {row_group.column(i).path_in_schema: row_group.column(i) for i in range(row_group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    for name in ("mean", "std", "min", "mean_abs"):
        assert "BYTE_STREAM_SPLIT" in columns[name].encodings, name
    assert "RLE_DICTIONARY" in columns["concept"].encodings


@pytest.mark.parametrize("path", sorted(sql_folder().glob("*.sql")), ids=lambda path: path.stem)
def test_queries__open_with_the_question_and_name_what_they_read(path):
    lines = path.read_text().splitlines()
    assert re.match(r"-- [A-Z].*\?", lines[0])
    assert any(line.startswith("-- in: ") for line in lines[:4])
    assert any("out: " in line for line in lines[:4])
    assert all(ord(character) < 128 for line in lines for character in line)


def test_questions__are_those_that_run_file_runs(con):
    assert set(questions()) == set(PARAMS)
    assert questions()["merge"] == "What are the moments of every neuron under every concept, over all shards?"
    for name, params in PARAMS.items():
        assert (run_file(con, name, **params).num_rows > 0) == (name not in NOT_HERE), name


def test_queries__run_in_a_plain_duckdb_session(store, con):
    """As in the shell: `.read` the files, `set variable` the parameters."""
    plain = duckdb.connect()
    plain.execute(read_query("macros"))
    plain.execute(read_query("schema"))
    for kind in KINDS:
        paths = store.get(kind, [])
        if paths and kind != "commits":
            hive = ", hive_partitioning = true" if kind == "raw" else ""
            hive += ", filename = true" if kind in ("partials", "shard_histograms", "ranges") else ""
            plain.execute(f"create or replace view {kind}_files as from read_parquet({paths}{hive})")
    plain.execute(f"create or replace view commits_files as from read_json({store['commits']})")
    for name in ("views", "analysis", "functions", "comments"):
        plain.execute(read_query(name))
    for name, params in PARAMS.items():
        for parameter, value in params.items():
            plain.execute(f"set variable {parameter} = {'null' if value is None else repr(value)}")
        rows = plain.execute(read_query(name)).fetchall()
        assert len(rows) == run_file(con, name, **params).num_rows, name


def test_sql_folder__is_found_in_an_installed_package(tmp_path):
    """The wheel carries sql/ inside the package; a checkout has it beside the package."""
    package = tmp_path / "site" / "neuronlens"
    source = Path(query.__file__).parent
    package.mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "query.py", "remote.py", "retry.py"):
        shutil.copy(source / name, package / name)
    shutil.copytree(sql_folder(), package / "sql")
    code = "from neuronlens.query import sql_folder, questions; print(sql_folder(), len(questions()))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": "."},
    ).stdout
    assert out.split() == [str(package / "sql"), str(len(PARAMS))]


# --- the analyst's questions ---


def test_gaussianity_by_layer__summarises_each_layer(con):
    rows = run_file(con, "gaussianity_by_layer").to_pylist()
    moments = con.sql("select layer, skewness, kurtosis from moments").fetchall()
    assert [row["layer"] for row in rows] == [0, 1, 2]
    for row in rows:
        skewness, kurtosis = np.array([(s, k) for layer, s, k in moments if layer == row["layer"]]).T
        assert row["n_bumps"] == len(skewness) == 18
        assert row["median_skewness"] == pytest.approx(np.median(skewness))
        assert row["median_abs_skewness"] == pytest.approx(np.median(abs(skewness)))
        assert row["median_kurtosis"] == pytest.approx(np.median(kurtosis))
        assert row["p95_kurtosis"] == pytest.approx(np.quantile(kurtosis, 0.95))
        near = (abs(skewness) < 1) & (kurtosis >= 2) & (kurtosis <= 5)
        assert row["share_near_gaussian"] == pytest.approx(near.mean())


def test_separable_pairs__puts_the_best_separated_pair_first(con):
    rows = run_file(con, "separable_pairs").to_pylist()
    overlap = con.sql("select layer, concept_a, concept_b, neuron, ovl from overlap").fetchall()
    assert len(rows) == 3 * 3
    assert [row["min_ovl"] for row in rows] == sorted(row["min_ovl"] for row in rows)
    for row in rows:
        key = (row["layer"], row["concept_a"], row["concept_b"])
        mine = {neuron: ovl for *pair, neuron, ovl in overlap if tuple(pair) == key}
        assert (row["min_ovl"], row["best_neuron"]) == min((ovl, neuron) for neuron, ovl in mine.items())
        assert row["median_ovl"] == pytest.approx(np.median(list(mine.values())))
        assert row["share_below_half"] == pytest.approx(np.mean([ovl < 0.5 for ovl in mine.values()]))


def test_most_polysemantic__counts_the_concepts_a_neuron_is_salient_for(con):
    rows = run_file(con, "most_polysemantic", salience="mean_abs", top_fraction=0.5).to_pylist()
    salient: dict[tuple[int, int], list[str]] = {}
    for layer, neuron, concept in con.sql(
        "select layer, neuron, concept from salience where method = 'mean_abs' and rank <= 3 order by concept"
    ).fetchall():
        salient.setdefault((layer, neuron), []).append(concept)
    assert {(row["layer"], row["neuron"]): row["concepts"] for row in rows} == salient
    assert [row["n_concepts"] for row in rows] == sorted((len(c) for c in salient.values()), reverse=True)
    overlap = {
        (r[0], r[1], r[2], r[3]): r[4]
        for r in con.sql("select layer, neuron, concept_a, concept_b, ovl from overlap").fetchall()
    }
    for row in rows:
        names = row["concepts"]
        pairs = [overlap[row["layer"], row["neuron"], a, b] for i, a in enumerate(names) for b in names[i + 1 :]]
        assert row["mean_ovl"] == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_separable_pairs__say_nothing_of_a_pair_with_dropped_rows(con):
    complete = {row["best_neuron"] for row in run_file(con, "separable_pairs").to_pylist()}
    kept = run_file(con, "kept_pairs", **LAYER_1, top=2, threshold=None)
    attach_rows(con, "overlap_files", kept)
    rows = run_file(con, "separable_pairs").to_pylist()
    assert None not in complete
    assert sum(row["n_neurons"] for row in rows) == kept.num_rows == 6 * 2
    for row in rows:
        assert row["n_neurons"] + row["n_dropped"] == 6
        known = row["n_dropped"] == 0
        assert {row[name] is not None for name in ("min_ovl", "best_neuron", "median_ovl", "share_below_half")} == {
            known
        }
    assert any(row["n_dropped"] for row in rows)


def test_most_polysemantic__has_no_mean_overlap_where_pairs_were_dropped(con):
    full = run_file(con, "most_polysemantic", salience="mean_abs", top_fraction=1.0).to_pylist()
    attach_rows(con, "overlap_files", run_file(con, "kept_pairs", **LAYER_1, top=2, threshold=None))
    rows = run_file(con, "most_polysemantic", salience="mean_abs", top_fraction=1.0).to_pylist()
    assert {(row["n_pairs"], row["mean_ovl"] is None) for row in full} == {(3, False)}
    assert {(row["n_pairs"], row["mean_ovl"]) for row in rows} == {(2, None), (0, None)}


def test_run_to_parquet__keeps_metadata_in_the_file(con, tmp_path):
    path = str(tmp_path / "salience.parquet")
    coverage = """{"n_shards": 1, "it's": "so"}"""
    run_to_parquet(con, "salience", path, metadata={"coverage": coverage}, **LAYER_1)
    assert pq.read_metadata(path).metadata[b"coverage"] == coverage.encode()


def test_top_samples__are_the_extremes_of_one_neuron(con):
    rows = run_file(con, "top_samples", hook_point="mlp_post", layer=1, neuron=2).to_pylist()
    values = np.concatenate([shard.x_LSN[1, :, 2] for shard in _shards()])
    order = np.argsort(-values)
    assert [row["sample"] for row in rows] == [*order[:10], *order[-10:]]
    assert [row["value"] for row in rows] == pytest.approx([*values[order[:10]], *values[order[-10:]]])
    assert rows[0]["text"] == f"text {order[0]}"
    assert rows[0]["concept"] == ("joy", "fear", "joy", "anger")[order[0] // 40]
