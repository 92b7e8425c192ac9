"""What do the statistics cost beside the forward pass, and the whole job beside the naive procedure?

    python -m tests.benchmarks.bench_collect overhead --model DIR --data train.jsonl [--texts 2000] [--repeats 7]
    python -m tests.benchmarks.bench_collect memory   --model DIR --data train.jsonl
    python -m tests.benchmarks.bench_collect naive    --recipe recipe.yaml [--share 0.125]
    python -m tests.benchmarks.bench_collect predictions --recipe recipe.yaml [--texts 600] [--repeats 7]
    python -m tests.benchmarks.bench_collect kernel   [--repeats 15]

`overhead`: the same batches through the bare trunk and through Capture, in turn, in one process; the ratio of each
pair, then their median. `memory`: peak resident memory of a fresh process that collects N and 4 N texts. `naive`:
every text padded to a fixed 128, one pass a concept, activations in Python lists, numpy mean and std, against
`neuronlens run` up to the range table. `predictions`: the same shards collected and committed with and without what the
model answers, in turn, in one process, in seconds of the processor; without raw values, whose writing would hide the
difference. `kernel`: the pass over activations by itself, as compiled and as torch operations, on one thread.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuronlens.accumulate import TorchAccumulator, make_accumulator
from neuronlens.batches import TokenBatch, batches_by_length, pad
from neuronlens.capture import Capture
from neuronlens.hookpoints import find_sites
from neuronlens.models import LoadedModel, load_model
from neuronlens.recipe import load_recipe
from neuronlens.store import Store
from pipeline.collect import CollectSpec, collect_shard
from pipeline.plan import TOKENS_PER_BATCH, Plan, freeze, make_plan

NAIVE_LENGTH = 128
NAIVE_BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("overhead", "memory", "memory-child"):
        command = commands.add_parser(name)
        command.add_argument("--model", required=True)
        command.add_argument("--data", required=True)
        command.add_argument("--suffix", default="<sep>")
        command.add_argument("--texts", type=int, default=2_000)
        command.add_argument("--repeats", type=int, default=7)
        command.add_argument("--threads", type=int, default=1)
    command = commands.add_parser("naive")
    command.add_argument("--recipe", required=True)
    command.add_argument("--share", type=float, default=0.125, help="Share of the texts that the naive procedure runs.")
    command.add_argument("--repeats", type=int, default=3)
    command = commands.add_parser("predictions")
    command.add_argument("--recipe", required=True)
    command.add_argument("--texts", type=int, default=600)
    command.add_argument("--repeats", type=int, default=7)
    command.add_argument("--threads", type=int, default=1)
    command = commands.add_parser("kernel")
    command.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    run = {
        "overhead": overhead,
        "memory": memory,
        "memory-child": memory_child,
        "naive": naive,
        "predictions": predictions,
        "kernel": kernel,
    }
    run[args.command](args)


def overhead(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model)
    batches = list(_batches(loaded, args))
    n_tokens = sum(int(batch.mask_BT.sum()) for batch in batches)
    sites = find_sites(loaded.module, ["mlp_post"], "all")
    cases = {
        "last_token, moments and histograms": ("last_token", True),
        "token, moments": ("token", False),
        "token, moments and histograms": ("token", True),
    }

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                loaded.hidden(batch)

    def captured(unit: str, histograms: bool) -> None:
        capture = Capture(loaded, sites, unit=unit, histograms=histograms, raw={}, n_threads=args.threads)
        for batch in batches:
            capture.add(batch)

    bare()
    captured("token", True)
    print(f"{len(batches)} batches, {n_tokens:,} tokens, {args.threads} threads, {args.repeats} pairs a row\n")
    print("| case | bare, s | captured, s | ratio (median) | min | max |\n|---|---|---|---|---|---|")
    for name, (unit, histograms) in cases.items():
        pairs = []
        for _ in range(args.repeats):
            # Before and after, so that a machine that slows down does not count for one side.
            before, here, after = _seconds(bare), _seconds(partial(captured, unit, histograms)), _seconds(bare)
            pairs.append(((before + after) / 2, here))
        _print_ratios(name, pairs)


def _print_ratios(name: str, pairs: list[tuple[float, float]]) -> None:
    ratios = sorted(here / base for base, here in pairs)
    base, here = (statistics.median(column) for column in zip(*pairs, strict=True))
    spread = " | ".join(f"{ratio:.3f}" for ratio in (statistics.median(ratios), ratios[0], ratios[-1]))
    print(f"| {name} | {base:.2f} | {here:.2f} | {spread} |", flush=True)


def memory(args: argparse.Namespace) -> None:
    print("| texts | peak memory of the collecting process, MB |\n|---|---|")
    for n_texts in (args.texts, 4 * args.texts):
        command = [sys.executable, "-m", __spec__.name, "memory-child", "--model", args.model, "--data", args.data]
        command += ["--suffix", args.suffix, "--texts", str(n_texts)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"| {n_texts:,} | {float(done.stdout) / 1e6:.0f} |", flush=True)


def memory_child(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    loaded = load_model(args.model)
    sites = find_sites(loaded.module, ["mlp_post"], "all")
    capture = Capture(loaded, sites, unit="token", histograms=True, raw={})
    for batch in _batches(loaded, args):
        capture.add(batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def naive(args: argparse.Namespace) -> None:
    recipe = load_recipe(args.recipe)
    rows = [json.loads(line) for line in Path(recipe.data.source).read_text().splitlines()]
    rng = np.random.default_rng(0)
    share = sorted(rng.choice(len(rows), int(len(rows) * args.share), replace=False))
    results = []
    for _ in range(args.repeats):
        ours = _seconds(lambda: _run_job(args.recipe))
        theirs = _seconds(lambda: _naive_ranges(recipe.model.id, [rows[i] for i in share])) / args.share
        results.append((ours, theirs))
        print(f"ours {ours:.1f} s, naive {theirs:.1f} s, ratio {theirs / ours:.2f}", file=sys.stderr, flush=True)
    ours, theirs = (statistics.median(column) for column in zip(*results, strict=True))
    ratio = statistics.median(theirs / ours for ours, theirs in results)
    print(f"| the whole job, s | naive, s (from {args.share:.1%} of the texts) | ratio (median) |\n|---|---|---|")
    print(f"| {ours:.1f} | {theirs:.1f} | {ratio:.1f} |")


def predictions(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    recipe = load_recipe(args.recipe)
    loaded = load_model(recipe.model.id)
    per_concept = args.texts // len(recipe.data.answers or {"": 0})
    data = recipe.data.model_copy(update={"max_per_concept": per_concept})
    print(f"{args.threads} threads, {args.repeats} pairs a row\n")
    print("| case | without, CPU s | with, CPU s | ratio (median) | min | max |\n|---|---|---|---|---|---|")
    for unit, only_correct in (("last_token", False), ("token", False), ("mean", False), ("last_token", True)):
        cases = []
        for asked in (False, True):
            collect = recipe.collect.model_copy(update={"unit": unit, "raw": "none", "predictions": asked})
            wanted = data.model_copy(update={"only_correct": only_correct})
            cases.append(make_plan(recipe.model_copy(update={"collect": collect, "data": wanted})))
        without, recorded = (partial(_collect, loaded, plan, args.threads) for plan in cases)
        without(), recorded()
        pairs = []
        for _ in range(args.repeats):
            before, here, after = without(), recorded(), without()
            pairs.append(((before + after) / 2, here))
        _print_ratios(f"{unit}{', only correct' if only_correct else ''}", pairs)


def _collect(loaded: LoadedModel, plan: Plan, n_threads: int) -> float:
    """Seconds of the processor to collect and commit all shards of a plan into a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        shards, spec = freeze(plan, store), CollectSpec.of(plan.description, plan.answers)

        def work() -> None:
            for shard in shards:
                collect_shard(loaded, spec, store, shard, n_threads=n_threads)

        return _seconds(work, time.process_time)


def kernel(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print("| rows, neurons | | compiled, ns a value | torch operations |\n|---|---|---|---|")
    for n_rows, n_neurons in ((1_024, 1_024), (4_096, 1_024), (2_048, 4_864)):
        x_RN, rows_K = torch.nn.functional.gelu(torch.randn(n_rows, n_neurons)), torch.arange(n_rows)
        for name, histogram in (("moments", False), ("moments and histograms", True)):
            options: dict[str, Any] = {"histogram": histogram, "device": torch.device("cpu")}
            accumulators = (make_accumulator(n_neurons, **options), TorchAccumulator(n_neurons, **options))
            nanoseconds = []
            for accumulator in accumulators:
                add = partial(accumulator.add, x_RN, rows_K)
                add()
                seconds = statistics.median(_seconds(add) for _ in range(args.repeats))
                nanoseconds.append(seconds / x_RN.numel() * 1e9)
            compiled, operations = nanoseconds
            print(f"| {n_rows:,} x {n_neurons:,} | {name} | {compiled:.2f} | {operations:.0f} |", flush=True)


def _run_job(recipe: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "neuronlens",
            "run",
            recipe,
            "--store",
            f"{folder}/store",
            "--set",
            "test=null",
        ]
        subprocess.run(command, check=True, capture_output=True)


def _naive_ranges(model_id: str, rows: list[dict[str, str]]) -> None:
    """What a first script does, on all cores: it is the procedure that is slow, not the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(model_id), AutoModelForCausalLM.from_pretrained(model_id).eval()
    kept: dict[int, list[np.ndarray]] = {}
    last: torch.Tensor = torch.empty(0)

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            kept[layer].extend(args[0][torch.arange(len(last)), last].numpy())

        return hook

    for layer, block in enumerate(model.transformer.h):
        block.mlp.c_proj.register_forward_pre_hook(keep(layer))
    for concept in sorted({row["label"] for row in rows}):
        kept = {layer: [] for layer in range(len(model.transformer.h))}
        texts = [row["text"] + "<sep>" for row in rows if row["label"] == concept]
        for some in _batched(texts):
            tokens = tokenizer(
                some, padding="max_length", truncation=True, max_length=NAIVE_LENGTH, return_tensors="pt"
            )
            last = tokens["attention_mask"].sum(dim=1) - 1
            with torch.no_grad():
                model(**tokens)
        for values in kept.values():
            mean, std = np.mean(values, axis=0), np.std(values, axis=0)
            _ = mean - 2.5 * std, mean + 2.5 * std


def _batched(texts: list[str]) -> list[list[str]]:
    return [texts[first : first + NAIVE_BATCH] for first in range(0, len(texts), NAIVE_BATCH)]


def _batches(loaded: LoadedModel, args: argparse.Namespace) -> list[TokenBatch]:
    lines = Path(args.data).read_text().splitlines()[: args.texts]
    texts = [json.loads(line)["text"] for line in lines]
    rows = sorted(loaded.tokenizer([text + args.suffix for text in texts])["input_ids"], key=len)
    rows = [row[: loaded.window] for row in rows]
    groups = batches_by_length([len(row) for row in rows], TOKENS_PER_BATCH["cpu"])
    return [pad([rows[i] for i in group], pad_id=loaded.pad_id) for group in groups]


def _seconds(work: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    work()
    return clock() - started


if __name__ == "__main__":
    main()
