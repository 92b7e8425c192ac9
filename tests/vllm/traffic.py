"""Sequences that arrive at an engine in any order, under programs or none, and what came of each."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neuronlens.ranges import RangeTable
from neuronlens.serving.engine import Counts, EngineBusy
from neuronlens.vllm.offline import SteeredRequest, steered
from tests.vllm.tiny import program_of


@dataclass(slots=True, eq=False)
class Sequence_:
    """One request: `rules` None runs plain; `abort_after` so many tokens it is aborted."""

    prompt: list[int]
    max_tokens: int
    rules: Any = None
    phases: tuple[Any, ...] = ("prompt", "generation")
    abort_after: int | None = None
    table: RangeTable | None = None
    """None: the model's usual one."""
    tokens: list[int] = field(default_factory=list)
    counts: Counts | None = None
    n_refused: int = 0
    """How often there was no room for its program."""


def drive(llm: Any, folder: Path, sequences: Sequence[Sequence_], rng: np.random.Generator) -> int:
    """Bring all to their end, each arriving between two steps of the engine. Returns the number of preemptions."""
    from vllm import SamplingParams

    engine, waiting, open_requests = llm.llm_engine, list(sequences), {}
    scheduler, n_preempted, number = engine.engine_core.engine_core.scheduler, 0, 0
    while waiting or open_requests:
        for one in list(waiting):
            if open_requests and rng.random() < 0.6:
                break
            context: AbstractContextManager[SteeredRequest] | None = None
            params = SamplingParams(max_tokens=one.max_tokens, temperature=0, stop_token_ids=[1])
            prompt: Any = {"prompt_token_ids": one.prompt}
            if one.rules is not None:
                context = steered(llm, program_of(folder, one.rules, one.table), one.phases)
                try:
                    request = context.__enter__()
                except EngineBusy:
                    one.n_refused += 1
                    continue
                prompt, params = request.prompt(one.prompt), request.sampling(params)
            waiting.remove(one)
            number += 1
            engine.add_request(str(number), prompt, params)
            open_requests[str(number)] = (one, context)
        before = {id: request.num_preemptions for id, request in scheduler.requests.items()}
        outputs = engine.step()
        n_preempted += sum(request.num_preemptions - before.get(id, 0) for id, request in scheduler.requests.items())
        for output in outputs:
            one, context = open_requests[output.request_id]
            one.tokens = list(output.outputs[0].token_ids)
            aborts = one.abort_after is not None and len(one.tokens) >= one.abort_after and not output.finished
            if aborts:
                engine.abort_request([output.request_id])
            if output.finished or aborts:
                del open_requests[output.request_id]
                if context is not None:
                    request = context.gen.gi_frame.f_locals["request"]  # type: ignore[attr-defined]
                    context.__exit__(None, None, None)
                    one.counts = request.counts
    return n_preempted
