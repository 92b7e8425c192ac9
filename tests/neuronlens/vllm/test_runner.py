"""The seams of vLLM's two model runners, on stand-ins with the parts of them that we use."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from neuronlens.vllm.runner import watch_model_state, watch_runner


class Notes:
    """A seater that writes down what it hears."""

    def __init__(self) -> None:
        self.is_empty = False
        self.heard: list[Any] = []

    def seat(self, sequences, names, n_scheduled_R, n_computed_R, n_prompt_R) -> None:
        self.heard.append(
            (list(sequences), list(names), n_scheduled_R.tolist(), n_computed_R.tolist(), n_prompt_R.tolist())
        )


def params(ticket: str | None) -> SimpleNamespace:
    return SimpleNamespace(extra_args=None if ticket is None else {"neuronlens": ticket, "other": 1})


def test_classic_runner__tells_the_batch_as_it_stands_after_it_was_settled():
    # The runner moves sequences about in `_prepare_inputs`' caller; the dictionary of requests keeps its own order.
    batch = SimpleNamespace(
        num_reqs=2,
        req_ids=["b", "a", None],
        num_computed_tokens_cpu=np.array([7, 0, 99]),
        num_prompt_tokens=np.array([5, 3, 99]),
    )
    requests = {"a": SimpleNamespace(sampling_params=params("ta")), "b": SimpleNamespace(sampling_params=params(None))}

    class Runner:
        def __init__(self) -> None:
            self.input_batch, self.requests = batch, requests

        def _prepare_inputs(self, scheduler_output: Any, n_scheduled: np.ndarray) -> str:
            assert notes.heard == [], "asked before the runner was done"
            return "prepared"

    runner, notes = Runner(), Notes()
    watch_runner(runner, notes)
    assert runner._prepare_inputs(None, np.array([1, 3])) == "prepared"
    assert notes.heard == [(["b", "a"], [None, "ta"], [1, 3], [7, 0], [5, 3])]
    notes.is_empty = True
    notes.heard.clear()
    runner._prepare_inputs(None, np.array([1, 3]))
    assert notes.heard == []


class ModelState:
    """vLLM's V2 interface, `v1/worker/gpu/model_states/interface.py`: called for each request and before each step."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        self.calls.append(("add", req_index))

    def remove_request(self, req_id: str) -> None:
        self.calls.append(("remove", req_id))

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {"positions": 1}


def v2_batch(req_ids: list[str], scheduled: list[int], computed: list[int], places: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        num_reqs=len(req_ids),
        req_ids=req_ids,
        num_scheduled_tokens=np.array([*scheduled, 0]),
        num_computed_tokens_np=np.array([*computed, 0]),
        idx_mapping_np=np.array([*places, 0]),
    )


def test_v2_runner__hears_of_every_request_and_step_by_its_model_state():
    state, notes = ModelState(), Notes()
    watch_model_state(state, notes)
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([0, 4, 9])))
    state.add_request(2, SimpleNamespace(req_id="x", sampling_params=params("tx")))
    state.add_request(1, SimpleNamespace(req_id="y", sampling_params=params(None)))
    assert state.prepare_inputs(v2_batch(["y", "x"], [1, 5], [8, 2], [1, 2]), states) == {"positions": 1}
    assert notes.heard == [(["y", "x"], [None, "tx"], [1, 5], [8, 2], [4, 9])]
    state.remove_request("x")
    state.prepare_inputs(v2_batch(["x", "y"], [1, 1], [7, 9], [2, 1]), states)
    assert notes.heard[-1][1] == [None, None], "a name that comes again is another request"
    assert state.calls == [("add", 2), ("add", 1), ("remove", "x")]


def test_v2_runner__a_dummy_batch_has_nobody():
    state, notes = ModelState(), Notes()
    watch_model_state(state, notes)
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([3])))
    state.prepare_inputs(v2_batch(["dummy"], [8], [0], [0]), states)
    assert notes.heard == [(["dummy"], [None], [8], [0], [3])]
