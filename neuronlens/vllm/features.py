"""What of vLLM was tested under our hooks, and what is refused at start instead of being wrong for some requests."""

from typing import Any

from neuronlens.errors import UsageError
from neuronlens.vllm.config import WorkerConfig

_FP8_ACTIVATIONS = ("fp8", "fp4", "mxfp4", "mxfp8", "nvfp4", "modelopt")


def check_features(vllm_config: Any, config: WorkerConfig) -> None:
    """Raises UsageError with all that is asked for and not supported, each with its mend."""
    faults = [fault for fault in _faults(vllm_config, config) if fault]
    if faults:
        raise UsageError("neuronlens in vLLM cannot run with " + "; ".join(faults) + ". See docs/vllm.md.")


def _faults(vllm_config: Any, config: WorkerConfig) -> list[str]:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    asked = {
        "the V2 model runner, where our adapter has run for minutes only: set VLLM_USE_V2_MODEL_RUNNER=0, or accept "
        'that with --additional-config \'{"neuronlens": {"v2_model_runner": true}}\'': (
            vllm_config.use_v2_model_runner and not (config.v2_model_runner and config.mode == "steer")
        ),
        "speculative decoding (drafts are computed without the program): drop --speculative-config": (
            vllm_config.speculative_config is not None
        ),
        "pipeline parallelism: take --tensor-parallel-size": parallel.pipeline_parallel_size > 1,
        "data parallelism: start one server each": parallel.data_parallel_size > 1,
        "dual-batch overlap (two half batches at a time): drop --enable-dbo": _is_set(parallel, "use_ubatching"),
        "context parallelism: drop it": (
            _number(parallel, "decode_context_parallel_size") > 1
            or _number(parallel, "prefill_context_parallel_size") > 1
        ),
        "a KV transfer connector (other servers would take steered keys and values for plain ones): drop "
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "keys and values offloaded to other memory: drop --kv-offloading-size": _is_set(cache, "kv_offloading_size"),
        "LoRA adapters (hooks see their layers, which was never tested): drop --enable-lora": (
            vllm_config.lora_config is not None
        ),
        "sequence parallelism in the compiled graph (a rank sees a part of the tokens): drop enable_sp": _is_set(
            getattr(vllm_config.compilation_config, "pass_config", None), "enable_sp"
        ),
        f"quantisation {vllm_config.model_config.quantization}, whose activations are not floating point at the down "
        "projection: take the model in bfloat16": _quantises_activations(vllm_config.model_config.quantization),
        "a model that is no decoder of text alone: take a text model": bool(
            getattr(vllm_config.model_config, "is_encoder_decoder", False)
            or getattr(vllm_config.model_config, "runner_type", "generate") != "generate"
        ),
        "a shared-KV fast prefill: drop --kv-sharing-fast-prefill": _is_set(cache, "kv_sharing_fast_prefill"),
    }
    return [sentence for sentence, is_asked in asked.items() if is_asked]


def _is_set(section: Any, name: str) -> bool:
    return bool(getattr(section, name, False))


def _number(section: Any, name: str) -> int:
    return int(getattr(section, name, 1) or 1)


def _quantises_activations(quantization: str | None) -> bool:
    return quantization is not None and any(name in quantization.lower() for name in _FP8_ACTIVATIONS)
