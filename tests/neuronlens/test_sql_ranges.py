"""sql/ranges.sql by hand-worked bounds and ranks."""

from pathlib import Path

import pyarrow as pa
import pytest

from neuronlens.query import attach, connect, run_file, run_to_parquet
from tests.range_tables import pieces, row, table_of
from tests.synthetic_store import write_moments

DEFAULTS = {"tau": 2.5, "top_fraction": 0.3, "salience": "mean_abs"}


def _moments(width: int, concepts: str = "ab") -> list[dict]:
    """Neuron i of concept a has mean_abs i, of concept b width - i; mean and std tell neurons apart."""
    return [
        {
            "neuron": i,
            "concept": concept,
            "mean": 10.0 * i,
            "std": 1.0 + i,
            "mean_abs": float(i if concept == "a" else width - i),
        }
        for concept in concepts
        for i in range(width)
    ]


def _ranges(path: Path, layers: dict[int, list[dict]], **params: object) -> list[dict]:
    files = {"moments": [], "salience": []}
    for layer, rows in layers.items():
        moments, salience = path / f"moments.{layer}.parquet", path / f"salience.{layer}.parquet"
        files["moments"].append(write_moments(moments, rows, layer=layer))
        with connect({"moments": [str(moments)]}, threads=1) as con:
            run_to_parquet(con, "salience", str(salience), hook_point="mlp_post", layer=layer)
        files["salience"].append(str(salience))
    with connect(files, threads=1) as con:
        return run_file(con, "ranges", **(DEFAULTS | params)).to_pylist()


def test_ranges__are_tau_std_around_the_mean_of_the_top_neurons(tmp_path):
    rows = _ranges(tmp_path, {0: _moments(10)}, tau=1.5)
    assert [(row["concept"], row["rank"], row["neuron"]) for row in rows] == [
        ("a", 1, 9),
        ("a", 2, 8),
        ("a", 3, 7),
        ("b", 1, 0),
        ("b", 2, 1),
        ("b", 3, 2),
    ]
    first = rows[0]
    assert (first["mean"], first["std"], first["lower"], first["upper"]) == (90.0, 10.0, 75.0, 105.0)
    assert (first["salience"], first["mean_abs"], first["n"]) == (9.0, 9.0, 100)


@pytest.mark.parametrize(
    ("width", "top_fraction", "expected"),
    [(10, 0.3, 3), (10, 0.39, 3), (10, 1.0, 10), (10, 0.0, 1), (2, 0.3, 1), (7, 0.5, 3)],
)
def test_ranges__take_the_top_fraction_of_the_width_and_at_least_one(width, top_fraction, expected, tmp_path):
    rows = _ranges(tmp_path, {0: _moments(width, "a")}, top_fraction=top_fraction)
    assert [row["rank"] for row in rows] == list(range(1, expected + 1))


def test_ranges__count_the_width_of_each_layer(tmp_path):
    rows = _ranges(tmp_path, {3: _moments(4, "a"), 1: _moments(10, "a")}, top_fraction=0.5)
    assert [(row["layer"], row["rank"]) for row in rows] == [(1, r) for r in range(1, 6)] + [(3, 1), (3, 2)]


def test_ranges__leave_out_concepts_without_a_spread(tmp_path):
    few = [
        {"neuron": 0, "concept": "one", "n": 1, "mean": 3.0, "std": 0.0},
        {"neuron": 0, "concept": "none", "n": 0, "mean": None, "std": None, "mean_abs": None},
        {"neuron": 0, "concept": "still", "n": 5, "mean": 3.0, "std": 0.0},
    ]
    rows = _ranges(tmp_path, {0: few})
    assert [(row["concept"], row["lower"], row["upper"]) for row in rows] == [("still", 3.0, 3.0)]


def test_ranges__need_a_score(tmp_path):
    """One concept has no other to differ from: cohens_d ranks its neurons, but without a score."""
    assert _ranges(tmp_path, {0: _moments(10, "a")}, salience="cohens_d") == []


def test_ranges__of_an_infinite_tau_hold_the_whole_line(tmp_path):
    still = {"neuron": 0, "concept": "a", "n": 5, "mean": 3.0, "std": 0.0}
    rows = _ranges(tmp_path, {0: [still]}, tau=float("inf"))
    assert [(row["lower"], row["upper"]) for row in rows] == [(float("-inf"), float("inf"))]


def test_ranges__by_another_salience(tmp_path):
    apart = [
        {"neuron": i, "concept": c, "mean": float(mean), "std": 1.0, "mean_abs": 1.0 + i, "min": 0.0, "max": 1.0}
        for c, means in (("a", [9, 0, 0]), ("b", [0, 0, 1]))
        for i, mean in enumerate(means)
    ]
    rows = _ranges(tmp_path, {0: apart}, salience="cohens_d", top_fraction=0.4)
    assert [(row["concept"], row["neuron"]) for row in rows] == [("a", 0), ("b", 0)]
    assert _ranges(tmp_path, {0: apart}, salience="selectivity") == []


def test_ranges__have_the_columns_of_the_format(tmp_path):
    with connect(threads=1) as con:
        schema = run_file(con, "ranges", **DEFAULTS).schema
    expected = {
        "hook_point": pa.string(),
        "layer": pa.int16(),
        "neuron": pa.int32(),
        "concept": pa.string(),
        "n": pa.int64(),
    }
    floats = dict.fromkeys(("mean", "std", "mean_abs", "salience", "lower", "upper"), pa.float64())
    assert {field.name: field.type for field in schema} == expected | floats | {"rank": pa.int32()}


def test_ranges__view_names_the_table_of_each_row(tmp_path):
    with connect({"moments": [write_moments(tmp_path / "m.parquet", _moments(4, "a"))]}, threads=1) as con:
        attach(con, "salience", [_salience_file(con, tmp_path)])
        paths = []
        for tau in (1.0, 2.0):
            path = tmp_path / "ranges" / f"tbl_{tau:.0f}abc" / "ranges.parquet"
            path.parent.mkdir(parents=True)
            run_to_parquet(con, "ranges", str(path), **(DEFAULTS | {"tau": tau}))
            paths.append(str(path))
        attach(con, "ranges", paths)
        rows = con.sql("select table_id, neuron, upper from ranges order by all").fetchall()
    assert rows == [("tbl_1abc", 3, 34.0), ("tbl_2abc", 3, 38.0)]


def test_ranges__view_reads_tables_with_and_without_pieces_in_any_order(tmp_path):
    whole = table_of([row("joy", 1, 0.0, 1.0), row("joy", 2, 0.5, 1.0, rank=2)])
    split = table_of(pieces("joy", 1, [(-1.0, 0.0, 0.5), (1.0, 2.0, 0.75)]), method="hpd")
    of_whole = [(whole.id, 1, -2.5, 2.5, None, None), (whole.id, 2, -2.0, 3.0, None, None)]
    of_split = [(split.id, 1, -1.0, 0.0, 0, 0.5), (split.id, 1, 1.0, 2.0, 1, 0.75)]
    one, two = (f"{table.save(tmp_path)}/ranges.parquet" for table in (whole, split))
    cases = [([one], of_whole), ([two], of_split), ([one, two], of_whole + of_split), ([two, one], of_whole + of_split)]
    for paths, expected in cases:
        with connect({"ranges": paths}, threads=1) as con:
            rows = con.sql("select table_id, neuron, lower, upper, piece, posterior from ranges").fetchall()
            assert sorted(rows, key=lambda r: (r[0], r[2])) == sorted(expected, key=lambda r: (r[0], r[2]))
            types = dict(con.sql("select column_name, column_type from (describe ranges)").fetchall())
            assert (types["piece"], types["posterior"]) == ("SMALLINT", "DOUBLE")


def _salience_file(con, path: Path) -> str:
    run_to_parquet(con, "salience", str(path / "salience.parquet"), hook_point="mlp_post", layer=0)
    return str(path / "salience.parquet")
