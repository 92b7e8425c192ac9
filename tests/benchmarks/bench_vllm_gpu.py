"""What do our hooks and programs cost inside vLLM on a GPU, in CUDA graphs and bfloat16?

    python -m tests.benchmarks.bench_vllm_gpu [--runner v2] [--layers 8] [--repeats 7]

Two engines in one process, vLLM's own worker and ours, on a few layers of an 8B model (d_model 4,096, d_mlp 14,336)
with random weights: what a layer costs is right, what Python costs a step is too much beside so few. In turn: plain;
ours without a program; one program at all layers for every request; sixteen. Of each repeat the ratio of tokens/s to
plain's, then the median. Needs a GPU with 40 GB and `pip install vllm`.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neuronlens.programs import Program
from tests.benchmarks.bench_vllm import N_PROGRAMS, Clock, Work, generate, measured
from tests.range_tables import row, table_of

D_MLP = 14_336
WORKS = {"prefill, 32 x 512": (32, 512, 1), "decode, 1": (1, 16, 128), "decode, 16": (16, 16, 128),
         "decode, 64": (64, 16, 128)}  # fmt: skip
"""Sequences, tokens of each prompt, new tokens of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", choices=("classic", "v2"), default="classic")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if asked.runner == "v2" else "0",
    }
    plain, ours = engines(asked.layers)
    programs = programs_at(asked.layers)
    ways: dict[str, tuple[Sequence[Any], Sequence[Program]]] = {
        "plain": ([plain], ()),
        "no program": ([ours], ()),
        "one program": ([ours], programs[:1]),
        "16 programs": ([ours], programs),
    }
    print(f"{asked.runner} runner, {asked.layers} layers, {asked.repeats} repeats\n")
    print("| work | way | ms | to plain (median) | quartiles |\n|---|---|---|---|---|")
    for name, (n_sequences, n_prompt, n_new) in WORKS.items():
        work = work_of(n_sequences, n_prompt, n_new)
        fitting = {way: (llms, some) for way, (llms, some) in ways.items() if len(some) <= n_sequences}
        runs = measured(work, fitting, asked.repeats, Clock())
        for way, found in runs.items():
            ratios = [run.speed / theirs.speed for run, theirs in zip(found, runs["plain"], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            ms = statistics.median(run.seconds for run in found) * 1e3
            print(f"| {name} | {way} | {ms:.1f} | {ratio:.3f} | {low:.3f} to {high:.3f} |", flush=True)


def engines(n_layers: int) -> tuple[Any, Any]:
    """Plain vLLM, and ours."""
    from vllm import LLM

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4_096,
        "intermediate_size": D_MLP,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": n_layers,
        "vocab_size": 32_000,
        "max_position_embeddings": 8_192,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config))
    options = {
        "model": str(folder),
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 8 << 30,
        "gpu_memory_utilization": 0.4,
        "max_num_seqs": 64,
        "max_model_len": 2_048,
        "max_num_batched_tokens": 4_096,
        "disable_log_stats": True,
    }
    v2 = os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    hooked = {"hook_points": ["mlp_post"], "rules": 1, "rule_rows": N_PROGRAMS, "v2_model_runner": v2}
    ours = {"worker_cls": "neuronlens.vllm.Worker", "additional_config": {"neuronlens": hooked}}
    return LLM(**options), LLM(**options, **ours)


def programs_at(n_layers: int) -> list[Program]:
    """They halve what is inside a range of seven neurons in ten."""
    rng = np.random.default_rng(0)
    rows = [
        row("joy", neuron, float(rng.normal(0, 0.3)), float(rng.uniform(0.1, 0.4)), layer=layer)
        for layer in range(n_layers)
        for neuron in range(D_MLP)
        if rng.random() < 0.7
    ]
    table = table_of(rows, widths={"mlp_post": D_MLP})
    return [
        Program.compile(table, [{"concept": "joy", "tau": 1 + i / N_PROGRAMS, "action": "dampen", "factor": 0.5}])
        for i in range(N_PROGRAMS)
    ]


def work_of(n_sequences: int, n_prompt: int, n_new: int) -> Work:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(10, 30_000, n_prompt).tolist() for _ in range(n_sequences)]
    return lambda llm, chosen: generate(llm, prompts, n_new, chosen)


if __name__ == "__main__":
    main()
