"""Range tables over HTTP, as any client sees them; what a body holds is read by pyarrow and json, not by our code."""

import gzip
import io
import json
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from neuronlens.ranges import PIECES_SCHEMA, SCHEMA, RangeTable
from neuronlens.serving.representations import ROWS_PER_PIECE
from tests.range_tables import large_table, pieces, row, table_of
from tests.table_servers import READ_KEY, WRITE_KEY, app_of, service_of_tables, table_server

READER, WRITER = ({"Authorization": f"Bearer {key}"} for key in (READ_KEY, WRITE_KEY))
ARROW, PARQUET = "application/vnd.apache.arrow.stream", "application/vnd.apache.parquet"
NAME = 'it\'s "joy"\n\\ läs 怒 \x07'
INF = float("inf")

ROWS = [
    row("anger", 2, 0.1, 0.2, rank=2),
    row("anger", 1, -1e-7, 1e-300),
    row("joy", 3, 1 / 3, 1e22, layer=3, lower=-INF, upper=INF),
    row(NAME, 0, 123456789.123456789, 0.0, layer=3, hook_point="resid_post"),
    row(NAME, 0, 0.0, 5e-324, n=2**53 + 1),
]
TABLE = table_of(ROWS, widths={"mlp_post": 4, "resid_post": 4})
OLDER = table_of([row("joy", 0, 1.0, 1.0)])
PIECES = table_of(
    [*pieces("joy", 1, [(-INF, -1.0, 0.75), (1 / 3, INF, 1.0)]), *pieces("joy", 0, [(0.0, 1.0, 0.0)], rank=2)],
    method="budget",
    options={"budget": 0.02},
)
MANY = large_table(3 * ROWS_PER_PIECE + 5)
"""More rows than one piece holds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tables")
    for age, table in enumerate((PIECES, MANY, OLDER, TABLE)):
        stamp = 1_700_000_000 + 100 * age
        os.utime(Path(table.save(root)) / "table.json", (stamp, stamp))
    return root


@pytest.fixture(scope="module")
def url(folder: Path):
    with table_server(uploads=folder) as url:
        yield url


@pytest.fixture(scope="module")
def get(url: str):
    with httpx.Client(base_url=url, headers={**READER, "Accept-Encoding": "identity"}) as client:
        yield client.get


def stored(folder: Path, table: RangeTable) -> list[dict]:
    """The rows of a table's file."""
    return pq.read_table(folder / "ranges" / table.id / "ranges.parquet").to_pylist()


def from_arrow(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()


def data_path(table: RangeTable = TABLE) -> str:
    return f"/v1/tables/{table.id}/data"


# --- which there are -------------------------------------------------------------------------------------------------


def test_tables__are_listed_newest_first(get) -> None:
    answer = get("/v1/tables").json()
    assert answer["object"] == "list"
    assert [table["id"] for table in answer["data"]] == [TABLE.id, OLDER.id, MANY.id, PIECES.id]
    assert answer["data"][0] == {
        "object": "table",
        "id": TABLE.id,
        "created": 1_700_000_300,
        "header": TABLE.header.model_dump(),
    }


@pytest.mark.parametrize("name", ["latest", TABLE.id])
def test_table__says_what_it_holds(get, name: str) -> None:
    answer = get(f"/v1/tables/{name}").json()
    assert answer["header"] == TABLE.header.model_dump()
    assert answer["concepts"] == sorted(["anger", "joy", NAME])
    assert (answer["layers"], answer["hook_points"]) == ([0, 3], ["mlp_post", "resid_post"])


def test_concepts__are_counted(get) -> None:
    answer = get(f"/v1/tables/{TABLE.id}/concepts").json()
    assert answer["table"] == TABLE.id
    assert answer["data"] == [
        {"concept": "anger", "ranges": 2, "layers": [0], "hook_points": ["mlp_post"]},
        {"concept": NAME, "ranges": 2, "layers": [0, 3], "hook_points": ["mlp_post", "resid_post"]},
        {"concept": "joy", "ranges": 1, "layers": [3], "hook_points": ["mlp_post"]},
    ]


def test_table__with_pieces_says_its_method_and_counts_a_range_once(get) -> None:
    header = get(f"/v1/tables/{PIECES.id}").json()["header"]
    assert (header["format_version"], header["method"], header["options"]) == (2, "budget", {"budget": 0.02})
    assert get(f"/v1/tables/{PIECES.id}/concepts").json()["data"] == [
        {"concept": "joy", "ranges": 2, "layers": [0], "hook_points": ["mlp_post"]}
    ]
    rows = get(data_path(PIECES), params={"top_fraction": 0.25}).json()["data"]
    found = [(r["neuron"], r["piece"], r["lower"], r["upper"], r["posterior"]) for r in rows]
    assert found == [(1, 0, None, -1.0, 0.75), (1, 1, 1 / 3, None, 1.0)]


def test_table__that_is_not_there_is_404_with_those_that_are(get) -> None:
    for path in ("", "/concepts", "/data"):
        response = get(f"/v1/tables/tbl_{'0' * 16}{path}")
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (404, "table_not_found", "not_found_error")
        assert TABLE.id in error["message"]


def test_tables__never_name_a_folder_of_the_server(get, folder: Path) -> None:
    for path in ("/v1/tables", "/v1/tables/latest", "/v1/tables/latest/concepts", "/v1/tables/tbl_0", data_path()):
        assert str(folder) not in get(path).text


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [TABLE, MANY, PIECES], ids=["few", "many", "pieces"])
def test_data__as_arrow_is_the_file(get, folder: Path, table: RangeTable) -> None:
    response = get(data_path(table), headers={"Accept": ARROW})
    assert response.headers["Content-Type"] == ARROW
    assert from_arrow(response.content).schema == (PIECES_SCHEMA if table is PIECES else SCHEMA)
    assert from_arrow(response.content).to_pylist() == stored(folder, table)


@pytest.mark.parametrize("table", [TABLE, MANY, PIECES], ids=["few", "many", "pieces"])
def test_data__as_parquet_is_the_file(get, folder: Path, table: RangeTable) -> None:
    response = get(data_path(table), params={"format": "parquet"})
    assert response.headers["Content-Type"] == PARQUET
    assert pq.read_table(io.BytesIO(response.content)).to_pylist() == stored(folder, table)


@pytest.mark.parametrize("table", [TABLE, MANY, PIECES], ids=["few", "many", "pieces"])
def test_data__as_json_is_the_file_with_null_for_what_is_not_bounded(get, folder: Path, table: RangeTable) -> None:
    response = get(data_path(table))
    assert response.headers["Content-Type"] == "application/json"
    answer = json.loads(response.content, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    expected = [
        {name: None if value in (INF, -INF) else value for name, value in found.items()}
        for found in stored(folder, table)
    ]
    assert answer == {"object": "list", "table": table.id, "rows": table.rows.num_rows, "data": expected}


@pytest.mark.parametrize("form", ["json", "arrow", "parquet"])
def test_data__of_no_rows_is_whole(get, form: str) -> None:
    response = get(data_path(), params={"neuron": 3, "concept": "anger", "format": form})
    read = {
        "json": lambda content: json.loads(content)["data"],
        "arrow": lambda content: from_arrow(content).to_pylist(),
        "parquet": lambda content: pq.read_table(io.BytesIO(content)).to_pylist(),
    }
    assert response.status_code == 200
    assert read[form](response.content) == []


@pytest.mark.parametrize(
    ("params", "keep"),
    [
        ({"concept": "joy"}, lambda r: r["concept"] == "joy"),
        ({"concept": ["joy", NAME]}, lambda r: r["concept"] in ("joy", NAME)),
        ({"layer": [3]}, lambda r: r["layer"] == 3),
        ({"hook_point": "resid_post", "layer": 3}, lambda r: r["hook_point"] == "resid_post"),
        ({"neuron": [0, 1], "layer": [0, 3]}, lambda r: r["neuron"] in (0, 1)),
        ({"top_fraction": 0.25}, lambda r: r["rank"] <= 1),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_data__is_filtered(get, folder: Path, params: dict, keep) -> None:
    got = from_arrow(get(data_path(), params={**params, "format": "arrow"}).content).to_pylist()
    assert got == [found for found in stored(folder, TABLE) if keep(found)]


def test_data__is_cut_at_the_limit(get, folder: Path) -> None:
    assert get(data_path(MANY), params={"limit": 3}).json()["data"] == stored(folder, MANY)[:3]


@pytest.mark.parametrize(
    ("query", "param", "message"),
    [
        ("layr=3", "layr", "'layr' is not known. Expected: hook_point, layer, concept, neuron, top_fraction, limit"),
        ("format=arrow&format=json", "format", "'format' came 2 times; expected once"),
        ("concept=fear", "concept", "has no concept fear. It has: anger, it's"),
        ("layer=7", "layer", "has no layer 7. It has: 0, 3"),
        ("hook_point=mlp", "hook_point", "has no hook point mlp. It has: mlp_post, resid_post"),
        ("neuron=4", "neuron", "has no neuron 4. Expected 0 to 3"),
        ("top_fraction=0.9", "top_fraction", "at most 0.5"),
        ("top_fraction=nan", "top_fraction", "top_fraction"),
        ("layer=x", None, "layer"),
        ("layer=-1", None, "layer"),
        ("limit=0", "limit", "limit"),
        ("format=csv", "format", "'json', 'arrow' or 'parquet'"),
    ],
)
def test_data__refuses_a_query_by_name(get, query: str, param: str | None, message: str) -> None:
    response = get(f"{data_path()}?{query}")
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert param is None or error["param"] == param
    assert message in error["message"]


def test_routes__refuse_parameters_that_they_do_not_have(get) -> None:
    for path in ("/v1/tables", "/v1/tables/latest", "/v1/tables/latest/concepts"):
        response = get(path, params={"limit": 3})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "limit")


def test_data__that_nobody_can_read_is_406_with_what_there_is(get) -> None:
    response = get(data_path(), headers={"Accept": "text/csv"})
    assert (response.status_code, response.json()["error"]["code"]) == (406, "not_acceptable")
    assert all(name in response.json()["error"]["message"] for name in ("application/json", ARROW, PARQUET))
    response = get(data_path(), headers={"Accept-Encoding": "br, identity;q=0"})
    assert (response.status_code, response.json()["error"]["param"]) == (406, "Accept-Encoding")


def raw(url: str, path: str, **headers: str) -> tuple[httpx.Response, bytes]:
    """An answer and its body as it travelled."""
    with httpx.stream("GET", url + path, headers={**READER, "Accept-Encoding": "identity", **headers}) as response:
        return response, b"".join(response.iter_raw())


@pytest.mark.parametrize("table", [TABLE, MANY], ids=["few", "many"])
@pytest.mark.parametrize("form", ["json", "arrow", "parquet"])
def test_data__is_compressed_where_the_client_takes_it_and_it_pays(url: str, form: str, table: RangeTable) -> None:
    path = f"{data_path(table)}?format={form}"
    plain = raw(url, path)[1]
    expected = {
        "json": {"gzip": "gzip", "zstd": "zstd", "gzip, deflate, br, zstd": "zstd"},
        "arrow": {"gzip": None, "zstd": "zstd", "gzip, identity;q=0": "gzip"},
        "parquet": {"gzip": None, "zstd": None},
    }
    unpack = {
        None: lambda content: content,
        "gzip": gzip.decompress,
        "zstd": lambda content: subprocess.run(["zstd", "-dc"], input=content, capture_output=True, check=True).stdout,
    }
    for asked, coding in expected[form].items():
        response, content = raw(url, path, **{"Accept-Encoding": asked})
        assert response.headers.get("Content-Encoding") == coding, asked
        assert unpack[coding](content) == plain


# --- what a client has already ---------------------------------------------------------------------------------------


def test_etag__is_one_for_each_representation(url: str) -> None:
    requests = [
        (f"{data_path()}?{query}", {"Accept-Encoding": coding})
        for query in ("format=json", "format=arrow", "format=parquet", "format=json&layer=0", "format=json&limit=1")
        for coding in ("identity", "zstd", "gzip")
    ]
    answers = [raw(url, path, **headers) for path, headers in requests]
    by_etag: dict[str, set[bytes]] = {}
    for response, content in answers:
        assert response.headers["ETag"].startswith('"')
        by_etag.setdefault(response.headers["ETag"], set()).add(content)
    assert all(len(contents) == 1 for contents in by_etag.values())
    assert len(by_etag) == len({content for _, content in answers})
    again = [raw(url, path, **headers)[1] for path, headers in requests]
    assert again == [content for _, content in answers]


def test_etag__is_that_of_what_is_asked_for_not_of_how(get) -> None:
    one = get(f"{data_path()}?layer=0&layer=3&concept=joy&format=arrow")
    same = get(f"{data_path()}?concept=joy&layer=3&layer=0", headers={"Accept": ARROW})
    assert one.headers["ETag"] == same.headers["ETag"]


@pytest.mark.parametrize("path", ["/v1/tables", "/v1/tables/latest", "/v1/tables/latest/concepts", data_path()])
def test_if_none_match__is_answered_with_304(get, path: str) -> None:
    etag = get(path).headers["ETag"]
    for header in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        response = get(path, headers={"If-None-Match": header})
        assert (response.status_code, response.content, response.headers["ETag"]) == (304, b"", etag), header
        assert response.headers["Cache-Control"]
    for header in ('"other"', etag.strip('"'), ""):
        assert get(path, headers={"If-None-Match": header}).status_code == 200


def test_if_none_match__star_does_not_hide_a_wrong_request(get) -> None:
    assert get(f"{data_path()}?concept=fear", headers={"If-None-Match": "*"}).status_code == 400
    assert get(f"/v1/tables/tbl_{'0' * 16}/data", headers={"If-None-Match": "*"}).status_code == 404


def test_caches__keep_a_named_table_for_good_and_the_newest_not_at_all(get) -> None:
    for path in ("", "/concepts", "/data?layer=3&format=arrow"):
        named, newest = get(f"/v1/tables/{TABLE.id}{path}"), get(f"/v1/tables/latest{path}")
        assert named.headers["Cache-Control"] == "private, max-age=31536000, immutable"
        assert "Content-Location" not in named.headers
        assert newest.headers["Cache-Control"] == "private, no-cache"
        assert newest.headers["Content-Location"] == f"/v1/tables/{TABLE.id}{path}"
        assert (newest.content, newest.headers["ETag"]) == (named.content, named.headers["ETag"])
    assert get(data_path()).headers["Vary"] == "Accept, Accept-Encoding"
    assert get("/v1/tables").headers["Cache-Control"] == "private, no-cache"


@pytest.mark.parametrize("path", ["/v1/tables", "/v1/tables/latest", "/v1/tables/latest/concepts", data_path(MANY)])
def test_head__is_get_without_the_body(url: str, get, path: str) -> None:
    plain = {**READER, "Accept-Encoding": "identity"}
    head, whole = httpx.head(url + path, headers=plain), get(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("ETag", "Content-Type", "Cache-Control", "Vary", "Content-Location"):
        assert head.headers.get(name) == whole.headers.get(name)
    assert head.headers.get("Content-Length") in (None, whole.headers.get("Content-Length"))
    assert httpx.head(url + path, headers={**plain, "If-None-Match": head.headers["ETag"]}).status_code == 304


# --- who may, and under load -----------------------------------------------------------------------------------------


def test_routes__ask_for_a_key(url: str) -> None:
    for path in ("/v1/tables", "/v1/tables/latest", "/v1/tables/latest/concepts", data_path()):
        assert httpx.get(url + path).status_code == 401
        assert httpx.head(url + path).status_code == 401
    files = {"header": ("h", TABLE.header_json()), "rows": ("r", TABLE.rows_parquet())}
    for headers, status in (({}, 401), (READER, 403), (WRITER, 200)):
        assert httpx.post(f"{url}/v1/tables", files=files, headers=headers, timeout=60).status_code == status


def test_data__of_a_reader_that_stands_still_holds_nobody_up(url: str) -> None:
    with httpx.stream("GET", f"{url}{data_path(MANY)}", headers=READER) as slow:
        next(slow.iter_raw(1))
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: raw(url, f"{data_path(MANY)}?format=arrow")[1], range(16)))
        assert all(from_arrow(answer).num_rows == MANY.rows.num_rows for answer in answers)


def test_data__goes_on_after_clients_that_left(url: str, get) -> None:
    before = threading.active_count()
    for _ in range(20):
        with httpx.stream("GET", f"{url}{data_path(MANY)}", headers=READER) as response:
            next(response.iter_raw(1))
    assert get(data_path(MANY)).json()["rows"] == MANY.rows.num_rows
    assert threading.active_count() <= before + 40  # Starlette's pool of threads


def test_tables__that_were_there_are_there_after_a_restart_and_damage_is_no_5xx(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "ranges" / TABLE.id / "ranges.parquet").write_bytes(OLDER.rows_parquet())
    with table_server(uploads=copy) as url:
        listed = [table["id"] for table in httpx.get(f"{url}/v1/tables", headers=READER).json()["data"]]
        damaged = httpx.get(f"{url}{data_path()}", headers=READER)
        latest = httpx.get(f"{url}/v1/tables/latest/data", headers=READER)
    assert set(listed) == {OLDER.id, MANY.id, PIECES.id}
    assert (damaged.status_code, damaged.json()["error"]["code"]) == (409, "table_damaged")
    assert latest.headers["Content-Location"] == f"/v1/tables/{OLDER.id}/data"


def test_list__sees_an_upload_at_once(tmp_path: Path) -> None:
    with table_server(uploads=tmp_path) as url:
        assert httpx.get(f"{url}/v1/tables", headers=READER).json()["data"] == []
        files = {"header": ("h", TABLE.header_json()), "rows": ("r", TABLE.rows_parquet())}
        assert httpx.post(f"{url}/v1/tables", files=files, headers=WRITER, timeout=60).status_code == 201
        listed = httpx.get(f"{url}/v1/tables", headers=READER).json()["data"]
        assert [table["id"] for table in listed] == [TABLE.id]
        assert time.time() - 60 < listed[0]["created"] <= time.time()


# --- the schema says so ----------------------------------------------------------------------------------------------


def test_openapi__is_what_the_server_does(folder: Path) -> None:
    """Requests made up from the schema, right and wrong ones: no 5xx, and every answer as the schema says. (It cannot
    say which concepts there are, nor which bytes are a table: such requests may be refused.)"""
    app = app_of(service_of_tables(uploads=folder))
    for path, operations in app.openapi()["paths"].items():
        if "{id}" in path:
            operations["get"]["parameters"][0]["schema"]["examples"] = ["latest", TABLE.id]
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    n_operations = 0
    for found in schema.get_all_operations():
        operation, n_operations = found.ok(), n_operations + 1
        for mode in schemathesis.GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=2 if operation.method == "post" else 5,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            def answers_as_documented(case: schemathesis.Case) -> None:
                case.call_and_validate(headers=WRITER, excluded_checks=[positive_data_acceptance])

            answers_as_documented()
    assert n_operations == 5
