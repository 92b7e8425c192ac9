"""The Ray actor that holds an engine of vLLM, and the placement group in which one of several GPUs runs.

vLLM's processes of a tensor-parallel engine are children of the actor, on the GPUs that Ray reserved for it: Ray knows
of one actor only, and of its group.
"""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from neuronlens.errors import NeuronLensError
from pipeline.collect import Collected, CollectSpec
from pipeline.frozen import Shard
from pipeline.plan import SHARDS_IN_HAND
from pipeline.pool import Started
from pipeline.workers import Layout, ModelWorker, WorkerSpec, cpu_share

if TYPE_CHECKING:
    from neuronlens.vllm.collection import CollectingEngine

_log = logging.getLogger(__name__)


class EngineWorker(ModelWorker):
    """As ModelWorker, with vLLM between the texts and the model. It evaluates nothing."""

    def _hold_model(self) -> None:
        # vLLM and the number of threads keep to the thread that they were set in.
        self._engine_thread = ThreadPoolExecutor(1)
        self._engine = self._engine_thread.submit(_start_engine, self._spec).result()

    def _run(self, spec: CollectSpec, shard: Shard, samples: pa.Table) -> Collected:
        try:
            return self._engine_thread.submit(run_shard_in_engine, self._engine, spec, shard, samples).result()
        except NeuronLensError:
            raise
        except Exception:
            if not self._engine_thread.submit(self._engine.is_alive).result():
                # A process of the engine has died, and no later shard would do better here: another worker will.
                _log.exception("vLLM's engine is gone")
                os._exit(1)
            raise


def run_shard_in_engine(engine: "CollectingEngine", spec: CollectSpec, shard: Shard, samples: pa.Table) -> Collected:
    """As `pipeline.collect.run_shard`, by an engine of vLLM."""
    started = time.perf_counter()
    prompts = samples["token_ids"].to_pylist()
    statistics = engine.run(prompts, unit=cast(Any, spec.unit), histograms=spec.histograms)
    forward = time.perf_counter() - started - statistics.seconds
    return Collected(
        shard=shard,
        samples=samples,
        sites=statistics.sites,
        accumulators=statistics.sites,
        n_kept=shard.n_samples,
        seconds={"forward": forward, "statistics": statistics.seconds},
    )


def engine_starter(spec: WorkerSpec) -> Callable[[], Started]:
    """A function that starts one more engine: where it is cut into ranks, in a placement group of its own, which goes
    when the worker goes."""
    spec_ref, layout = ray.put(spec), spec.layout

    def start() -> Started:
        if layout.tensor_parallel == 1:
            actor = ray.remote(EngineWorker).options(**_options(layout)).remote()
            return Started(actor, actor.ready.remote(spec_ref))
        options = _options(layout)
        bundle = {"CPU": options["num_cpus"], "GPU": layout.n_gpus}
        group = placement_group([{name: n for name, n in bundle.items() if n}], strategy="STRICT_PACK")
        inside = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=0)
        actor = ray.remote(EngineWorker).options(**options, scheduling_strategy=inside).remote()

        def end(actor: Any) -> None:
            ray.kill(actor)
            remove_placement_group(group)

        return Started(actor, actor.ready.remote(spec_ref), end)

    return start


def _options(layout: Layout) -> dict[str, Any]:
    return {
        "num_cpus": layout.tensor_parallel if layout.n_gpus else cpu_share(layout),
        "num_gpus": layout.n_gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": SHARDS_IN_HAND,
    }


def _start_engine(spec: WorkerSpec) -> "CollectingEngine":
    torch.set_num_threads(spec.layout.n_threads)
    from neuronlens.vllm.collection import CollectingEngine

    assert spec.collect is not None
    return CollectingEngine(
        spec.model.id,
        revision=spec.model.revision,
        # As the plan read it from the checkpoint: vLLM's own `auto` would halve float32.
        dtype=spec.store.describe()["model"]["dtype"],
        hook_points=spec.collect.hook_points,
        layers=spec.collect.layers,
        modules=spec.collect.modules,
        tensor_parallel=spec.layout.tensor_parallel,
        longest_prompt=spec.longest_prompt,
        tokens_per_batch=spec.tokens_per_batch,
        machine_share=spec.layout.n_gpus or 1 / spec.layout.n_workers,
    )
