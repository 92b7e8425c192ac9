"""A store that was collected through vLLM against one through transformers: the same texts, the same rows, the same
numbers within what float32 leaves open."""

import json
import subprocess
import sys

import numpy as np
import pytest

from neuronlens.errors import RunFailed
from neuronlens.recipe import parse_recipe
from neuronlens.store import Store
from pipeline.collect import CollectSpec, collect_shard, commit_shard
from pipeline.frozen import read_samples
from pipeline.plan import freeze, make_plan
from pipeline.vllm_worker import run_shard_in_engine
from tests.tiny_models import SENTENCES
from tests.vllm.test_collection import collecting
from tests.vllm.tiny import loaded_of

pytestmark = pytest.mark.vllm
HOOK_POINTS = ["mlp_post", "resid_post"]


@pytest.fixture
def texts(tmp_path):
    rng = np.random.default_rng(0)
    words = " ".join(SENTENCES).split()
    rows = [
        {"text": " ".join(rng.choice(words, rng.integers(1, 25))), "label": ("joy", "fear")[i % 2]} for i in range(120)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def content_of(folder, texts, backend, unit, **sections):
    return {
        "model": {"id": str(folder), "backend": backend, "dtype": "float32"},
        "data": {"source": str(texts), "prompt": "{text}<sep>"},
        "collect": {"hook_points": HOOK_POINTS, "unit": unit, "raw": "none", "predictions": False},
        **sections,
    }


def planned(root, *args):
    plan = make_plan(parse_recipe(content_of(*args)))
    store = Store(str(root))
    return store, freeze(plan, store), CollectSpec.of(plan.description, plan.answers)


def table_of(store, shard, kind):
    """The rows of a shard that is committed."""
    receipt = store.read_json(f"commits/{shard.name}.json")
    (path,) = [file["path"] for file in receipt["files"] if file["path"].startswith(kind)]
    return store.read_parquet(path)


def assert_same_shard(ours, theirs, shard):
    receipts = [store.read_json(f"commits/{shard.name}.json") for store in (ours, theirs)]
    for key in ("shard", "concept", "n_samples", "n_kept", "n_correct", "n_tokens", "n_truncated", "n_nonfinite"):
        assert receipts[0][key] == receipts[1][key], key
    ours_partials, theirs_partials = (table_of(store, shard, "partials") for store in (ours, theirs))
    assert ours_partials.schema == theirs_partials.schema
    for name in ("layer", "hook_point", "neuron", "concept", "n", "n_nonfinite"):
        assert ours_partials[name].to_pylist() == theirs_partials[name].to_pylist(), name
    got, true = ({name: table[name].to_numpy() for name in ("mean", "m2", "m3", "m4", "min", "max", "mean_abs", "n")}
                 for table in (ours_partials, theirs_partials))  # fmt: skip
    size = np.maximum(np.abs(true["min"]), np.abs(true["max"])).astype(np.float64) + 1e-2
    for name, power in (("mean", 1), ("min", 1), ("max", 1), ("mean_abs", 1), ("m2", 2), ("m3", 3), ("m4", 4)):
        n = 1 if power == 1 else true["n"]
        assert (np.abs(got[name] - true[name]) / (size**power * n)).max() < 1e-4, name
    cells = []
    for store in (ours, theirs):
        rows = table_of(store, shard, "histograms").to_pylist()
        cells.append({tuple(row[k] for k in ("hook_point", "layer", "neuron", "bin")): row["n"] for row in rows})
    n_moved = sum(abs(cells[0].get(cell, 0) - cells[1].get(cell, 0)) for cell in cells[0].keys() | cells[1].keys()) / 2
    assert sum(cells[0].values()) == sum(cells[1].values())
    assert n_moved < 2e-3 * sum(cells[1].values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_store__holds_the_same_through_vllm(models, texts, tmp_path, architecture, monkeypatch):
    monkeypatch.setattr("pipeline.plan.MIN_SHARD_TOKENS", 500)
    folder = models[architecture]
    with collecting(folder, hook_points=HOOK_POINTS) as engine:
        for unit in ("last_token", "token"):
            ours, shards, spec = planned(tmp_path / unit, folder, texts, "vllm", unit)
            theirs, their_shards, their_spec = planned(tmp_path / f"{unit}-bare", folder, texts, "transformers", unit)
            assert shards == their_shards
            assert len(shards) > 3
            for shard in shards:
                collected = run_shard_in_engine(engine, spec, shard, read_samples(ours, shard))
                receipt = commit_shard(spec, ours, collected)
                assert "vllm" in receipt["versions"]
                collect_shard(loaded_of(folder), their_spec, theirs, shard)
                assert_same_shard(ours, theirs, shard)


def test_run__collects_through_vllm_and_evaluates_through_transformers(models, texts, tmp_path):
    folder = models["qwen2"]
    content = content_of(folder, texts, "vllm", "last_token", test={"source": str(texts)})
    content["data"]["answers"] = {"joy": "<joy>", "fear": "<fear>"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(content))
    command = [sys.executable, "-m", "neuronlens", "run", str(recipe), "--store", str(tmp_path / "ours"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4_000:]
    assert json.loads(done.stdout)["rows"]
    ours = Store(str(tmp_path / "ours"))
    theirs, shards, spec = planned(tmp_path / "theirs", folder, texts, "transformers", "last_token")
    for shard in shards:
        collect_shard(loaded_of(folder), spec, theirs, shard)
        assert_same_shard(ours, theirs, shard)


def test_engine__that_answers_too_little_fails_the_shard(models, texts, tmp_path, monkeypatch):
    folder = models["llama"]
    store, (shard, *_), spec = planned(tmp_path / "store", folder, texts, "vllm", "token")
    with collecting(folder, hook_points=HOOK_POINTS) as engine:
        monkeypatch.setattr(engine.llm, "generate", lambda *args, **kwargs: [])
        with pytest.raises(RunFailed, match="vLLM answered 0 of"):
            run_shard_in_engine(engine, spec, shard, read_samples(store, shard))
