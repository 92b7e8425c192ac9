"""One Ray for all tests of the pipeline, and small data to run on."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.pipeline.runs import KeptSpares
from tests.tiny_models import SENTENCES, save_tiny

CONCEPTS = ("joy", "anger", "fear")


@pytest.fixture(scope="session")
def ray_cluster():
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    patch = pytest.MonkeyPatch()
    patch.setattr("pipeline.driver.Spares", KeptSpares)
    yield
    patch.undo()
    ray.shutdown()


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a tiny GPT-2 (model/) and labelled texts (train.jsonl, test.jsonl)."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model", "gpt2")
    rng = np.random.default_rng(0)
    words = " ".join(SENTENCES).split()
    for name, n_texts in (("train.jsonl", 120), ("test.jsonl", 30)):
        rows = [
            {"text": " ".join(rng.choice(words, rng.integers(1, 20))), "label": CONCEPTS[i % 3]} for i in range(n_texts)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def one_thread_each(monkeypatch):
    """On some CPUs torch's matrix products round differently with other numbers of threads, and fewer workers get more
    of them."""
    from pipeline import driver, erasure
    from pipeline.workers import choose_layout

    for stage in (driver, erasure):
        monkeypatch.setattr(stage, "choose_layout", lambda *a, **k: replace(choose_layout(*a, **k), n_threads=1))


@pytest.fixture
def small_shards(monkeypatch):
    """Ten or so shards out of the 120 texts."""
    monkeypatch.setattr("pipeline.plan.MIN_SHARD_TOKENS", 150)
