"""The main job, end to end: plan, collect, statistics, ranges, evaluation. Every stage goes on where an earlier try
stopped.

    neuronlens run recipe.yaml
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from neuronlens.errors import RunFailed
from neuronlens.recipe import Recipe
from neuronlens.store import Store
from pipeline.collect import CollectSpec
from pipeline.emit import emit_table
from pipeline.erasure import evaluate_table
from pipeline.plan import Plan, Shard, check_room, freeze, make_plan
from pipeline.pool import Failure, Pool
from pipeline.statistics import compute_statistics, layers_of
from pipeline.workers import Layout, Spares, WorkerSpec, actor_factory, choose_layout

DEFAULT_FOLDER = "neuronlens-runs"


class Reporter(Protocol):
    """Where a run says how far it is. `total` and `done` are in the stage's own unit."""

    def stage(self, name: str, total: int, unit: str) -> contextlib.AbstractContextManager[Callable[[int], None]]: ...

    def say(self, line: str) -> None: ...


class Silent:
    """A reporter that says nothing."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        yield lambda n: None

    def say(self, line: str) -> None:
        pass


@dataclass(slots=True, kw_only=True)
class Summary:
    """What a run made and how long each stage took."""

    store: str = ""
    range_table: str = ""
    n_samples: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    erasure: list[dict[str, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] = round(time.perf_counter() - started, 3)


def run(recipe: Recipe, *, name: str, store_root: str | None = None, reporter: Reporter | None = None) -> Summary:
    """Do the whole job, or what is left of it. Needs Ray to be running (`ray_session`).

    Without `store_root` the store lies in neuronlens-runs/, named by `name` and the hash of what decides its content.

    Raises UsageError before anything heavy for whatever is wrong with the recipe, the data or the store; RunFailed
    where shards were quarantined.
    """
    reporter = reporter or Silent()
    summary, started = Summary(), time.perf_counter()
    with Spares(recipe.compute) as spares:
        with summary.timed("plan"), reporter.stage("plan", 1, "plan") as advance:
            plan = make_plan(recipe, device_type=_device_type(recipe))
            store = Store(store_root or f"{DEFAULT_FOLDER}/{name}-{plan.store_hash[:12]}")
            if not store.exists("store.json"):
                check_room(plan, store)
            shards = freeze(plan, store)
            advance(1)
        summary.store, summary.n_samples, summary.n_tokens = store.root, plan.n_samples, plan.n_tokens
        n_truncated = plan.description["dataset"]["n_truncated"]
        if n_truncated:
            reporter.say(f"{n_truncated:,} texts are longer than the model's window and were cut.")
        reporter.say(plan.estimate.raw_note)
        with summary.timed("collect"):
            collect(recipe, plan, store, shards, reporter, spares)
    n_nonfinite = sum(receipt["n_nonfinite"] for receipt in store.receipts("commits"))
    if n_nonfinite:
        reporter.say(f"{n_nonfinite:,} activations are NaN or infinite; they are counted apart, in n_nonfinite.")
    with (
        summary.timed("statistics"),
        reporter.stage("statistics", len(layers_of(plan.description)), "layers") as advance,
    ):
        compute_statistics(
            store, tau=recipe.ranges.tau, memory_limit=recipe.compute.memory_limit, on_done=lambda _: advance(1)
        )
    with summary.timed("ranges"):
        table = emit_table(
            store,
            tau=recipe.ranges.tau,
            top_fraction=recipe.ranges.top_fraction,
            salience=recipe.ranges.salience,
        )
    summary.range_table = table.id
    if recipe.test is not None:
        with summary.timed("evaluate"):
            summary.erasure = evaluate_table(recipe, store, table, reporter)
    summary.seconds = round(time.perf_counter() - started, 3)
    return summary


def collect(
    recipe: Recipe,
    plan: Plan,
    store: Store,
    shards: tuple[Shard, ...],
    reporter: Reporter,
    spares: Spares | None = None,
) -> None:
    """Run the shards that no receipt names yet, longest first."""
    committed = set(store.names("commits"))
    todo = sorted(
        (shard for shard in shards if f"{shard.name}.json" not in committed),
        key=lambda shard: (-shard.n_tokens, shard.shard),
    )
    if len(todo) < len(shards):
        reporter.say(f"{len(shards) - len(todo)} of {len(shards)} shards are committed already.")
    if not todo:
        return
    layout = choose_layout(
        recipe.compute, n_jobs=len(todo), worker_memory_bytes=plan.estimate.total_worker_memory_bytes
    )
    spec = WorkerSpec(
        model=recipe.model,
        store=store,
        layout=layout,
        collect=CollectSpec.of(plan.description, plan.answers),
    )
    reporter.say(f"collecting with {_layout_text(layout)}")
    with (
        reporter.stage("collect", sum(shard.n_tokens for shard in todo), "tokens") as advance,
        Pool(make_actor=actor_factory(spec, spares), size=layout.n_workers) as pool,
    ):
        failures = pool.run(
            todo,
            submit=lambda actor, shard: actor.collect.remote(shard),
            on_done=lambda shard, _: advance(shard.n_tokens),
        )
    if failures:
        raise RunFailed(_quarantined(failures, len(shards)))


@contextlib.contextmanager
def ray_session(n_cpus: int | None = None) -> Iterator[None]:
    """Ray on this machine, or the cluster that RAY_ADDRESS names; stopped again at the end if we started it."""
    if ray.is_initialized():
        yield
        return
    threading.Thread(target=_import_libraries, daemon=True).start()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="ERROR", log_to_driver=False)
    else:
        ray.init(
            num_cpus=n_cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False, configure_logging=True
        )
    try:
        yield
    finally:
        ray.shutdown()


def _import_libraries() -> None:
    """Ray needs seconds to start its processes, in which this one waits: time enough to import what the plan needs."""
    import datasets  # noqa: F401
    import transformers.modeling_utils  # noqa: F401


def _device_type(recipe: Recipe) -> str:
    wanted = recipe.compute.gpus_per_worker
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    return "cuda" if (has_gpus if wanted == "auto" else wanted > 0) else "cpu"


def _layout_text(layout: Layout) -> str:
    workers = f"{layout.n_workers} worker{'s' if layout.n_workers > 1 else ''}"
    if layout.n_gpus:
        return f"{workers}, {layout.n_gpus:g} GPU each"
    return f"{workers} on the CPU, {layout.n_threads} thread{'s' if layout.n_threads > 1 else ''} each"


def _quarantined(failures: list[Failure[Shard]], n_shards: int) -> str:
    lines = [
        f"{failure.job.name} (concept {failure.job.concept}, {failure.job.n_samples} samples): failed "
        f"{failure.n_tries} times, last because {failure.reason}"
        for failure in failures
    ]
    return (
        f"{len(failures)} of {n_shards} shards failed and are quarantined; the others are committed.\n  "
        + "\n  ".join(lines)
        + '\n  Their texts: neuronlens sql STORE "select sample, row, text from samples where shard = N". '
        "Mend the reason and run the same command again."
    )
