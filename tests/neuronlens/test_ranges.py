"""Range tables: the id, the files, the selections."""

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronlens.errors import RunFailed, UsageError
from neuronlens.ranges import PIECES_SCHEMA, SCHEMA, RangeTable, TableModel, salient_count
from tests.range_tables import HEADER, pieces, row, table_of

ROWS = [
    row("joy", 2, 0.5, 0.25),
    row("joy", 0, -0.25, 0.125, rank=2),
    row("anger", 1, 3.0, 1.0),
    row("anger", 3, 2.0, 1.0, rank=2),
    row("joy", 1, 1.5, 0.5, layer=1),
    row("anger", 0, 1.0, 0.0, layer=1),
    row("joy", 7, 0.75, 0.5, layer=1, hook_point="resid_post"),
]
WIDTHS = {"mlp_post": 4, "resid_post": 8}


@pytest.fixture
def table() -> RangeTable:
    return table_of(ROWS, widths=WIDTHS)


PIECES = [
    *pieces("joy", 2, [(-1.0, -0.5, 0.75), (0.25, 0.5, 0.5)]),
    *pieces("joy", 0, [(0.0, float("inf"), 1.0)], rank=2),
    *pieces("joy", 1, [(-3.0, -2.0, 0.0), (-1.0, -1.0, 0.125), (0.0, 7.0, 1.0)], layer=1),
    *pieces("anger", 2, [(-1.0, 2.0, 0.25)]),
]


def pieces_table(rows: list[dict] = PIECES, **header: object) -> RangeTable:
    return table_of(rows, widths=WIDTHS, **{"method": "budget", "options": {"budget": 0.02, "atol": 1}, **header})


def id_by_hand(rows: list[dict], **fields: object) -> str:
    """The id made again from the format's words, with the standard library alone."""
    header = {
        "format_version": 1,
        "tau": 2.5,
        "top_fraction": 0.5,
        "salience": "mean_abs",
        "store_hash": "5" * 16,
        "model": {"config_hash": "c" * 16},
        "unit": "last_token",
        "widths": WIDTHS,
        "coverage": {"shards": 3, "committed": 3},
        "rows": len(rows),
        **fields,
    }
    rows = sorted(
        rows, key=lambda r: (r["hook_point"], r["layer"], r["concept"], r["rank"], r["neuron"], r.get("piece"))
    )
    content = json.dumps(header, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    columns = [
        ("hook_point", "string", "i"),
        ("layer", "int16", "h"),
        ("neuron", "int32", "i"),
        ("concept", "string", "i"),
    ]
    columns += [("n", "int64", "q"), *((name, "double", "d") for name in ("mean", "std", "mean_abs", "salience"))]
    columns += [("rank", "int32", "i"), ("lower", "double", "d"), ("upper", "double", "d")]
    of_pieces = [("piece", "int16", "h"), ("posterior", "double", "d"), ("mean_others", "double", "d")]
    columns += of_pieces if "piece" in rows[0] else []
    for name, type_name, code in columns:
        content += f"{name}:{type_name}\n".encode()
        values = [r[name] for r in rows]
        if type_name == "string":
            names = sorted(set(values))
            content += json.dumps(names, separators=(",", ":")).encode() + b"\n"
            values = [names.index(value) for value in values]
        content += struct.pack(f"<{len(values)}{code}", *values)
    return f"tbl_{hashlib.sha256(content).hexdigest()[:16]}"


def test_range_table__id_is_what_the_format_says(table: RangeTable) -> None:
    assert table.id == id_by_hand(ROWS)
    made_by = {"format_version": 2, "method": "budget", "options": {"atol": 1.0, "budget": 0.02}}
    assert pieces_table().id == id_by_hand(PIECES, **made_by)


def test_range_table__of_the_papers_method_is_what_it_was_before_there_were_others(table: RangeTable) -> None:
    assert table.id == "tbl_e259f8acfcc95978"  # as version 1 of the format alone gave it, like the text of the header
    assert hashlib.sha256(table.header_json()).hexdigest()[:12] == "eefa59092c6a"
    assert table.rows.schema == SCHEMA


def test_range_table__id_follows_method_options_and_posteriors() -> None:
    changed = [{**PIECES[0], "posterior": 0.76}, *PIECES[1:]]
    tables = [
        pieces_table(),
        pieces_table(method="hpd"),
        pieces_table(options={"budget": 0.03, "atol": 1}),
        pieces_table(options={}),
        pieces_table(changed),
    ]
    assert len({table.id for table in tables}) == len(tables)
    assert pieces_table(PIECES[::-1], options={"atol": 1.0, "budget": 0.02}).id == tables[0].id


def test_range_table__with_pieces_can_be_saved_and_loaded(tmp_path: Path) -> None:
    for table in (pieces_table(), pieces_table(options={})):
        folder = Path(table.save(tmp_path))
        loaded = RangeTable.load(folder)
        assert (loaded.header, loaded.rows) == (table.header, table.rows)
        assert loaded.rows.schema == PIECES_SCHEMA
        assert pq.read_schema(folder / "ranges.parquet").names == PIECES_SCHEMA.names
    assert json.loads((folder / "table.json").read_text())["method"] == "budget"


EDGES = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=8, unique=True)


@given(st.lists(EDGES, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_range_table__holds_any_pieces_that_lie_apart_in_any_order(edges_of_neuron, random) -> None:
    rows = []
    for neuron, edges in enumerate(edges_of_neuron):
        edges = sorted(edges[: len(edges) // 2 * 2])
        bounds = [(edges[i], edges[i + 1], 0.5) for i in range(0, len(edges), 2)]
        rows += pieces("joy", neuron, bounds, rank=neuron + 1)
    shuffled = random.sample(rows, len(rows))
    assert pieces_table(shuffled).rows.to_pylist() == rows


def test_select__takes_a_neuron_with_all_its_pieces() -> None:
    table = pieces_table()
    assert table.select("joy", layers=[0])["neuron"].to_pylist() == [2, 2, 0]
    assert table.select("joy", layers=[0], top_fraction=0.25)["neuron"].to_pylist() == [2, 2]
    assert table.select("joy", layers=[1], neurons=[1])["piece"].to_pylist() == [0, 1, 2]


def test_range_table__id_ignores_row_order_encoding_chunks_and_who_made_it(table: RangeTable) -> None:
    loose = pa.Table.from_pylist(ROWS[::-1])  # int64 and double throughout, no schema
    for name in ("hook_point", "concept"):
        loose = loose.set_column(loose.column_names.index(name), name, loose[name].dictionary_encode())
    loose = pa.concat_tables([loose.slice(0, 3), loose.slice(3)]).select(sorted(loose.column_names))
    other = RangeTable.make(
        loose,
        **{
            **table.header.model_dump(exclude={"id", "rows", "format_version", "model"}),
            "model": TableModel(id="elsewhere/tiny", revision="main", config_hash="c" * 16),
            "created_with": {"pyarrow": "99"},
        },
    )
    assert other.id == table.id
    assert other.rows.equals(table.rows)


@pytest.mark.parametrize(
    "change",
    [{"tau": 2.0}, {"unit": "token"}, {"store_hash": "6" * 16}, {"coverage": {"shards": 3, "committed": 2}}],
    ids=lambda change: next(iter(change)),
)
def test_range_table__id_follows_the_header(table: RangeTable, change: dict) -> None:
    assert table_of(ROWS, widths=WIDTHS, **change).id != table.id


def test_range_table__id_follows_every_value(table: RangeTable) -> None:
    changed = [{**ROWS[0], "upper": ROWS[0]["upper"] + 1e-12}, *ROWS[1:]]
    assert table_of(changed, widths=WIDTHS).id != table.id


def test_range_table__id_does_not_tell_negative_zero_from_zero() -> None:
    assert table_of([row("joy", 0, -0.0, 0.0)]).id == table_of([row("joy", 0, 0.0, 0.0)]).id


def test_save__can_be_loaded_and_repeated(table: RangeTable, tmp_path: Path) -> None:
    folder = Path(table.save(tmp_path))
    assert folder == tmp_path / "ranges" / table.id
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert sorted(before) == ["ranges.parquet", "table.json"]
    assert table.save(str(tmp_path)) == str(folder)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    loaded = RangeTable.load(folder)
    assert (loaded.header, loaded.rows) == (table.header, table.rows)


def test_save__writes_to_any_fsspec_filesystem(table: RangeTable) -> None:
    fs = fsspec.filesystem("memory")
    folder = table.save("memory://runs/a")
    assert RangeTable.load(folder, fs).id == table.id
    assert RangeTable.load(f"memory://runs/a/ranges/{table.id}").id == table.id


def test_save__writes_the_parquet_before_the_json(
    table: RangeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuronlens.ranges.json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        table.save(tmp_path)
    folder = tmp_path / "ranges" / table.id
    assert [path.name for path in folder.iterdir()] == ["ranges.parquet"]
    with pytest.raises(UsageError, match=r"no table\.json"):
        RangeTable.load(folder)


def test_save__mends_a_damaged_table(table: RangeTable, tmp_path: Path) -> None:
    folder = Path(table.save(tmp_path))
    (folder / "ranges.parquet").write_bytes(b"half")
    table.save(tmp_path)
    assert RangeTable.load(folder).rows.equals(table.rows)


def test_load__says_that_there_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no range table at"):
        RangeTable.load(tmp_path / "ranges" / "tbl_0")


def edit_json(folder: Path, **fields: object) -> None:
    path = folder / "table.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_rows(folder: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "ranges.parquet")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: edit_json(folder, tau=2.0),
        lambda folder: edit_json(folder, id="tbl_" + "0" * 16),
        lambda folder: edit_json(folder, colour="red"),
        lambda folder: edit_json(folder, format_version=2),
        lambda folder: edit_json(folder, format_version=2, method="hpd"),
        lambda folder: edit_json(folder, method="hpd"),
        lambda folder: (folder / "table.json").write_text("{"),
        lambda folder: edit_rows(folder, ROWS[:-1]),
        lambda folder: edit_rows(folder, [{**ROWS[0], "mean": 0.5000001}, *ROWS[1:]]),
        lambda folder: edit_rows(folder, [{**ROWS[0], "upper": float("nan")}, *ROWS[1:]]),
        lambda folder: (folder / "ranges.parquet").write_bytes((folder / "ranges.parquet").read_bytes()[:-20]),
        lambda folder: (folder / "ranges.parquet").unlink(),
    ],
    ids=[
        "tau",
        "id",
        "unknown key",
        "format",
        "columns",
        "method",
        "half json",
        "row lost",
        "value",
        "nan",
        "half parquet",
        "no parquet",
    ],
)
def test_load__refuses_a_damaged_table(table: RangeTable, tmp_path: Path, damage) -> None:
    folder = Path(table.save(tmp_path))
    damage(folder)
    with pytest.raises(RunFailed, match="is damaged"):
        RangeTable.load(folder)


def test_load__refuses_a_newer_format(table: RangeTable, tmp_path: Path) -> None:
    folder = Path(table.save(tmp_path))
    edit_json(folder, format_version=3)
    with pytest.raises(UsageError, match="format version 3, this neuronlens reads 2"):
        RangeTable.load(folder)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([row("joy", 4, 0.0, 1.0)], "wrong neuron: 4"),
        ([row("joy", -1, 0.0, 1.0)], "wrong neuron: -1"),
        ([row("joy", 0, float("nan"), 1.0)], "wrong mean: nan"),
        ([row("joy", 0, 0.0, -1.0)], "wrong std: -1.0"),
        ([row("joy", 0, 0.0, 1.0, lower=float("nan"))], "wrong lower: nan"),
        ([row("joy", 0, 0.0, 1.0, lower=3.0)], "wrong lower: 3.0"),
        ([row("joy", 0, 0.0, 1.0, rank=0)], "wrong rank: 0"),
        ([row("joy", 0, 0.0, 1.0, hook_point="attn_out")], "No width is given for the hook points attn_out"),
        ([row("joy", 0, 0.0, 1.0), row("joy", 0, 1.0, 1.0, rank=2)], "1 rows name a neuron that"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_make__refuses_rows_that_cannot_be_right(rows: list[dict], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        table_of(rows)


def test_make__refuses_missing_and_surplus_columns_and_nulls() -> None:
    header = table_of(ROWS[:1]).header.model_dump(exclude={"id", "rows", "format_version", "model"})
    header["model"] = TableModel(id="tiny", config_hash="c")
    rows = pa.Table.from_pylist(ROWS[:1], schema=SCHEMA)
    with pytest.raises(UsageError, match="Missing: upper; not among them: none"):
        RangeTable.make(rows.drop_columns("upper"), **header)
    with pytest.raises(UsageError, match="Missing: none; not among them: colour"):
        RangeTable.make(rows.append_column("colour", pa.array(["red"])), **header)
    with pytest.raises(UsageError, match="1 rows of the range table have no mean"):
        RangeTable.make(pa.Table.from_pylist([{**ROWS[0], "mean": None}]), **header)
    with pytest.raises(UsageError, match="layer cannot be read as int16"):
        RangeTable.make(pa.Table.from_pylist([{**ROWS[0], "layer": 70_000}]), **header)


TWO = pieces("joy", 1, [(-1.0, 0.0, 0.5), (1.0, 2.0, 0.5)])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"lower": 0.0}, "wrong lower: 0.0 for neuron 1 of layer 0; expected above the upper bound"),
        ({"lower": -2.0, "upper": -1.5}, "wrong lower: -2.0"),
        ({"piece": 2}, "wrong piece: 2"),
        ({"piece": 0}, "wrong piece: 0"),
        ({"posterior": 1.5}, "wrong posterior: 1.5"),
        ({"posterior": -0.5}, "wrong posterior: -0.5"),
        ({"posterior": float("nan")}, "wrong posterior: nan"),
        ({"mean_others": float("inf")}, "wrong mean_others: inf"),
        ({"mean": 0.75}, "wrong mean: 0.75 .* what the neuron's other pieces have"),
        ({"n": 11}, "wrong n: 11"),
        ({"salience": 1.0}, "wrong salience: 1.0"),
        ({"rank": 2}, "wrong piece: 1 .* within each neuron and rank"),
        ({"rank": 2, "piece": 0}, "1 rows name a neuron that"),
        ({"concept": "anger"}, "wrong piece: 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_make__refuses_pieces_that_make_no_range(second: dict, message: str) -> None:
    assert pieces_table(TWO).rows.num_rows == 2
    with pytest.raises(UsageError, match=message):
        pieces_table([TWO[0], {**TWO[1], **second}])


def test_make__refuses_a_range_of_too_many_pieces() -> None:
    def split(n_pieces: int) -> list[dict]:
        return pieces("joy", 1, [(float(2 * i), 2.0 * i + 1, 0.5) for i in range(n_pieces)])

    assert pieces_table(split(64)).rows.num_rows == 64
    with pytest.raises(UsageError, match=r"1 rows .* wrong piece: 64 .* at most so many pieces"):
        pieces_table(split(65))


def test_make__wants_the_columns_of_its_method() -> None:
    with pytest.raises(UsageError, match="not among them: mean_others, piece, posterior"):
        RangeTable.make(pa.Table.from_pylist(TWO), **HEADER, widths=WIDTHS)
    with pytest.raises(UsageError, match="Missing: piece, posterior"):
        RangeTable.make(pa.Table.from_pylist(ROWS), **HEADER, widths=WIDTHS, method="hpd")
    with pytest.raises(UsageError, match="method paper has no options, found budget"):
        table_of(ROWS, widths=WIDTHS, options={"budget": 0.02})
    with pytest.raises(UsageError, match="method"):
        pieces_table(method="Not a name")
    with pytest.raises(UsageError, match=r"options\.budget"):
        pieces_table(options={"budget": float("nan")})


@pytest.mark.parametrize("header", [{"tau": 0}, {"tau": float("inf")}, {"top_fraction": 1.5}])
def test_make__refuses_a_header_that_cannot_be_right(header: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(header))):
        table_of(ROWS[:1], **header)


def test_range_table__says_what_it_holds(table: RangeTable) -> None:
    assert table.concepts == ("anger", "joy")
    assert table.hook_points == ("mlp_post", "resid_post")
    assert table.layers == (0, 1)


def neurons(rows: pa.Table) -> list[int]:
    return rows["neuron"].to_pylist()


def test_select__by_concept_hook_point_and_layer(table: RangeTable) -> None:
    assert table.select().num_rows == len(ROWS)
    assert neurons(table.select("joy")) == [2, 0, 1, 7]
    assert neurons(table.select("joy", layers=[1])) == [1, 7]
    assert neurons(table.select("joy", layers=[1], hook_points=["resid_post"])) == [7]


def test_select__by_top_fraction_of_each_hook_points_width() -> None:
    rows = [row("joy", neuron, 1.0, 1.0, rank=neuron + 1) for neuron in range(2)]
    rows += [row("joy", neuron, 1.0, 1.0, rank=neuron + 1, hook_point="resid_post") for neuron in range(4)]
    table = table_of(rows, widths=WIDTHS)
    assert neurons(table.select("joy", top_fraction=0.5)) == [0, 1, 0, 1, 2, 3]
    assert neurons(table.select("joy", top_fraction=0.25)) == [0, 0, 1]
    assert neurons(table.select("joy", top_fraction=0.01)) == [0, 0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"concept": "fear"}, "no concept fear. It has: anger, joy"),
        ({"layers": [1, 5]}, "no layer 5. It has: 0, 1"),
        ({"hook_points": ["attn_out"]}, "no hook point attn_out. It has: mlp_post, resid_post"),
        ({"hook_points": ["resid_post"], "layers": [0]}, "no layer 0 for resid_post. It has: 1"),
        ({"top_fraction": 0.6}, "top_fraction is 0.6; expected above 0 and at most 0.5"),
        ({"top_fraction": 0.0}, "top_fraction is 0.0; expected above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_select__names_what_there_is(table: RangeTable, asked: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        table.select(**asked)


def test_salient_count__rounds_down_but_keeps_one() -> None:
    assert [salient_count(0.3, width) for width in (1, 3, 4, 10, 768)] == [1, 1, 1, 3, 230]


def test_import__of_the_package_and_of_ranges_is_light() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'duckdb'}"
    for module in ("neuronlens", "neuronlens.ranges", "neuronlens.programs"):
        code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n", module
