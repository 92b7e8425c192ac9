"""neuronlens/lens.py: a store opened for questions, and only for them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

import neuronlens
from neuronlens.errors import UsageError
from neuronlens.lens import Lens, view_script
from neuronlens.query import read_query
from neuronlens.store import Store
from tests.synthetic_store import Shard, add_statistics, moments_of, write_store

CONCEPTS = ("it's joy", 'fear "x"', "läs/anger 怒り")
N_LAYERS, WIDTH = 2, 10
RNG_SEED = 11


def _shards() -> list[Shard]:
    rng = np.random.default_rng(RNG_SEED)
    return [
        Shard(
            concept=concept,
            x_LSN=(k + rng.gamma(2, size=(N_LAYERS, 60, WIDTH)) * rng.choice([-1, 1], WIDTH)).astype(np.float32),
        )
        for k, concept in enumerate(CONCEPTS)
        for _ in range(2)
    ]


def _values(concept: str, layer: int, neuron: int) -> np.ndarray:
    return np.concatenate([shard.x_LSN[layer, :, neuron] for shard in _shards() if shard.concept == concept])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    root = tmp_path_factory.mktemp("lens") / "it's a store"
    write_store(root, _shards())
    return add_statistics(root)


@pytest.fixture(scope="module")
def lens(store):
    with neuronlens.open(store.root) as lens:
        yield lens


# --- answers ---


def test_open__gives_relations_that_become_arrow_and_pandas(lens):
    relation = lens.sql("select concept, count(*) as n from moments group by all order by all")
    assert isinstance(relation.to_arrow_table(), pa.Table)
    assert relation.df()["n"].tolist() == [N_LAYERS * WIDTH] * 3
    assert relation.fetchall()[0] == (sorted(CONCEPTS)[0], N_LAYERS * WIDTH)


def test_sql__takes_parameters_and_questions_by_name(lens):
    rows = lens.sql("select mean from moments where layer = 1 and neuron = 3 and concept = $c", c=CONCEPTS[0])
    assert rows.fetchall()[0][0] == pytest.approx(moments_of(_values(CONCEPTS[0], 1, 3))["mean"], rel=1e-12)
    assert lens.sql("separable_pairs").fetchall() == lens.sql(read_query("separable_pairs")).fetchall()


def test_sql__reads_rows_that_were_registered_and_no_variables(lens):
    mine = pa.table({"neuron": [3], "note": ["seen"]})
    with pytest.raises(duckdb.CatalogException, match="mine"):
        lens.sql("from mine")
    lens.register("mine", mine)
    assert lens.sql("select note from moments join mine using (neuron) limit 1").fetchall() == [("seen",)]


def test_open__names_what_is_missing(tmp_path):
    with pytest.raises(UsageError, match=r"no store at .*store\.json is missing"):
        neuronlens.open(str(tmp_path))


# --- what a column means ---


def test_views__have_a_comment_on_every_column(lens):
    assert set(lens.views()) >= {
        *("samples", "shards", "activations", "moments", "histograms", "quantiles", "gaussianity", "overlap"),
        *("overlap_by_layer", "salience", "polysemantic", "ranges", "evaluations", "generations"),
    }
    for view in lens.views():
        columns = lens.sql(f"from {view}").columns
        assert list(lens.columns(view)) == columns
        assert all(lens.columns(view).values()), view


def test_macros__have_a_comment_that_calls_them(lens):
    for name, comment in lens.macros().items():
        [(parameters,)] = lens.sql(
            "select parameters from duckdb_functions() where function_name = $name", name=name
        ).fetchall()
        call = re.search(rf"{name}\((.*)\)", comment)
        assert [part.split(" :=")[0].strip() for part in call[1].split(",")] == parameters


@pytest.mark.parametrize("query", ["describe moments", "DESC moments;", ' describe "moments" '])
def test_sql__describe_says_unit_and_source(lens, query):
    rows = {name: comment for name, _, comment in lens.sql(query).fetchall()}
    assert "ddof = 0" in rows["std"]
    assert "not excess" in rows["kurtosis"]


def test_columns__names_the_views_for_an_unknown_one(lens):
    with pytest.raises(UsageError, match=r"no view 'momments'.*moments"):
        lens.columns("momments")


# --- read only ---


@pytest.mark.parametrize(
    "query",
    [
        "copy (select 1 as x) to '{file}' (use_tmp_file false)",
        "explain analyze copy (select 1 as x) to '{file}' (use_tmp_file false)",
        "prepare p as COPY (select 1 as x) to '{file}' (use_tmp_file false)",
        "copy (pivot (select 1 as a, 2 as b) on a using sum(b)) to '{file}' (use_tmp_file false)",
        "select 'ü'; /* ü */ copy (select 1 as x) to '{file}' (use_tmp_file false)",
        "copy (select 1 as x) to '{store}/new.parquet'",
        "export database '{store}/dump'",
        "attach '{store}/new.db'",
        "attach '{outside}/new.db'",
    ],
)
def test_sql__writes_nothing(store, lens, tmp_path, query):
    path = store.file_lists()["moments"][0]
    before, names = Path(path).read_bytes(), sorted(p.name for p in Path(store.root).rglob("*"))
    text = query.format(file=path.replace("'", "''"), store=store.root.replace("'", "''"), outside=str(tmp_path))
    with pytest.raises(UsageError, match="only read"):
        lens.sql(text).fetchall()
    assert Path(path).read_bytes() == before
    assert sorted(p.name for p in Path(store.root).rglob("*")) == names
    assert list(tmp_path.iterdir()) == []


def test_sql__would_write_over_a_file_without_its_own_check(store, tmp_path):
    """What the check is for: DuckDB itself has no read-only files."""
    shutil.copytree(store.root, tmp_path / "copy")
    copy = Store(str(tmp_path / "copy"))
    path = copy.file_lists()["moments"][0]
    with Lens(copy) as lens:
        lens._con.execute(f"copy (select 1 as x) to '{path}' (use_tmp_file false)")
    assert Path(path).stat().st_size < 1000


@pytest.mark.parametrize(
    "query",
    [
        "from '{outside}/secret.csv'",
        "from read_csv('{outside}/secret.csv')",
        "from read_text('{outside}/secret.csv')",
        "from glob('{outside}/*')",
        "from '{store}/store.json'",
        "from read_parquet('{store}/../{name}/../outside.parquet')",
        "set enable_external_access = true",
        "set allowed_directories = ['{outside}']",
        "reset allowed_paths",
        "install httpfs",
        "load httpfs",
    ],
)
def test_sql__reads_no_other_file_and_keeps_its_settings(store, lens, tmp_path, query):
    (tmp_path / "secret.csv").write_text("a,b\n1,2\n")
    root = store.root.replace("'", "''")
    name = Path(store.root).name.replace("'", "''")
    with pytest.raises(duckdb.Error):
        lens.sql(query.format(outside=tmp_path, store=root, name=name)).fetchall()


def test_sql__a_quoted_name_may_be_a_word_that_writes(lens):
    assert lens.sql("select 1 as \"copy\", 'copy' -- attach").fetchall() == [(1, "copy")]


def test_sql__spills_within_its_limit(store):
    with neuronlens.open(store.root, memory_limit="60MB", threads=1) as lens:
        query = "select count(distinct i || 'xxxxxxxxxxxxxxxxxxxxxxxx') from range(1_500_000) t(i)"
        assert lens.sql(query).fetchall() == [(1_500_000,)]


def test_sql__works_in_a_folder_that_cannot_be_written(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "fixed")
    for path in [tmp_path / "fixed", *(tmp_path / "fixed").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with neuronlens.open(str(tmp_path / "fixed")) as lens:
        assert lens.sql("select count(*) from moments").fetchall() == [(N_LAYERS * WIDTH * 3,)]


# --- the same views elsewhere ---


def test_view_script__gives_the_same_views_to_any_client(store, lens, tmp_path):
    """In a process that knows nothing of this package."""
    (tmp_path / "views.sql").write_text(view_script(store))
    code = (
        "import duckdb, sys; con = duckdb.connect(); con.execute(open('views.sql').read());"
        "print(con.execute(sys.argv[1]).fetchall())"
    )
    for query in (
        "from neuron_card(1, 3)",
        "select count(*), sum(n) from histograms",
        "select committed, count(*) from shards group by all",
        "select comment from duckdb_columns() where table_name = 'gaussianity' order by column_index",
    ):
        out = subprocess.run(
            [sys.executable, "-I", "-c", code, query], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        assert out.strip() == str(lens.sql(query).fetchall())


def test_view_script__reads_what_receipts_name_and_no_more(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "copy")
    moments = Store(str(tmp_path / "copy")).file_lists()["moments"]
    shutil.copy(moments[0], str(tmp_path / "copy" / "moments" / "mlp_post.000.orphan.parquet"))
    con = duckdb.connect()
    con.execute(view_script(Store(str(tmp_path / "copy"))))
    assert con.execute("select count(*) from moments").fetchone() == (N_LAYERS * WIDTH * 3,)


# --- macros ---


@pytest.mark.parametrize("tau", [0.7, 2.5])
def test_ar__is_mean_plus_and_minus_tau_std(lens, tau):
    own = _values(CONCEPTS[1], 1, 4).astype(np.longdouble)
    [row] = lens.sql("from ar(layer := 1, neuron := 4, concept := $c, tau := $tau)", c=CONCEPTS[1], tau=tau).fetchall()
    assert row[:2] == ("mlp_post", 120)
    expected = [own.mean(), own.std(), own.mean() - tau * own.std(), own.mean() + tau * own.std()]
    assert row[2:] == pytest.approx([float(value) for value in expected])


def test_ar__of_infinite_tau_is_everything(lens):
    [row] = lens.sql("from ar(1, 4, $c, tau := 'inf')", c=CONCEPTS[1]).fetchall()
    assert row[-2:] == (-np.inf, np.inf)


def test_capture__counts_values_inside_the_range(lens):
    """Exact up to the two bins that the range cuts."""
    own = _values(CONCEPTS[0], 0, 2).astype(np.float64)
    low, high = own.mean() - own.std(), own.mean() + own.std()
    rows = lens.sql("from capture(0, 2, $c, tau := 1)", c=CONCEPTS[0]).fetchall()
    assert rows[0][1] == CONCEPTS[0]
    assert {row[1] for row in rows} == set(CONCEPTS)
    for _, concept, n, share, share_gaussian in rows:
        x = _values(concept, 0, 2).astype(np.float64)
        assert n == len(x)
        assert share == pytest.approx(np.mean((x >= low) & (x <= high)), abs=0.06)
        fitted = stats.norm(x.mean(), x.std())
        assert share_gaussian == pytest.approx(fitted.cdf(high) - fitted.cdf(low), abs=1e-9)


def test_ovl__is_the_overlap_of_the_store(lens):
    for a, b in ((0, 1), (2, 0)):
        [row] = lens.sql("from ovl(1, 6, $a, $b)", a=CONCEPTS[a], b=CONCEPTS[b]).fetchall()
        [stored] = lens.sql(
            "select ovl, bhattacharyya from overlap where layer = 1 and neuron = 6"
            " and [concept_a, concept_b] = list_sort([$a, $b])",
            a=CONCEPTS[a],
            b=CONCEPTS[b],
        ).fetchall()
        assert row[1:] == pytest.approx(stored, abs=1e-6)


@pytest.mark.parametrize("q", [0.02, 0.5, 0.99])
def test_quantile_of__is_right_within_its_bin(lens, q):
    for hook_point, concept, asked, value in lens.sql("from quantile_of(0, 5, $q)", q=q).fetchall():
        x = np.sort(_values(concept, 0, 5))
        lower, upper = x[int(np.floor(q * len(x))) - 1], x[min(len(x) - 1, int(np.ceil(q * len(x))))]
        slack = max(abs(lower), abs(upper)) / 8
        assert lower - slack <= value <= upper + slack
        assert (hook_point, asked) == ("mlp_post", q)


def test_ks_exact__is_the_distance_to_the_fitted_normal(lens):
    rows = lens.sql("from ks_exact(1)").fetchall()
    assert len(rows) == WIDTH * 3
    for _, neuron, concept, n, ks in rows:
        x = _values(concept, 1, neuron).astype(np.float64)
        assert (n, ks) == (120, pytest.approx(stats.kstest(x, "norm", (x.mean(), x.std())).statistic, abs=1e-9))
    one = lens.sql("from ks_exact(layer := 1, neuron := 4)").fetchall()
    assert one == [row for row in rows if row[1] == 4]


def test_neuron_card__gathers_what_the_views_say(lens):
    relation = lens.sql("from neuron_card(1, 6, tau := 2.0)")
    cards = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    assert [card["concept"] for card in cards] == sorted(CONCEPTS)
    for card in cards:
        expected = moments_of(_values(card["concept"], 1, 6))
        for name in ("n", "mean", "std", "skewness", "kurtosis", "min", "max", "mean_abs"):
            assert card[name] == pytest.approx(expected[name], rel=1e-9), name
        assert (card["upper"] - card["lower"]) == pytest.approx(4 * expected["std"])
        ranks = np.argsort(-np.array([moments_of(_values(card["concept"], 1, j))["mean_abs"] for j in range(WIDTH)]))
        assert ranks[card["rank"] - 1] == 6
        pairs = {
            other: lens.sql("select ovl from ovl(1, 6, $a, $b)", a=card["concept"], b=other).fetchall()[0][0]
            for other in CONCEPTS
            if other != card["concept"]
        }
        assert card["nearest"] == max(pairs, key=pairs.get)
        assert card["nearest_ovl"] == pytest.approx(max(pairs.values()), abs=1e-6)
        assert card["mean_ovl"] == pytest.approx(np.mean(list(pairs.values())), abs=1e-6)


def test_macros__answer_for_one_hook_point_or_all(lens):
    assert (
        lens.sql("from neuron_card(1, 6, hook_point := 'mlp_post')").fetchall()
        == lens.sql("from neuron_card(1, 6)").fetchall()
    )
    assert lens.sql("from neuron_card(1, 6, hook_point := 'resid_post')").fetchall() == []


def test_salient_jaccard__compares_the_sets(lens):
    tops = {
        concept: {
            neuron
            for (neuron,) in lens.sql(
                "select neuron from salience where layer = 0 and method = 'cohens_d' and concept = $c and rank <= 4",
                c=concept,
            ).fetchall()
        }
        for concept in CONCEPTS
    }
    rows = lens.sql("from salient_jaccard(method := 'cohens_d', top_fraction := 0.45) where layer = 0").fetchall()
    assert len(rows) == 3
    for _, _, a, b, n_a, n_b, n_both, jaccard in rows:
        assert a < b
        assert (n_a, n_b, n_both) == (4, 4, len(tops[a] & tops[b]))
        assert jaccard == pytest.approx(len(tops[a] & tops[b]) / len(tops[a] | tops[b]))


def test_polysemantic__counts_the_sets_a_neuron_stands_in(lens):
    expected: dict[tuple[int, int], list[str]] = {}
    for layer in range(N_LAYERS):
        for concept in sorted(CONCEPTS):
            scores = [moments_of(_values(concept, layer, j))["mean_abs"] for j in range(WIDTH)]
            for neuron in np.argsort(-np.array(scores))[:3]:
                expected.setdefault((layer, int(neuron)), []).append(concept)
    rows = lens.sql("select layer, neuron, n_concepts, concepts from polysemantic").fetchall()
    assert {(layer, neuron): concepts for layer, neuron, _, concepts in rows} == expected
    assert all(n == len(concepts) for _, _, n, concepts in rows)


def test_gaussianity__has_jarque_bera_and_bounds_of_the_exact_distance(lens):
    exact = {(c, j): ks for _, j, c, _, ks in lens.sql("from ks_exact(0)").fetchall()}
    rows = lens.sql(
        "select neuron, concept, skewness, excess_kurtosis, jarque_bera, ks, ks_bound, near_gaussian"
        " from gaussianity where layer = 0"
    ).fetchall()
    assert len(rows) == WIDTH * 3
    for neuron, concept, skewness, excess, jarque_bera, ks, ks_bound, near in rows:
        x = _values(concept, 0, neuron).astype(np.float64)
        assert (skewness, excess) == pytest.approx((stats.skew(x), stats.kurtosis(x)))
        assert jarque_bera == pytest.approx(stats.jarque_bera(x).statistic)
        assert ks - 1e-6 <= exact[concept, neuron] <= ks_bound + 1e-6
        assert near == (abs(stats.skew(x)) < 1 and 2 <= stats.kurtosis(x) + 3 <= 5)


def test_overlap_by_layer__says_what_dropped_rows_leave(tmp_path):
    write_store(tmp_path, _shards())
    with Lens(add_statistics(tmp_path, keep="top")) as lens:
        rows = lens.sql("select n_neurons, n_dropped, mean_ovl, min_ovl from overlap_by_layer").fetchall()
    assert sum(row[0] for row in rows) == N_LAYERS * WIDTH  # one pair a neuron
    assert all(n + dropped == WIDTH for n, dropped, *_ in rows)
    assert any(dropped for _, dropped, *_ in rows)
    assert all((min_ovl is None) == (dropped > 0) for _, dropped, _, min_ovl in rows)
