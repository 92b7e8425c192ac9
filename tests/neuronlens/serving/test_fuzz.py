"""The server under requests that nobody would write by hand: no 5xx, a sentence for every refusal, and others' tokens
stay right."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from neuronlens import intervene
from neuronlens.errors import UsageError
from neuronlens.identity import model_identity
from neuronlens.models import LoadedModel, load_model
from neuronlens.ranges import RangeTable
from neuronlens.serving import schemas
from neuronlens.serving.app import create_app
from neuronlens.serving.auth import Keys
from neuronlens.serving.bodies import MAX_NAMES
from neuronlens.serving.cards import CardShelf
from neuronlens.serving.catalog import Catalog
from neuronlens.serving.metrics import Metrics
from neuronlens.serving.service import Service
from neuronlens.serving.settings import Limits, Settings
from neuronlens.serving.transformers_engine import TransformersEngine
from tests.neuronlens.serving.tiny_engine import RULES, alone, wide_table
from tests.range_tables import large_table
from tests.report_stores import arrays, write_report_store
from tests.served import served
from tests.tiny_models import D_MLP, save_tiny

# As the hooks have them. Whoever imports the hooks has them in force for every use of schemathesis in the process.
MODEL, CONCEPTS = "tiny", ("joy", "anger", "fear")
READ_KEY, WRITE_KEY = "read-key-of-the-tests", "write-key-of-the-tests"
HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
ROOT = HOOKS.parents[3]
PROMPTS = ("i feel so happy today", "the storm came closer", "he slammed the door")
N_TOKENS = 6
LONGEST_MESSAGE = 4_100
BODY_BYTES = 100_000
JOY = {"concept": "joy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fuzzed:
    """A server of a tiny model, its range table and the cards of a store; `folder` holds all that it may write to."""

    url: str
    service: Service
    loaded: LoadedModel
    table: RangeTable
    folder: Path

    def client(self, key: str = WRITE_KEY) -> httpx.Client:
        # Without TLS, whose certificates take longer to load than a request to be answered.
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60, verify=False)

    def files(self) -> set[Path]:
        return {path for path in self.folder.rglob("*") if path.is_file()}

    def statuses(self) -> dict[tuple[str, str], set[int]]:
        """Which statuses each (method, route) was answered with so far."""
        found: dict[tuple[str, str], set[int]] = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                if sample.name == "neuronlens_requests_total":
                    labels = sample.labels
                    found.setdefault((labels["method"], labels["route"]), set()).add(int(labels["status"]))
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Fuzzed]:
    folder = tmp_path_factory.mktemp("fuzzed")
    model = save_tiny(folder / MODEL, "gpt2")
    config_hash = model_identity(str(model)).config_hash
    described = {"id": MODEL, "revision": None, "config_hash": config_hash}
    store = write_report_store(folder / "store", arrays(CONCEPTS, width=D_MLP), raw=False, model=described)
    table = wide_table(config_hash)
    table.save(store.root)
    catalog = Catalog([store.root], uploads=str(folder / "uploads"))
    limits = Limits(body_bytes=BODY_BYTES, max_tokens=8, sequences=4, upload_bytes=1_000_000)
    service = Service(
        settings=Settings(limits=limits),
        catalog=catalog,
        cards=CardShelf(catalog.stores, catalog),
        keys=Keys.of([("read", READ_KEY), ("write", WRITE_KEY)]),
        metrics=Metrics(),
        engine=TransformersEngine.load(str(model), limits=limits, device="cpu", cache_bytes=64 << 20),
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    (folder / "tmp").mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(folder / "tmp")
    try:
        with served(create_app(service)) as url:
            yield Fuzzed(url=url, service=service, loaded=load_model(str(model)), table=table, folder=folder)
    finally:
        tempfile.tempdir = before


def repeatably(n_examples: int) -> settings:
    """The same examples each time, so that a failure in CI is one at home."""
    health = list(HealthCheck)
    return settings(
        max_examples=n_examples, derandomize=True, database=None, deadline=None, suppress_health_check=health
    )


# --- its own OpenAPI -------------------------------------------------------------------------------------------------


def run_schemathesis(server: Fuzzed, folder: Path, *arguments: str) -> str:
    """What `schemathesis run` says of the server; fails where it found anything."""
    config = folder / "schemathesis.toml"
    config.write_text(
        f'hooks = "{HOOKS}"\n[auth.openapi.key]\nbearer = "{WRITE_KEY}"\n'
        "[checks.negative_data_rejection]\nexpected-statuses = [400, 401, 404, 405, 406, 413, 415]\n"
    )
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
            *("run", f"{server.url}/openapi.json", "--no-color", "--continue-on-failure"),
            *("--seed", "1", "--generation-deterministic"),
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    return run.stdout


def test_api__answers_what_its_openapi_says(server, tmp_path):
    run_schemathesis(server, tmp_path, "--phases", "fuzzing", "--max-examples", "4")


@pytest.mark.slow
def test_api__answers_what_its_openapi_says_in_every_corner(server, tmp_path):
    """Every boundary of every field, many random requests, and sequences of them."""
    run_schemathesis(server, tmp_path, "--phases", "coverage,fuzzing,stateful", "--max-examples", "15")
    found = server.statuses()
    operations = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    for path, methods in operations.items():
        for method in methods:
            statuses = found[method.upper(), path.replace("{model}", "{model:path}")]
            assert 200 in statuses or path == "/v1/tables", f"{method} {path} was never answered: {statuses}"


# --- anything as an intervention -------------------------------------------------------------------------------------

FIELDS = ("rules", "concept", "action", "tau", "factor", "value", "layers", "neurons", "hook_points", "table", "mode")
OVERFLOW = "@1e999@"
"""Stands for a number that JSON can write and no double can hold."""

numbers = st.integers() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False, allow_infinity=False)
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=20) | st.sampled_from(CONCEPTS),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), inner, max_size=5)
    ),
    max_leaves=12,
)
poison = (
    st.sampled_from([None, True, False, -1, 0, 10**30, -(2**63), 1e308, -1e308, 5e-324, -0.0, 0.5])
    | st.sampled_from([float("nan"), float("inf"), -float("inf"), OVERFLOW])
    | st.sampled_from(
        ["", "0.5", "NaN", "inf", "joi", "JOY", "joy ", "\x00", "\ud800", "j\u00f6y \U0001f600", "x" * 5_000]
    )
    | st.sampled_from([[], {}, [[]], [None], {"concept": "joy"}, [0] * 5_000, ["joy"] * 50, {"": {}}])
    | anything
)
half_right = st.fixed_dictionaries(
    {"concept": st.sampled_from(CONCEPTS)},
    optional={
        "layers": st.lists(st.sampled_from([0, 1]), min_size=1, max_size=3),
        "hook_points": st.lists(st.sampled_from(["mlp_post", "resid_post"]), min_size=1, max_size=2),
        "tau": st.floats(0.01, 4) | st.sampled_from([1e-300, 1e300]),
        "top_fraction": st.floats(0.01, 1),
    },
)
actions = st.one_of(
    st.fixed_dictionaries({"action": st.sampled_from(["zero", "mean"])}),
    st.fixed_dictionaries({"action": st.just("dampen"), "factor": st.floats(0, 1)}),
    st.fixed_dictionaries({"action": st.just("adaptive")}, optional={"factor": st.floats(0, 1)}),
    st.fixed_dictionaries({"action": st.just("set"), "value": st.floats(-5, 5) | st.sampled_from([3e38, 1e308])}),
)
rules = st.builds(lambda where, what: {**where, **what}, half_right, actions)
right = st.fixed_dictionaries(
    {"rules": st.lists(rules, min_size=1, max_size=4)},
    optional={
        "table": st.just("latest"),
        "phases": st.lists(st.sampled_from(["prompt", "generation"]), min_size=1, max_size=2),
        "mode": st.sampled_from(["range", "neuron"]),
        "conflicts": st.sampled_from(["order", "refuse"]),
        "compare_baseline": st.booleans(),
    },
)


@st.composite
def nearly_right(draw: st.DrawFn) -> Any:
    """A right intervention with one thing changed."""
    intervention = draw(right)
    *path, last = draw(st.sampled_from(_paths(intervention)))
    parent = functools.reduce(lambda part, step: part[step], path, intervention)
    change = draw(st.sampled_from(["replace", "remove", "add", "repeat", "wrap"]))
    if change == "replace":
        parent[last] = draw(poison)
    elif change == "remove":
        del parent[last]
    elif change == "add" and isinstance(parent, dict):
        parent[draw(st.sampled_from(FIELDS) | st.text(max_size=8))] = draw(poison)
    elif change == "repeat":
        parent[last] = [parent[last]] * draw(st.sampled_from([0, 2, 17, 1_001]))
    else:
        parent[last] = [parent[last]]
    return intervention


def _paths(value: Any) -> list[tuple[Any, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for step, part in steps for path in [(step,), *((step, *rest) for rest in _paths(part))]]


@contextlib.contextmanager
def honest_clients(server: Fuzzed, n: int = 2) -> Iterator[list[str]]:
    """Clients that go on asking, steered and not, while the context is open; gives a list of what they got wrong."""
    wrong: list[str] = []
    n_right = [0] * n
    stop = threading.Event()
    wanted = [(prompt, rules, expected(server, prompt, rules)) for prompt in PROMPTS for rules in RULES[:4]]

    def ask(place: int) -> None:
        with server.client(READ_KEY) as client:
            while not stop.is_set() or n_right[place] < len(wanted):
                prompt, rules, tokens = wanted[(n_right[place] + 5 * place) % len(wanted)]
                found = tokens_of(client, prompt, rules)
                if found != tokens:
                    wrong.append(f"{prompt!r} under {rules}: expected {tokens}, found {found}")
                    return
                n_right[place] += 1

    with ThreadPoolExecutor(n) as pool:
        asking = [pool.submit(ask, place) for place in range(n)]
        try:
            yield wrong
        finally:
            stop.set()
        for one in asking:
            one.result()


def expected(server: Fuzzed, prompt: str, rules: list[dict[str, Any]] | None) -> list[str]:
    """The tokens of transformers' own generate on the bare model, under `neuronlens.intervene` with rules."""
    tokenizer = server.loaded.tokenizer
    with intervene(server.loaded, server.table, rules) if rules else contextlib.nullcontext():
        ids, _, _ = alone(server.loaded, tokenizer(prompt)["input_ids"], N_TOKENS, None)
    return [tokenizer.decode([i]) for i in ids]


def tokens_of(client: httpx.Client, prompt: str, rules: list[dict[str, Any]] | None = None) -> list[str] | str:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0, "logprobs": 0}
    answer = client.post("/v1/completions", json=body | ({"intervention": {"rules": rules}} if rules else {}))
    return answer.json()["choices"][0]["logprobs"]["tokens"] if answer.status_code == 200 else answer.text


def send(client: httpx.Client, intervention: Any, *, chat: bool, stream: bool) -> httpx.Response:
    asked = {"messages": [{"role": "user", "content": PROMPTS[0]}]} if chat else {"prompt": PROMPTS[0]}
    body = {"model": MODEL, "max_tokens": 3, "temperature": 0, "stream": stream, "intervention": intervention, **asked}
    content = json.dumps(body).replace(json.dumps(OVERFLOW), "1e999")
    note(content)
    headers = {"Content-Type": "application/json"}
    return client.post("/v1/chat/completions" if chat else "/v1/completions", content=content, headers=headers)


def check(answer: httpx.Response, *, chat: bool, stream: bool) -> None:
    """A whole answer, or a whole refusal that names the field."""
    assert answer.status_code in (200, 400, 404, 409, 413), answer.text
    if answer.status_code != 200:
        check_refusal(answer.json(), answer.status_code)
    elif stream:
        check_stream(answer, chat=chat)
    else:
        (ChatCompletion if chat else Completion).model_validate(answer.json())
        check_applied(answer.json().get("intervention"))


def check_stream(answer: httpx.Response, *, chat: bool) -> None:
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n")]
    assert events.pop() == ""
    last = events.pop()
    if last != "[DONE]":
        check_refusal(json.loads(last), 400)
    for event in events:  # openai's Completion knows no chunk without a finish_reason, though its own server sends them
        (ChatCompletionChunk if chat else schemas.Completion).model_validate_json(event)
    check_applied(json.loads(events[-1]).get("intervention") if events else None)


def check_applied(applied: Mapping[str, Any] | None) -> None:
    if applied is not None:
        assert 0 <= applied["changed"] <= applied["tested"]
        assert sum(applied["changed_by_rule"]) == applied["changed"]


def check_refusal(body: Any, status: int) -> None:
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "..."))
    assert len(error["message"]) < LONGEST_MESSAGE
    assert (error["type"], error["code"]) != (None, None)
    if error["code"] == "invalid_json" or status == 413:
        assert error["param"] is None
    else:
        assert (error["param"] or "").split(".")[0] == "intervention", error


def storm(server: Fuzzed, interventions: st.SearchStrategy[Any], n_requests: int) -> None:
    """So many of these interventions, on both routes, streamed and not, while honest clients are answered right."""
    with server.client() as client, honest_clients(server) as wrong:

        @repeatably(n_requests)
        @given(intervention=interventions, chat=st.booleans(), stream=st.booleans())
        def send_one(intervention: Any, chat: bool, stream: bool) -> None:
            check(send(client, intervention, chat=chat, stream=stream), chat=chat, stream=stream)
            assert not wrong

        send_one()
    assert not wrong
    check_nothing_is_left(server)


def check_nothing_is_left(server: Fuzzed) -> None:
    """The engine has no row and no program left, and a plain request gets the tokens of the bare model."""
    deadline = time.monotonic() + 10
    while (load := server.service.engine.load_now()).running + load.waiting + load.programs:
        assert time.monotonic() < deadline, f"the engine still holds {load}"
        time.sleep(0.02)
    with server.client() as client:
        for prompt in PROMPTS:
            assert tokens_of(client, prompt) == expected(server, prompt, None)


@pytest.mark.parametrize(
    ("interventions", "n_requests"),
    [
        pytest.param(anything, 50, id="any"),
        pytest.param(right | nearly_right(), 120, id="nearly right"),
        pytest.param(anything, 300, id="any, for long", marks=pytest.mark.slow),
        pytest.param(right | nearly_right(), 500, id="nearly right, for long", marks=pytest.mark.slow),
    ],
)
def test_intervention__of_any_json_is_answered_and_harms_nobody(server, interventions, n_requests):
    storm(server, interventions, n_requests)


# --- anything as a body ----------------------------------------------------------------------------------------------

BOUNDARY = "a-boundary-of-the-tests"
RIGHT = json.dumps({"model": MODEL, "prompt": "i feel", "max_tokens": 1, "intervention": {"rules": [JOY]}}).encode()

content_types = st.sampled_from(
    [
        f"multipart/form-data; boundary={BOUNDARY}",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'x' * 5_000}",
        'multipart/form-data; boundary="',
        "multipart/form-data; boundary=é",
        "multipart/mixed; boundary=x",
        "application/json",
        "application/x-www-form-urlencoded",
        "",
    ]
)


@st.composite
def slightly_wrong(draw: st.DrawFn, body: bytes) -> bytes:
    """A right body with a few bytes cut out, doubled, or others in their place."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(body) - 1) | st.integers(0, 200))
        stop = min(len(body), start + draw(st.integers(0, 40) | st.integers(0, len(body))))
        change = draw(st.sampled_from(["cut", "double", "put"]))
        middle = {"cut": b"", "double": 2 * body[start:stop], "put": draw(st.binary(max_size=30))}[change]
        body = body[:start] + middle + body[stop:]
    return body


def test_body__of_random_bytes_is_refused(server):
    @repeatably(80)
    @given(body=st.binary(max_size=200) | slightly_wrong(RIGHT), content_type=content_types)
    def send_one(body: bytes, content_type: str) -> None:
        headers = {"Content-Type": content_type.encode("latin-1")}
        answer = client.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code in (200, 400, 404, 415), answer.text
        assert answer.status_code == 200 or set(answer.json()["error"]) == {"message", "type", "param", "code"}

    with server.client() as client:
        send_one()


# --- anything as an upload -------------------------------------------------------------------------------------------


def multipart(table: RangeTable) -> bytes:
    """The two files of a table's folder, as curl sends them."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}.bin"\r\n'.encode()
        + b"Content-Type: application/octet-stream\r\n\r\n"
        + content
        for name, content in (("header", table.header_json()), ("rows", table.rows_parquet()))
    ]
    return b"\r\n".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


def uploaded(server: Fuzzed, body: bytes, content_type: str = f"multipart/form-data; boundary={BOUNDARY}") -> int:
    """The status of the answer, once it is known to be a whole one that leaves no file behind."""
    before = server.files()
    with server.client() as client:
        answer = client.post("/v1/tables", content=body, headers={"Content-Type": content_type.encode("latin-1")})
    assert answer.status_code in (200, 400, 413, 415), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.json()["error"]["message"]) < LONGEST_MESSAGE
    assert server.files() == before
    return answer.status_code


def upload_many(server: Fuzzed, n: int, bodies: st.SearchStrategy[bytes], types: st.SearchStrategy[str]) -> None:
    @repeatably(n)
    @given(body=bodies, content_type=types)
    def upload_one(body: bytes, content_type: str) -> None:
        uploaded(server, body, content_type)

    upload_one()


def test_upload__of_the_right_bytes_is_taken(server):
    """So that the others are refused for what is wrong with them."""
    assert uploaded(server, multipart(server.table)) == 200


def test_upload__of_random_bytes_is_refused_and_leaves_nothing(server):
    noise = st.binary(max_size=2_000) | st.binary(max_size=200).map(lambda part: f"--{BOUNDARY}\r\n".encode() + part)
    upload_many(server, 60, noise, content_types)


@pytest.mark.parametrize("n", [pytest.param(8, id="some"), pytest.param(40, id="many", marks=pytest.mark.slow)])
def test_upload__that_is_nearly_right_leaves_nothing(server, n):
    right_type = st.just(f"multipart/form-data; boundary={BOUNDARY}")
    upload_many(server, n, slightly_wrong(multipart(server.table)), right_type)


# --- anything as a header --------------------------------------------------------------------------------------------

header_names = st.sampled_from(
    ["Accept", "Accept-Encoding", "If-None-Match", "Range", "X-Request-Id", "Content-Type", "Origin", "Expect"]
)
pieces = st.sampled_from(
    [
        *("*/*", "*", "application/json", "text/", "gzip", "zstd", "identity", "bytes=0-1", "W/", "é", "x" * 2_000),
        *(";q=", "0", "0.5", "1e9", "nan", "-1", ",", ";", " ", '"', "="),
    ]
)
latin = st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f")
header_values = st.text(latin, max_size=60) | st.lists(pieces, max_size=8).map("".join)


@pytest.mark.parametrize(
    "path", ["/v1/tables/latest/data?limit=3", "/v1/tables", "/v1/neurons/mlp_post/0/1", "/v1/models"]
)
def test_headers__of_any_text_are_answered(server, path):
    @repeatably(40)
    @given(headers=st.dictionaries(header_names, header_values.map(str.strip), max_size=4))
    def ask(headers: dict[str, str]) -> None:
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = client.get(path, headers=encoded)
        assert answer.status_code in (200, 304, 400, 406), answer.text
        assert answer.status_code in (200, 304) or set(answer.json()["error"]) == {"message", "type", "param", "code"}

    with server.client() as client:
        ask()


# --- what all this found ---------------------------------------------------------------------------------------------


def refused(server: Fuzzed, **body: Any) -> tuple[int, Mapping[str, Any]]:
    with server.client() as client:
        answer = client.post("/v1/completions", json={"model": MODEL, "prompt": "i feel", "max_tokens": 2, **body})
    return answer.status_code, answer.json()["error"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tau": "0.5"}, "tau"),
        ({"tau": "inf"}, "tau"),
        ({"tau": True}, "tau"),
        ({"action": "dampen", "factor": "1"}, "factor"),
        ({"action": "set", "value": "1"}, "value"),
        ({"action": "set", "value": False}, "value"),
        ({"layers": ["0"]}, "layers.0"),
        ({"layers": [True]}, "layers.0"),
        ({"layers": [0.0]}, "layers.0"),
        ({"layers": [-1]}, "layers.0"),
        ({"layers": [0], "neurons": ["1"]}, "neurons.0"),
        ({"top_fraction": "0.5"}, "top_fraction"),
    ],
)
def test_rule__takes_numbers_for_numbers_only(server, fields, param):
    status, error = refused(server, intervention={"rules": [JOY | fields]})
    assert (status, error["param"]) == (400, f"intervention.rules.0.{param}")


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (schemas.ChatRequest, {"messages": [1] * 1_000}),
        (schemas.ChatRequest, {"messages": [{"role": "user", "content": [1] * 1_000}]}),
        (schemas.CompletionRequest, {"prompt": "x", "intervention": {"rules": [{}] * 1_000}}),
        (schemas.CompletionRequest, {"prompt": "x", "intervention": {"rules": [JOY | {"layers": [""] * 1_000}]}}),
        (schemas.CompletionRequest, {"prompt": "x", "stop": [1] * 1_000}),
        (schemas.CompletionRequest, {"prompt": [True] * 1_000}),
        (schemas.CompletionRequest, {"prompt": [[True] * 1_000] * 1_000}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else next(reversed(value)),
)
def test_request__ends_a_list_at_its_first_fault(model, fields):
    """300,000 faults took ten seconds of the event loop, in which nobody else was answered."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"model": MODEL, **fields})
    assert caught.value.error_count() <= 4  # one for each kind of prompt


def test_body__with_more_names_than_any_object_has_is_refused(server):
    status, error = refused(server, **{f"x{i}": 1 for i in range(MAX_NAMES)})
    assert (status, error["code"]) == (400, "invalid_json")
    assert str(MAX_NAMES) in error["message"]


def test_body__that_names_a_field_twice_is_refused(server):
    with server.client() as client:
        content = '{"model": "tiny", "prompt": "i feel", "max_tokens": 1, "max_tokens": 2}'
        answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "'max_tokens' twice" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields", [{"concept": "x" * 90_000}, JOY | {"layers": [7] * 30_000}, JOY | {"hook_points": ["x"] * 20_000}]
)
def test_refusal__does_not_repeat_all_that_was_sent(server, fields):
    status, error = refused(server, intervention={"rules": [fields]})
    assert (status, error["code"]) == (400, "bad_rule")
    assert len(error["message"]) < LONGEST_MESSAGE


def test_table__names_its_field_where_there_is_none(server):
    status, error = refused(server, intervention={"rules": [JOY], "table": "tbl_0"})
    assert (status, error["param"]) == (404, "intervention.table")


def test_adaptive__in_neuron_mode_is_refused_in_the_words_of_the_request(server):
    status, error = refused(server, intervention={"rules": [JOY | {"action": "adaptive"}], "mode": "neuron"})
    assert (status, error["param"]) == (400, "intervention.rules")
    assert "inf" not in error["message"]


def test_many_neurons__of_a_large_table_are_found_at_once():
    """Each was looked for in a list of all that the table has."""
    table = large_table(30_000)
    began = time.monotonic()
    assert table.select("joy", layers=[0], neurons=[29_999] * 30_000).num_rows == 1
    with pytest.raises(UsageError, match=r"no neuron 30000, .* \(30,000 in all\)"):
        table.select("joy", layers=[0], neurons=[30_000] * 30_000)
    assert time.monotonic() - began < 5


def test_limit__beyond_any_table_asks_for_all_rows(server):
    with server.client() as client:
        answer = client.get("/v1/tables/latest/data", params={"limit": 10**23, "format": "json"})
    assert answer.status_code == 200
    assert answer.json()["rows"] == server.table.rows.num_rows


def test_a_method_that_is_not_offered__is_told_every_one_that_is(server):
    with server.client() as client:
        answer = client.delete("/v1/tables")
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "GET, HEAD, POST"
    assert "Offered: GET, HEAD, POST." in answer.json()["error"]["message"]


def test_seed__is_promised_no_more_bits_than_it_has(server):
    described = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    assert {"type": "integer", "format": "int64"} in described["properties"]["seed"]["anyOf"]
    status, error = refused(server, seed=2**63)
    assert (status, error["param"]) == (400, "seed")
