"""What stands before the routes: ids, logs, hosts, limits of bodies and heads, and the drain; over real sockets where a
client misbehaves."""

import contextlib
import io
import json
import logging
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.testclient import TestClient

from neuronlens.serving import logs
from neuronlens.serving.auth import Keys
from neuronlens.serving.settings import Limits
from neuronlens.serving.wire import MAX_HEAD_BYTES, bounded_http
from tests.neuronlens.serving.shells import READ_KEY, WRITE_KEY, bare_service, bearer, guarded_app
from tests.served import served

LIMITS = Limits(body_bytes=1000, body_seconds=0.4, upload_bytes=100_000)
KEYS = Keys.of([("read", READ_KEY), ("write", WRITE_KEY)])
ASK = b"POST /v1/ask HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\n" % (
    READ_KEY.encode()
)


@contextlib.contextmanager
def captured_log():
    """Lines that the server logs meanwhile, each a dict."""
    root, ours = logging.getLogger(), logging.getLogger("neuronlens.serving")
    before = root.handlers, root.level, ours.level
    stream, lines = io.StringIO(), []
    logs.configure(stream)
    try:
        yield lines
    finally:
        root.handlers, root.level = before[:2]
        ours.setLevel(before[2])
        logging.captureWarnings(False)
        lines += [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture(scope="module")
def service():
    return bare_service(keys=KEYS, limits=LIMITS)


@pytest.fixture(scope="module")
def url(service):
    with served(guarded_app(service), http=bounded_http(LIMITS.body_seconds), ws="none") as url:
        yield url


@contextlib.contextmanager
def connected(url):
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        yield connection


def read_until_closed(connection):
    """Everything that the server sends before it ends the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def answer_of(received):
    """Status and error code of one HTTP answer."""
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


# --- ids and logs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["req-1", "0b3f:7/a_B.c+=", "x" * 128])
def test_request_id__that_is_sane_is_kept(given):
    answer = TestClient(guarded_app(bare_service())).get("/health", headers={"X-Request-Id": given})
    assert answer.headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "two words", 'quo"te', "\u00fc".encode("latin-1"), "a\x1b[31m"])
def test_request_id__is_made_where_none_or_an_odd_one_came(given):
    headers = {} if given is None else {"X-Request-Id": given}
    client = TestClient(guarded_app(bare_service()))
    made = [client.get("/health", headers=headers).headers["X-Request-Id"] for _ in range(2)]
    assert all(len(one) == 32 and one.isalnum() for one in made)
    assert made[0] != made[1]


def test_log__has_one_line_a_request_with_what_the_route_noted(url):
    with captured_log() as lines:
        httpx.post(
            f"{url}/v1/ask?secret=1",
            json={"prompt": "a private thought"},
            headers={**bearer(READ_KEY), "X-Request-Id": "r-1"},
        )
        httpx.get(f"{url}/v1/nowhere%0a%1b[31m", headers={"X-Request-Id": "r-2"})
        time.sleep(0.1)
    one, two = lines
    assert one["seconds"] >= 0
    assert one["time"]
    assert {key: value for key, value in one.items() if key not in ("seconds", "time")} == {
        "event": "request",
        "level": "info",
        "request_id": "r-1",
        "method": "POST",
        "path": "/v1/ask",
        "status": 200,
        "caller": KEYS.caller(f"Bearer {READ_KEY}".encode()).name,
        "prompt_tokens": 3,
    }
    assert (two["request_id"], two["status"], two["error"]) == ("r-2", 401, "missing_api_key")
    assert two["path"] == "/v1/nowhere%0A%1B%5B31m"
    assert READ_KEY not in json.dumps(lines)
    assert "private" not in json.dumps(lines)


def test_log__shows_a_terminal_no_control_characters():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    root, ours = logging.getLogger(), logging.getLogger("neuronlens.serving")
    before = root.handlers, root.level, ours.level
    terminal = Terminal()
    try:
        logs.configure(terminal)
        logs.log.info("request", prompt="\x1b]0;owned\x07")
        logging.getLogger("uvicorn.error").warning("Invalid \x1b[2J request")
    finally:
        root.handlers, root.level = before[:2]
        ours.setLevel(before[2])
        logging.captureWarnings(False)
    assert "owned" in terminal.getvalue()
    assert "\x1b]" not in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()


def test_log__takes_uvicorns_own_lines_the_same_way():
    with captured_log() as lines:
        logging.getLogger("uvicorn.error").warning("Invalid %s request", "HTTP")
        logging.getLogger("uvicorn.error").info("chatter")
    assert [(line["event"], line["level"]) for line in lines] == [("Invalid HTTP request", "warning")]


def test_stream__that_fails_midway_is_cut_and_logged(url):
    with captured_log() as lines, pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{url}/v1/ticks", params={"fail_at": 2}, headers=bearer(READ_KEY))
    failed = [line for line in lines if line["event"] == "request failed"]
    assert "ZeroDivisionError" in failed[0]["exception"]


def test_client__that_leaves_is_noticed_and_noted(url):
    with captured_log() as lines:
        with httpx.stream(
            "GET", f"{url}/v1/ticks", params={"n": 10_000, "seconds": 0.01}, headers=bearer(READ_KEY)
        ) as stream:
            next(stream.iter_lines())
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and httpx.get(f"{url}/metrics").text.count(
            "neuronlens_requests_in_flight 2.0"
        ):
            time.sleep(0.02)
    left = [line for line in lines if line["path"] == "/v1/ticks"]
    assert [line.get("client_left") for line in left] == [True]
    assert left[0]["seconds"] < 5


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_body__that_declares_too_much_is_refused_before_it_comes(url):
    with connected(url) as connection:
        connection.sendall(ASK + b"Connection: close\r\nContent-Length: 1001\r\nExpect: 100-continue\r\n\r\n")
        received = read_until_closed(connection)
    assert b"100 Continue" not in received
    assert answer_of(received) == (413, "body_too_large")


@pytest.mark.parametrize("n_bytes", [999, 1000, 1001, 50_000])
def test_body__is_counted_where_nothing_is_declared(url, n_bytes):
    body = json.dumps({"prompt": ""}).encode()
    body = body[:-2] + b"a" * (n_bytes - len(body)) + body[-2:]
    answer = httpx.post(
        f"{url}/v1/ask",
        content=(body[i : i + 100] for i in range(0, len(body), 100)),
        headers={**bearer(READ_KEY), "Content-Type": "application/json"},
    )
    assert answer.request.headers["Transfer-Encoding"] == "chunked"
    assert answer.status_code == (200 if n_bytes <= 1000 else 413)
    if n_bytes > 1000:
        assert answer.json()["error"]["message"] == "The body is larger than 1,000 bytes."


@pytest.mark.parametrize(("n_bytes", "status"), [(100_000, 200), (100_001, 413)])
def test_upload__has_a_limit_of_its_own(url, n_bytes, status):
    for content in (b"x" * n_bytes, (b"x" * 1000 for _ in range(-(-n_bytes // 1000)))):
        answer = httpx.post(f"{url}/v1/tables", content=content, headers=bearer(WRITE_KEY))
        assert answer.status_code == status, answer.text


@pytest.mark.parametrize("declared", ["-1", "+5", "1e3", "99999999999999999999999999", "5, 5", "\u0665"])
def test_content_length__that_is_odd_does_no_harm(url, declared):
    with connected(url) as connection:
        connection.sendall(ASK + b"Content-Length: %s\r\n\r\n{}" % declared.encode())
        connection.shutdown(socket.SHUT_WR)
        received = read_until_closed(connection)
    assert received == b"" or answer_of(received)[0] in (400, 413)
    assert httpx.get(f"{url}/health").status_code == 200
    # Other servers than uvicorn may let it through to us.
    headers = {"Content-Type": "application/json", "Content-Length": declared.encode()}
    answer = TestClient(guarded_app(bare_service())).post("/v1/ask", content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code in (200, 413)


def test_body__that_comes_too_slowly_is_408_and_ends_the_connection(url):
    with connected(url) as connection:
        connection.sendall(ASK + b"Content-Length: 500\r\n\r\n")
        started = time.monotonic()
        with contextlib.suppress(OSError):
            for _ in range(40):
                connection.sendall(b"{")
                time.sleep(0.05)
                if connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    break
        received = read_until_closed(connection)
    assert answer_of(received) == (408, "body_too_slow")
    assert b"connection: close" in received.lower()
    assert 0.3 < time.monotonic() - started < 8


def test_upload__may_take_longer_where_it_keeps_coming(url):
    def rows():
        for _ in range(20):
            yield b"x" * 4000
            time.sleep(0.05)

    started = time.monotonic()
    answer = httpx.post(f"{url}/v1/tables", content=rows(), headers=bearer(WRITE_KEY))
    assert answer.json() == {"bytes": 80_000}
    assert time.monotonic() - started > 2 * LIMITS.body_seconds


def test_body__that_holds_more_than_it_declares_hurts_only_its_connection(url):
    body = b'{"prompt": "a"}'
    with connected(url) as connection:
        connection.sendall(ASK + b"Content-Length: %d\r\n\r\n" % len(body) + body + b'{"prompt": "and more"}')
        received = read_until_closed(connection)
    assert received.count(b"HTTP/1.1 ") <= 2
    assert b"bad_http" in received or b"200 OK" in received
    assert httpx.get(f"{url}/health").status_code == 200


def test_body__that_ends_early_is_no_error_of_the_server(url):
    with captured_log() as lines:
        with connected(url) as connection:
            connection.sendall(ASK + b'Content-Length: 500\r\n\r\n{"prompt"')
            time.sleep(0.1)
        time.sleep(0.3)
    assert [(line["event"], line["status"], line["client_left"]) for line in lines] == [("request", 499, True)]


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # TLS to a plain port
        b"\x00" * 1000,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/ask HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_garbage__is_refused_and_hurts_nobody(url, garbage):
    with connected(url) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        received = read_until_closed(connection)
    assert received == b"" or answer_of(received)[0] in (400, 401)
    assert b"Traceback" not in received
    assert httpx.get(f"{url}/health").status_code == 200


def test_head__that_is_too_large_is_431(url):
    with connected(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(OSError):
            for i in range(2 * MAX_HEAD_BYTES // 1000):
                connection.sendall(b"X-%d: %s\r\n" % (i, b"y" * 1000))
                time.sleep(0.001)
        received = read_until_closed(connection)
    assert answer_of(received) == (431, "headers_too_large")


def test_head__of_one_endless_header_is_cut_off(url):
    with connected(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: ")
        assert _n_taken(connection, b"y" * 10_000, 500) < 500


def _n_taken(connection, piece, n):
    """How many of `n` pieces could be sent."""
    for i in range(n):
        try:
            connection.sendall(piece)
        except OSError:
            return i
        time.sleep(0.0005)
    return n


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_head__that_comes_too_slowly_is_408(url, first):
    with connected(url) as connection:
        connection.sendall(first)
        started = time.monotonic()
        received = read_until_closed(connection)
    assert answer_of(received) == (408, "headers_too_slow")
    assert 0.3 < time.monotonic() - started < 8


def test_head__of_a_second_request_has_the_same_bounds(url):
    with connected(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b'{"status":"ok"}' in connection.recv(65536)
        time.sleep(2 * LIMITS.body_seconds)  # Idle between requests is no slowness.
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b'{"status":"ok"}' in connection.recv(65536)
        connection.sendall(b"GET /hea")
        assert answer_of(read_until_closed(connection)) == (408, "headers_too_slow")


def test_head__that_is_bad_does_not_end_up_inside_an_answer(url):
    with connected(url) as connection:
        head = b"GET /v1/ticks?n=50 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n" % READ_KEY.encode()
        connection.sendall(head)
        time.sleep(0.15)
        connection.sendall(b"\x00garbage\r\n\r\n")
        received = read_until_closed(connection)
    assert b"tick 0" in received
    assert received.count(b"HTTP/1.1") == 1


# --- hosts, origins, drain -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("a.example.com", 200),
        ("example.com", 400),
        ("evil.test", 400),
        ("localhost.evil.test", 400),
        ("evil.test:localhost", 400),
        ("127.0.0.1.evil.test", 400),
        ("[::1", 200),
        ("", 400),
    ],
)
def test_hosts__only_those_that_are_trusted_are_answered(host, status):
    trusted = ("localhost", "127.0.0.1", "[::1]", "*.example.com")
    client = TestClient(guarded_app(bare_service(trusted_hosts=trusted)))
    answer = client.get("/health", headers={"Host": host})
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["code"] == "host_not_allowed"
        assert answer.headers["X-Request-Id"]


def test_origins__may_ask_with_a_key_and_read_errors():
    client = TestClient(guarded_app(bare_service(keys=KEYS, allowed_origins=("https://lab.example",))))
    ours, other = {"Origin": "https://lab.example"}, {"Origin": "https://evil.test"}
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = client.options("/v1/ask", headers={**ours, **ask})
    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://lab.example"
    assert client.options("/v1/ask", headers={**other, **ask}).status_code == 400
    refused = client.get("/v1/tables/tbl_1", headers=ours)
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == "https://lab.example"
    assert "X-Request-Id" in refused.headers["Access-Control-Expose-Headers"]
    assert "Access-Control-Allow-Origin" not in client.get("/health", headers=other).headers


def test_origins__none_are_allowed_without_the_setting():
    answer = TestClient(guarded_app(bare_service())).get("/health", headers={"Origin": "https://lab.example"})
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_drain__turns_away_new_work_and_lets_probes_in():
    service = bare_service()
    client = TestClient(guarded_app(service))
    service.lifecycle.draining = True
    refused = client.post("/v1/ask", json={"prompt": "a"})
    assert refused.status_code == 503
    assert (refused.json()["error"]["code"], refused.json()["error"]["type"]) == ("draining", "server_error")
    assert int(refused.headers["Retry-After"]) > 0
    assert [client.get(path).status_code for path in ("/health", "/metrics", "/ready")] == [200, 200, 503]


def test_drain__lets_what_has_begun_go_on(service, url):
    try:
        with httpx.stream("GET", f"{url}/v1/ticks", params={"n": 20}, headers=bearer(READ_KEY)) as stream:
            lines = stream.iter_lines()
            next(lines)
            service.lifecycle.draining = True
            assert len(list(lines)) == 19
    finally:
        service.lifecycle.draining = False
