"""neuronlens.Client against a real server, and against servers that fail."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import neuronlens
from neuronlens import client as client_module
from neuronlens.client import Client, read_key
from neuronlens.errors import RunFailed, UsageError
from neuronlens.ranges import PIECES_SCHEMA, SCHEMA, RangeTable
from tests.range_tables import pieces, row, table_of
from tests.served import served
from tests.table_servers import READ_KEY, WRITE_KEY, app_of, service_of_tables

ROWS = [
    row("anger", 2, 0.1, 0.2, rank=2),
    row("anger", 1, -1e-7, 1e-300),
    row("joy", 3, 1 / 3, 1e22, layer=3, lower=float("-inf")),
    row("läs & 怒", 0, 1.0, 0.0, layer=3, hook_point="resid_post"),
]
TABLE = table_of(ROWS, widths={"mlp_post": 4, "resid_post": 4})
NEWER = table_of([row("joy", 0, 1.0, 1.0)])
PIECES = table_of(pieces("joy", 1, [(-1.0, 0.0, 0.75), (0.5, float("inf"), 1.0)]), method="hpd", options={"mass": 0.9})


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURONLENS_API_KEY", raising=False)
    monkeypatch.delenv("NEURONLENS_WRITE_KEY", raising=False)


@pytest.fixture(scope="module")
def seen() -> list[tuple[str, str, int]]:
    """Method, path with query, and status of what the server was asked."""
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tables")
    TABLE.save(root)
    return root


@pytest.fixture(scope="module")
def url(folder: Path, seen):
    app = app_of(service_of_tables(uploads=folder))

    async def watched(scope, receive, send) -> None:
        async def noting(message) -> None:
            if message["type"] == "http.response.start":
                query = scope["query_string"].decode()
                seen.append((scope["method"], scope["path"] + (f"?{query}" if query else ""), message["status"]))
            await send(message)

        await app(scope, receive, noting if scope["type"] == "http" else send)

    with served(watched) as url:
        yield url


@pytest.fixture
def client(url: str, seen):
    with Client(url, READ_KEY) as client:
        seen.clear()
        yield client


def test_table__is_the_one_on_the_server(client: Client, folder: Path) -> None:
    table = client.table("latest")
    assert (table.id, table.header) == (TABLE.id, TABLE.header)
    assert table.concepts == ("anger", "joy", "läs & 怒")
    assert (table.layers, table.hook_points) == ((0, 3), ("mlp_post", "resid_post"))
    stored = pq.read_table(folder / "ranges" / TABLE.id / "ranges.parquet")
    assert table.to_arrow().equals(stored)
    assert table.to_pandas()["lower"].tolist() == stored["lower"].to_pylist()
    assert TABLE.id in repr(table)


def test_tables__are_listed_and_know_what_they_hold(client: Client) -> None:
    (table,) = client.tables()
    assert table.id == TABLE.id
    assert table.concepts == ("anger", "joy", "läs & 怒")


@pytest.mark.parametrize(
    ("filters", "keep"),
    [
        ({"concept": "läs & 怒"}, lambda r: r["concept"] == "läs & 怒"),
        ({"concept": ["joy", "anger"], "layers": [0]}, lambda r: r["layer"] == 0),
        ({"layers": range(3, 4), "hook_points": ["mlp_post"]}, lambda r: r["concept"] == "joy"),
        ({"neurons": {1, 2}, "layers": [0]}, lambda r: r["neuron"] in (1, 2)),
        ({"top_fraction": 0.25}, lambda r: r["rank"] == 1),
        ({"layers": []}, lambda r: False),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_to_arrow__is_filtered(client: Client, folder: Path, filters: dict, keep) -> None:
    got = client.table().to_arrow(**filters)
    stored = pq.read_table(folder / "ranges" / TABLE.id / "ranges.parquet").to_pylist()
    assert got.schema == SCHEMA
    assert got.to_pylist() == [found for found in stored if keep(found)]


def test_download__is_a_table_that_can_be_saved_and_loaded(client: Client, tmp_path: Path) -> None:
    table = client.table(TABLE.id).download()
    assert (table.header, table.rows) == (TABLE.header, TABLE.rows)
    assert RangeTable.load(table.save(tmp_path)).id == TABLE.id


def test_table_with_pieces__is_published_and_downloaded_whole(tmp_path: Path) -> None:
    with served(app_of(service_of_tables(uploads=tmp_path))) as url, Client(url, WRITE_KEY) as client:
        assert client.publish(PIECES) == PIECES.id
        table = client.table(PIECES.id)
        assert table.header == PIECES.header
        assert table.to_arrow("joy").equals(PIECES.rows)
        assert table.to_arrow(layers=[]).schema == PIECES_SCHEMA
        assert table.download().rows.equals(PIECES.rows)


def test_download__refuses_what_is_not_the_table(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    table = client.table(TABLE.id)
    monkeypatch.setattr(table, "to_arrow", lambda: TABLE.rows.slice(1))
    with pytest.raises(RunFailed, match=f"is not range table {TABLE.id}: table.json says 4 rows, there are 3"):
        table.download()


def test_client__asks_for_unchanged_answers_without_their_bodies(client: Client, seen) -> None:
    answers = [client.table("latest").to_arrow(concept="joy") for _ in range(2)]
    assert answers[0].equals(answers[1])
    assert [status for _, _, status in seen] == [200, 200, 304, 304]


def test_client__forgets_what_it_has_no_room_for(url: str, seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_KEPT_BYTES", 10)
    with Client(url, READ_KEY) as client:
        seen.clear()
        for _ in range(2):
            client.table("latest")
    assert [status for _, _, status in seen] == [200, 200]


def test_client__reads_what_was_compressed_on_its_way(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_LOOPBACK", ())
    with Client(url, READ_KEY) as client:
        assert client.table().to_arrow().equals(TABLE.rows)


def test_publish__uploads_once_and_needs_a_key_that_may(url: str, tmp_path: Path, monkeypatch) -> None:
    with Client(url, READ_KEY) as client, pytest.raises(UsageError, match=r"may read only.*NEURONLENS_WRITE_KEY"):
        client.publish(NEWER)
    monkeypatch.setenv("NEURONLENS_API_KEY", READ_KEY)
    monkeypatch.setenv("NEURONLENS_WRITE_KEY", WRITE_KEY)
    with Client(url) as client:
        assert client.publish(NEWER) == client.publish(NEWER.save(tmp_path)) == NEWER.id
        assert client.table("latest").download().rows.equals(NEWER.rows)
        client.table(TABLE.id).to_arrow()
    (tmp_path / "ranges" / NEWER.id / "ranges.parquet").write_bytes(b"half")
    with Client(url) as client, pytest.raises(RunFailed, match="is damaged"):
        client.publish(tmp_path / "ranges" / NEWER.id)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda client: client.table("tbl_" + "0" * 16), f"There is no range table.*{TABLE.id}"),
        (lambda client: client.table("../../secret"), "There is no"),
        (lambda client: client.table().to_arrow(concept="fear"), "no concept fear. It has:"),
        (lambda client: client.neuron("mlp_post", 0, 1), "404|There is no"),
    ],
)
def test_client__says_what_the_server_says(client: Client, ask, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(client)


def test_client__says_how_to_give_a_key(url: str) -> None:
    with Client(url) as client, pytest.raises(UsageError, match=r"Authorization: Bearer KEY.*NEURONLENS_API_KEY"):
        client.tables()


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://x", "http://", "http://x:99999", "http://x?y", ""])
def test_client__refuses_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="is not the address of a server"):
        Client(address)


def test_client__refuses_a_key_that_no_header_takes() -> None:
    with pytest.raises(UsageError, match="cannot travel in a header"):
        Client("http://localhost:8000", "schlüssel\n")


def test_client__takes_the_address_that_openais_client_takes(url: str) -> None:
    with Client(f"{url}/v1/", READ_KEY) as client:
        assert client.tables()


# --- servers that fail -----------------------------------------------------------------------------------------------


class _Scripted(BaseHTTPRequestHandler):
    """Answers with what `script` says next: status, headers and body; None: ends the connection."""

    script: list[tuple[int, dict[str, str], bytes] | None]
    paths: list[str]

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.script.pop(0)
        if answer is None:
            self.close_connection = True
            return
        status, headers, body = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    """A server that answers as told, a client of it, and the pauses that the client makes."""
    pauses: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", pauses.append)
    servers = []

    def start(*script) -> tuple[Client, list[str], list[float]]:
        handler = type("Handler", (_Scripted,), {"script": list(script), "paths": []})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return Client(f"http://127.0.0.1:{server.server_port}", "k", timeout=5), handler.paths, pauses

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


OK = (200, {}, b'{"data": []}')


def busy(status: int, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, headers, json.dumps({"error": {"message": "Too much at once."}}).encode()


def test_client__tries_again_where_the_server_is_busy_or_breaks_off(scripted) -> None:
    whole = {"Content-Length": "400"}
    client, paths, pauses = scripted(None, busy(503), (200, whole, b'{"data"'), (502, {}, b"<html>"), OK)
    assert client.tables() == []
    assert len(paths) == 5
    assert all(earlier * 0.9 < later for earlier, later in pairwise(pauses))


def test_client__waits_as_long_as_the_server_says(scripted) -> None:
    client, _, pauses = scripted(busy(429, **{"Retry-After": "7"}), busy(429, **{"Retry-After": "9999"}), OK)
    client.tables()
    assert pauses == [7.0, client_module._LONGEST_PAUSE_SECONDS]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (busy(429), "Too much at once. .It was asked 5 times"),
        ((503, {}, b"upstream gone"), "status 503: upstream gone"),
        (None, "cannot be reached .*tried 5 times"),
    ],
)
def test_client__gives_up_after_a_few_tries(scripted, answer, message: str) -> None:
    client, paths, _ = scripted(*[answer] * 9)
    with pytest.raises(RunFailed, match=message):
        client.tables()
    assert len(paths) == client_module.MAX_TRIES


def test_client__says_that_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module.time, "sleep", lambda _: None)
    with pytest.raises(RunFailed, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        Client("http://127.0.0.1:9").tables()


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (busy(500), RunFailed, "Too much at once"),
        (busy(400), UsageError, "Too much at once"),
        ((301, {"Location": "https://x"}, b""), UsageError, "status 301"),
        ((200, {}, b"<html>"), RunFailed, "not JSON"),
    ],
)
def test_client__does_not_ask_again_where_the_answer_is_final(scripted, answer, kind, message: str) -> None:
    client, paths, _ = scripted(answer, OK)
    with pytest.raises(kind, match=message):
        client.tables()
    assert len(paths) == 1


def test_client__does_not_wait_for_ever(scripted) -> None:
    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            silence.wait(20)

    silence = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(RunFailed, match=r"did not answer within 0\.2 s"):
            Client(f"http://127.0.0.1:{server.server_port}", timeout=0.2).tables()
    finally:
        silence.set()
        server.shutdown()
        server.server_close()


def test_neuron__asks_for_a_card(scripted) -> None:
    client, paths, _ = scripted((200, {}, b'{"neuron": 7}'))
    assert client.neuron("blocks/3", 3, 7, tau=1.5) == {"neuron": 7}
    assert paths == ["/v1/neurons/blocks%2F3/3/7?tau=1.5"]


# --- keys in files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scope", "key"),
    [
        ("secret\n", "read", "secret"),
        ("# mine\n\n  secret  \n", "write", "secret"),
        ("read a\nwrite b\nwrite c\n", "write", "b"),
        ("read a\nwrite b\n", "read", "a"),
        ("write b\n", "read", "b"),
    ],
)
def test_read_key__takes_a_bare_key_and_the_servers_file(tmp_path: Path, text: str, scope: str, key: str) -> None:
    (tmp_path / "key").write_text(text)
    assert read_key(tmp_path / "key", scope=scope) == key


@pytest.mark.parametrize("text", ["", "read a\n", "# only words\n", "two keys\nand three words\n"])
def test_read_key__says_what_it_looked_for_and_shows_no_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(UsageError, match="holds no key with the write scope") as caught:
        read_key(tmp_path / "key", scope="write")
    assert "two" not in str(caught.value).replace(str(tmp_path), "")
    with pytest.raises(UsageError, match="cannot be read"):
        read_key(tmp_path / "nowhere")


def test_import__of_the_client_is_light() -> None:
    heavy = "{'httpx', 'pyarrow', 'numpy', 'torch', 'pandas', 'fastapi', 'pydantic'}"
    code = f"import sys, neuronlens; neuronlens.Client; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert neuronlens.Client is Client
