"""The steering kernel under Triton's interpreter, which must be chosen before Triton is imported: in a process of its
own."""

import os
import subprocess
import sys

import pytest
import torch

from neuronlens.vllm.tables import replace_by_torch
from tests.neuronlens.vllm.boards import CONFIG, RULES, board, program, program_with_pieces, rank_site, values
from tests.range_tables import RULES_ON_PIECES

pytest.importorskip("triton")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="needs Triton's interpreter")


@pytest.mark.skipif(IS_INTERPRETED, reason="this is the process that it starts")
def test_triton_kernel__is_right_under_the_interpreter():
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block", "enough"), [(1024, 2048), (16, 2048), (16, 8)])
def test_triton_kernel__does_what_the_torch_operations_do(dtype, block, enough, monkeypatch):
    # Blocks shorter than a token's neurons, one to a program and several.
    from neuronlens.vllm import triton_kernel

    monkeypatch.setattr(triton_kernel, "_BLOCK", block)
    monkeypatch.setattr(triton_kernel, "_ENOUGH_PROGRAMS", enough)
    width, slots = 37, [0, 1, 2, 3, 4, 5, 6, 2, 0, 4]
    programs = [*(program(rules, width) for rules in RULES)]
    programs += [program_with_pieces(rules, width) for rules in RULES_ON_PIECES[1:3]]
    n_rows = sum(len(one.sites[0].rule_R) for one in programs)
    config = CONFIG.model_copy(update={"slots": len(programs), "rule_rows": n_rows})
    made, _ = board([rank_site(width)], dtype=dtype, config=config)
    for slot, one in enumerate(programs, start=1):
        made.tables.put(slot, one.sites)
    x_TN = values(12, width, 11, dtype)
    expected_TN, counts_TC = x_TN.clone(), torch.zeros_like(made.counts_TC)
    made.host_2T[:, : len(slots)] = slots
    made.seat(len(slots))
    replace_by_torch(expected_TN, made.tables.sites[0], made.slot_T, counts_TC)
    triton_kernel.replace_by_triton(x_TN, made.tables.sites[0], made.slot_T, made.counts_TC)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(x_TN, expected_TN, rtol=tolerance, atol=1e-6, equal_nan=True)
    assert torch.equal(made.counts_TC, counts_TC)
    assert counts_TC[:, 1:].sum() > 0
