"""What is refused before a model is loaded: one feature at a time, and all of them in one sentence."""

from types import SimpleNamespace
from typing import Any

import pytest

from neuronlens.errors import UsageError
from neuronlens.vllm.config import WorkerConfig
from neuronlens.vllm.features import check_features

PLAIN: dict[str, Any] = {
    "use_v2_model_runner": False,
    "speculative_config": None,
    "kv_transfer_config": None,
    "lora_config": None,
    "parallel_config.pipeline_parallel_size": 1,
    "parallel_config.data_parallel_size": 1,
    "parallel_config.use_ubatching": False,
    "parallel_config.decode_context_parallel_size": 1,
    "parallel_config.prefill_context_parallel_size": 1,
    "cache_config.kv_sharing_fast_prefill": False,
    "cache_config.kv_offloading_size": None,
    "compilation_config.pass_config.enable_sp": False,
    "model_config.quantization": None,
    "model_config.is_encoder_decoder": False,
    "model_config.runner_type": "generate",
}


def config_of(**changes: Any) -> SimpleNamespace:
    """A vLLM config, as far as we read it; a double underscore stands for a dot."""
    found = SimpleNamespace()
    for path, value in {**PLAIN, **{name.replace("__", "."): value for name, value in changes.items()}}.items():
        *sections, name = path.split(".")
        owner = found
        for section in sections:
            if not hasattr(owner, section):
                setattr(owner, section, SimpleNamespace())
            owner = getattr(owner, section)
        setattr(owner, name, value)
    return found


def test_features__plain_vllm_is_fine():
    check_features(config_of(), WorkerConfig())
    check_features(config_of(model_config__quantization="gptq"), WorkerConfig())


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV transfer connector"),
        ({"lora_config": object()}, "LoRA"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__data_parallel_size": 2}, "data parallelism"),
        ({"parallel_config__use_ubatching": True}, "dual-batch overlap"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "fast prefill"),
        ({"cache_config__kv_offloading_size": 4.0}, "offloaded"),
        ({"compilation_config__pass_config__enable_sp": True}, "sequence parallelism"),
        ({"model_config__quantization": "compressed-tensors-fp8"}, "quantisation compressed-tensors-fp8"),
        ({"model_config__runner_type": "pooling"}, "no decoder of text"),
    ],
)
def test_features__are_refused_by_name_with_the_mend(changes, wanted):
    with pytest.raises(UsageError, match=wanted):
        check_features(config_of(**changes), WorkerConfig())


def test_features__are_all_named_at_once():
    with pytest.raises(UsageError) as error:
        check_features(config_of(lora_config=object(), speculative_config=object()), WorkerConfig())
    assert "LoRA" in str(error.value)
    assert "speculative" in str(error.value)


def test_features__the_v2_runner_is_allowed_by_its_flag_for_steering_alone():
    check_features(config_of(use_v2_model_runner=True), WorkerConfig(v2_model_runner=True))
    with pytest.raises(UsageError, match="V2"):
        check_features(config_of(use_v2_model_runner=True), WorkerConfig(v2_model_runner=True, mode="collect"))
