"""Keys: where they come from, what they open, and that they stay secret."""

import hmac
import os

import pytest
from fastapi.testclient import TestClient

from neuronlens.errors import UsageError
from neuronlens.serving.auth import Keys
from tests.neuronlens.serving.shells import READ_KEY, WRITE_KEY, bare_service, bearer, guarded_app

KEYS = Keys.of([("read", READ_KEY), ("write", WRITE_KEY)])


def key_file(folder, text, mode=0o600):
    path = folder / "keys.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def load(path, environ=None):
    warnings = []
    return Keys.load(path, environ or {}, warnings.append), warnings


@pytest.fixture(scope="module")
def client():
    return TestClient(guarded_app(bare_service(keys=KEYS)))


@pytest.fixture(scope="module")
def open_client():
    return TestClient(guarded_app(bare_service()))


def test_load__reads_scopes_comments_and_a_byte_order_mark(tmp_path):
    text = f"\ufeff# for the team\n\nread   {READ_KEY}\n  write {WRITE_KEY}\n"
    keys, warnings = load(key_file(tmp_path, text))
    assert keys == KEYS
    assert warnings == []


def test_load__takes_keys_from_the_environment_beside_those_of_the_file(tmp_path):
    environ = {"NEURONLENS_API_KEY": READ_KEY, "NEURONLENS_WRITE_KEY": WRITE_KEY}
    assert load(None, environ)[0] == KEYS
    both, _ = load(key_file(tmp_path, "read nl-another-0123456789\n"), environ)
    assert len(both.scopes) == 3
    assert load(key_file(tmp_path, f"read {READ_KEY}\n"), {"NEURONLENS_API_KEY": READ_KEY})[0].scopes[0][1] == "read"
    assert not load(None, {"NEURONLENS_API_KEY": ""})[0]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f"read {READ_KEY}\n{WRITE_KEY}\n", "Line 2 "),
        (f"admin {READ_KEY}\n", "Line 1 "),
        (f"read {READ_KEY} {WRITE_KEY}\n", "Line 1 "),
        ("# one\n\nwrite short\n", "in line 3 "),
        (f"read {READ_KEY}\nwrite {READ_KEY}\n", "Line 2 "),
        ("read nl-schlüssel-0123456789\n", "in line 1 "),
        (f"read {'x' * 600}\n", "in line 1 "),
        ("# nothing\n", "no key"),
        (b"read \xff\xfe0123456789abcdef\n", "cannot be read"),
    ],
)
def test_load__names_the_line_and_never_the_key(tmp_path, text, named):
    with pytest.raises(UsageError) as caught:
        load(key_file(tmp_path, text))
    assert named in str(caught.value)
    for secret in (READ_KEY, WRITE_KEY, "short ", "0123456789abcdef", "schl"):
        assert secret not in str(caught.value)


def test_load__says_that_a_file_is_not_there_and_that_a_key_of_the_environment_is_short(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "absent")
    with pytest.raises(UsageError, match="Is a directory"):
        load(tmp_path)
    with pytest.raises(UsageError, match="NEURONLENS_WRITE_KEY has 5 characters"):
        load(None, {"NEURONLENS_WRITE_KEY": "short"})


@pytest.mark.parametrize(("mode", "is_warned"), [(0o600, False), (0o640, False), (0o644, True)])
def test_load__warns_where_everyone_may_read_the_file(tmp_path, mode, is_warned):
    path = key_file(tmp_path, f"read {READ_KEY}\n", mode)
    _, warnings = load(path)
    assert [f"chmod 600 {path}" in warning for warning in warnings] == [True] * is_warned


def test_caller__compares_every_key_in_constant_time_whichever_fits(monkeypatch):
    compared = []
    compare = hmac.compare_digest

    def counted(a, b):
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    assert not KEYS.caller(f"Bearer {READ_KEY}".encode()).may_write
    assert KEYS.caller(f"bearer  {WRITE_KEY} ".encode()).may_write
    assert compared == [(32, 32)] * 4


def test_caller__has_a_name_that_is_not_the_key():
    caller = KEYS.caller(bearer(READ_KEY)["Authorization"].encode())
    assert len(caller.name) == 8
    assert caller.name not in READ_KEY
    assert caller.name != KEYS.caller(bearer(WRITE_KEY)["Authorization"].encode()).name


@pytest.mark.parametrize(
    ("header", "read", "write"),
    [
        (None, 401, 401),
        ("", 401, 401),
        ("Bearer", 401, 401),
        ("Bearer ", 401, 401),
        (READ_KEY, 401, 401),
        (f"Basic {READ_KEY}", 401, 401),
        (f"Bearer {READ_KEY}x", 401, 401),
        (f"Bearer {READ_KEY[:-1]}", 401, 401),
        (f"Bearer {READ_KEY}, Bearer {WRITE_KEY}", 401, 401),
        ("Bearer \xff\xfeschlüssel".encode("latin-1"), 401, 401),
        (b"Bearer \x80" + b"x" * 100_000, 401, 401),
        (f"Bearer {READ_KEY}", 200, 403),
        (f"BEARER {READ_KEY}", 200, 403),
        (f"Bearer {WRITE_KEY}", 200, 200),
    ],
)
def test_keys__open_what_their_scope_allows(client, header, read, write):
    headers = {} if header is None else {"Authorization": header}
    answers = [
        (client.get("/v1/tables/tbl_1", headers=headers), read),
        (client.post("/v1/tables", headers=headers, content=b"rows"), write),
    ]
    for answer, status in answers:
        assert answer.status_code == status, answer.text
        if status == 401:
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
        elif status == 403:
            assert answer.json()["error"]["type"] == "permission_error"
            assert "write scope" in answer.json()["error"]["message"]


def test_keys__are_asked_for_where_no_route_is(client):
    assert client.get("/v1/nowhere").status_code == 401
    assert client.get("/v1/nowhere", headers=bearer(READ_KEY)).status_code == 404
    # A route whose author forgot the dependency is closed too.
    assert client.get("/v1/raise/usage").status_code == 401


def test_keys__are_not_asked_for_by_probes_and_docs(client):
    for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200, path


def test_no_keys__leave_reading_open_and_writing_closed(open_client):
    assert open_client.get("/v1/tables/tbl_1").status_code == 200
    assert open_client.get("/v1/tables/tbl_1", headers=bearer("whatever")).status_code == 200
    refused = open_client.post("/v1/tables", content=b"rows")
    assert refused.status_code == 403
    assert "--api-key-file" in refused.json()["error"]["message"]


def test_keys__are_checked_before_a_byte_of_the_body_is_read(client):
    def body():
        raise AssertionError("the body was read")
        yield b""

    assert client.post("/v1/ask", content=body(), headers={"Content-Type": "application/json"}).status_code == 401


def test_openapi__declares_the_key(client):
    spec = client.get("/openapi.json").json()
    assert spec["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert spec["paths"]["/v1/tables"]["post"]["security"] == [{"key": []}]
    assert "security" not in spec["paths"]["/health"]["get"]


def test_load__does_not_read_the_environment_of_the_process(monkeypatch):
    monkeypatch.setitem(os.environ, "NEURONLENS_API_KEY", READ_KEY)
    assert not load(None)[0]
