"""Uploads: what is right is kept, and nothing else does any harm."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import httpx
import pytest

from neuronlens.ranges import RangeTable, TableModel
from neuronlens.serving import uploads
from neuronlens.serving.catalog import Catalog
from neuronlens.serving.check_upload import Refused, read_header, read_table
from neuronlens.serving.errors import ApiError
from neuronlens.serving.settings import Limits
from neuronlens.serving.uploads import check, check_model
from tests.bad_tables import BAD, GOOD, GOOD_JSON, GOOD_PARQUET, flipped
from tests.range_tables import large_table, large_table_with_pieces, row, table_of
from tests.table_servers import WRITE_KEY, table_server

WRITER = {"Authorization": f"Bearer {WRITE_KEY}"}


def opened(content: bytes) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 (gone with the object)
    file.write(content)
    file.flush()
    file.seek(0)
    return file


def checked(header: bytes, rows: bytes, **limits: int) -> RangeTable:
    return check(opened(header), opened(rows), Limits(**limits))


def send(url: str, header: bytes = GOOD_JSON, rows: bytes = GOOD_PARQUET, **options) -> httpx.Response:
    files = {"header": ("table.json", header), "rows": ("ranges.parquet", rows)}
    return httpx.post(f"{url}/v1/tables", **{"files": files, "headers": WRITER, "timeout": 60, **options})


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go while the test runs."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_check__gives_the_table_that_was_sent() -> None:
    table = checked(GOOD_JSON, GOOD_PARQUET)
    assert (table.header, table.rows) == (GOOD.header, GOOD.rows)


def test_check__takes_a_table_with_pieces_of_many_rows() -> None:
    table = large_table_with_pieces(50_000)
    found = checked(table.header_json(), table.rows_parquet())
    assert (found.header, found.rows) == (table.header, table.rows)


def test_check__takes_names_of_many_bytes_in_many_rows() -> None:
    table = large_table(50_000, concept="x" * 250)
    assert checked(table.header_json(), table.rows_parquet()).id == table.id


@pytest.mark.parametrize(("make", "status", "message"), BAD.values(), ids=BAD)
def test_read_table__refuses(make, status: int, message: str) -> None:
    header, rows = make()
    max_rows = Limits().upload_rows
    with pytest.raises(Refused, match=message) as caught:
        read_table(read_header(header, max_rows), rows, max_rows)
    assert (caught.value.status, caught.value.code) == (status, "too_large" if status == 413 else "bad_table")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("seed", range(60))
def test_read_table__survives_flipped_bits(seed: int) -> None:
    """Such a file is refused, or its values are those that its id promises."""
    with contextlib.suppress(Refused):
        assert read_table(GOOD.header, flipped(GOOD_PARQUET, seed), 10**6).rows.equals(GOOD.rows)


@pytest.mark.parametrize("case", ["random bytes", "truncated", "a billion rows", "a lower bound that is NaN"])
def test_check__refuses_and_leaves_nothing(case: str, temporary: Path) -> None:
    make, status, message = BAD[case]
    with pytest.raises(ApiError, match=message) as caught:
        checked(*make())
    assert caught.value.status == status
    assert list(temporary.iterdir()) == []


STARVED = """
import neuronlens.serving.check_upload as c
c._MEMORY_BYTES_PER_ROW, c._MEMORY_BYTES = 0, 270 << 20
c.main()
"""


def test_check__ends_what_takes_more_memory_than_its_rows_may(monkeypatch: pytest.MonkeyPatch) -> None:
    table = large_table(400_000)
    start = subprocess.Popen

    def starve(command: list[str], **options):
        return start([sys.executable, "-c", STARVED, *command[3:]], **options)

    monkeypatch.setattr(uploads.subprocess, "Popen", starve)
    with pytest.raises(ApiError, match=r"takes more memory|too much memory") as caught:
        checked(table.header_json(), table.rows_parquet())
    assert caught.value.status in (400, 413)


@pytest.mark.parametrize("end", ["os.abort()", "os._exit(0)", "print('nonsense')", "os.kill(os.getpid(), 11)"])
def test_check__answers_where_the_child_is_lost(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    monkeypatch.setattr(
        uploads.subprocess,
        "Popen",
        lambda command, **options: start([sys.executable, "-c", f"import os; {end}"], **options),
    )
    with pytest.raises(ApiError, match="cannot be checked") as caught:
        checked(GOOD_JSON, GOOD_PARQUET)
    assert (caught.value.status, caught.value.code) == (400, "bad_table")


def test_check__ends_a_child_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    monkeypatch.setattr(uploads, "cpu_seconds", lambda _: 0.2)
    monkeypatch.setattr(
        uploads.subprocess,
        "Popen",
        lambda command, **options: start([sys.executable, "-c", "import time; time.sleep(60)"], **options),
    )
    with pytest.raises(ApiError, match="cannot be checked"):
        checked(GOOD_JSON, GOOD_PARQUET)


def test_check__tells_the_child_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLENS_API_KEY", "secret-key")
    assert "secret-key" not in uploads._environment().values()


def served_model(**facts) -> SimpleNamespace:
    defaults = {"config_hash": "c" * 16, "widths": {"mlp_post": 4}, "sites": {"mlp_post": (0, 3)}}
    return SimpleNamespace(engine=SimpleNamespace(facts=SimpleNamespace(**{**defaults, **facts})))


def test_check_model__takes_a_table_of_the_served_model() -> None:
    check_model(GOOD, served_model())


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"config_hash": "e" * 16}, "config_hash is c{16}, this server's has e{16}"),
        ({"widths": {"mlp_post": 8}}, "mlp_post has 4 neurons, in the served model 8"),
        ({"widths": {"mlp_out": 4}}, "mlp_post has 4 neurons, in the served model it is not there"),
        ({"sites": {"mlp_post": (0, 1)}}, "ranges for mlp_post in layer 3, the served model has layers 0, 1"),
        ({"sites": {}}, "in layer 0, the served model has layers none"),
    ],
    ids=["config", "width", "hook point", "layer", "no sites"],
)
def test_check_model__refuses_a_table_of_another_model(facts: dict, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        check_model(GOOD, served_model(**facts))
    assert (caught.value.status, caught.value.code) == (409, "wrong_model")


def test_check_model__without_an_engine_goes_by_the_sources(tmp_path: Path) -> None:
    other = table_of([row("joy", 0, 1.0, 1.0)], model=TableModel(id="other", config_hash="d" * 16))
    sources = SimpleNamespace(engine=None, catalog=Catalog([GOOD.save(tmp_path)]))
    check_model(GOOD, sources)
    with pytest.raises(ApiError, match=r"this server's models have c{16}"):
        check_model(other, sources)
    check_model(other, SimpleNamespace(engine=None, catalog=Catalog([], uploads=str(tmp_path / "registry"))))


MULTIPART = {**WRITER, "Content-Type": "multipart/form-data; boundary=x"}
OTHER_FORMS: dict[str, tuple[dict, int, str]] = {
    "no header": ({"files": {"rows": ("r", GOOD_PARQUET)}}, 400, "has the parts 'rows'"),
    "no rows": ({"files": {"header": ("h", GOOD_JSON)}}, 400, "has the parts 'header'"),
    "rows twice": ({"files": [("rows", ("r", b"x"))] * 2}, 400, "has the parts 'rows', 'rows'"),
    "rows thrice": ({"files": [("rows", ("r", b"x"))] * 3}, 400, "Too many files"),
    "a third part": ({"data": {"colour": "red"}}, 400, "'colour'"),
    "json": ({"files": None, "json": {"header": 1}}, 415, "Content-Type is application/json. Expected multipart"),
    "no type": ({"files": None, "content": GOOD_PARQUET}, 415, "Content-Type is missing"),
    "no boundary": (
        {"files": None, "content": b"--x", "headers": {**WRITER, "Content-Type": "multipart/form-data"}},
        400,
        "Missing boundary",
    ),
    "no multipart": ({"files": None, "content": b"--x\r\nnonsense", "headers": MULTIPART}, 400, "The body"),
    "too large": ({"files": {"header": ("h", GOOD_JSON), "rows": ("r", bytes(200_000))}}, 413, "larger than 100,000"),
    "a query": ({"params": {"colour": "red"}}, 400, "'colour' is not known. Expected: none"),
}


class TestOverHttp:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("uploads")

    @pytest.fixture(scope="class")
    @classmethod
    def url(cls, folder: Path):
        with table_server(uploads=folder, upload_bytes=100_000) as url:
            yield url

    def test_upload__makes_a_table_once(self, url: str, folder: Path) -> None:
        first, again = send(url), send(url)
        assert (first.status_code, again.status_code) == (201, 200)
        assert first.headers["Location"] == again.headers["Location"] == f"/v1/tables/{GOOD.id}"
        assert first.json() == again.json() == httpx.get(f"{url}/v1/tables/{GOOD.id}", headers=WRITER).json()
        assert RangeTable.load(folder / "ranges" / GOOD.id).rows.equals(GOOD.rows)

    def test_upload__takes_what_curl_sends(self, url: str, tmp_path: Path) -> None:
        table = table_of([row("joy", 3, 1.0, 1.0)])
        folder = Path(table.save(tmp_path))
        parts = ("-F", f"header=@{folder}/table.json", "-F", f"rows=@{folder}/ranges.parquet")
        key = ("-H", f"Authorization: {WRITER['Authorization']}")
        command = ["curl", "-sS", "-w", "%{http_code}", "-o", "/dev/null", *key, *parts, f"{url}/v1/tables"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "201"

    def test_upload__takes_a_header_that_is_a_plain_field(self, url: str) -> None:
        table = table_of([row("läs 怒", 2, 1.0, 1.0)])
        response = send(url, data={"header": table.header_json().decode()}, files={"rows": ("r", table.rows_parquet())})
        assert response.status_code == 201, response.text

    def test_upload__that_is_bad_leaves_nothing(self, url: str, folder: Path, temporary: Path) -> None:
        before = sorted(folder.rglob("*"))
        response = send(url, rows=GOOD_PARQUET[:-10])
        assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_table")
        assert sorted(folder.rglob("*")) == before
        assert list(temporary.iterdir()) == []

    @pytest.mark.parametrize(("options", "status", "message"), OTHER_FORMS.values(), ids=OTHER_FORMS)
    def test_upload__refuses_a_body_of_another_form(self, url: str, options: dict, status: int, message: str) -> None:
        response = send(url, **options)
        assert (response.status_code, message in response.json()["error"]["message"]) == (status, True), response.text

    def test_upload__without_a_place_is_refused_before_it_is_read(self, tmp_path: Path) -> None:
        with table_server([GOOD.save(tmp_path)]) as url:
            response = send(url, rows=b"nothing that anybody looks at")
        assert (response.status_code, response.json()["error"]["code"]) == (403, "uploads_disabled")

    def test_upload__refuses_a_large_header(self, tmp_path: Path) -> None:
        with table_server(uploads=tmp_path) as url:
            response = send(url, header=b" " * 1_000_001)
        assert response.status_code == 413
        assert "'header' has 1,000,001 bytes" in response.json()["error"]["message"]

    def test_upload__goes_on_when_a_client_leaves_in_the_middle(self, url: str) -> None:
        def half():
            yield b"--x\r\n"
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            httpx.post(
                f"{url}/v1/tables",
                content=half(),
                headers={**WRITER, "Content-Type": "multipart/form-data; boundary=x"},
            )
        assert send(url).status_code == 200

    def test_upload__turns_away_more_than_a_few_at_once(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(uploads, "_places", threading.BoundedSemaphore(1))
        going_on, checking = threading.Event(), threading.Event()

        def slow(*_) -> RangeTable:
            checking.set()
            going_on.wait(30)
            return GOOD

        monkeypatch.setattr(uploads, "check", slow)
        answers: list[httpx.Response] = []
        first = threading.Thread(target=lambda: answers.append(send(url)))
        first.start()
        assert checking.wait(30)
        refused = send(url)
        going_on.set()
        first.join()
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
        assert answers[0].status_code == 200
        assert send(url).status_code == 200


SLOW_SERVER = """
import sys, threading, time
from pathlib import Path
import uvicorn
from neuronlens import ranges
from tests.table_servers import app_of, service_of_tables

write, pauses = ranges._write, sys.argv[3]

def pausing(fs, path, content):
    if pauses == "before " + Path(path).name:
        time.sleep(600)
    write(fs, path, content)
    if pauses == "after " + Path(path).name:
        time.sleep(600)

ranges._write = pausing
uvicorn.run(app_of(service_of_tables(uploads=sys.argv[1])), port=int(sys.argv[2]), log_level="critical")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("pause", "is_there"), [("after ranges.parquet", False), ("after table.json", True)])
def test_upload__killed_in_the_middle_leaves_nothing_half_written(tmp_path: Path, pause: str, is_there: bool) -> None:
    port = free_port()
    server = subprocess.Popen([sys.executable, "-c", SLOW_SERVER, str(tmp_path), str(port), pause])
    try:
        sender = threading.Thread(target=lambda: send_until_killed(f"http://127.0.0.1:{port}"))
        sender.start()
        awaited = tmp_path / "ranges" / GOOD.id / pause.removeprefix("after ")
        deadline = time.monotonic() + 60
        while not awaited.exists():
            assert time.monotonic() < deadline
            assert server.poll() is None
            time.sleep(0.02)
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
    sender.join()
    with table_server(uploads=tmp_path) as url:
        listed = httpx.get(f"{url}/v1/tables", headers=WRITER).json()["data"]
        assert [table["id"] for table in listed] == ([GOOD.id] if is_there else [])
        assert send(url).status_code == (200 if is_there else 201)
        assert len(httpx.get(f"{url}/v1/tables/{GOOD.id}/data", headers=WRITER).json()["data"]) == GOOD.rows.num_rows


def send_until_killed(url: str) -> None:
    while True:
        try:
            send(url)
            return
        except httpx.ConnectError:
            time.sleep(0.05)
        except httpx.TransportError:
            return


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_check__leaves_no_open_files_and_no_processes() -> None:
    def held() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = held()
    with pytest.raises(ApiError):
        checked(GOOD_JSON, b"junk")
    assert held() == before
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    assert "check_upload" not in children
