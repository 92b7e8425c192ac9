"""An engine of vLLM that collects: prompts of one shard in, statistics of every site out.

    engine = CollectingEngine(folder, hook_points=["mlp_post"], layers="all", longest_prompt=128)
    statistics = engine.run(token_ids, unit="last_token", histograms=True)

vLLM batches the prompts as it does for any request of one new token; the workers accumulate on their device and send
moments and histograms once. Making an engine takes vLLM 15 to 60 s and sets its environment variables in this process.
"""

import gc
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import psutil
import torch

from neuronlens.errors import RunFailed, UsageError
from neuronlens.identity import resolve_folder
from neuronlens.vllm.collector import UNITS, Unit, request_name
from neuronlens.vllm.config import KEY
from neuronlens.vllm.statistics import ShardStatistics, join

_SEQUENCES = {"cpu": 256, "cuda": 1_024}
_BATCH_TOKENS = {"cpu": 4_096, "cuda": 16_384}
_BLOCK_TOKENS = {"cpu": 128, "cuda": 16}
"""vLLM's own defaults: sequences and tokens in a batch, and tokens in a block of the cache of keys and values."""
_CACHE_SHARE = 0.4
"""Of the memory that is free when an engine starts, how much its keys and values may take."""


class CollectingEngine:
    """vLLM on one model, its workers hooked for collecting. One thread uses it at a time.

    longest_prompt: in tokens; the model's window is as long. machine_share: which part of this machine's memory, or of
    its one GPU, the engine may count on. engine_options go to vllm.LLM as they are.
    """

    def __init__(
        self,
        model: str,
        *,
        hook_points: Sequence[str],
        layers: Literal["all"] | Sequence[int],
        longest_prompt: int,
        modules: Mapping[str, str] | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        tensor_parallel: int = 1,
        tokens_per_batch: int | None = None,
        machine_share: float = 1.0,
        **engine_options: Any,
    ) -> None:
        _set_environment(tensor_parallel)
        mend_llvmlite()
        from vllm import LLM, SamplingParams

        folder = str(resolve_folder(model, revision))
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        cache_bytes = _cache_bytes(folder, longest_prompt + 1, tensor_parallel, device_type, machine_share)
        options: dict[str, Any] = {
            "dtype": dtype,
            "enforce_eager": True,
            "worker_cls": "neuronlens.vllm.Worker",
            "additional_config": {
                KEY: {
                    "mode": "collect",
                    "hook_points": list(hook_points),
                    "layers": layers if layers == "all" else list(layers),
                    "modules": dict(modules or {}),
                }
            },
            "tensor_parallel_size": tensor_parallel,
            "distributed_executor_backend": "mp" if tensor_parallel > 1 else "uni",
            # Room for the one token that vLLM insists on making; it is never run through the model.
            "max_model_len": longest_prompt + 1,
            "kv_cache_memory_bytes": cache_bytes,
        }
        if device_type == "cuda":
            options["gpu_memory_utilization"] = 0.9 * min(1.0, machine_share)
        if tokens_per_batch is not None:
            options["max_num_batched_tokens"] = tokens_per_batch
            options["max_num_seqs"] = min(tokens_per_batch, _SEQUENCES[device_type])
        self.llm = LLM(model=folder, **(options | engine_options))
        self._sampling_params = SamplingParams
        self._special_ids = frozenset(self.llm.get_tokenizer().all_special_ids)

    def run(self, prompts: Sequence[Sequence[int]], *, unit: Unit, histograms: bool) -> ShardStatistics:
        """The statistics of one shard's prompts, given as token ids. What an earlier call left half done is forgotten.

        Raises UsageError for another unit, RunFailed where vLLM did not answer every prompt.
        """
        if unit not in UNITS:
            raise UsageError(f"The unit is {unit}; through vLLM it can be {' or '.join(UNITS)}.")
        shard = secrets.token_hex(8)
        self.llm.collective_rpc("neuronlens_begin_shard", args=(shard, unit, histograms))
        try:
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(ids)} for ids in prompts],
                self._parameters(shard, unit, prompts),
                use_tqdm=False,
            )
        except BaseException:
            self._drop_requests()
            raise
        if len(outputs) != len(prompts):
            raise RunFailed(f"vLLM answered {len(outputs)} of {len(prompts)} prompts of a shard; expected all of them.")
        return join(self.llm.collective_rpc("neuronlens_end_shard"))

    def is_alive(self) -> bool:
        """Do all workers still answer?"""
        try:
            self.llm.collective_rpc("check_health", timeout=60)
        except Exception:  # whatever vLLM raises for a worker that is gone
            return False
        return True

    def close(self) -> None:
        """End its processes and give back its memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def _parameters(self, shard: str, unit: Unit, prompts: Sequence[Sequence[int]]) -> list[Any]:
        """Sampling parameters for each prompt; those with special tokens at the same positions share one object."""
        counts_all = unit == "token"
        made: dict[tuple[int, ...], Any] = {}
        parameters = []
        for ids in prompts:
            specials = tuple(i for i, token in enumerate(ids) if token in self._special_ids) if counts_all else ()
            if specials not in made:
                made[specials] = self._sampling_params(
                    max_tokens=1,
                    temperature=0,
                    detokenize=False,
                    # Tokens whose keys and values are found in the cache are not computed, and could not be counted.
                    # The last token of a prompt always is.
                    skip_reading_prefix_cache=counts_all,
                    extra_args={KEY: request_name(shard, specials)},
                    # A deep copy for each prompt would take as long as the statistics of a short one.
                    skip_clone=True,
                )
            parameters.append(made[specials])
        return parameters

    def _drop_requests(self) -> None:
        """The next shard must not wait for what is left of this one."""
        engine = self.llm.llm_engine
        try:
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
        except Exception as error:  # the reason for which the shard failed is the one to tell
            logging.getLogger(__name__).warning("vLLM could not drop the requests of a failed shard: %s", error)


def _set_environment(tensor_parallel: int) -> None:
    """What vLLM reads when it starts. What the person has set stays, but for what must be."""
    # The engine lives in this process, and its workers are this process or are made new, never forked off it.
    os.environ |= {
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if tensor_parallel > 1 and not torch.cuda.is_available():
        # vLLM would give each rank a memory node of its own, and refuse where there is only one.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // tensor_parallel))


def mend_llvmlite() -> None:
    """vLLM's CPU build looks for kernels in the `__dict__` of everything in every module, and trips over llvmlite's
    library, which numba has loaded here and which answers to any name, even that one."""
    from llvmlite.binding import ffi

    kind = type(ffi.lib)
    answer = kind.__getattr__

    def answer_to_functions(lib: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer(lib, name)

    kind.__getattr__ = answer_to_functions


def _cache_bytes(folder: str, window: int, tensor_parallel: int, device_type: str, machine_share: float) -> int:
    """Bytes for keys and values, on each rank: room for two full batches, or two of the longest prompts, since prompts
    leave as soon as they are through; within a share of what is free, but never less than one prompt needs.

    The rest of a GPU's memory is left to the statistics.
    """
    token_bytes = _token_bytes(folder, tensor_parallel)
    block = _BLOCK_TOKENS[device_type]
    n_tokens = 2 * max(window, _BATCH_TOKENS[device_type] * tensor_parallel) + _SEQUENCES[device_type] * block
    n_free = (
        torch.cuda.mem_get_info()[0] if device_type == "cuda" else psutil.virtual_memory().available / tensor_parallel
    )
    wanted, room = n_tokens * token_bytes, int(_CACHE_SHARE * machine_share * n_free)
    return max(min(wanted, room), (window + 4 * block) * token_bytes)


def _token_bytes(folder: str, tensor_parallel: int) -> int:
    """Of the keys and values of one token in all layers of a rank; float32, to be sure."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return 2 * 4 * config.num_hidden_layers * max(1, n_kv_heads // tensor_parallel) * head_width
