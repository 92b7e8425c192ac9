"""vLLM's own server with our field, routes and worker: `neuronlens serve --engine vllm`, and plain `vllm serve`."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from neuronlens import Client
from tests.vllm.tiny import RULES, alone, save_model, table_for

pytestmark = pytest.mark.vllm

READ, WRITE = "nl-read-0123456789abcdef", "nl-write-0123456789abcdef"
PROMPT = [int(7 + 11 * i % 250) for i in range(40)]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}<sep>"


@dataclass(frozen=True, slots=True)
class Served:
    url: str
    model: str
    folder: Path
    table: str
    log: Path

    def post(self, path: str = "/v1/completions", *, key: str | None = READ, **fields: Any) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.post(self.url + path, json={"model": self.model, **fields}, headers=headers, timeout=120)

    def complete(self, rules: Any = None, **fields: Any) -> Any:
        asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stop_token_ids": [1], **fields}
        asked["return_token_ids"] = True
        if rules is not None:
            asked["intervention"] = {"table": self.table, "rules": as_json(rules), **fields.pop("more", {})}
        asked.pop("more", None)
        answer = self.post(**asked)
        assert answer.status_code == 200, answer.text
        return answer.json()


def as_json(rules: Any) -> Any:
    """inf does not go over the wire: a large tau takes every value too."""
    return [{**rule, "tau": 1e6} if rule.get("tau") == float("inf") else rule for rule in rules]


@contextlib.contextmanager
def process(command: list[str], environ: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as stderr, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **environ}
    ) as running:  # fmt: skip
        try:
            yield running
        finally:
            running.send_signal(signal.SIGTERM)
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                running.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    work = tmp_path_factory.mktemp("serve")
    folder = save_model(work, "llama")
    table = table_for(folder)
    saved = table.save(work / "ranges")
    (work / "keys.txt").write_text(f"read {READ}\nwrite {WRITE}\n")
    (work / "keys.txt").chmod(0o600)
    (work / "chat.jinja").write_text(CHAT_TEMPLATE)
    command = [
        sys.executable, "-m", "neuronlens", "serve", saved, "--engine", "vllm", "--model", str(folder), "--port", "0",
        "--uploads", str(work / "uploads"), "--json", "--api-key-file", str(work / "keys.txt"),
        "--chat-template", str(work / "chat.jinja"), "--cache-gb", "0.05",
        "--vllm-option=--enforce-eager", "--vllm-option=--enable-log-requests",
    ]  # fmt: skip
    log = work / "log"
    with process(command, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}, log) as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        assert line, log.read_text()[-3000:]
        ready = json.loads(line)
        yield Served(ready["url"], ready["model"], folder, table.id, log)


@pytest.mark.parametrize("rules", [None, *RULES[1:]])
def test_completions__say_and_report_what_the_model_does_alone(served, rules):
    found = served.complete(rules)
    ids, tested, changed = alone(served.folder, PROMPT, 12, rules)
    assert found["choices"][0]["token_ids"][: len(ids)] == ids
    assert found["choices"][0]["finish_reason"] in ("length", "stop")
    if rules is None:
        assert "intervention" not in found
        return
    applied = found["intervention"]
    assert (applied["table"], applied["engine"], applied["mode"]) == (served.table, "vllm", "range")
    assert 0 < applied["changed"] <= changed
    assert applied["tested"] <= tested
    assert sum(applied["changed_by_rule"]) == applied["changed"]
    assert ids != alone(served.folder, PROMPT, 12, None)[0]


def test_streams__carry_the_intervention_at_their_end(served):
    whole = served.complete(RULES[1])
    asked = {"model": served.model, "prompt": [PROMPT, PROMPT], "max_tokens": 12, "temperature": 0,
             "stop_token_ids": [1], "stream": True, "stream_options": {"include_usage": True},
             "intervention": {"table": served.table, "rules": as_json(RULES[1])}}  # fmt: skip
    headers, chunks = {"Authorization": f"Bearer {READ}"}, []
    with httpx.stream("POST", served.url + "/v1/completions", json=asked, headers=headers, timeout=60) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    for index in (0, 1):
        said = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in said) == whole["choices"][0]["text"]
        assert said[-1]["finish_reason"] is not None
    marked = [i for i, chunk in enumerate(chunks) if "intervention" in chunk]
    assert marked == [len(chunks) - 2, len(chunks) - 1]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert chunks[-1]["intervention"]["changed"] >= 2 * whole["intervention"]["changed"] * 0.3


def test_chat__is_steered_through_vllms_own_template(served):
    asked = {"messages": [{"role": "user", "content": "i feel so happy"}], "max_tokens": 10, "temperature": 0}
    plain = served.post("/v1/chat/completions", **asked).json()
    steering = {"table": "latest", "rules": as_json(RULES[3]), "compare_baseline": True}
    steered = served.post("/v1/chat/completions", **asked, intervention=steering).json()
    assert steered["choices"][0]["message"]["content"] != plain["choices"][0]["message"]["content"]
    (baseline,) = steered["intervention"]["baseline"]
    assert baseline["text"] == plain["choices"][0]["message"]["content"]
    assert steered["intervention"]["changed"] > 0


def test_many_at_once__each_says_its_own_and_too_many_programs_get_429(served):
    # More distinct programs than the sixteen slots: those that are taken say what they say alone.
    answers: dict[int, httpx.Response] = {}
    taus = [1.0 + i / 10 for i in range(24)]

    def ask(i: int) -> None:
        rules = [{"concept": "joy", "tau": taus[i], "hook_points": ["mlp_post"]}]
        answers[i] = served.post(
            prompt=[9 + i, *PROMPT], max_tokens=40, temperature=0, stop_token_ids=[1], return_token_ids=True,
            intervention={"table": served.table, "rules": rules},
        )  # fmt: skip

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(taus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [answers[i].status_code for i in range(len(taus))]
    assert set(statuses) <= {200, 429}, statuses
    assert statuses.count(200) >= 16
    for i, answer in answers.items():
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "too_many_programs"
            assert int(answer.headers["retry-after"]) >= 1
            continue
        rules = [{"concept": "joy", "tau": taus[i], "hook_points": ["mlp_post"]}]
        ids, _, _ = alone(served.folder, [9 + i, *PROMPT], 40, rules)
        assert answer.json()["choices"][0]["token_ids"][: len(ids)] == ids


def test_a_client_that_leaves__gives_its_slot_back(served):
    headers = {"Authorization": f"Bearer {READ}"}
    asked = {"model": served.model, "prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    for i in range(20):  # more than there are slots
        steering = {"table": served.table, "rules": [{"concept": "anger", "tau": 1 + i / 7}]}
        body = {**asked, "intervention": steering}
        with httpx.stream("POST", served.url + "/v1/completions", json=body, headers=headers, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            next(answer.iter_lines())
    deadline = time.monotonic() + 30
    steering = {"table": served.table, "rules": [{"concept": "fear"}]}
    while (answer := served.post(prompt=PROMPT, max_tokens=2, intervention=steering)).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("fields", "status", "wanted"),
    [
        ({"intervention": {"rules": [{"concept": "pride"}]}}, 400, "has no concept pride"),
        ({"intervention": {"rules": []}}, 400, "intervention.rules"),
        ({"intervention": {"rules": [{"concept": "joy", "layers": [9]}]}}, 400, "has no layer 9"),
        ({"intervention": {"rules": [{"concept": "joy", "actoin": "zero"}]}}, 400, "actoin"),
        ({"intervention": {"table": "tbl_none", "rules": [{"concept": "joy"}]}}, 404, "no range table 'tbl_none'"),
        ({"intervention": {"rules": [{"concept": "joy"}]}, "use_beam_search": True, "n": 2}, 400, "use_beam_search"),
        ({"vllm_xargs": {"neuronlens": "a-ticket-of-my-own"}}, 400, "is the server's own"),
        ({"intervention": {"rules": [{"concept": "joy", "tau": 1 + i} for i in range(9)]}}, 400, "at most 8"),
    ],
)  # fmt: skip
def test_wrong_requests__are_refused_with_a_sentence(served, fields, status, wanted):
    answer = served.post(prompt=PROMPT, max_tokens=3, **fields)
    assert answer.status_code == status, answer.text
    assert wanted in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/invocations", "/v1/chat/completions/batch"])
def test_other_routes__refuse_what_they_would_ignore(served, path):
    answer = served.post(path, prompt="x", input="x", messages=[], intervention={"rules": [{"concept": "joy"}]})
    assert answer.status_code == 400
    assert "takes no intervention" in answer.json()["error"]["message"]


def test_keys__guard_text_and_tables_and_uploads_need_the_write_scope(served):
    assert served.post(prompt=PROMPT, key=None).status_code == 401
    assert served.post("/invocations", prompt=PROMPT, key="nl-wrong-0123456789").status_code == 401
    assert httpx.get(f"{served.url}/v1/tables").status_code == 401
    assert httpx.get(f"{served.url}/health").status_code == 200
    table = table_for(served.folder, ("mlp_post",))
    with pytest.raises(Exception, match="may read only"):
        Client(served.url, api_key=READ).publish(table)
    assert Client(served.url, api_key=WRITE).publish(table) == table.id
    assert served.complete(RULES[1], more={"table": table.id})["intervention"]["table"] == table.id


def test_client__reads_tables_and_models_as_from_our_own_server(served):
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {READ}"}) as client:
        card = client.get("/v1/models").json()["data"][0]
        assert card["hook_points"] == {"mlp_post": [0, 1], "resid_post": [0, 1]}
        assert (card["engine"], card["dtype"]) == ("vllm", "float32")
        first = client.get(f"/v1/tables/{served.table}/data?concept=joy&layer=0")
        again = client.get(f"/v1/tables/{served.table}/data?concept=joy&layer=0",
                           headers={"If-None-Match": first.headers["etag"]})  # fmt: skip
        assert (first.status_code, again.status_code) == (200, 304)
        metrics = client.get("/metrics").text
    lines = [line for line in metrics.splitlines() if line.startswith("neuronlens_changed_activations_total")]
    assert sum(float(line.split()[-1]) for line in lines) > 0
    assert "vllm:num_requests_running" in metrics


def test_vllm_serve__with_our_worker_class_and_plugin(models, tmp_path):
    folder = models["gpt2"]
    table = table_for(folder)
    saved = table.save(tmp_path / "ranges")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--worker-cls", "neuronlens.vllm.Worker",
        "--additional-config", json.dumps({"neuronlens": {"hook_points": ["mlp_post", "resid_post"]}}),
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "50000000",
        "--max-num-seqs", "8", "--api-key", "of-vllms-own-kind",
    ]  # fmt: skip
    environ = {"VLLM_PLUGINS": "neuronlens", "NEURONLENS_SOURCES": saved, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer of-vllms-own-kind"}
    with process(command, environ, tmp_path / "log") as running:
        deadline = time.monotonic() + 240
        while True:
            assert running.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.5)
        asked = {"model": str(folder), "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stop_token_ids": [1],
                 "return_token_ids": True, "intervention": {"rules": as_json(RULES[5])}}  # fmt: skip
        assert httpx.post(f"{url}/v1/completions", json=asked, timeout=60).status_code == 401
        found = httpx.post(f"{url}/v1/completions", json=asked, headers=headers, timeout=60).json()
        ids, tested, changed = alone(folder, PROMPT, 12, RULES[5])
        assert found["choices"][0]["token_ids"][: len(ids)] == ids
        assert (found["intervention"]["tested"], found["intervention"]["changed"]) == (tested, changed)
        assert httpx.get(f"{url}/v1/tables", headers=headers).json()["data"][0]["id"] == table.id
