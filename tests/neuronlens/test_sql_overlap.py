"""sql/overlap.sql, its compiled twin in neuronlens/overlap.py and sql/macros.sql against scipy's integrals and dense
histograms in numpy."""

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from neuronlens.bumps import Bumps
from neuronlens.overlap import concept_overlap_of, kept_of, pairs_of
from neuronlens.query import attach_rows, connect, run_file
from tests.synthetic_store import Shard, bin_span, bins_of, moments_of, write, write_moments, write_store

TAU = 2.5
AT = {"hook_point": "mlp_post", "layer": 0, "tau": TAU, "first_neuron": 0, "last_neuron": 2**31 - 1}
HISTOGRAM_SCORES = ("ovl", "b_in_a", "a_in_b")
SCORES = ("ovl", "ovl_gaussian", "bhattacharyya", "range_jaccard", "b_in_a", "a_in_b")


Overlap = Callable[..., pa.Table]
"""Takes the files of a store and what differs from AT; gives the rows of `overlap`."""


def overlap_by_sql(files: dict[str, list[str]], **params: float) -> pa.Table:
    with connect(files, threads=1) as con:
        return run_file(con, "overlap", **(AT | params))


def overlap_by_kernel(files: dict[str, list[str]], n_threads: int = 1, **params: float) -> pa.Table:
    at = AT | params
    site = {"hook_point": at["hook_point"], "layer": at["layer"]}
    wanted = "hook_point = $hook_point and layer = $layer"
    with connect(files, threads=1) as con:
        moments = con.sql(f"from moments where {wanted} order by all desc", params=site).to_arrow_table()
        concepts = con.execute(f"select distinct concept from histograms where {wanted}", site).fetchall()
        merged = [run_file(con, "merged_histograms", concept=concept, **site) for (concept,) in concepts]
    neuron = moments["neuron"].to_numpy()
    bumps = Bumps.of(moments.filter((neuron >= at["first_neuron"]) & (neuron <= at["last_neuron"])), **site)
    if merged:
        bumps = bumps.with_counts(pa.concat_tables(merged), n_threads=n_threads)
    return pairs_of(bumps, tau=at["tau"], n_threads=n_threads)


@pytest.fixture(params=[overlap_by_sql, overlap_by_kernel], ids=["sql", "kernel"])
def overlap(request) -> Overlap:
    return request.param


def _bumps(*bumps: tuple[float, float]) -> list[dict]:
    """Moments of one neuron under concepts a, b, ... given as (mean, std)."""
    return [
        {"neuron": 0, "concept": concept, "mean": mean, "std": std}
        for concept, (mean, std) in zip("abcdefgh", bumps, strict=False)
    ]


def _overlap_of_moments(overlap: Overlap, rows: list[dict], path: Path, **params: float) -> list[dict]:
    return overlap({"moments": [write_moments(path / "moments.parquet", rows)]}, **params).to_pylist()


def _overlap_of_values(
    overlap: Overlap, values: dict[str, list[np.ndarray]], path: Path, **params: float
) -> list[dict]:
    return overlap(_files_of_values(values, path), **params).to_pylist()


def _files_of_values(values: dict[str, list[np.ndarray]], path: Path) -> dict[str, list[str]]:
    """Each array is a shard's values, [samples, neurons]; moments come from longdouble, not from merge.sql."""
    arrays = {c: [np.asarray(x, np.float32).reshape(len(x), -1) for x in parts] for c, parts in values.items()}
    shards = [Shard(concept=c, x_LSN=x[None]) for c, parts in arrays.items() for x in parts]
    files = write_store(path, shards, raw=False)
    rows = [
        {"neuron": neuron, "concept": c} | moments_of(x_S)
        for c, parts in arrays.items()
        for neuron, x_S in enumerate(np.concatenate(parts).T)
    ]
    return files | {"moments": [write_moments(path / "moments.parquet", rows)]}


def _share_inside(x_S: np.ndarray, lower: float, upper: float) -> float:
    """The share of a histogram inside [lower, upper], bin by bin, straight-line within a bin."""
    counts, inside = bins_of(x_S), 0.0
    for b, n in counts.items():
        low, high = max(bin_span(b)[0], float(x_S.min())), min(bin_span(b)[1], float(x_S.max()))
        if high > low:
            inside += n * max(0.0, min(high, upper) - max(low, lower)) / (high - low)
        else:
            inside += n * (lower <= low <= upper)
    return inside / sum(counts.values())


@pytest.mark.parametrize("name", ["normal_cdf", "erf"])
def test_macros__equal_scipy(name):
    x = np.concatenate([np.linspace(-40, 40, 20_001), [0.0, 7.0710678, 7.0710679, -np.inf, np.inf]])
    with connect(threads=1) as con:
        got = con.execute(
            f"select list({name}(x) order by i) from (select unnest($x) x, unnest(range(len($x))) i)", {"x": x.tolist()}
        )
        got = np.array(got.fetchone()[0])
    expected = {"normal_cdf": special.ndtr, "erf": special.erf}[name](x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-15)


def test_macros__bin_edges_are_those_of_the_format():
    with connect(threads=1) as con:
        rows = con.sql("select b, bin_lower(b), bin_upper(b) from range(-208, 209) t(b)").fetchall()
    assert {b: (low, high) for b, low, high in rows} == {b: bin_span(b) for b in range(-208, 209)}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((0, 1), (0, 1)),
        ((0, 1), (1, 1)),
        ((0, 1), (1, 2)),
        ((1, 2), (0, 1)),
        ((-3, 0.5), (2, 4)),
        ((5, 1), (5, 3)),
        ((100, 1), (100.5, 1.0000001)),
        ((0, 1), (0, 1 + 1e-9)),
        ((0, 1), (1e-9, 1)),
        ((1e4, 1), (1e4 + 2, 1.5)),
        ((0, 0.01), (0.3, 5)),
        ((0, 1), (8, 1)),
        ((-1e-20, 1e-20), (1e-20, 3e-20)),
    ],
)
def test_overlap__gaussian_equals_the_integral_of_the_smaller_density(overlap, a, b, tmp_path):
    [row] = _overlap_of_moments(overlap, _bumps(a, b), tmp_path)
    unit = min(a[1], b[1])
    one, other = stats.norm(0, a[1] / unit), stats.norm((b[0] - a[0]) / unit, b[1] / unit)
    edges = sorted({m + k * s for m, s in ((0, one.std()), (other.mean(), other.std())) for k in range(-12, 13)})
    expected = sum(
        integrate.quad(lambda x: min(one.pdf(x), other.pdf(x)), low, high, epsabs=1e-12)[0]
        for low, high in pairwise(edges)
    )
    assert row["ovl_gaussian"] == pytest.approx(expected, abs=2e-7)
    product = sum(
        integrate.quad(lambda x: np.sqrt(one.pdf(x) * other.pdf(x)), low, high, epsabs=1e-12)[0]
        for low, high in pairwise(edges)
    )
    assert row["bhattacharyya"] == pytest.approx(product, abs=2e-7)


def test_overlap__bhattacharyya_bounds_the_gaussian_overlap(overlap, tmp_path):
    rng = np.random.default_rng(0)
    n = 3000
    rows = [
        {
            "neuron": i,
            "concept": concept,
            "mean": rng.normal() * 10 ** rng.uniform(-3, 3),
            "std": 10 ** rng.uniform(-3, 3),
        }
        for i in range(n)
        for concept in "ab"
    ]
    got = _overlap_of_moments(overlap, rows, tmp_path)
    ovl, bc = (np.array([row[name] for row in got], dtype=float) for name in ("ovl_gaussian", "bhattacharyya"))
    assert len(got) == n
    assert (1 - np.sqrt(1 - bc**2) <= ovl + 1e-6).all()
    assert (ovl <= bc + 1e-6).all()
    assert 0.05 < ovl.mean() < 0.9


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 1), (0, 1), 1.0),
        ((0, 1), (5, 1), 0.0),  # [-2.5, 2.5] and [2.5, 7.5] touch
        ((0, 1), (2.5, 1), 2.5 / 7.5),
        ((0, 1), (0, 2), 0.5),
        ((0, 1), (100, 1), 0.0),
        ((1, 0), (1, 0), 1.0),
        ((1, 0), (1, 1), 0.0),
    ],
)
def test_overlap__jaccard_of_ranges(overlap, a, b, expected, tmp_path):
    [row] = _overlap_of_moments(overlap, _bumps(a, b), tmp_path)
    assert row["range_jaccard"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [((2, 0), (2, 0), 1.0), ((2, 0), (2.5, 0), 0.0), ((2, 0), (2, 1), 0.0), ((2, 1), (2, 0), 0.0)],
)
def test_overlap__of_points_is_all_or_nothing(overlap, a, b, expected, tmp_path):
    [row] = _overlap_of_moments(overlap, _bumps(a, b), tmp_path)
    assert (row["ovl_gaussian"], row["bhattacharyya"], row["range_jaccard"]) == (expected, expected, expected)


def test_overlap__with_a_concept_without_values_is_null(overlap, tmp_path):
    rows = [*_bumps((0, 1), (1, 0)), {"neuron": 0, "concept": "z", "n": 0, "mean": None, "std": None}]
    got = {(row["concept_a"], row["concept_b"]): row for row in _overlap_of_moments(overlap, rows, tmp_path)}
    assert set(got) == {("a", "b"), ("a", "z"), ("b", "z")}
    for pair in (("a", "z"), ("b", "z")):
        assert [got[pair][name] for name in SCORES] == [None] * len(SCORES)
    assert got["a", "b"]["ovl_gaussian"] == 0


def test_overlap__without_histograms_keeps_the_gaussian_scores(overlap, tmp_path):
    [row] = _overlap_of_moments(overlap, _bumps((0, 1), (1, 1)), tmp_path)
    assert [row[name] for name in HISTOGRAM_SCORES] == [None, None, None]
    assert row["ovl_gaussian"] == pytest.approx(2 * stats.norm.cdf(-0.5), abs=1e-7)


def test_overlap__with_one_histogram_missing(overlap, tmp_path):
    rng = np.random.default_rng(1)
    values = {c: [rng.normal(size=(50, 1)).astype(np.float32)] for c in "ab"}
    files = write_store(tmp_path, [Shard(concept=c, x_LSN=x[0][None]) for c, x in values.items()])
    rows = [{"neuron": 0, "concept": c} | moments_of(x[0][:, 0]) for c, x in values.items()]
    moments = write_moments(tmp_path / "moments.parquet", rows)
    [row] = overlap({"histograms": files["histograms"][:1], "moments": [moments]}).to_pylist()
    assert row["ovl"] is None
    assert row["b_in_a"] is None
    assert row["a_in_b"] == pytest.approx(
        _share_inside(
            values["a"][0][:, 0], rows[1]["mean"] - TAU * rows[1]["std"], rows[1]["mean"] + TAU * rows[1]["std"]
        )
    )


def test_overlap__of_a_block_of_neurons_is_that_part_of_the_layer(overlap, tmp_path):
    rng = np.random.default_rng(4)
    values = {c: [rng.normal(rng.normal(size=7), 1, (50, 7))] for c in "abc"}
    whole = _overlap_of_values(overlap, values, tmp_path / "whole")
    part = _overlap_of_values(overlap, values, tmp_path / "part", first_neuron=2, last_neuron=4)
    assert part == [row for row in whole if 2 <= row["neuron"] <= 4]
    assert len(part) == 9


def kept_by_sql(pairs: pa.Table, top: int | None, threshold: float | None) -> pa.Table:
    with connect(threads=1) as con:
        attach_rows(con, "overlap", pairs)
        return run_file(con, "kept_pairs", hook_point="mlp_post", layer=0, top=top, threshold=threshold)


def kept_by_kernel(pairs: pa.Table, top: int | None, threshold: float | None) -> pa.Table:
    return kept_of(pairs, top=top, threshold=threshold)


@pytest.fixture(params=[kept_by_sql, kept_by_kernel], ids=["sql", "kernel"])
def kept(request) -> Callable[..., pa.Table]:
    return request.param


@pytest.mark.parametrize(("top", "threshold"), [(2, None), (None, 0.6), (1, 0.6), (None, None), (100, 0.0)])
def test_kept_pairs__are_the_first_of_all_pairs_put_in_order(top, threshold, kept):
    """Neuron 0 has no histograms, neuron 1 two equal pairs and one without any score."""
    scores = {
        0: {("a", "b"): (None, 0.5), ("a", "c"): (None, 0.7), ("b", "c"): (None, 0.6)},
        1: {("a", "b"): (0.75, 0.1), ("a", "c"): (0.75, 0.9), ("b", "c"): (None, None)},
    }
    rows = [
        {"layer": 0, "hook_point": "mlp_post", "neuron": neuron, "concept_a": a, "concept_b": b, "tau": TAU}
        | dict.fromkeys(SCORES, 0.5)
        | {"ovl": ovl, "ovl_gaussian": gaussian}
        for neuron, pairs in scores.items()
        for (a, b), (ovl, gaussian) in pairs.items()
    ]
    floats = [(name, pa.float32()) for name in ("tau", *SCORES)]
    keys = [("layer", pa.int16()), ("hook_point", pa.string()), ("neuron", pa.int32())]
    schema = pa.schema([*keys, ("concept_a", pa.string()), ("concept_b", pa.string()), *floats])
    got = kept(pa.Table.from_pylist(rows, schema), top, threshold).to_pylist()
    expected = []
    for neuron, pairs in scores.items():
        score = {pair: ovl if ovl is not None else gaussian for pair, (ovl, gaussian) in pairs.items()}
        order = sorted(score, key=lambda pair: (score[pair] is None, -(score[pair] or 0), pair))
        order = [
            pair
            for pair in order
            if threshold is None or (score[pair] is not None and np.float32(score[pair]) >= np.float32(threshold))
        ]
        expected += [(neuron, *pair) for pair in sorted(order[:top])]
    assert [(row["neuron"], row["concept_a"], row["concept_b"]) for row in got] == expected


def test_merged_histograms__are_the_counts_of_all_values_of_the_concept(tmp_path):
    rng = np.random.default_rng(5)
    parts = [rng.normal(0, 3000, (1, n, 4)).astype(np.float32) for n in (30, 1, 80)]
    parts[0][0, :4, 1] = [np.nan, np.inf, 0.0, -1e9]
    files = write_store(tmp_path, [Shard(concept="a", x_LSN=x) for x in parts] + [Shard(concept="b", x_LSN=parts[1])])
    with connect(files, threads=2) as con:
        rows = run_file(con, "merged_histograms", hook_point="mlp_post", layer=0, concept="a").to_pylist()
    x_SN = np.concatenate(parts, axis=1)[0]
    expected = [(neuron, b, n) for neuron in range(4) for b, n in sorted(bins_of(x_SN[:, neuron]).items())]
    assert [(row["neuron"], row["bin"], row["n"]) for row in rows] == expected
    assert {(row["layer"], row["hook_point"], row["concept"]) for row in rows} == {(0, "mlp_post", "a")}


@pytest.mark.parametrize("n_concepts", [2, 9, 19])
def test_overlap__equals_dense_histograms(overlap, n_concepts, tmp_path):
    """9 and 19 concepts: more than fit side by side in one row of the query's table, with a last row part full."""
    rng = np.random.default_rng(n_concepts)
    names = [f"concept {k:02d}" for k in range(n_concepts)]
    values = {
        name: [rng.gamma(2, size=(int(n), 3)) * rng.normal(0, 2, 3) + rng.normal(size=3) for n in (40, 7, 90)]
        for name in names
    }
    rows = _overlap_of_values(overlap, values, tmp_path)
    assert [(r["neuron"], r["concept_a"], r["concept_b"]) for r in rows] == [
        (neuron, *pair) for neuron in range(3) for pair in combinations(names, 2)
    ]
    for row in rows:
        a, b = (np.concatenate(values[row[k]]).astype(np.float32)[:, row["neuron"]] for k in ("concept_a", "concept_b"))
        p, q = bins_of(a), bins_of(b)
        ovl = sum(min(p.get(k, 0) / len(a), q.get(k, 0) / len(b)) for k in p.keys() | q.keys())
        assert row["ovl"] == pytest.approx(ovl, abs=1e-6)
        for name, owner, mass in (("b_in_a", a, b), ("a_in_b", b, a)):
            mean, std = owner.astype(float).mean(), owner.astype(float).std()
            assert row[name] == pytest.approx(_share_inside(mass, mean - TAU * std, mean + TAU * std), abs=1e-6), name


def test_overlap__shares_inside_are_near_the_true_ones(overlap, tmp_path):
    rng = np.random.default_rng(2)
    a, b = rng.normal(1, 0.5, (20_000, 1)), rng.normal(2.2, 1, (20_000, 1))
    [row] = _overlap_of_values(overlap, {"a": [a], "b": [b]}, tmp_path)
    assert row["b_in_a"] == pytest.approx(stats.norm.cdf(1 + 1.25, 2.2, 1) - stats.norm.cdf(1 - 1.25, 2.2, 1), abs=0.01)
    assert row["a_in_b"] == pytest.approx(stats.norm.cdf(4.7, 1, 0.5) - stats.norm.cdf(-0.3, 1, 0.5), abs=0.01)


@pytest.mark.parametrize(
    ("owner", "mass", "expected"),
    [
        ([0.0, 2.0], [1.0, 1.0], 1.0),  # a constant inside
        ([0.0, 2.0], [100.0, 100.0], 0.0),  # a constant outside
        ([3.0, 3.0], [3.0, 3.0], 1.0),  # the same point
        ([3.0, 3.0], [3.25, 3.25], 0.0),  # another point
        ([3.0, 3.0], [2.9, 3.1], 0.0),  # a point inside an interval has no length
        ([-1e5, 1e5], [5e3, 9e3], 1.0),  # beyond the last edge, 4096
        ([4096.0, 8192.0], [0.0, 16384.0], 0.5 * (6144 + 2.5 * 2048 - 3840) / (16384 - 3840)),  # inside the last bin
        ([-4096.0, -8192.0], [0.0, -16384.0], 0.5 * (6144 + 2.5 * 2048 - 3840) / (16384 - 3840)),
    ],
)
def test_overlap__share_inside_of_points_and_outermost_bins(overlap, owner, mass, expected, tmp_path):
    values = {"a": [np.array(owner)[:, None]], "b": [np.array(mass)[:, None]]}
    [row] = _overlap_of_values(overlap, values, tmp_path)
    assert row["b_in_a"] == pytest.approx(expected, abs=1e-6)


def test_overlap__an_infinite_tau_holds_everything(overlap, tmp_path):
    [row] = _overlap_of_values(overlap, {"a": [[[1.0], [1.0]]], "b": [[[-3.0], [5000.0]]]}, tmp_path, tau=float("inf"))
    assert (row["b_in_a"], row["a_in_b"], row["range_jaccard"]) == (1.0, 1.0, 1.0)


def test_overlap__has_the_columns_of_the_format(overlap, tmp_path):
    schema = overlap({"moments": [write_moments(tmp_path / "m.parquet", _bumps((0, 1), (1, 1)))]}).schema
    keys = {"layer": pa.int16(), "hook_point": pa.string(), "neuron": pa.int32()}
    names = dict.fromkeys(("concept_a", "concept_b"), pa.string())
    expected = keys | names | dict.fromkeys(("tau", *SCORES), pa.float32())
    plain = [f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in schema]
    assert list(zip(schema.names, plain, strict=True)) == list(expected.items())


def test_overlap__takes_the_asked_layer_only(overlap, tmp_path):
    rng = np.random.default_rng(3)
    x = {c: rng.normal(k, 1, (2, 60, 2)).astype(np.float32) for k, c in enumerate("ab")}
    files = write_store(tmp_path, [Shard(concept=c, x_LSN=v) for c, v in x.items()])
    files["moments"] = [
        write_moments(
            tmp_path / f"moments.{layer}.parquet",
            [{"neuron": n, "concept": c} | moments_of(v[layer, :, n]) for c, v in x.items() for n in range(2)],
            layer=layer,
        )
        for layer in range(2)
    ]
    rows = overlap(files, layer=1).to_pylist()
    assert [(row["layer"], row["neuron"]) for row in rows] == [(1, 0), (1, 1)]
    p, q = bins_of(x["a"][1, :, 0]), bins_of(x["b"][1, :, 0])
    assert rows[0]["ovl"] == pytest.approx(sum(min(p.get(k, 0), q.get(k, 0)) for k in p) / 60, abs=1e-6)


def test_overlap__sums_the_histograms_of_shards(overlap, tmp_path):
    """Bins 1 and 2 for a, in two files; bins 2 and 3 for b in one: half the mass is shared."""

    def histogram(name: str, concept: str, counts: dict[int, int]) -> str:
        n = len(counts)
        columns = {"layer": [0] * n, "hook_point": ["mlp_post"] * n, "neuron": [0] * n, "concept": [concept] * n}
        types = {"layer": pa.int16(), "neuron": pa.int32(), "bin": pa.int16(), "n": pa.int64()}
        columns |= {"bin": list(counts), "n": list(counts.values())}
        return write(tmp_path / name, [pa.table({k: pa.array(v, types.get(k)) for k, v in columns.items()})])

    files = [histogram("1", "a", {1: 10}), histogram("2", "a", {1: 20, 2: 30}), histogram("3", "b", {2: 5, 3: 5})]
    moments = write_moments(tmp_path / "m.parquet", _bumps((1e-4, 1e-5), (1e-4, 1e-5)))
    [row] = overlap({"histograms": files, "moments": [moments]}).to_pylist()
    assert row["ovl"] == 0.5


EDGES = [s * x for s in (-1, 1) for x in (0, 2**-15, 2**-14, 2**-13, 1, 1.0625, 1.125, 2, 3840, 4096, 1e5, 3e38)]
any_value = st.one_of(
    st.sampled_from(EDGES), st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(-3, 3, width=32)
)
values_of_concepts = st.lists(st.lists(any_value, max_size=12), min_size=2, max_size=4)


def _rows(values: list[list[float]]) -> tuple[pa.Table, pa.Table]:
    """Moments and histograms of one neuron, as tables in memory, under the concepts a, b, ..."""
    moments, histograms = [], []
    for concept, x in zip("abcd", values, strict=False):
        x_S = np.array(x, np.float32)
        key = {"layer": 0, "hook_point": "mlp_post", "neuron": 7, "concept": concept}
        moments.append(key | moments_of(x_S))
        histograms += [key | {"bin": b, "n": n} for b, n in sorted(bins_of(x_S).items())]
    keys = [("layer", pa.int16()), ("hook_point", pa.string()), ("neuron", pa.int32()), ("concept", pa.string())]
    floats = [(name, pa.float64()) for name in ("mean", "std", "min", "max")]
    counts = pa.schema([*keys, ("bin", pa.int16()), ("n", pa.int64())])
    return pa.Table.from_pylist(moments, pa.schema([*keys, *floats])), pa.Table.from_pylist(histograms, counts)


@settings(deadline=None)
@given(values_of_concepts, st.sampled_from([0.1, 1.0, TAU, np.inf]))
def test_pairs_of__equals_dense_histograms_whatever_the_values(values, tau):
    moments, histograms = _rows(values)
    bumps = Bumps.of(moments, hook_point="mlp_post", layer=0).with_counts(histograms)
    rows = pairs_of(bumps, tau=tau).to_pylist()
    arrays = {c: np.array(x, np.float32) for c, x in zip("abcd", values, strict=False)}
    assert [(row["concept_a"], row["concept_b"]) for row in rows] == list(combinations(arrays, 2))
    for row in rows:
        a, b = arrays[row["concept_a"]], arrays[row["concept_b"]]
        if not (len(a) and len(b)):
            assert [row[name] for name in SCORES] == [None] * len(SCORES)
            continue
        p, q = bins_of(a), bins_of(b)
        ovl = sum(min(p.get(k, 0) / len(a), q.get(k, 0) / len(b)) for k in p.keys() | q.keys())
        assert row["ovl"] == pytest.approx(ovl, abs=1e-6)
        for name, owner, mass in (("b_in_a", a, b), ("a_in_b", b, a)):
            mean, std = moments_of(owner)["mean"], moments_of(owner)["std"]
            half = np.inf if np.isinf(tau) else tau * std
            assert row[name] == pytest.approx(_share_inside(mass, mean - half, mean + half), abs=1e-6), name
        # Near 1, the root makes 3e-4 of what rounding to FLOAT takes from the coefficient.
        assert 1 - np.sqrt(1 - row["bhattacharyya"] ** 2) <= row["ovl_gaussian"] + 1e-3
        assert row["ovl_gaussian"] <= row["bhattacharyya"] + 1e-5


@pytest.mark.parametrize("with_histograms", [True, False])
def test_concept_overlap_of__is_the_mean_over_the_pairs_of_a_concept(with_histograms, tmp_path):
    """As the view has it, and as numpy has it; concept d has no values."""
    rng = np.random.default_rng(6)
    files = _files_of_values({c: [rng.normal(k, 1, (40, 5))] for k, c in enumerate("abc")}, tmp_path)
    if not with_histograms:
        del files["histograms"]
    with connect(files, threads=1) as con:
        moments = con.sql("select neuron, concept, n, mean, std, min, max from moments").to_arrow_table().to_pylist()
    moments += [{"neuron": neuron, "concept": "d", "n": 0} for neuron in range(5)]
    moments = [row for row in moments if (row["neuron"], row["concept"]) != (3, "a")]
    pairs = overlap_by_kernel(files | {"moments": [write_moments(tmp_path / "more.parquet", moments)]})
    key = ("layer", "hook_point", "neuron", "concept")
    got = {tuple(row[name] for name in key): row for row in concept_overlap_of(pairs).to_pylist()}
    assert len(got) == 5 * 4 - 1
    for (_, _, neuron, concept), row in got.items():
        mine = [r for r in pairs.to_pylist() if r["neuron"] == neuron and concept in (r["concept_a"], r["concept_b"])]
        scores = [r["ovl"] if r["ovl"] is not None else r["ovl_gaussian"] for r in mine]
        known = [score for score in scores if score is not None]
        assert row["n_pairs"] == len(mine) == (2 if neuron == 3 else 3)
        assert row["mean_ovl"] == (pytest.approx(np.mean(known)) if known else None)
    with connect(threads=1) as con:
        attach_rows(con, "overlap", pairs)
        view = con.sql("from concept_overlap").to_arrow_table().to_pylist()
    assert {tuple(row[name] for name in key): row for row in view} == {k: pytest.approx(row) for k, row in got.items()}


@pytest.fixture(scope="module")
def connection():
    with connect(threads=1) as con:
        yield con


@settings(deadline=None, max_examples=25)
@given(values_of_concepts, st.sampled_from([0.1, 1.0, TAU, np.inf]))
def test_pairs_of__equals_the_query(connection, values, tau):
    moments, histograms = _rows(values)
    attach_rows(connection, "moments", moments)
    attach_rows(connection, "histograms", histograms)
    expected = run_file(connection, "overlap", **(AT | {"tau": tau})).to_pylist()
    bumps = Bumps.of(moments, hook_point="mlp_post", layer=0).with_counts(histograms)
    rows = pairs_of(bumps, tau=tau).to_pylist()
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-6)
