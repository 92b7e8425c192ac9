"""What does collecting cost inside vLLM, beside vLLM's own prefill of the same prompts?

    python -m tests.benchmarks.bench_vllm_collect --model DIR --data train.jsonl [--texts 2000] [--repeats 7]

The same prompts, as token ids, through two engines with the same options in one process: vLLM's own worker, and ours
that collects; each prompt makes one token. In turn, before and after; the ratio of each pair, then their median. Of
both engines the prefix cache is emptied before every run, and units that skip its reads skip them on both sides.
Beside it the ratio by the hooks' own clock: collecting, to collecting without the seconds within them.
Without --model and --data: the demo's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from neuronlens.vllm.collection import CollectingEngine

DEMO = Path(__file__).parents[2] / "neuronlens" / "demo"
CASES = {
    "last_token, moments and histograms": ("last_token", True),
    "token, moments": ("token", False),
    "token, moments and histograms": ("token", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "model"))
    parser.add_argument("--data", default=str(DEMO / "corpus" / "train.jsonl"))
    parser.add_argument("--suffix", default="<sep>")
    parser.add_argument("--texts", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts = _prompts(args)
    options: dict[str, Any] = {
        "hook_points": ["mlp_post"],
        "layers": "all",
        "dtype": args.dtype,
        "longest_prompt": max(map(len, prompts)),
    }
    ours = CollectingEngine(args.model, **options)
    theirs = CollectingEngine(args.model, **options, worker_cls="auto", additional_config={})
    n_tokens = sum(map(len, prompts))
    print(f"{len(prompts)} prompts, {n_tokens:,} tokens, {args.threads} threads, {args.repeats} pairs a row\n")
    print("| case | prefill, s | collecting, s | ratio (median) | quartiles | by the hooks' clock |")
    print("|---|---|---|---|---|---|")
    for name, (unit, histograms) in CASES.items():
        inside: list[float] = []

        def collect(unit: Any = unit, histograms: bool = histograms, inside: list[float] = inside) -> None:
            inside.append(ours.run(prompts, unit=unit, histograms=histograms).seconds)

        def prefill(unit: str = unit) -> None:
            _prefill(theirs.llm, prompts, skip_reading=unit == "token")

        collect(), prefill()
        inside.clear()
        pairs = []
        for _ in range(args.repeats):
            # Before and after, so that a machine that slows down does not count for one side.
            before, here, after = _seconds(theirs, prefill), _seconds(ours, collect), _seconds(theirs, prefill)
            pairs.append(((before + after) / 2, here))
        _print_ratios(name, pairs, inside)


def _prefill(llm: Any, prompts: Sequence[Sequence[int]], *, skip_reading: bool) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, skip_reading_prefix_cache=skip_reading)
    llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)


def _prompts(args: argparse.Namespace) -> list[list[int]]:
    from neuronlens.models import load_model

    skeleton = load_model(args.model, device="meta")
    texts = [json.loads(line)["text"] + args.suffix for line in Path(args.data).read_text().splitlines()[: args.texts]]
    return [ids[: skeleton.window] for ids in sorted(skeleton.tokenizer(texts)["input_ids"], key=len)]


def _seconds(engine: CollectingEngine, work: Callable[[], None]) -> float:
    engine.llm.reset_prefix_cache()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _print_ratios(name: str, pairs: Sequence[tuple[float, float]], inside: Sequence[float]) -> None:
    base, here = (statistics.median(column) for column in zip(*pairs, strict=True))
    low, ratio, high = statistics.quantiles((here / base for base, here in pairs), n=4)
    clocked = statistics.median(here / (here - ours) for (_, here), ours in zip(pairs, inside, strict=True))
    print(f"| {name} | {base:.2f} | {here:.2f} | {ratio:.3f} | {low:.3f} to {high:.3f} | {clocked:.3f} |", flush=True)


if __name__ == "__main__":
    main()
