"""The Triton kernel against the torch operations and numpy by hand, also inside a CUDA graph."""

import numpy as np
import pytest
import torch

from neuronlens.vllm.tables import replace_by_torch
from tests.neuronlens.vllm.boards import CONFIG, RULES, board, by_hand, program, rank_site, values

pytestmark = pytest.mark.gpu
WIDE = CONFIG.model_copy(update={"rule_rows": 7})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [37, 2048, 14336])
@pytest.mark.parametrize("n_tokens", [64, 400])
def test_triton__does_what_torch_and_numpy_do(dtype, width, n_tokens):
    from neuronlens.vllm.triton_kernel import replace_by_triton

    rng = np.random.default_rng(0)
    slots = rng.integers(0, 5, size=48).tolist()
    programs = [program(rules, width) for rules in RULES]
    made, _ = board([rank_site(width)], dtype=dtype, device="cuda", config=WIDE, n_tokens=400)
    for slot, one in enumerate(programs, start=1):
        made.tables.put(slot, one.sites)
    x_TN = values(n_tokens, width, 3, dtype).cuda()
    before, expected_TN = x_TN.clone(), x_TN.clone()
    made.host_2T[:, : len(slots)] = slots
    made.seat(len(slots))
    counts_TC = torch.zeros_like(made.counts_TC)
    replace_by_torch(expected_TN, made.tables.sites[0], made.slot_T, counts_TC)
    replace_by_triton(x_TN, made.tables.sites[0], made.slot_T, made.counts_TC)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(x_TN, expected_TN, rtol=tolerance, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(made.counts_TC, counts_TC)
    assert torch.equal(x_TN[48:].nan_to_num(), before[48:].nan_to_num())
    if width == 37:
        for t, slot in enumerate(slots):
            if slot:
                expected, _ = by_hand(programs[slot - 1], 0, before[t].double().cpu().numpy(), dtype)
                np.testing.assert_allclose(x_TN[t].double().cpu().numpy(), expected, rtol=tolerance, atol=1e-6)


def test_triton__works_on_rows_with_a_gap_between_them():
    width = 100
    made, _ = board([rank_site(width)], device="cuda")
    made.tables.put(1, program(RULES[0], width).sites)
    whole = values(8, 256, 1).cuda()
    expected = whole[:, :width].clone()
    made.host_2T[:, :8] = 1
    made.seat(8)
    replace_by_torch(expected, made.tables.sites[0], made.slot_T, made.counts_TC)
    outside = whole[:, width:].clone()
    made.run(whole[:, :width], 0)
    torch.testing.assert_close(whole[:, :width], expected, equal_nan=True)
    torch.testing.assert_close(whole[:, width:], outside, equal_nan=True)


@pytest.mark.parametrize("pair", [False, True])
def test_board__steers_a_captured_graph_by_what_is_seated_before_each_replay(pair):
    width, n_tokens = 512, 16
    made, tickets = board([rank_site(width)], device="cuda", dtype=torch.bfloat16)
    x_TN = torch.zeros(n_tokens, width, dtype=torch.bfloat16, device="cuda")
    residual_TN = torch.zeros_like(x_TN)

    def run() -> None:
        if pair:
            made.run_pair(x_TN, residual_TN, 0)
        else:
            made.run(x_TN, 0)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    # Programs are loaded, taken out and exchanged after the capture.
    for step, rules in enumerate((RULES[0], RULES[2], RULES[1], RULES[3], RULES[0])):
        from neuronlens.vllm.wire import pack

        one = program(rules, width, seed=step)
        assert tickets.admit(f"t{step}", f"p{step}", ["prompt", "generation"], pack(one))[0] == "admitted"
        start_TN = values(n_tokens, width, step, torch.bfloat16).cuda()
        x_TN.copy_(start_TN)
        residual_TN.zero_()
        n = n_tokens - step
        tickets.seat(["a", "b"], [None, f"t{step}"], np.array([2, n - 2]), np.array([0, 0]), np.array([2, 50]))
        graph.replay()
        made.rest()
        expected_TN, counts = start_TN.double().cpu().numpy(), np.zeros(len(one.rules) + 1, int)
        for t in range(2, n):
            expected_TN[t], found = by_hand(one, 0, expected_TN[t], torch.bfloat16)
            counts += found
        got_TN = (x_TN + residual_TN).double().cpu().numpy()
        np.testing.assert_allclose(got_TN, expected_TN, rtol=2e-2, atol=1e-6)
        released = tickets.release(f"t{step}")
        assert released is not None
        assert released[: len(counts)] == counts.tolist()
        x_TN.copy_(start_TN)
        residual_TN.zero_()
        graph.replay()
        assert torch.equal((x_TN + residual_TN).nan_to_num(), start_TN.nan_to_num()), "at rest a replay changes nothing"


def test_tickets__leave_alone_what_a_device_that_is_a_step_behind_has_still_to_copy():
    from neuronlens.vllm.wire import pack

    made, tickets = board([rank_site(512)], device="cuda")
    assert tickets.admit("t", "p", ["prompt"], pack(program(RULES[0], 512)))[0] == "admitted"
    before = values(9, 512, 1).nan_to_num(0, 0, 0).cuda()
    first, second = before.clone(), before.clone()
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    tickets.seat(["a"], ["t"], np.array([8]), np.array([0]), np.array([8]))
    made.run(first, 0)
    made.rest()
    tickets.seat(["b", "c"], [None, "t"], np.array([8, 1]), np.array([0, 0]), np.array([8, 1]))
    made.run(second, 0)
    assert (first != before).any(dim=1).tolist() == [True] * 8 + [False]
    assert (second != before).any(dim=1).tolist() == [False] * 8 + [True]
