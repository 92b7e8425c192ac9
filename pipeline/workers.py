"""The Ray actor that holds one model, and how many of them a machine or a cluster gets."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from neuronlens.errors import UsageError
from neuronlens.evaluation import Case, CaseResult, TestText, evaluate_case
from neuronlens.models import load_model
from neuronlens.programs import Edit
from neuronlens.ranges import RangeTable
from neuronlens.recipe import ComputeSection, ModelSection
from neuronlens.store import Store
from pipeline.collect import CollectSpec, collect_shard
from pipeline.plan import Shard

_MEMORY_SHARE = 0.7
"""Of a machine's memory, how much the models of its workers may take together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the work is spread: so many workers, with so many GPUs and CPU threads each."""

    n_workers: int
    n_gpus: float
    n_threads: int

    @property
    def device_type(self) -> str:
        return "cuda" if self.n_gpus else "cpu"


def choose_layout(compute: ComputeSection, *, n_jobs: int, worker_memory_bytes: int) -> Layout:
    """One worker a GPU where there are GPUs; else as many as cores, jobs and memory allow, sharing the cores.

    Raises UsageError where the recipe asks for GPUs that the cluster does not have.
    """
    resources = ray.cluster_resources()
    n_cores, n_cluster_gpus = max(1, int(resources.get("CPU", 1))), resources.get("GPU", 0.0)
    n_gpus = (1.0 if n_cluster_gpus else 0.0) if compute.gpus_per_worker == "auto" else compute.gpus_per_worker
    if n_gpus > n_cluster_gpus:
        raise UsageError(
            f"compute.gpus_per_worker is {n_gpus:g}, but Ray sees {n_cluster_gpus:g} GPUs. Set it to 0 or auto, or "
            "give the cluster GPUs."
        )
    if n_gpus:
        room = int(n_cluster_gpus / n_gpus)
    else:
        n_bytes = resources.get("memory", 0) * _MEMORY_SHARE
        room = min(n_cores, int(n_bytes / max(1, worker_memory_bytes)) if n_bytes else n_cores)
    n_workers = max(1, min(room, n_jobs)) if compute.workers == "auto" else compute.workers
    return Layout(n_workers=n_workers, n_gpus=n_gpus, n_threads=max(1, n_cores // n_workers))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker needs to begin."""

    model: ModelSection
    store: Store
    layout: Layout
    collect: CollectSpec | None = None
    tokens_per_batch: int = 1_024


class ModelWorker:
    """Holds the model; collects shards and evaluates cases, one at a time."""

    def configure(self, spec: WorkerSpec) -> None:
        """What to load and to do. Must be called first."""
        self._spec = spec

    def ready(self) -> int:
        """Load the model; the process id. Must be called second."""
        import torch

        model, layout = self._spec.model, self._spec.layout
        torch.set_num_threads(layout.n_threads)
        self._loaded = load_model(model.id, revision=model.revision, dtype=model.dtype, device=layout.device_type)
        return os.getpid()

    def collect(self, shard: Shard) -> dict[str, Any]:
        """Run and commit one shard; the receipt that counts."""
        assert self._spec.collect is not None
        return collect_shard(
            self._loaded, self._spec.collect, self._spec.store, shard, n_threads=self._spec.layout.n_threads
        )

    def evaluate(
        self, table: RangeTable, edit: Edit, case: Case, texts: tuple[TestText, ...], answers: dict[str, int] | None
    ) -> CaseResult:
        """One intervention on all test texts."""
        return evaluate_case(
            self._loaded,
            table,
            case,
            texts,
            answers,
            tokens_per_batch=self._spec.tokens_per_batch,
            edit=edit,
            overrides=self._spec.model.modules or None,
        )


class Spares:
    """CPU workers that import their libraries while the driver plans, so that nobody waits for them later.

    Only where Ray runs on this machine alone and has no GPU: there it is known beforehand what a worker will be.
    """

    def __init__(self, compute: ComputeSection) -> None:
        resources = ray.cluster_resources()
        n_cores = int(resources.get("CPU", 1))
        alone = len(ray.nodes()) == 1 and not resources.get("GPU")
        fits = alone and compute.gpus_per_worker in ("auto", 0) and compute.workers in ("auto", n_cores)
        layout = Layout(n_workers=n_cores, n_gpus=0, n_threads=1)
        self._idle = [_actor_class(layout).remote() for _ in range(n_cores)] if fits else []

    def take(self, layout: Layout) -> Any | None:
        """One that fits the layout, or None."""
        return self._idle.pop() if self._idle and layout.n_threads == 1 and not layout.n_gpus else None

    def __enter__(self) -> "Spares":
        return self

    def __exit__(self, *_: object) -> None:
        """End those that nobody took."""
        while self._idle:
            ray.kill(self._idle.pop())


def actor_factory(spec: WorkerSpec, spares: Spares | None = None) -> Callable[[], Any]:
    """A function that gives one more worker: a spare, or a new one on whatever node has room."""
    spec_ref = ray.put(spec)

    def make() -> Any:
        spare = spares.take(spec.layout) if spares is not None else None
        actor = spare or _actor_class(spec.layout).remote()
        actor.configure.remote(spec_ref)
        return actor

    return make


def _actor_class(layout: Layout) -> Any:
    return ray.remote(ModelWorker).options(
        num_cpus=1 if layout.n_gpus else _cpu_share(layout),
        num_gpus=layout.n_gpus,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=1,
    )


def _cpu_share(layout: Layout) -> float:
    """More workers than cores still start: they share, a core's fraction each."""
    n_cores = ray.cluster_resources().get("CPU", 1.0)
    return min(float(layout.n_threads), int(n_cores / layout.n_workers * 1000) / 1000)
