"""Small tensors are faster on one thread, and tests run beside Ray's workers and each other."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A core each, and no more than four: each has a Ray of its own. Files or tests that were named run in this
    process, where a debugger can stop them: they would be over before other processes had begun."""
    named = [arg for arg in map(str, config.invocation_params.args) if not arg.startswith("-")]
    return 0 if any(arg.partition("::")[0].endswith(".py") for arg in named) else min(4, os.cpu_count() or 1)
