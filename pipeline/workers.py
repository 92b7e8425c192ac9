"""The Ray actor that holds one model, and how many of them a machine or a cluster gets."""

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from neuronlens.errors import UsageError
from neuronlens.models import import_for_generation, load_model
from neuronlens.recipe import ComputeSection, ModelSection
from neuronlens.store import Store
from pipeline.backends import tensor_parallel_of
from pipeline.collect import Collected, CollectSpec, commit_shard, run_shard
from pipeline.compiling import have_accumulate
from pipeline.evaluator import EvaluationJob, EvaluationWork, Evaluator
from pipeline.frozen import Shard, read_samples
from pipeline.metrics import CollectorMetrics
from pipeline.plan import SHARDS_IN_HAND
from pipeline.pool import Place, Started, here
from pipeline.stopping import GRACE_SECONDS
from pipeline.turns import Turns

_MEMORY_SHARE = 0.7
"""Of a machine's memory, how much the models of its workers may take together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the work is spread: so many workers, with so many GPUs and CPU threads each, and their model cut into so many
    ranks."""

    n_workers: int
    n_gpus: float
    n_threads: int
    tensor_parallel: int = 1

    @property
    def device_type(self) -> str:
        return "cuda" if self.n_gpus else "cpu"


def choose_layout(
    compute: ComputeSection, *, n_jobs: int, worker_memory_bytes: int, backend: str = "transformers"
) -> Layout:
    """One worker a GPU where there are GPUs; else as many as cores, jobs and memory allow, sharing the cores. Of vLLM's
    engines, each with threads of its own, one a machine without GPUs.

    Raises UsageError where the recipe asks for GPUs that the cluster does not have.
    """
    resources = ray.cluster_resources()
    n_cores, n_cluster_gpus = max(1, int(resources.get("CPU", 1))), resources.get("GPU", 0.0)
    n_gpus = (1.0 if n_cluster_gpus else 0.0) if compute.gpus_per_worker == "auto" else compute.gpus_per_worker
    tensor_parallel = 1
    if backend == "vllm":
        tensor_parallel, n_gpus = tensor_parallel_of(compute, has_gpus=bool(n_cluster_gpus))
    may_grow = bool(os.environ.get("RAY_ADDRESS")) and compute.workers != "auto"
    if n_gpus > n_cluster_gpus and not may_grow:
        raise UsageError(
            f"compute.gpus_per_worker is {n_gpus:g}, but Ray sees {n_cluster_gpus:g} GPUs. Set it to 0 or auto, or "
            "give the cluster GPUs. A cluster that grows on demand needs compute.workers as a number, to know how far."
        )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if n_gpus > 1 and tensor_parallel > 1:
        room = sum(int(node.get("GPU", 0) / n_gpus) for node in nodes)
        if not room and not may_grow:
            raise UsageError(
                f"An engine of {tensor_parallel} ranks needs {n_gpus:g} GPUs of one machine; the largest here has "
                f"{max(node.get('GPU', 0) for node in nodes):g}. Lower compute.tensor_parallel."
            )
    elif n_gpus:
        room = int(n_cluster_gpus / n_gpus)
    elif backend == "vllm":
        room = sum(bool(node.get("CPU")) for node in nodes)
    else:
        n_bytes = resources.get("memory", 0) * _MEMORY_SHARE
        room = min(n_cores, int(n_bytes / max(1, worker_memory_bytes)) if n_bytes else n_cores)
    n_workers = max(1, min(room, n_jobs)) if compute.workers == "auto" else compute.workers
    n_node_cores = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    return Layout(
        n_workers=n_workers,
        n_gpus=n_gpus,
        n_threads=max(1, min(n_cores // n_workers, n_node_cores or n_cores)),
        tensor_parallel=tensor_parallel,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker needs to begin."""

    model: ModelSection
    store: Store
    layout: Layout
    collect: CollectSpec | None = None
    tokens_per_batch: int | None = 1_024
    """None: as the backend would have it."""
    longest_prompt: int = 0


class ModelWorker:
    """Holds the model; collects shards and evaluates batches of test texts.

    Up to SHARDS_IN_HAND shards at once, each in a thread of its own: one in the model, the others being written.
    SIGTERM (its node is taken away) gives it a few seconds to commit what it has in hand; the rest is dropped.
    """

    def __init__(self) -> None:
        import_for_generation()
        self._n_in_hand = 0
        self._evaluator: Evaluator | None = None
        self._counting = threading.Lock()
        signal.signal(signal.SIGTERM, self._leave)  # Ray's own handler waits for threads, however long they take

    def ready(self, spec: WorkerSpec) -> Place:
        """Load the model and look for the store. Must be called first, and be done before anything else is asked.

        Raises UsageError where this node does not see the driver's store or the model.
        """
        _check_store(spec.store)
        if spec.collect is not None and spec.layout.device_type == "cpu":
            have_accumulate()
        self._spec = spec
        self._hold_model()
        self._turns = Turns(SHARDS_IN_HAND)
        self._metrics = CollectorMetrics(Path(spec.store.root).name)
        return here()

    def rest(self) -> None:
        """Let go of the model, and keep the libraries until the next `ready`."""
        self._evaluator = None
        del self._loaded
        gc.collect()

    def collect(self, shard: Shard) -> dict[str, Any]:
        """Run and commit one shard; the receipt that counts."""
        spec = self._spec
        assert spec.collect is not None
        with self._in_hand():
            samples = read_samples(spec.store, shard)
            with self._turns.forward() as waited:
                collected = self._run(spec.collect, shard, samples)
            collected.seconds |= waited
            with self._turns.writing():
                receipt = commit_shard(spec.collect, spec.store, collected)
        self._metrics.committed(receipt)
        return receipt

    def evaluate(self, work: EvaluationWork, job: EvaluationJob) -> Any:
        """One batch of test texts under a group of interventions."""
        torch.set_num_threads(self._spec.layout.n_threads)
        if self._evaluator is None:
            self._evaluator = Evaluator(self._loaded, self._spec.model.modules or None)
        return self._evaluator.run(work, job)

    def _hold_model(self) -> None:
        model, layout = self._spec.model, self._spec.layout
        torch.set_num_threads(layout.n_threads)
        self._loaded = load_model(model.id, revision=model.revision, dtype=model.dtype, device=layout.device_type)

    def _run(self, spec: CollectSpec, shard: Shard, samples: pa.Table) -> Collected:
        n_threads = self._spec.layout.n_threads
        torch.set_num_threads(n_threads)  # a setting of the thread, not of the process
        return run_shard(self._loaded, spec, shard, samples, n_threads=n_threads)

    @contextlib.contextmanager
    def _in_hand(self) -> Iterator[None]:
        with self._counting:
            self._n_in_hand += 1
        try:
            yield
        finally:
            with self._counting:
                self._n_in_hand -= 1

    def _leave(self, *_: object) -> None:
        threading.Thread(target=self._leave_when_done, daemon=True).start()

    def _leave_when_done(self) -> None:
        end = time.monotonic() + GRACE_SECONDS
        while self._n_in_hand and time.monotonic() < end:
            time.sleep(0.1)
        os._exit(128 + signal.SIGTERM)


def on_one_machine() -> bool:
    """Is Ray ours, on this machine alone?"""
    return not os.environ.get("RAY_ADDRESS") and len(ray.nodes()) == 1


class Spares:
    """CPU workers that import their libraries while the driver plans, and keep them from one stage to the next, so that
    nobody waits for them.

    Only where Ray is ours, on this machine alone and without a GPU: there it is known beforehand what a worker will be.
    They reserve no cores, which the stages between theirs need. As many as the recipe asks for, by default and at most
    one a core; no more than `at_most`.
    """

    def __init__(self, compute: ComputeSection, backend: str = "transformers", *, at_most: int | None = None) -> None:
        resources = ray.cluster_resources()
        n_cores = int(resources.get("CPU", 1))
        alone = on_one_machine() and not resources.get("GPU")
        fits = backend == "transformers" and alone and compute.gpus_per_worker in ("auto", 0)
        wanted = (n_cores, n_cores if compute.workers == "auto" else compute.workers, at_most or n_cores)
        self._idle = self._started(min(wanted)) if fits else []

    def _started(self, n_workers: int) -> list[Any]:
        return [_actor_class(0, 0).remote() for _ in range(n_workers)]

    def take(self) -> Any | None:
        """One that is ready to be made ready, or None."""
        return self._idle.pop() if self._idle else None

    def put(self, actor: Any) -> None:
        """Take back one that has nothing in hand."""
        try:
            ray.get(actor.rest.remote())
        except ray.exceptions.RayError:  # it died meanwhile
            ray.kill(actor)
        else:
            self._idle.append(actor)

    def end(self) -> None:
        """End those that nobody has taken."""
        while self._idle:
            ray.kill(self._idle.pop())

    def __enter__(self) -> "Spares":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def worker_starter(spec: WorkerSpec, spares: Spares | None = None) -> Callable[[], Started]:
    """A function that starts one more worker: a spare, or a new one on whatever node has room."""
    spec_ref = ray.put(spec)

    def start() -> Started:
        spare = spares.take() if spares is not None else None
        if spares is not None and spare is not None:
            return Started(spare, spare.ready.remote(spec_ref), rest=spares.put)
        n_cpus = 1 if spec.layout.n_gpus else cpu_share(spec.layout)
        actor = _actor_class(n_cpus, spec.layout.n_gpus).remote()
        return Started(actor, actor.ready.remote(spec_ref))

    return start


def _check_store(store: Store) -> None:
    if not store.exists("store.json"):
        raise UsageError(
            f"{store.root} holds no store.json as seen from the node {ray.util.get_node_ip_address()}; the driver has "
            "just written one there. Expected a store that all nodes share: give --store a folder on a shared disk, or "
            "a URL such as s3://bucket/run."
        )


def _actor_class(n_cpus: float, n_gpus: float) -> Any:
    return ray.remote(ModelWorker).options(
        num_cpus=n_cpus,
        num_gpus=n_gpus,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=SHARDS_IN_HAND,
    )


def cpu_share(layout: Layout) -> float:
    """More workers than cores still start on this machine: they share, a core's fraction each. On a cluster, which may
    grow, they wait for cores of their own."""
    if os.environ.get("RAY_ADDRESS"):
        return float(layout.n_threads)
    n_cores = ray.cluster_resources().get("CPU", 1.0)
    return min(float(layout.n_threads), int(n_cores / layout.n_workers * 1000) / 1000)
