"""What do our hooks and programs cost inside vLLM, beside plain vLLM?

    python -m tests.benchmarks.bench_vllm --store STORE --texts TEXTS.jsonl [--repeats 9] [--eager]

Four engines in one process with the same options: two with vLLM's own worker, two with ours and every layer of the
store's hook point hooked; of two equal engines in a process one can be 2 % faster, by where its memory lies. In turn,
on both engines of a kind: plain; ours without a program; one program on all layers for every request; sixteen programs,
one for each of sixteen requests at a time. Prefill: prompts of TEXTS, one token each. Decode: sixteen sequences of a
few prompt tokens and many new ones. Of each repeat the ratio of tokens/s to plain's, then the median: many short
repeats where the machine's speed drifts. Beside it, by a clock around our hooks, seats and counts, their share of those
seconds, which no other engine and no neighbour on the machine changes; what they cost the caches is not in it. Freed
memory stays with the process, as our worker sees to: the plain engines have that here, too.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuronlens.programs import Program
from neuronlens.ranges import RangeTable
from neuronlens.vllm.collection import mend_llvmlite
from neuronlens.vllm.offline import steered
from tests.benchmarks.bench_serving import read_texts, rules_of

N_PROGRAMS = CONCURRENT = 16
TARGETS = {"no program": 0.99, "one program": 0.97, "16 programs": 0.94}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100, help="new ones of a decoded sequence")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "OMP_NUM_THREADS": str(asked.threads),
    }
    description = json.loads((Path(asked.store) / "store.json").read_text())
    (folder, *_) = sorted((Path(asked.store) / "ranges").glob("tbl_*"))
    table = RangeTable.load(folder)
    programs = [Program.compile(table, rules) for rules in rules_of(asked.store, N_PROGRAMS)]
    hook_point = programs[0].hook_points[0]
    plain, ours = engines(description["model"]["id"], hook_point, eager=asked.eager)
    clock = Clock.inside(ours)
    tokenizer = plain[0].get_tokenizer()
    prompts = [tokenizer(text).input_ids[:60] for text in read_texts(asked.texts)[: asked.prompts]]
    works: dict[str, Work] = {
        "prefill": lambda llm, chosen: generate(llm, prompts, 1, chosen),
        "decode": lambda llm, chosen: generate(
            llm, [prompt[:4] for prompt in prompts[:CONCURRENT]], asked.tokens, chosen
        ),
    }
    ways: dict[str, tuple[Sequence[Any], Sequence[Program]]] = {
        "plain": (plain, ()),
        "no program": (ours, ()),
        "one program": (ours, programs[:1]),
        "16 programs": (ours, programs),
    }
    print(f"{hook_point}, {len(programs[0].layers)} layers, {'eager' if asked.eager else 'compiled'}, "
          f"{asked.threads} threads, {asked.repeats} repeats\n")  # fmt: skip
    print("| work | way | tokens/s | to plain (median) | quartiles | target | 1 - our share |")
    print("|---|---|---|---|---|---|---|")
    for name, work in works.items():
        runs = measured(work, ways, asked.repeats, clock)
        plain_speeds = [run.speed for run in runs["plain"]]
        for way, found in runs.items():
            speed = statistics.median(run.speed for run in found)
            ratios = [run.speed / theirs for run, theirs in zip(found, plain_speeds, strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            share = statistics.median(run.inside / run.seconds for run in found)
            print(f"| {name} | {way} | {speed:,.0f} | {ratio:.3f} | {low:.3f} to {high:.3f} | {TARGETS.get(way, '')} "
                  f"| {1 - share:.3f} |")  # fmt: skip
    tickets = statistics.median(admitting(ours[0], programs[0]) for _ in range(asked.repeats))
    print(f"\nA ticket for a program that has its slot: {tickets:.2f} ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Runs of a work, each from its first step to its last, and what of that was ours."""

    n_tokens: int
    seconds: float
    inside: float = 0.0

    @property
    def speed(self) -> float:
        return self.n_tokens / self.seconds


Work = Callable[[Any, Sequence[Program]], Run]


@dataclass(slots=True)
class Clock:
    """Seconds that our parts of a worker's steps have taken so far."""

    seconds: float = 0.0

    @classmethod
    def inside(cls, llms: Sequence[Any]) -> "Clock":
        """A clock around what our workers add to a step, from now on."""
        clock = cls()

        def wrap(worker: Any) -> None:
            clock._around(worker.board, "run")
            clock._around(worker.board, "rest")
            clock._around(worker.tickets, "seat")

        for llm in llms:
            llm.collective_rpc(wrap)
        return clock

    def _around(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)


def engines(model: str, hook_point: str, *, eager: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """Two of plain vLLM, and two of ours."""
    mend_llvmlite()
    from vllm import LLM

    options = {
        "model": model,
        "dtype": "float32",
        "enforce_eager": eager,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 28,
        "max_num_seqs": 64,
        "disable_log_stats": True,
    }
    ours = {"worker_cls": "neuronlens.vllm.Worker", "additional_config": {"neuronlens": {"hook_points": [hook_point]}}}
    first, *steerable = LLM(**options), LLM(**options, **ours), LLM(**options, **ours)
    return (first, LLM(**options)), steerable


def generate(llm: Any, prompts: Sequence[list[int]], n_tokens: int, programs: Sequence[Program]) -> Run:
    """Run all prompts, request i under program i modulo their number."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=n_tokens, temperature=0, ignore_eos=True, detokenize=False)
    inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    samplings = [params] * len(prompts)
    with contextlib.ExitStack() as stack:
        if programs:
            tickets = [stack.enter_context(steered(llm, program)) for program in programs]
            inputs = [tickets[i % len(tickets)].prompt(prompt) for i, prompt in enumerate(prompts)]
            of_tickets = [ticket.sampling(params) for ticket in tickets]
            samplings = [of_tickets[i % len(tickets)] for i in range(len(prompts))]
        start = time.perf_counter()
        outputs = llm.generate(inputs, samplings, use_tqdm=False)
        seconds = time.perf_counter() - start
    if programs:
        assert all(ticket.counts.changed for ticket in tickets), "a program changed nothing"
    n_made = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Run(n_tokens=n_made if n_tokens > 1 else sum(map(len, prompts)), seconds=seconds)


def admitting(llm: Any, program: Program) -> float:
    """Milliseconds that a ticket takes, from asking to its release, where the program has a slot already."""
    start = time.perf_counter()
    with steered(llm, program):
        pass
    return (time.perf_counter() - start) * 1e3


def measured(
    work: Work, ways: dict[str, tuple[Sequence[Any], Sequence[Program]]], repeats: int, clock: Clock
) -> dict[str, list[Run]]:
    """The runs of each way on all its engines, a round of all ways a repeat."""
    for llms, programs in ways.values():
        for llm in llms:
            work(llm, programs)
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    for i in range(repeats):
        for way in list(ways) if i % 2 else list(reversed(ways)):
            before = clock.seconds
            llms, programs = ways[way]
            found = [work(llm, programs) for llm in llms]
            runs[way].append(
                Run(
                    n_tokens=sum(run.n_tokens for run in found),
                    seconds=sum(run.seconds for run in found),
                    inside=clock.seconds - before,
                )
            )
    return runs


if __name__ == "__main__":
    main()
