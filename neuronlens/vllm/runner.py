"""Where vLLM knows which tokens it is about to run: the seam of each of its two model runners.

The classic runner calls `_prepare_inputs` once its batch has settled; any earlier, sequences are still being moved
about in it. The V2 runner asks its `ModelState` for inputs before every step, also before it replays a CUDA graph, and
tells it of every sequence that comes and goes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from neuronlens.vllm.config import KEY


class Seater(Protocol):
    """What has to know about the next forward pass, such as `Tickets`: the sequences in the batch's order, what the
    sampling parameters of each carry for us, its tokens in this pass, its position before it, its prompt's length."""

    @property
    def is_empty(self) -> bool: ...

    def seat(
        self,
        sequences: Sequence[str],
        names: Sequence[Any],
        n_scheduled_R: np.ndarray,
        n_computed_R: np.ndarray,
        n_prompt_R: np.ndarray,
    ) -> None: ...


def watch_runner(runner: Any, seater: Seater) -> None:
    """From now on the seater hears of every forward pass of the classic model runner, before it."""
    prepare = runner._prepare_inputs

    def prepare_and_seat(scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = prepare(scheduler_output, num_scheduled_tokens)
        if not seater.is_empty:
            batch = runner.input_batch
            n = batch.num_reqs
            sequences = batch.req_ids[:n]
            seater.seat(
                sequences,
                [name_in(runner.requests[sequence].sampling_params) for sequence in sequences],
                num_scheduled_tokens,
                batch.num_computed_tokens_cpu[:n],
                batch.num_prompt_tokens[:n],
            )
        return prepared

    runner._prepare_inputs = prepare_and_seat


def watch_model_state(model_state: Any, seater: Seater) -> None:
    """The same for the V2 model runner, by its ModelState."""
    names: dict[str, Any] = {}
    add, remove, prepare = model_state.add_request, model_state.remove_request, model_state.prepare_inputs

    def add_request(req_index: int, new_req_data: Any) -> None:
        names[new_req_data.req_id] = name_in(new_req_data.sampling_params)
        add(req_index, new_req_data)

    def remove_request(req_id: str) -> None:
        names.pop(req_id, None)
        remove(req_id)

    def prepare_inputs(input_batch: Any, req_states: Any) -> Any:
        if not seater.is_empty:
            n = input_batch.num_reqs
            sequences = input_batch.req_ids[:n]
            seater.seat(
                sequences,
                [names.get(sequence) for sequence in sequences],  # a dummy batch has sequences that nobody added
                input_batch.num_scheduled_tokens[:n],
                input_batch.num_computed_tokens_np[:n],
                req_states.prompt_len.np[input_batch.idx_mapping_np[:n]],
            )
        return prepare(input_batch, req_states)

    replaced: dict[str, Callable[..., Any]] = {
        "add_request": add_request,
        "remove_request": remove_request,
        "prepare_inputs": prepare_inputs,
    }
    for name, function in replaced.items():
        setattr(model_state, name, function)


def name_in(sampling_params: Any) -> Any:
    """What a request carries for us; None for one that carries nothing, and for pooling requests."""
    extra = getattr(sampling_params, "extra_args", None)
    return extra.get(KEY) if extra else None
