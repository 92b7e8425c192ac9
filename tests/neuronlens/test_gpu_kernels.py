"""The kernels of GPUs under Triton's interpreter. It must be chosen before Triton is imported, so that these tests run
once more in a process of their own."""

import os
import subprocess
import sys

import pytest
import torch

from tests.neuronlens import triton_cases

pytest.importorskip("triton")

CPU = torch.device("cpu")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="needs Triton's interpreter")
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.fixture
def kernels(monkeypatch):
    """The kernels with long steps, since the interpreter takes as long for a short one."""
    from neuronlens import gpu_kernels

    monkeypatch.setattr(gpu_kernels, "_ROWS", 64)
    monkeypatch.setattr(gpu_kernels, "ROWS_TO_SORT_OUT", 50)
    return gpu_kernels


@pytest.mark.skipif(IS_INTERPRETED, reason="this is the process that it starts")
def test_gpu_kernels__are_right_under_the_interpreter():
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@interpreted
@pytest.mark.parametrize("name", triton_cases.NAMES)
def test_triton_accumulator__agrees_with_long_double(kernels, name):
    case = triton_cases.cases(6, (270, 16, 1, 40))[name]
    triton_cases.assert_right(case.fed(CPU), case.x_RN)


@interpreted
@pytest.mark.parametrize("n_neurons", [1, 67])
def test_triton_accumulator__takes_any_width_and_length(kernels, n_neurons, monkeypatch):
    monkeypatch.setattr(kernels, "_ROWS", 16)
    monkeypatch.setattr(kernels, "MAX_ROWS", 100)
    case = triton_cases.cases(n_neurons, (130,))["some not finite"]
    triton_cases.assert_right(case.fed(CPU), case.x_RN)


@interpreted
def test_triton_accumulator__counts_only_rows_named(kernels):
    triton_cases.assert_counts_only_rows_named(CPU)


@interpreted
def test_triton_accumulator__has_no_counts_where_none_were_asked_for(kernels):
    case = triton_cases.cases(2, (20,))["mean 0"]
    fed = case.fed(CPU, histogram=False)
    assert fed.counts() is None
    triton_cases.assert_right(fed, case.x_RN)
