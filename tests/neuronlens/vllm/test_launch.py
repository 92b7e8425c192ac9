"""What `neuronlens serve --engine vllm` starts vLLM with: told apart from a run, without vLLM."""

import asyncio
import itertools
import json
from argparse import Namespace
from pathlib import Path

import pytest

from neuronlens.errors import UsageError
from neuronlens.identity import model_identity
from neuronlens.ranges import TableModel
from neuronlens.serving.assembly import ServiceSpec
from neuronlens.serving.catalog import Catalog
from neuronlens.vllm.endpoint import NeuronLensEndpoint
from neuronlens.vllm.launch import environment, vllm_arguments
from tests.range_tables import row, table_of
from tests.tiny_models import save_tiny


@pytest.fixture
def spec(tmp_path: Path) -> ServiceSpec:
    folder = save_tiny(tmp_path / "tiny", "llama")
    model = TableModel(id=str(folder), revision=None, config_hash=model_identity(str(folder)).config_hash)
    rows = [row("joy", 1, 0.1, 0.2, hook_point=name) for name in ("resid_post", "mlp_post")]
    table = table_of(rows, widths={"resid_post": 16, "mlp_post": 40}, model=model)
    return ServiceSpec(sources=(table.save(tmp_path / "ranges"),))


def test_arguments__name_the_tables_model_its_dtype_and_their_hook_points(spec):
    command = vllm_arguments(spec, Catalog(spec.sources), host="127.0.0.1", port=8123, more=["--enforce-eager"])
    options = dict(itertools.pairwise(command))
    assert (command[0], Path(command[1]).name) == ("serve", "tiny")
    assert options["--served-model-name"] == "tiny", "the path of a local folder is nobody's business"
    assert options["--worker-cls"] == "neuronlens.vllm.Worker"
    assert options["--dtype"] == "float32", "vLLM's own auto would take bfloat16"
    config = json.loads(options["--additional-config"])["neuronlens"]
    assert config["hook_points"] == ["mlp_post", "resid_post"]
    assert (options["--host"], options["--port"], command[-1]) == ("127.0.0.1", "8123", "--enforce-eager")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({"device": "cuda:1"}, "chooses its device itself"), ({"chat_template": "plain"}, "needs a Jinja chat template"),
     ({"chat_template": "/nowhere/x.jinja"}, "cannot be read")],
)  # fmt: skip
def test_arguments__refuse_what_vllm_does_not_have(spec, changes, wanted):
    with pytest.raises(UsageError, match=wanted):
        vllm_arguments(spec.model_copy(update=changes), Catalog(spec.sources), host="h", port=1)


def test_environment__brings_sources_keys_and_plugin_over_and_keeps_the_rest():
    spec = ServiceSpec(sources=("s3://bucket/run", "/store"), uploads="/up")
    found = environment(spec, "keys.txt", {"VLLM_PLUGINS": "other", "HOME": "/h"})
    assert found["NEURONLENS_SOURCES"] == "s3://bucket/run,/store"
    assert (found["NEURONLENS_UPLOADS"], found["NEURONLENS_API_KEY_FILE"]) == ("/up", "keys.txt")
    assert found["VLLM_PLUGINS"] == "other,neuronlens"
    assert (found["VLLM_USE_V2_MODEL_RUNNER"], found["HOME"]) == ("0", "/h")
    assert environment(spec, None, {"VLLM_USE_V2_MODEL_RUNNER": "1"})["VLLM_USE_V2_MODEL_RUNNER"] == "1"


def test_plugin__says_what_is_missing_where_no_tables_are_named(monkeypatch):
    for name in ("NEURONLENS_SOURCES", "NEURONLENS_UPLOADS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="neither NEURONLENS_SOURCES nor NEURONLENS_UPLOADS"):
        asyncio.run(NeuronLensEndpoint().init_state(object(), None, Namespace(worker_cls="auto")))
