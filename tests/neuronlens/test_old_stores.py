"""Stores that the code of past days made (tests/stores/README.md) open with the code of today.

Every number below was computed with numpy from the store's raw values when it was made, in longdouble, without this
package.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from neuronlens.errors import UsageError
from neuronlens.query import connect
from neuronlens.ranges import RangeTable
from neuronlens.recipe import RangesSection
from neuronlens.store import FORMAT_VERSION, Store
from pipeline.driver import Silent
from pipeline.emit import emit_table
from pipeline.statistics import compute_statistics_here

STORES = Path(__file__).parents[1] / "stores"
FEAR, JOY, ANGER = "fear, %s; --", 'it\'s "joy"', "läs/anger 怒り"
TABLE = "tbl_9f2583ffadb190b3"
N_ROWS = {
    "samples": 36,
    "shards": 6,
    "partials": 2 * 144,
    "activations": 36 * 48,
    "moments": 144,
    "overlap": 144,
    "concept_overlap": 144,
    "salience": 3 * 144,
    "ranges": 36,
    "evaluations": 9,
}
"""48 neurons (2 layers x (16 + 8)) under 3 concepts, each with 12 texts in 2 shards."""

MOMENTS = {
    ("mlp_post", 1, 5, FEAR): (
        *(0.3194992591937383, 0.1892054609260588, 0.6103896337559216, 1.8249552164940255),
        *(0.10200133174657822, 0.6263768672943115, 0.3194992591937383),
    ),
    ("mlp_post", 1, 5, ANGER): (
        *(0.2540736471613248, 0.10546193075055664, 0.11762694114543261, 2.122823415485309),
        *(0.08616892248392105, 0.4482730031013489, 0.2540736471613248),
    ),
    ("resid_post", 0, 2, JOY): (
        *(0.03580076992511749, 0.15821510741956354, -0.5127156782434213, 2.5414151316979896),
        *(-0.27523061633110046, 0.2952304184436798, 0.13453909754753113),
    ),
    ("mlp_post", 0, 3, JOY): (0.17329519987106323, 0.0, None, None, *[0.17329519987106323] * 3),
}
"""mean, std, skewness, kurtosis, min, max, mean_abs. The store summed each batch in float32: right to 1e-6."""

JOY_BINS = {-97: 1, -94: 1, -84: 1, -54: 1, -36: 1, 83: 2, 86: 1, 88: 1, 89: 1, 93: 1, 98: 1}
"""resid_post, layer 0, neuron 2."""
ANGER_RANKS = [1, 3, 4, 0, 5, 7, 6, 2]
"""The neurons of resid_post, layer 0, by their mean |x| under ANGER."""


@pytest.fixture(scope="module")
def store() -> Store:
    return Store(str(STORES / "version-1"))


@pytest.fixture(scope="module")
def con(store):
    with connect(store.file_lists(), fs=store.fs, threads=1) as con:
        yield con


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(STORES / "version-1", tmp_path / "store"))


def neuronlens(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "neuronlens", *args], capture_output=True, text=True, timeout=300)


def test_version_1__has_no_fault_and_says_what_it_is(store):
    description = store.describe()
    assert (description["format_version"], description["concepts"]) == (1, {FEAR: 12, JOY: 12, ANGER: 12})
    assert description["widths"] == {"mlp_post": 16, "resid_post": 8}
    assert store.faults() == []
    assert len(store.committed_files()) == 2 + 6 * (2 + 4) + 4 * 3


def test_version_1__answers_from_every_view(con):
    views = con.sql("select view_name from duckdb_views() where not internal").fetchall()
    found = {
        name: con.sql(f"select count(*) from {name}").fetchall()[0][0]
        for (name,) in views
        if not name.endswith("_files")
    }
    assert {name: found.get(name) for name in N_ROWS} == N_ROWS


@pytest.mark.parametrize(("key", "expected"), MOMENTS.items(), ids=str)
def test_version_1__has_the_moments_of_its_values(con, key, expected):
    rows = con.execute(
        "select n, n_nonfinite, mean, std, skewness, kurtosis, min, max, mean_abs from moments "
        "where hook_point = ? and layer = ? and neuron = ? and concept = ?",
        key,
    ).fetchall()
    assert rows == [(12, 0, *(pytest.approx(value, rel=1e-6) if value is not None else None for value in expected))]


def test_version_1__has_the_histogram_of_its_values(con):
    counts = con.execute(
        "select bin, sum(n)::integer from histograms "
        "where hook_point = 'resid_post' and layer = 0 and neuron = 2 and concept = ? group by bin",
        [JOY],
    ).fetchall()
    assert dict(counts) == JOY_BINS


def test_version_1__has_the_overlap_and_salience_of_its_values(con):
    ovl = con.sql(
        "select concept_a, concept_b, ovl from overlap where hook_point = 'mlp_post' and layer = 1 and neuron = 5 "
        "order by all"
    ).fetchall()
    assert ovl == [(FEAR, JOY, 0.25), (FEAR, ANGER, pytest.approx(1 / 3)), (JOY, ANGER, 0.25)]
    ranked = con.execute(
        "select neuron from salience where hook_point = 'resid_post' and layer = 0 and concept = ? "
        "and method = 'mean_abs' order by rank",
        [ANGER],
    ).fetchall()
    assert [neuron for (neuron,) in ranked] == ANGER_RANKS
    [(effect,)] = con.execute(
        "select score from salience where hook_point = 'mlp_post' and layer = 1 and neuron = 5 and concept = ? "
        "and method = 'cohens_d'",
        [FEAR],
    ).fetchall()
    assert effect == pytest.approx(0.30224690124458864)


def test_version_1__has_its_texts_and_what_its_table_erased(con):
    [text] = con.sql("select shard, concept, n_tokens, text, token_ids[-1] from samples where sample = 17").fetchall()
    assert text == (1, FEAR, 23, "slammed children i that laughed storm was", 2)
    rows = con.execute(
        "select condition, target_accuracy, tested, changed, perplexity from evaluations where concept = ? "
        "order by condition",
        [JOY],
    ).fetchall()
    assert rows == [
        ("base", 1 / 3, 0, 0, pytest.approx(652.7401680241837)),
        ("neuron", 1.0, 1104, 1104, pytest.approx(3081.4865109929237)),
        ("range", 2 / 3, 1104, 725, pytest.approx(3732.301233104085)),
    ]


def test_version_1__has_no_rows_of_what_did_not_exist_then(con):
    assert con.sql("select count(*) from distributions").fetchall() == [(0,)]
    assert con.sql("select count(*), count(ks), count(ks_bound) from gaussianity").fetchall() == [(144, 0, 0)]
    assert con.sql("select count(predicted), count(correct), count(confidence) from samples").fetchall() == [(0, 0, 0)]


def test_version_1__loads_its_range_table_by_its_id():
    table = RangeTable.load(STORES / "version-1" / "ranges" / TABLE)
    assert (table.id, table.rows.num_rows, table.concepts) == (TABLE, 36, (FEAR, JOY, ANGER))
    [row] = table.select(ANGER, hook_points=["resid_post"], layers=[0], top_fraction=0.2).to_pylist()
    assert (row["neuron"], row["rank"]) == (ANGER_RANKS[0], 1)
    assert (row["lower"], row["upper"]) == (row["mean"] - 2.5 * row["std"], row["mean"] + 2.5 * row["std"])


def test_version_1__gives_the_same_table_for_the_same_question(copy):
    assert emit_table(Store(str(copy)), RangesSection(), Silent()).id == TABLE


def test_version_1__says_how_to_get_the_salience_that_it_does_not_hold(copy):
    with pytest.raises(
        UsageError, match=r"by mean_abs, cohens_d, selectivity; 'f_ratio' is not.*python -m jobs\.statistics"
    ):
        emit_table(Store(str(copy)), RangesSection(salience="f_ratio"), Silent())


def test_ranges__say_what_a_method_needs_that_statistics_of_today_do_not_hold(copy):
    for path in (copy / "statistics").iterdir():
        receipt = json.loads(path.read_text())
        path.write_text(json.dumps(receipt | {"salience": ["mean_abs", "f_ratio"]}))
    with pytest.raises(UsageError, match=r"by mean_abs, f_ratio; 'selectivity' is not.*needs.*two concepts or more"):
        emit_table(Store(str(copy)), RangesSection(salience="selectivity"), Silent())


def test_version_1__gets_what_is_new_by_making_its_statistics_again(copy):
    store = Store(str(copy))
    receipts = []
    compute_statistics_here(store, tau=2.5, memory_limit=None, on_done=receipts.append)
    assert len(receipts) == 4
    assert store.faults() == []
    assert emit_table(store, RangesSection(salience="f_ratio"), Silent()).rows.num_rows == 36
    assert emit_table(store, RangesSection(), Silent()).id == TABLE
    with connect(store.file_lists(), fs=store.fs, threads=1) as con:
        assert con.sql("select count(*) from quantiles").fetchall() == [(144,)]


def test_version_1__answers_the_commands(copy):
    before = _listing(copy)
    asked = neuronlens("sql", str(copy), "select count(*) as n from moments where std = 0", "--format", "json")
    assert json.loads(asked.stdout) == [{"n": 3}]
    assert json.loads(neuronlens("verify", str(copy), "--json").stdout) == {"ok": True, "faults": []}
    assert _listing(copy) == before
    refused = neuronlens("ranges", str(copy), "--salience", "f_ratio")
    assert refused.returncode == 2
    assert f"python -m jobs.statistics {copy}" in " ".join(refused.stderr.split())
    made = neuronlens("ranges", str(copy), "--tau", "1", "--top-fraction", "0.5", "--salience", "cohens_d", "--json")
    table = json.loads(made.stdout)
    assert table["rows"] == 2 * 3 * (8 + 4)
    assert len(pq.read_table(copy / "ranges" / table["range_table"] / "ranges.parquet")) == table["rows"]


def test_version_1__is_read_where_nothing_may_be_written(copy):
    for path in [copy, *copy.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    before = _listing(copy)
    try:
        store = Store(str(copy))
        with connect(store.file_lists(), fs=store.fs, threads=1) as con:
            assert con.sql("select count(*) from activations").fetchall() == [(36 * 48,)]
        assert store.faults() == []
        assert _listing(copy) == before  # who runs the tests as root may write all the same
    finally:
        for path in [copy, *copy.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)


def test_a_newer_store__is_refused_with_the_mend(copy):
    description = json.loads((copy / "store.json").read_text())
    (copy / "store.json").write_text(json.dumps(description | {"format_version": FORMAT_VERSION + 1}))
    done = neuronlens("sql", str(copy), "from moments")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"store format {FORMAT_VERSION + 1}, this version reads formats up to {FORMAT_VERSION}." in said
    assert "Update neuronlens: version 0.1.0 made the store" in said
    assert "Traceback" not in said


def test_a_store_without_a_format_version__is_refused_in_a_sentence(copy):
    description = json.loads((copy / "store.json").read_text())
    del description["format_version"]
    (copy / "store.json").write_text(json.dumps(description))
    done = neuronlens("verify", str(copy))
    assert done.returncode == 2
    assert "gives None as its format_version, expected a whole number" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def _listing(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and the time of its last change: a folder's changes where a name is added."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [root, *root.rglob("*")]}
