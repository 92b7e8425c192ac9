"""The server under requests that nobody would write by hand: no 5xx, a sentence for every refusal, and others' tokens
stay right."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
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
from tests.neuronlens.serving.schemathesis_hooks import CONCEPTS, MODEL
from tests.neuronlens.serving.tiny_engine import RULES, alone, wide_table
from tests.range_tables import large_table
from tests.report_stores import arrays, write_report_store
from tests.served import served
from tests.tiny_models import D_MLP, save_tiny

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
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

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
    run_schemathesis(server, tmp_path, "--phases", "fuzzing", "--max-examples", "6")


@pytest.mark.slow
def test_api__answers_what_its_openapi_says_in_every_corner(server, tmp_path):
    """Every boundary of every field, many random requests, and sequences of them."""
    run_schemathesis(server, tmp_path, "--phases", "coverage,fuzzing,stateful", "--max-examples", "25")
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
    """Clients that go on asking, steered and not, while the context is open; what each was answered wrong is listed."""
    wrong: list[str] = []
    n_right = [0] * n
    stop = threading.Event()
    wanted = [(prompt, rules, expected(server, prompt, rules)) for prompt in PROMPTS for rules in RULES[:4]]

    def ask(place: int) -> None:
        with server.client(READ_KEY) as client:
            while not stop.is_set():
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
    assert min(n_right) >= len(wanted), f"the honest clients were answered {n_right} times only"


def expected(server: Fuzzed, prompt: str, rules: list[dict[str, Any]] | None) -> list[str]:
    """The tokens of transformers' own generate on the bare model, under `neuronlens.intervene` where there are rules."""
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
        assert error["param"].split(".")[0] == "intervention", error


def storm(server: Fuzzed, interventions: st.SearchStrategy[Any], n_requests: int) -> None:
    """So many of these interventions, on both routes, streamed and not, while honest clients are answered right."""
    with server.client() as client, honest_clients(server) as wrong:

        @settings(
            max_examples=n_requests,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
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


@pytest.mark.parametrize("interventions", [anything, right | nearly_right()], ids=["any", "nearly_right"])
def test_intervention__of_any_json_is_answered_and_harms_nobody(server, interventions):
    storm(server, interventions, 100)


@pytest.mark.slow
@pytest.mark.parametrize("interventions", [anything, right | nearly_right()], ids=["any", "nearly_right"])
def test_intervention__of_any_json_is_answered_and_harms_nobody_for_long(server, interventions):
    storm(server, interventions, 1_200)
