"""The Triton accumulator on the hardware: what tests/neuronlens/test_gpu_kernels.py asks of it, and more of it."""

import numpy as np
import pytest
import torch

from neuronlens.accumulate import TorchAccumulator, TritonAccumulator, make_accumulator
from tests.neuronlens import triton_cases

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("rows_to_sort_out", [1, 10**9])
@pytest.mark.parametrize("name", triton_cases.NAMES)
def test_triton_accumulator__agrees_with_long_double(name, rows_to_sort_out, monkeypatch):
    from neuronlens import gpu_kernels

    monkeypatch.setattr(gpu_kernels, "ROWS_TO_SORT_OUT", rows_to_sort_out)
    case = triton_cases.cases(70, (290, 16, 1, 65, 1200, 512))[name]
    triton_cases.assert_right(case.fed(GPU), case.x_RN)


@pytest.mark.parametrize("n_neurons", [1, 37, 64, 256])
def test_triton_accumulator__takes_any_width_and_length(n_neurons, monkeypatch):
    from neuronlens import gpu_kernels

    monkeypatch.setattr(gpu_kernels, "MAX_ROWS", 1000)
    case = triton_cases.cases(n_neurons, (3333, 256, 7))["some not finite"]
    triton_cases.assert_right(case.fed(GPU), case.x_RN)


def test_triton_accumulator__counts_only_rows_named():
    triton_cases.assert_counts_only_rows_named(GPU)


@pytest.mark.parametrize("histogram", [False, True])
def test_make_accumulator__gives_on_a_gpu_what_torch_gives(histogram):
    made = make_accumulator(14336, histogram=histogram, device=GPU)
    reference = TorchAccumulator(14336, histogram=histogram, device=GPU)
    assert isinstance(made, TritonAccumulator)
    for seed, n_rows in enumerate((16, 4096, 9000, 1)):
        torch.manual_seed(seed)
        x_RN = torch.randn(n_rows, 14336, device=GPU).bfloat16()
        rows_K = torch.arange(0, n_rows, 1 + seed % 2, device=GPU)
        made.add(x_RN, rows_K)
        reference.add(x_RN, rows_K)
    got, expected = made.moments(), reference.moments()
    np.testing.assert_array_equal(got.n_N, expected.n_N)
    np.testing.assert_allclose(got.mean_N, expected.mean_N, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.m2_N, expected.m2_N, rtol=2e-6)
    np.testing.assert_allclose(got.m4_N, expected.m4_N, rtol=1e-5)
    if histogram:
        np.testing.assert_array_equal(made.counts(), reference.counts())
    else:
        assert made.counts() is None


def test_triton_accumulator__does_not_wait_for_the_device():
    accumulator = TritonAccumulator(256, histogram=True, device=GPU)
    x_RN, rows_K = torch.randn(2048, 256, device=GPU), torch.arange(2048, device=GPU)
    accumulator.add(x_RN, rows_K)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulator.add(x_RN, rows_K)
        accumulator.add(x_RN, rows_K[:16])
    finally:
        torch.cuda.set_sync_debug_mode("default")
