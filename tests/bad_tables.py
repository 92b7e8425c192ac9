"""Uploads that are not what they should be: pairs of table.json and ranges.parquet."""

import io
import json
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neuronlens.ranges import PIECES_SCHEMA, SCHEMA
from tests.range_tables import pieces, row, table_of

GOOD = table_of(
    [row("joy", n, 0.5 + n, 0.25, rank=n + 1) for n in range(2)] + [row("anger", 1, 1.0, 0.0, layer=3)],
    widths={"mlp_post": 4},
)


def parquet(rows: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, **options)
    return buffer.getvalue()


def header(**fields: Any) -> bytes:
    return json.dumps({**GOOD.header.model_dump(), **fields}).encode()


def rows_with(**columns: pa.Array) -> bytes:
    """The rows of GOOD with other columns."""
    rows = GOOD.rows
    for name, values in columns.items():
        rows = rows.set_column(rows.column_names.index(name), name, values)
    return parquet(rows)


def honest(*rows: dict, **fields: Any) -> tuple[bytes, bytes]:
    """Rows that cannot be right under a header that counts them."""
    schema = PIECES_SCHEMA if "method" in fields else SCHEMA
    return header(rows=len(rows), **fields), parquet(pa.Table.from_pylist(list(rows), schema=schema))


def of_many_row_groups(n_rows: int, n_groups: int) -> bytes:
    """A file that holds one small row group, and whose footer names it n_groups times."""
    ones = {field.name: pa.array(["joy"] if field.type == "string" else [1], field.type) for field in SCHEMA}
    table = pa.table({name: pa.repeat(column[0], n_rows) for name, column in ones.items()}, schema=SCHEMA)
    content = parquet(table, row_group_size=n_rows)
    metadata = pq.read_metadata(io.BytesIO(content))
    group = pq.read_metadata(io.BytesIO(content))
    for _ in range(n_groups - 1):
        metadata.append_row_groups(group)
    footer = io.BytesIO()
    metadata.write_metadata_file(footer)
    n_footer_bytes = int.from_bytes(content[-8:-4], "little") + 8
    return content[:-n_footer_bytes] + footer.getvalue()[4:]


def that_understates(n_rows: int, n_said: int) -> bytes:
    """A file whose footer gives another number of rows than its row group."""
    content = of_many_row_groups(n_rows, 1)
    n_footer_bytes = int.from_bytes(content[-8:-4], "little") + 8
    body, footer = content[:-n_footer_bytes], content[-n_footer_bytes:]
    true, said = _varint(n_rows), _varint(n_said, len(_varint(n_rows)))
    return body + footer.replace(true, said, 1)


def _varint(number: int, n_bytes: int = 0) -> bytes:
    """Thrift's compact form of a whole number, filled up to n_bytes."""
    left, digits = 2 * number, []
    while left or not digits:
        digits.append(left & 0x7F)
        left >>= 7
    digits += [0] * (n_bytes - len(digits))
    return bytes([digit | 0x80 for digit in digits[:-1]] + digits[-1:])


def nested(depth: int) -> bytes:
    kind: pa.DataType = pa.int32()
    for _ in range(depth):
        kind = pa.list_(kind)
    return parquet(pa.table({"neuron": pa.array([None] * 3, kind)}))


def flipped(content: bytes, seed: int) -> bytes:
    """One bit of every 200 bytes, somewhere."""
    rng, changed = random.Random(seed), bytearray(content)
    for _ in range(max(1, len(content) // 200)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


NAN, INF = float("nan"), float("inf")
JOY = row("joy", 0, 0.0, 1.0)
GOOD_PARQUET = GOOD.rows_parquet()
GOOD_JSON = GOOD.header_json()
_FLOATS = GOOD.rows["mean"]

BAD: dict[str, tuple[Callable[[], tuple[bytes, bytes]], int, str]] = {
    "empty": (lambda: (GOOD_JSON, b""), 400, "cannot be read as Parquet"),
    "random bytes": (lambda: (GOOD_JSON, random.Random(0).randbytes(5_000)), 400, "cannot be read as Parquet"),
    "magic around noise": (
        lambda: (GOOD_JSON, b"PAR1" + random.Random(1).randbytes(500) + (400).to_bytes(4, "little") + b"PAR1"),
        400,
        "cannot be",
    ),
    "truncated": (lambda: (GOOD_JSON, GOOD_PARQUET[:-100]), 400, "cannot be read as Parquet"),
    "a footer longer than the file": (
        lambda: (GOOD_JSON, GOOD_PARQUET[:-8] + b"\xff\xff\xff\x7fPAR1"),
        400,
        "cannot be read as Parquet",
    ),
    "a billion rows": (lambda: (GOOD_JSON, of_many_row_groups(1_000_000, 1_000)), 413, "1,000,000,000 rows"),
    "a billion rows, as the header says": (
        lambda: (header(rows=10**9), GOOD_PARQUET),
        413,
        "table.json says 1,000,000,000 rows",
    ),
    "more rows than the footer says": (
        lambda: (GOOD_JSON, that_understates(1_000_000, 3)),
        400,
        "the Parquet file holds more",
    ),
    "fewer rows than the header says": (
        lambda: (header(rows=4), GOOD_PARQUET),
        400,
        "says 4 rows, the Parquet file has 3",
    ),
    "a neuron as text": (
        lambda: (GOOD_JSON, rows_with(neuron=pa.array(["0", "1", "1"]))),
        400,
        "neuron is of type string; expected int32",
    ),
    "a mean as a list": (
        lambda: (GOOD_JSON, rows_with(mean=pa.array([[0.5], [1.5], [1.0]]))),
        400,
        "mean is of type list<.*expected double",
    ),
    "a neuron as a fraction": (
        lambda: (GOOD_JSON, rows_with(neuron=pa.array([0.5, 1.5, 1.0]))),
        400,
        "neuron is of type floating",
    ),
    "a neuron beyond int32": (
        lambda: (GOOD_JSON, rows_with(neuron=pa.array([0, 1, 2**40]))),
        400,
        "neuron cannot be read as int32",
    ),
    "a layer beyond int16": (
        lambda: (GOOD_JSON, rows_with(layer=pa.array([0, 1, 70_000]))),
        400,
        "layer cannot be read as int16",
    ),
    "nothing there": (
        lambda: (GOOD_JSON, rows_with(mean=pa.array([None, 1.0, 1.0]))),
        400,
        "1 rows of the range table have no mean",
    ),
    "a column missing": (
        lambda: (GOOD_JSON, parquet(GOOD.rows.drop_columns("upper"))),
        400,
        "Missing: upper; not among them: none",
    ),
    "a column of names missing": (
        lambda: (GOOD_JSON, parquet(GOOD.rows.drop_columns("concept"))),
        400,
        "Missing: concept; not among them: none",
    ),
    "a column too many": (
        lambda: (GOOD_JSON, parquet(GOOD.rows.append_column("colour", _FLOATS))),
        400,
        "not among them: colour",
    ),
    "a column twice": (
        lambda: (GOOD_JSON, parquet(GOOD.rows.append_column("mean", _FLOATS))),
        400,
        "there twice: mean",
    ),
    "nested types": (lambda: (GOOD_JSON, nested(10)), 400, "Missing: hook_point"),
    "types nested too deeply": (lambda: (GOOD_JSON, nested(60)), 400, "too deeply nested"),
    "a name of a megabyte": (
        lambda: (GOOD_JSON, rows_with(concept=pa.array(["x" * 1_000_000] * 3))),
        400,
        "A concept has 1,000,000 bytes",
    ),
    "a lower bound that is NaN": (lambda: honest({**JOY, "lower": NAN}), 400, "wrong lower: nan"),
    "an upper bound that is NaN": (lambda: honest({**JOY, "upper": NAN}), 400, "expected at most upper"),
    "an empty range": (lambda: honest({**JOY, "lower": INF, "upper": INF}), 400, "wrong lower: inf"),
    "a negative neuron": (lambda: honest({**JOY, "neuron": -1}), 400, "wrong neuron: -1"),
    "a neuron beyond the width": (lambda: honest({**JOY, "neuron": 4}), 400, "wrong neuron: 4"),
    "a negative layer": (lambda: honest({**JOY, "layer": -1}), 400, "wrong layer: -1"),
    "a neuron twice": (lambda: honest(JOY, {**JOY, "rank": 2}), 400, "1 rows name a neuron"),
    "a hook point without a width": (lambda: honest({**JOY, "hook_point": "attn_out"}), 400, "No width is given"),
    "no rows": (lambda: honest(), 400, "at least one row"),
    "an absurd width": (lambda: (header(widths={"mlp_post": 2**40}), GOOD_PARQUET), 400, "widths.mlp_post"),
    "a negative width": (lambda: (header(widths={"mlp_post": 4, "x": -1}), GOOD_PARQUET), 400, "widths.x"),
    "another id": (lambda: (header(id="tbl_" + "0" * 16), GOOD_PARQUET), 400, f"the content has the id {GOOD.id}"),
    "another tau": (lambda: (header(tau=2.0), GOOD_PARQUET), 400, f"table.json says {GOOD.id}, but the content"),
    "another model": (
        lambda: (header(model={"id": "tiny", "config_hash": "d" * 16}), GOOD_PARQUET),
        400,
        f"table.json says {GOOD.id}, but the content",
    ),
    "an id that is a path": (lambda: (header(id="../../../etc/x"), GOOD_PARQUET), 400, "no table.json: id"),
    "a method that the columns are not of": (
        lambda: (header(format_version=2, method="hpd"), GOOD_PARQUET),
        400,
        "Missing: piece, posterior",
    ),
    "pieces that overlap": (
        lambda: honest(*pieces("joy", 1, [(0.0, 0.5, 0.5), (0.5, 1.0, 0.5)]), format_version=2, method="hpd"),
        400,
        "wrong lower: 0.5 .* expected above the upper bound",
    ),
    "a later format": (lambda: (header(format_version=3), GOOD_PARQUET), 400, "format version 3"),
    "a format before the first": (lambda: (header(format_version=0), GOOD_PARQUET), 400, "format_version"),
    "a header of half a JSON": (lambda: (GOOD_JSON[:50], GOOD_PARQUET), 400, "no table.json"),
    "a header that is a list": (lambda: (b"[1]", GOOD_PARQUET), 400, "no table.json"),
    "a header nested too deeply": (lambda: (b"[" * 500_000, GOOD_PARQUET), 400, "nested too deeply"),
    "a header with NaN": (lambda: (header(coverage={"x": NAN}), GOOD_PARQUET), 400, "not right"),
    "a header with half a character": (
        lambda: (header(coverage={"x": "\ud800"}), GOOD_PARQUET),
        400,
        "not right|but the",
    ),
    "a header that is not UTF-8": (lambda: (b"\xff\xfe\x00", GOOD_PARQUET), 400, "no table.json"),
    "a header with an unknown key": (lambda: (header(colour="red"), GOOD_PARQUET), 400, "colour"),
    "the two parts exchanged": (lambda: (GOOD_PARQUET, GOOD_JSON), 400, "no table.json"),
}
"""What is wrong, the two files, the status of the answer, and what its sentence says."""
