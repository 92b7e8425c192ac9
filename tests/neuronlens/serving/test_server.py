"""A server as a person and a process manager meet it: where it listens, how it ends, exit codes and streams."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import httpx
import pytest

from neuronlens.errors import UsageError
from neuronlens.identity import model_identity
from neuronlens.ranges import TableModel
from neuronlens.serving import server
from neuronlens.serving.settings import Limits
from tests.neuronlens.serving.shells import READ_KEY, WRITE_KEY, bearer
from tests.range_tables import row, table_of
from tests.tiny_models import save_tiny
from tests.warm import run_warm

SERVER = ("tests.neuronlens.serving.stream_server", "--drain-seconds")


class Started:
    """A server process; `ready` is the JSON object that it printed when it was."""

    def __init__(self, folder, module, *args, env=None):
        self.stderr = folder / "stderr.txt"
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *args],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **(env or {})},
            )
        line = self.process.stdout.readline()
        self.ready = json.loads(line) if line.startswith("{") else None
        self.url = self.ready and self.ready["url"]

    def ends(self, within=20.0):
        """The exit code."""
        return self.process.wait(timeout=within)

    @property
    def log(self):
        return [json.loads(line) for line in self.stderr.read_text().splitlines() if line.startswith("{")]


@contextlib.contextmanager
def started(folder, module, *args, env=None):
    server = Started(folder, module, *args, env=env)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()


# --- where it may listen ---------------------------------------------------------------------------------------------


def bound(host, port=0, **options):
    place = server.bind(host, port, **{"has_keys": False, **options})
    place.socket.close()
    return place


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.9.9.9"])
def test_bind__takes_a_loopback_without_keys(host):
    place = bound(host)
    assert not place.is_public
    assert place.url.startswith("http://127.")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0"])
def test_bind__refuses_a_public_address_without_keys(host):
    with pytest.raises(UsageError, match="--api-key-file"):
        bound(host)
    with pytest.raises(UsageError, match="a second time: --no-auth --no-auth"):
        bound(host, no_auth=1)


def test_bind__takes_a_public_address_with_keys_or_where_told_so_twice():
    assert bound("0.0.0.0", has_keys=True).is_public
    assert bound("0.0.0.0", no_auth=2).url.startswith("http://127.0.0.1:")


def test_bind__looks_behind_a_name(monkeypatch):
    resolved = {
        "lab.example": [(socket.AF_INET, 1, 6, "", ("10.1.2.3", 0))],
        "both.example": [(socket.AF_INET, 1, 6, "", ("127.0.0.1", 0)), (socket.AF_INET, 1, 6, "", ("10.1.2.3", 0))],
        "zone.example": [(socket.AF_INET6, 1, 6, "", ("fe80::1%eth0", 0, 0, 2))],
    }
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **kwargs: resolved[host])
    for host in resolved:
        with pytest.raises(UsageError, match="reachable from other machines"):
            bound(host)


def test_bind__refuses_keys_and_no_auth_together():
    with pytest.raises(UsageError, match="Drop one"):
        bound("127.0.0.1", has_keys=True, no_auth=1)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("no.such.host.invalid", "no name that this machine knows"),
        ("x" * 300, "no name"),
        ("192.0.2.1", "Cannot listen"),
    ],
)
def test_bind__says_in_a_sentence_that_a_host_cannot_be(host, words):
    with pytest.raises(UsageError, match=words):
        bound(host, no_auth=2)


def test_bind__says_that_a_port_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"Port {port} of 127.0.0.1 is taken"):
            bound("127.0.0.1", port)


def test_bind__takes_a_port_whose_last_connections_still_linger():
    place = server.bind("127.0.0.1", 0, has_keys=False)
    place.socket.listen()
    port = place.socket.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)):
        accepted, _ = place.socket.accept()
        accepted.close()  # Whoever closes first keeps the port in TIME_WAIT.
    place.socket.close()
    assert bound("127.0.0.1", port).url == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("host", "options", "trusted"),
    [
        ("127.0.0.1", {}, ("localhost", "127.0.0.1", "::1")),
        ("127.0.0.2", {}, ("localhost", "127.0.0.1", "::1", "127.0.0.2")),
        ("127.0.0.1", {"has_keys": True}, ("*",)),
        ("0.0.0.0", {"no_auth": 2}, ("*",)),
    ],
)
def test_trusted_hosts__are_the_loopbacks_names_where_nothing_else_guards(host, options, trusted):
    place = bound(host, **options)
    assert place.trusted_hosts(has_keys=options.get("has_keys", False)) == trusted


# --- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sig", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal__lets_a_stream_finish_and_takes_nothing_new(tmp_path, sig):
    with started(tmp_path, *SERVER, "60") as running:
        with httpx.stream("GET", f"{running.url}/v1/ticks", params={"n": 30, "seconds": 0.05}) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "tick 0"
            running.process.send_signal(sig)
            time.sleep(0.4)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{running.url}/health")
            assert list(lines) == [f"tick {i}" for i in range(1, 30)]
        assert running.ends() == 0
        assert running.process.stdout.read() == ""
        events = [line["event"] for line in running.log]
        assert [event for event in events if event in ("draining", "request", "ended")] == events[-3:]
        assert events[-3:] == ["draining", "request", "ended"]


def test_signal__answers_new_work_on_an_open_connection_with_503(tmp_path):
    with started(tmp_path, *SERVER, "60") as running:
        parts = urlsplit(running.url)
        ask = b"GET /v1/ticks?n=%d&seconds=0.05 HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
            connection.sendall(ask % 10 + ask % 10)
            assert b"200 OK" in connection.recv(65536)
            running.process.send_signal(signal.SIGTERM)
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
        assert b"tick 9" in received
        assert b"HTTP/1.1 200" not in received
        assert running.ends() == 0


def test_signal__the_second_ends_it_at_once(tmp_path):
    with (
        started(tmp_path, *SERVER, "60") as running,
        httpx.stream("GET", f"{running.url}/v1/ticks", params={"n": 1000, "seconds": 0.05}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGTERM)
        assert running.ends() == 128 + signal.SIGTERM


def test_signal__cuts_off_what_does_not_finish_in_time_and_says_so(tmp_path):
    with started(tmp_path, *SERVER, "0.5") as running:
        with httpx.stream("GET", f"{running.url}/v1/ticks", params={"n": 1000, "seconds": 0.05}) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert running.ends() == 1
        assert "1 request" in running.stderr.read_text()
        assert "--drain-seconds" in running.stderr.read_text()


def test_signal__idle_connections_and_half_a_request_hold_nothing_up(tmp_path):
    with started(tmp_path, *SERVER, "60") as running, httpx.Client() as client:
        assert client.get(f"{running.url}/health").status_code == 200
        parts = urlsplit(running.url)
        with socket.create_connection((parts.hostname, parts.port)) as half:
            half.sendall(b"GET /health HTT")
            time.sleep(0.1)
            running.process.send_signal(signal.SIGTERM)
            assert running.ends() == 0


@pytest.mark.slow
def test_engine__is_closed_after_the_drain(tmp_path):
    with started(tmp_path, *SERVER, "60", "--engine", "good") as running:
        running.process.send_signal(signal.SIGTERM)
        assert running.ends() == 0
        assert running.process.stdout.read() == "closed\n"


@pytest.mark.parametrize(
    ("engine", "code", "words"),
    [("unusable", 2, "The model does not fit on the device."), ("broken", 1, "of the engine")],
)
@pytest.mark.slow
def test_engine__that_does_not_start_ends_the_command_in_a_sentence(tmp_path, engine, code, words):
    with started(tmp_path, *SERVER, "60", "--engine", engine) as running:
        assert running.ready is None
        assert running.ends() == code
        assert re.search(f"^neuronlens: .*{words}", running.stderr.read_text(), re.MULTILINE)


@pytest.mark.slow
def test_port__that_is_taken_is_one_sentence_and_exit_code_2(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        started(tmp_path, *SERVER, "60", "--port", str(other.getsockname()[1])) as running,
    ):
        assert running.ends() == 2
        told = running.stderr.read_text()
        assert "is taken. Choose another --port" in told
        assert "Traceback" not in told


# --- the command -----------------------------------------------------------------------------------------------------


def neuronlens(*args, env=None):
    return subprocess.run(
        [sys.executable, "-m", "neuronlens", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    return table_of([row("joy", 0, 1.0, 0.5), row("anger", 1, -1.0, 0.5)]).save(str(folder))


def test_serve__tables_only_says_when_it_is_ready_and_serves_them(tmp_path, table):
    keys = tmp_path / "keys.txt"
    keys.write_text(f"read {READ_KEY}\nwrite {WRITE_KEY}\n")
    keys.chmod(0o600)
    args = ("serve", table, "--tables-only", "--port", "0", "--json", "--api-key-file", str(keys))
    with started(tmp_path, "neuronlens", *args) as running:
        assert running.ready["model"] is None
        assert running.ready["tables"] == [table.rpartition("/")[2]]
        assert httpx.get(f"{running.url}/v1/tables").status_code == 401
        listed = httpx.get(f"{running.url}/v1/tables", headers=bearer(READ_KEY))
        assert running.ready["tables"][0] in listed.text
        assert httpx.post(f"{running.url}/v1/completions", headers=bearer(READ_KEY)).status_code == 404
        assert httpx.get(f"{running.url}/ready").status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.ends() == 0
        ready = next(line for line in running.log if line["event"] == "ready")
        assert ready["url"] == running.url
        assert ready["example"].startswith(f"curl {running.url}/v1/tables")
        # Beside the log there is nothing on stderr.
        assert len(running.log) == len(running.stderr.read_text().splitlines())


@pytest.mark.slow
def test_serve__runs_the_model_that_the_table_names_and_no_other(tmp_path):
    model = save_tiny(tmp_path / "model", "gpt2")
    identity = model_identity(str(model))
    rows = [row("joy", neuron, 0.0, 100.0) for neuron in range(40)]
    made = table_of(rows, widths={"mlp_post": 40}, model=TableModel(id=str(model), config_hash=identity.config_hash))
    folder = made.save(str(tmp_path))
    with started(tmp_path, "neuronlens", "serve", folder, "--port", "0", "--json") as running:
        asked = {
            "model": running.ready["model"],
            "prompt": "i feel so happy",
            "max_tokens": 40,
            "temperature": 0,
            "stream": True,
            "intervention": {"table": "latest", "rules": [{"concept": "joy", "action": "zero"}]},
        }
        with httpx.stream("POST", f"{running.url}/v1/completions", json=asked, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert running.ends() == 0
        request = next(line for line in running.log if line["event"] == "request")
        assert request["status"] == 200
        assert request["changed"] > 0
        assert "happy" not in running.stderr.read_text()
    other = save_tiny(tmp_path / "other", "gpt2", n_embd=32)
    refused = neuronlens("serve", folder, "--model", str(other))
    assert refused.returncode == 2
    assert "is not the model that the tables are for" in refused.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "there is nothing to serve"),
        (("nowhere", "--tables-only"), "neither a store.json nor a table.json"),
        (("TABLE", "--tables-only", "--model", "m"), "drop one of the two"),
        (("TABLE", "--revision", "abc"), "name that model too"),
        (("TABLE", "--model", "nowhere/at-all"), "nowhere/at-all"),
        (("TABLE",), "No --model was given"),
        (("TABLE", "--tables-only", "--host", "0.0.0.0"), "there are no keys"),
        (("TABLE", "--tables-only", "--host", "0.0.0.0", "--no-auth"), "--no-auth --no-auth"),
        (("TABLE", "--tables-only", "--api-key-file", "absent"), "cannot be read"),
        (("TABLE", "--tables-only", "--chat-template", "absent"), "--chat-template absent cannot be read"),
        (("TABLE", "--tables-only", "--max-queue", "0"), "--max-queue"),
        (("TABLE", "--tables-only", "--uploads", "/proc/nowhere"), "--uploads"),
    ],
)
@pytest.mark.slow
def test_serve__a_mistake_is_a_sentence_and_exit_code_2(table, args, words):
    done = run_warm("neuronlens", "serve", *(table if arg == "TABLE" else arg for arg in args))
    assert done.returncode == 2, done.stderr
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_serve__helps_with_an_example_and_the_defaults_of_the_limits():
    done = neuronlens("serve", "--help", env={"COLUMNS": "200"})
    assert "neuronlens serve STORE" in done.stdout
    options = {
        "body_bytes": "--max-body-bytes",
        "body_seconds": "--body-seconds",
        "upload_bytes": "--max-upload-bytes",
        "upload_rows": "--max-upload-rows",
        "prompt_tokens": "--max-prompt-tokens",
        "max_tokens": "--max-tokens",
        "sequences": "--max-sequences",
        "rules": "--max-rules",
        "programs": "--max-programs",
        "queue": "--max-queue",
        "request_seconds": "--request-seconds",
    }
    assert options.keys() == Limits.model_fields.keys()
    for name, option in options.items():
        default = Limits.model_fields[name].default
        shown = "the window" if default is None else f"{default:,}"
        assert re.search(rf"{option}\s.*\[default: {shown}\]", done.stdout), (option, shown)


def test_serve__without_the_extra_says_what_to_install(monkeypatch):
    from neuronlens.cli.serve import serve

    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'neuronlens[serve]'")):
        serve(["x"])
