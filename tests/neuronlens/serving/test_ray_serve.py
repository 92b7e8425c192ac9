"""The server as a Ray Serve application: what it is built from, and two real replicas of a tiny model."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner, Result

from neuronlens import Client, intervene
from neuronlens.cli import app
from neuronlens.errors import RunFailed, UsageError
from neuronlens.identity import model_identity
from neuronlens.models import LoadedModel, load_model
from neuronlens.ranges import RangeTable
from neuronlens.recipe import parse_section
from neuronlens.serving import ray_serve
from neuronlens.serving.ray_serve import DeployArgs, Replica, application_of, build, deployment_options
from tests.neuronlens.serving.tiny_engine import alone, wide_table
from tests.range_tables import row, table_of
from tests.tiny_models import SENTENCES, save_tiny

READ_KEY, WRITE_KEY = "nl-read-0123456789", "nl-write-0123456789"
OURS = ("RAY_ADDRESS", "NEURONLENS_API_KEY", "NEURONLENS_WRITE_KEY")
LONG = 900
"""Tokens of an answer that takes seconds."""


def deploy(*args: Any) -> Result:
    """The command in this process; errors come through."""
    return CliRunner().invoke(app, ["deploy", *map(str, args)], catch_exceptions=False)


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OURS} | more


# --- what it is built from ---


def test_args__are_refused_by_name():
    for wrong, words in (
        ({"sources": ["s"], "replicas": 4, "max_replicas": 2}, "max_replicas is 2, and 4 replicas are always there"),
        ({"sources": ["s"], "api_key": "k"}, "api_key"),
        ({"sources": ["s"], "settings": {"limits": {"queu": 1}}}, "queu"),
        ({}, "nothing to serve"),
        ({"sources": ["s"], "tables_only": True, "model": "m"}, "has no use for the model m"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_section(DeployArgs, wrong, origin="args")


def test_options__scale_with_the_requests_at_work():
    args = DeployArgs(sources=("s",), replicas=2, gpus_per_replica=1, cpus_per_replica=8)
    fixed, growing = deployment_options(args), deployment_options(args.model_copy(update={"max_replicas": 6}))
    assert fixed["num_replicas"] == 2
    assert fixed["ray_actor_options"] == {"num_cpus": 8, "num_gpus": 1}
    assert fixed["max_ongoing_requests"] == 32 + 512, "Serve's own queue begins where the server's ends"
    assert "num_replicas" not in growing
    assert growing["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 32}


def test_build__makes_an_application_that_serve_accepts():
    application = build(DeployArgs(sources=("s",), max_replicas=3, drain_seconds=7))
    deployment = application._bound_deployment
    assert deployment.name == "neuronlens"
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3


def test_replica__without_keys_does_not_start(tmp_path, monkeypatch):
    monkeypatch.delenv("NEURONLENS_API_KEY", raising=False)
    table = table_of([row("joy", 0, 1.0, 0.5)]).save(tmp_path)
    args = DeployArgs(sources=(table,), tables_only=True)
    with pytest.raises(UsageError, match=r"found no keys.*api_key_file"):
        application_of(args)
    assert not application_of(args.model_copy(update={"no_auth": True})).state.service.keys
    monkeypatch.setenv("NEURONLENS_API_KEY", READ_KEY)
    assert application_of(args).state.service.keys


async def _health_of(engine: Any) -> None:
    replica = Replica()
    replica.app = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(engine=engine)))  # type: ignore
    await replica.check_health()


def test_replica__is_ill_where_its_engine_has_died():
    asyncio.run(_health_of(SimpleNamespace(ready=True)))
    asyncio.run(_health_of(None))
    with pytest.raises(RunFailed, match="engine of this replica has ended"):
        asyncio.run(_health_of(SimpleNamespace(ready=False)))


# --- the command, before Ray begins ---


@pytest.fixture(scope="module")
def table_folder(tmp_path_factory) -> str:
    return table_of([row("joy", 0, 1.0, 0.5)]).save(tmp_path_factory.mktemp("table"))


@pytest.fixture(autouse=True)
def no_cluster_and_no_keys(monkeypatch):
    for name in OURS:
        monkeypatch.delenv(name, raising=False)


def test_deploy__prints_a_configuration_that_serve_takes_and_no_key_stands_in(table_folder, tmp_path, monkeypatch):
    keys = tmp_path / "keys.txt"
    keys.write_text(f"read {READ_KEY}\n")
    keys.chmod(0o600)
    monkeypatch.setenv("NEURONLENS_WRITE_KEY", WRITE_KEY)
    printed = deploy(
        *(table_folder, "--tables-only", "--print-config", "--host", "0.0.0.0", "--port", 8123),
        *("--max-replicas", 4, "--limit", "queue=9", "--api-key-file", keys, "--gpus-per-replica", 0.5),
    )
    assert READ_KEY not in printed.stdout
    assert WRITE_KEY not in printed.stdout
    config = ServeDeploySchema.model_validate(yaml.safe_load(printed.stdout))
    [application] = config.applications
    args = DeployArgs.model_validate(application.args)
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8123)
    assert application.import_path == f"{ray_serve.__name__}:build"
    assert (args.sources, args.max_replicas, args.settings.limits.queue) == ((table_folder,), 4, 9)
    assert args.gpus_per_replica == 0.5
    assert (args.api_key_file, args.no_auth) == (str(keys), False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "there are no keys"),
        (["--host", "0.0.0.0", "--no-auth"], "say --no-auth a second time"),
        (["--limit", "queue"], "--limit queue has no number"),
        (["--limit", "queue=no"], "queue"),
        (["--max-replicas", "1"], "max_replicas is 1"),
        (["--uploads", "/proc/nothing"], "--uploads /proc/nothing cannot be used"),
        (["--gpus-per-replica", "few"], "--gpus-per-replica is 'few'; expected a number, or auto"),
        (["--cpus-per-replica", "-1"], "cpus_per_replica"),
    ],
)
def test_deploy__says_what_is_wrong_before_it_starts_anything(table_folder, options, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        deploy(table_folder, "--tables-only", "--port", 0, *options)
    assert not ray.is_initialized()


def test_deploy__wants_the_model_of_the_tables(table_folder, tmp_path):
    other = save_tiny(tmp_path / "other", "llama")
    with pytest.raises(UsageError, match="is not the model that the tables are for"):
        deploy(table_folder, "--model", other, "--port", 0)


# --- two replicas ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """`neuronlens deploy` at work with two replicas, and the same model and table without it."""

    url: str
    process: subprocess.Popen[str]
    loaded: LoadedModel
    table: RangeTable

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=READ_KEY, **options)

    def pids(self) -> set[int]:
        """Of the replicas."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return {child.pid for child in found if _title(child).startswith("ray::ServeReplica")}

    def answering(self) -> set[str]:
        """When the processes began that answer requests now."""
        found = set()
        for _ in range(20):
            with contextlib.suppress(httpx.HTTPError):
                text = httpx.get(f"{self.url}/metrics", timeout=5).text
                found |= {line for line in text.splitlines() if line.startswith("process_start_time_seconds")}
        return found

    def wait_for(self, n_replicas: int, *, seconds: float, without: int = -1) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(self.pids() - {without}) == n_replicas and len(self.answering()) == n_replicas:
                return
            time.sleep(0.5)
        pytest.fail(f"after {seconds} s {self.pids()} are there, and {len(self.answering())} answer")


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("deployed")
    model = save_tiny(folder / "tiny", "gpt2", n_positions=1024)
    named = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(named | {"model_max_length": 1024}))
    table = wide_table(model_identity(str(model)).config_hash)
    keys = folder / "keys.txt"
    keys.write_text(f"read {READ_KEY}\nwrite {WRITE_KEY}\n")
    keys.chmod(0o600)
    command = [
        *(sys.executable, "-m", "neuronlens", "deploy", table.save(folder), "--model", str(model)),
        *("--replicas", "2", "--port", "0", "--json", "--drain-seconds", "20"),
        *("--uploads", str(folder / "uploads"), "--api-key-file", str(keys)),
    ]
    with (folder / "stderr").open("w") as log:
        # A session of its own: what ends the tests by force must not end Ray before the command.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(), start_new_session=True
        )
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        assert ready, (folder / "stderr").read_text()
        yield Deployed(url=json.loads(ready)["url"], process=process, loaded=load_model(str(model)), table=table)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for left in [*children, process]:
            with contextlib.suppress(psutil.Error):
                left.kill()


JOY = [{"concept": "joy", "hook_points": ["mlp_post"]}]
MIX = [{"concept": "anger", "action": "dampen", "factor": 0.25}, {"concept": "joy", "action": "adaptive"}]
RULES: tuple[Any, ...] = (None, JOY, MIX)


def expected(deployed: Deployed, prompt: str, n_tokens: int, rules: Any) -> str:
    """What the model says alone, under `neuronlens.intervene`."""
    prompt_ids = deployed.loaded.tokenizer(prompt)["input_ids"]
    steered = contextlib.nullcontext() if rules is None else intervene(deployed.loaded.module, deployed.table, rules)
    with steered:
        ids, _, _ = alone(deployed.loaded, prompt_ids, n_tokens, None)
    return str(deployed.loaded.tokenizer.decode([i for i in ids if i not in (0, 1, 2)]))


def asked(deployed: Deployed, prompt: str, n_tokens: int, rules: Any) -> dict[str, Any]:
    steer = {"intervention": {"table": deployed.table.id, "rules": rules}}
    fields = {"model": "tiny", "prompt": prompt, "max_tokens": n_tokens, "temperature": 0}
    return fields if rules is None else fields | {"extra_body": steer}


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES, ids=["bare", "zero", "two rules"])
def test_replicas__say_what_the_model_says_alone(deployed, rules):
    prompt, text = SENTENCES[0], expected(deployed, SENTENCES[0], 24, rules)
    deployed.wait_for(2, seconds=30)
    client = deployed.client()
    for _ in range(6):
        answer = client.completions.create(**asked(deployed, prompt, 24, rules))
        assert answer.choices[0].text == text
        streamed = list(client.completions.create(**asked(deployed, prompt, 24, rules), stream=True))
        assert "".join(chunk.choices[0].text for chunk in streamed) == text
        assert len(streamed) > 1
        for said in (answer, streamed[-1]) if rules else ():
            assert said.intervention["changed"] > 0
    assert rules is None or text != expected(deployed, prompt, 24, None)


@pytest.mark.slow
def test_replicas__all_want_a_key(deployed):
    for _ in range(6):
        assert httpx.get(f"{deployed.url}/v1/tables").status_code == 401
        answer = httpx.get(f"{deployed.url}/v1/tables", headers={"Authorization": f"Bearer {READ_KEY}"})
        assert answer.json()["data"][0]["id"] == deployed.table.id


@pytest.mark.slow
def test_replicas__see_what_one_of_them_took(deployed):
    table = table_of(
        [row("joy", 3, 0.5, 0.25)], widths={"mlp_post": 40}, model=deployed.table.header.model, top_fraction=1.0
    )
    client = Client(deployed.url, api_key=WRITE_KEY)
    assert client.publish(table) == table.id
    for _ in range(20):
        answer = httpx.get(f"{deployed.url}/v1/tables/{table.id}", headers={"Authorization": f"Bearer {READ_KEY}"})
        assert answer.status_code == 200


@pytest.mark.slow
def test_replicas__one_killed_under_load_costs_no_answer(deployed):
    cases = [(SENTENCES[i % 6][: 8 + 5 * i], 20 + 7 * i, RULES[i % 3]) for i in range(9)]
    texts = [expected(deployed, *case) for case in cases]
    statuses: Counter[int] = Counter()
    hooks: Any = {"response": [lambda answer: statuses.update([answer.status_code])]}
    client = deployed.client(http_client=httpx.Client(event_hooks=hooks, timeout=60))
    stop, wrong, n_right = threading.Event(), list[str](), [0]
    deployed.wait_for(2, seconds=30)
    victim = min(deployed.pids())

    def ask(seed: int) -> None:
        own = random.Random(seed)
        while not stop.is_set():
            i = own.randrange(len(cases))
            try:
                text = client.completions.create(**asked(deployed, *cases[i])).choices[0].text
            except openai.OpenAIError as error:
                wrong.append(repr(error))
            else:
                n_right[0] += text == texts[i]
                wrong.extend([f"{cases[i]}: {text!r}"] if text != texts[i] else [])

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, seed) for seed in range(8)]
        time.sleep(1.5)
        os.kill(victim, signal.SIGKILL)
        time.sleep(4)
        stop.set()
        for one in asking:
            one.result()
    assert wrong == []
    assert n_right[0] > 40
    assert statuses[500] > 0, "requests were at work on the replica that died, and the client asked again"
    deployed.wait_for(2, seconds=90, without=victim)


@pytest.mark.slow
def test_deploy__lets_streams_finish_and_ends_ray(deployed):
    text = expected(deployed, SENTENCES[1], LONG, JOY)
    children = psutil.Process(deployed.process.pid).children(recursive=True)
    stream = deployed.client().completions.create(**asked(deployed, SENTENCES[1], LONG, JOY), stream=True)
    said = next(iter(stream)).choices[0].text
    deployed.process.terminate()
    for chunk in stream:
        said += chunk.choices[0].text
    assert said == text
    assert deployed.process.wait(60) == 0
    _, left = psutil.wait_procs(children, timeout=20)
    assert left == []
