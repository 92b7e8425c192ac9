"""What does steering cost a server, what does batching bring, how fast do tables leave it, and does it last?

    python -m tests.benchmarks.bench_serving throughput --store STORE --texts TEXTS.jsonl --repeats 5
    python -m tests.benchmarks.bench_serving tables --rows 1300000
    python -m tests.benchmarks.bench_serving soak --store STORE --texts TEXTS.jsonl --clients 200 --minutes 3

STORE was made by `neuronlens run`, and its model is still there. The server is a process of its own, as `neuronlens
serve` starts it; the clients share the machine with it. TEXTS has prompts in its field `text`.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow as pa

N_PROGRAMS = 16
CONCURRENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server."""

    url: str
    model: str | None
    process: psutil.Process


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[Server]:
    """`neuronlens serve` on a free port, until the context closes."""
    command = [sys.executable, "-m", "neuronlens", "serve", *arguments, "--port", "0", "--json"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            log.seek(0)
            raise SystemExit(log.read())
        ready = json.loads(line)
        try:
            yield Server(url=ready["url"], model=ready["model"], process=psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)


def read_texts(path: Path) -> list[str]:
    with path.open() as lines:
        return [json.loads(line)["text"] for line in lines]


def rules_of(store: str, n: int) -> list[list[dict[str, Any]]]:
    """n different interventions at all layers of one hook point, round the concepts of the store."""
    description = json.loads((Path(store) / "store.json").read_text())
    hook_point = sorted(description["widths"])[0]
    concepts = sorted(description["concepts"])
    return [
        [{"concept": concepts[i % len(concepts)], "hook_points": [hook_point], "tau": 1 + i / n, "action": "dampen",
          "factor": 0.5}]
        for i in range(n)
    ]  # fmt: skip


# --- throughput ------------------------------------------------------------------------------------------------------


async def tokens_per_second(
    url: str, model: str, texts: Sequence[str], rules: Sequence[Any], *, concurrent: int, n_requests: int, n_tokens: int
) -> float:
    """Of n_requests, `concurrent` at a time; request i runs under rules[i % len(rules)], None for none."""
    todo = iter(range(n_requests))
    n_done = 0

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal n_done
        for i in todo:
            body: dict[str, Any] = {"model": model, "prompt": texts[i % len(texts)], "max_tokens": n_tokens}
            chosen = rules[i % len(rules)]
            if chosen is not None:
                body["intervention"] = {"rules": chosen}
            answer = await http.post("/v1/completions", json={**body, "temperature": 0})
            answer.raise_for_status()
            n_done += answer.json()["usage"]["completion_tokens"]

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        began = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(concurrent)))
        return n_done / (time.perf_counter() - began)


def throughput(args: argparse.Namespace) -> None:
    texts = [" ".join(text.split()[:6]) for text in read_texts(args.texts)[:200]]
    programs: list[Any] = rules_of(args.store, N_PROGRAMS)
    cases = {
        "one by one, plain": (1, [None]),
        "one by one, one program": (1, programs[:1]),
        f"{CONCURRENT} at a time, plain": (CONCURRENT, [None]),
        f"{CONCURRENT} at a time, one program": (CONCURRENT, programs[:1]),
        f"{CONCURRENT} at a time, {N_PROGRAMS} programs": (CONCURRENT, programs),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    with server(args.store) as running:
        assert running.model is not None
        for repeat in range(args.repeats + 1):
            order = list(cases)
            random.Random(repeat).shuffle(order)
            for name in order:
                concurrent, rules = cases[name]
                n_requests = args.requests if concurrent > 1 else max(8, args.requests // 6)
                rate = asyncio.run(
                    tokens_per_second(
                        running.url, running.model, texts, rules, concurrent=concurrent, n_requests=n_requests,
                        n_tokens=args.tokens,
                    )
                )  # fmt: skip
                if repeat:  # the first round warms up
                    found[name].append(rate)
    print("| case | tokens/s (median) | min | max |\n|---|---|---|---|")
    for name, rates in found.items():
        print(f"| {name} | {statistics.median(rates):.0f} | {min(rates):.0f} | {max(rates):.0f} |")
    names = list(cases)
    print("\n| ratio | median | min | max |\n|---|---|---|---|")
    for title, above, below in (
        ("batched to one by one, plain", 2, 0),
        ("one program to plain, one by one", 1, 0),
        (f"one program to plain, {CONCURRENT} at a time", 3, 2),
        (f"{N_PROGRAMS} programs to plain, {CONCURRENT} at a time", 4, 2),
    ):
        ratios = [a / b for a, b in zip(found[names[above]], found[names[below]], strict=True)]
        print(f"| {title} | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |")


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(args: argparse.Namespace) -> None:
    headers = {"Accept": "application/vnd.apache.arrow.stream", "Accept-Encoding": "identity"}
    with (
        tempfile.TemporaryDirectory() as folder,
        server(_big_table(folder, args.rows), "--tables-only") as running,
        httpx.Client(base_url=running.url, timeout=600, headers=headers) as http,
    ):
        table_id = http.get("/v1/tables", headers={"Accept": "*/*"}).json()["data"][0]["id"]
        print("| answer | MB | MB/s (median) | min | max |\n|---|---|---|---|---|")
        for title, params in (("all rows, Arrow", {}), ("one layer, Arrow", {"layer": 3})):
            rates, n_bytes = [], 0
            for repeat in range(args.repeats + 1):
                began = time.perf_counter()
                with http.stream("GET", f"/v1/tables/{table_id}/data", params=params) as answer:
                    n_bytes = sum(len(part) for part in answer.raise_for_status().iter_raw())
                if repeat:  # the first one reads the table from the disk
                    rates.append(n_bytes / 1e6 / (time.perf_counter() - began))
            shown = f"{statistics.median(rates):.0f} | {min(rates):.0f} | {max(rates):.0f}"
            print(f"| {title} | {n_bytes / 1e6:.1f} | {shown} |")


def _big_table(folder: str, n_rows: int) -> str:
    """A table of 14 concepts and as many layers of 4,096 neurons as it takes."""
    from neuronlens.ranges import SCHEMA, RangeTable, TableModel

    width, n_concepts = 4096, 14
    i = np.arange(n_rows)
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=n_rows), rng.uniform(0.1, 1, size=n_rows)
    columns: dict[str, Any] = {
        "hook_point": pa.array(["mlp_post"] * n_rows),
        "layer": i // (width * n_concepts),
        "neuron": i % width,
        "concept": pa.array([f"concept {k:02}" for k in range(n_concepts)]).take(pa.array(i // width % n_concepts)),
        "n": np.full(n_rows, 1000),
        "mean": mean,
        "std": std,
        "mean_abs": np.abs(mean),
        "salience": np.abs(mean),
        "rank": i % width + 1,
        "lower": mean - 2.5 * std,
        "upper": mean + 2.5 * std,
    }
    rows = pa.table({name: pa.array(columns[name]).cast(SCHEMA.field(name).type) for name in SCHEMA.names})
    table = RangeTable.make(
        rows, tau=2.5, top_fraction=1.0, salience="mean_abs", store_hash="0" * 16,
        model=TableModel(id="big", config_hash="0" * 32), unit="last_token", widths={"mlp_post": width},
    )  # fmt: skip
    return table.save(folder)


# --- soak ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request, and the text that the bare model alone gives for it."""

    body: dict[str, Any]
    expected: str


@dataclass(slots=True, kw_only=True)
class Tally:
    """What the clients saw."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    n_tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)


def soak(args: argparse.Namespace) -> None:
    questions = _questions(args.store, read_texts(args.texts), args.questions)
    tally, megabytes = Tally(), []
    with server(args.store) as running:
        megabytes = asyncio.run(_storm(running, questions, tally, args))
    settled = megabytes[len(megabytes) // 6 :]
    growth = statistics.mean(settled[-10:]) / statistics.mean(settled[:10]) - 1
    total = sum(tally.outcomes.values())
    quantiles = statistics.quantiles(tally.seconds, n=100)
    print(f"{args.clients} clients, {args.minutes:g} minutes, {len(questions)} different questions")
    print(f"answers      {total:,} ({total / args.minutes / 60:.1f}/s), {tally.n_tokens:,} tokens")
    print(f"outcomes     {dict(tally.outcomes)}")
    print(f"seconds      median {quantiles[49]:.2f}, p99 {quantiles[98]:.2f}")
    print(f"memory       {settled[0]:.0f} MB after a sixth, {megabytes[-1]:.0f} MB at the end, grown {growth:+.2%}")
    for found, expected in tally.wrong[:3]:
        print(f"wrong        {found!r}, expected {expected!r}")
    if tally.wrong or tally.outcomes["failed"]:
        raise SystemExit(1)


def _questions(store: str, texts: Sequence[str], n: int) -> list[Question]:
    """Random prompts, lengths and interventions, and what the bare model says under `neuronlens.intervene`."""
    import torch

    from neuronlens import RangeTable, intervene
    from neuronlens.models import load_model

    description = json.loads((Path(store) / "store.json").read_text())
    loaded = load_model(description["model"]["id"])
    (table_path,) = (Path(store) / "ranges").iterdir()
    table = RangeTable.load(table_path)
    control = set(loaded.tokenizer.all_special_ids)
    rng, programs = random.Random(0), rules_of(store, N_PROGRAMS)
    module: Any = loaded.module
    questions = []
    for _ in range(n):
        text, rules, n_tokens = rng.choice(texts), rng.choice([None, *programs]), rng.randrange(4, 40)
        prompt = " ".join(text.split()[: rng.randrange(1, 12)])
        ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
        with intervene(loaded, table, rules) if rules else contextlib.nullcontext():
            out = module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False,
                pad_token_id=loaded.pad_id,
            )  # fmt: skip
        answer = loaded.tokenizer.decode([i for i in out[0, ids.shape[1] :].tolist() if i not in control])
        body = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0}
        questions.append(
            Question(body={**body, **({"intervention": {"rules": rules}} if rules else {})}, expected=answer)
        )
    return questions


async def _storm(running: Server, questions: Sequence[Question], tally: Tally, args: argparse.Namespace) -> list[float]:
    """The server's resident megabytes, second by second, while the clients ask."""
    ends = time.monotonic() + 60 * args.minutes
    megabytes = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=running.url, timeout=600, limits=limits) as http:
        clients = [
            asyncio.ensure_future(_client(http, running.model, questions, tally, random.Random(i), ends))
            for i in range(args.clients)
        ]
        while time.monotonic() < ends:
            await asyncio.sleep(1)
            megabytes.append(running.process.memory_info().rss / 1e6)
        await asyncio.gather(*clients)
    return megabytes


async def _client(
    http: httpx.AsyncClient,
    model: str | None,
    questions: Sequence[Question],
    tally: Tally,
    rng: random.Random,
    ends: float,
) -> None:
    while time.monotonic() < ends:
        question = rng.choice(questions)
        began = time.perf_counter()
        try:
            leaves = rng.random() < 0.05
            found = await _asked(
                http, {**question.body, "model": model}, streams=leaves or rng.random() < 0.5, leaves=leaves
            )
        except httpx.HTTPError as error:
            tally.outcomes["failed"] += 1
            tally.wrong.append((repr(error), question.expected))
            continue
        if found is None:
            tally.outcomes["left half way"] += 1
            continue
        text, n_tokens = found
        tally.seconds.append(time.perf_counter() - began)
        tally.n_tokens += n_tokens
        tally.outcomes["right" if text == question.expected else "wrong"] += 1
        if text != question.expected:
            tally.wrong.append((text, question.expected))


async def _asked(
    http: httpx.AsyncClient, body: dict[str, Any], *, streams: bool, leaves: bool
) -> tuple[str, int] | None:
    """The text and its number of tokens; None where the client left after the first chunk."""
    if not streams:
        answer = (await http.post("/v1/completions", json=body)).raise_for_status().json()
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
    text, n_tokens = "", 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", "/v1/completions", json={**body, **options}) as answer:
        answer.raise_for_status()
        async for chunk in _chunks(answer):
            if leaves:
                return None
            text += "".join(choice["text"] for choice in chunk["choices"])
            n_tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else n_tokens
    return text, n_tokens


async def _chunks(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("throughput", throughput), ("tables", tables), ("soak", soak)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        if name != "tables":
            command.add_argument("--store", required=True)
            command.add_argument("--texts", type=Path, required=True)
        command.add_argument("--repeats", type=int, default=5)
        command.add_argument("--requests", type=int, default=96)
        command.add_argument("--tokens", type=int, default=48)
        command.add_argument("--rows", type=int, default=1_300_000)
        command.add_argument("--clients", type=int, default=200)
        command.add_argument("--minutes", type=float, default=3)
        command.add_argument("--questions", type=int, default=300)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
