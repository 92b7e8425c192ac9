"""Small tensors are faster on one thread, and tests run beside Ray's workers."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
