"""Tests that need a GPU: python -m pytest tests/gpu -m gpu. Nothing here runs where torch sees none."""

import pytest
import torch


@pytest.fixture(autouse=True)
def on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
