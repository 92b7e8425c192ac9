"""The main job, whole or stage by stage. Every stage goes on where an earlier try stopped, on whatever machine.

neuronlens run recipe.yaml
python -m jobs.collect recipe.yaml --store DIR, then jobs.statistics, jobs.ranges and jobs.evaluate
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import ray

from neuronlens.cluster import ray_cluster
from neuronlens.errors import RunFailed, UsageError
from neuronlens.models import import_for_generation
from neuronlens.programs import Edit
from neuronlens.ranges import RangeTable
from neuronlens.recipe import Recipe
from neuronlens.store import Store, files_of
from pipeline.collect import CollectSpec
from pipeline.compiling import compile_ahead
from pipeline.coverage import coverage_of
from pipeline.emit import emit_table
from pipeline.erasure import evaluate_table
from pipeline.erasure_texts import check_test
from pipeline.frozen import Shard
from pipeline.lease import Lease
from pipeline.plan import SHARDS_IN_HAND, Plan, check_room, freeze, make_plan, without_predictions
from pipeline.pool import Failure, Pool
from pipeline.progress import QUARANTINE, CollectProgress
from pipeline.statistics import compute_statistics, layers_of
from pipeline.stopping import StopSignals
from pipeline.vllm_worker import engine_starter
from pipeline.workers import Layout, Spares, WorkerSpec, choose_layout, on_one_machine, worker_starter

DEFAULT_FOLDER = "neuronlens-runs"
_N_ROWS_TOLD = 20


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
    """What a run made, how long each stage took, and what the collectors' seconds went into."""

    store: str = ""
    range_table: str = ""
    n_samples: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    collector_seconds: dict[str, float] = field(default_factory=dict)
    bytes_written: dict[str, int] = field(default_factory=dict)
    coverage: dict[str, int] = field(default_factory=dict)
    erasure: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For --json. `rows` are those of the evaluation."""
        shown = asdict(self)
        return shown | {"rows": shown.pop("erasure")}

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] = round(time.perf_counter() - started, 3)


@dataclass(slots=True, kw_only=True)
class Driver:
    """One process that works on one store: what its stages share. Use it as a context; Ray must be running.

    `allow_partial` goes on without the shards that were given up. `trust_files` compares only the sizes of files that
    were committed before, not their digests. `owns_process` lets a signal end the process by force, after its grace.
    """

    recipe: Recipe
    reporter: Reporter = field(default_factory=Silent)
    allow_partial: bool = False
    trust_files: bool = False
    owns_process: bool = False
    summary: Summary = field(default_factory=Summary)
    _stop: StopSignals = field(init=False)
    _started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._stop = StopSignals(ends_process=self.owns_process)

    def __enter__(self) -> "Driver":
        self._stop.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.__exit__(*error)
        self.summary.seconds = round(time.perf_counter() - self._started, 3)

    def plan(self, *, name: str, store_root: str | None) -> tuple[Plan, Store]:
        """What there is to do, and the store for it: `store_root`, or neuronlens-runs/ and the hash of what decides its
        content. Raises UsageError for whatever is wrong with the recipe or the data. Writes nothing."""
        with self.summary.timed("plan"), self.reporter.stage("plan", 1, "plan") as advance:
            plan = make_plan(self.recipe, device_type=_device_type(self.recipe))
            check_test(self.recipe, plan.description["concepts"])
            plan, store = _begun(plan, name, store_root, self.reporter)
            if not store.exists("store.json"):
                check_room(plan, store)
            advance(1)
        self.summary.store, self.summary.n_samples, self.summary.n_tokens = store.root, plan.n_samples, plan.n_tokens
        n_truncated = plan.description["dataset"]["n_truncated"]
        if n_truncated:
            self.reporter.say(f"{n_truncated:,} texts are longer than the model's window and were cut.")
        self.reporter.say(plan.estimate.raw_note)
        return plan, store

    def holding(self, store: Store, purpose: str) -> Lease:
        """Within it, no other driver works on the store. Entering it raises StoreHeld where one does."""
        return Lease(store, purpose, self.reporter.say)

    def collect(self, plan: Plan, store: Store, lease: Lease, spares: Spares | None = None) -> None:
        """Freeze the plan, or go on with the one that is frozen, and run the shards that no receipt names yet.

        Raises RunFailed where shards were given up, unless the recipe's person allows that.
        """
        with self.summary.timed("collect"):
            shards = freeze(plan, store)
            plan = replace(plan, members=())  # all the texts: workers read theirs from the store
            committed = intact_shards(store, self.reporter, digests=not self.trust_files)
            todo = sorted(
                (shard for shard in shards if shard.name not in committed),
                key=lambda shard: (-shard.n_tokens, shard.shard),
            )
            if len(todo) < len(shards):
                self.reporter.say(f"{len(shards) - len(todo)} of {len(shards)} shards are committed already.")
            failures = self._run_shards(plan, store, shards, todo, lease, spares) if todo else []
        n_nonfinite = sum(receipt["n_nonfinite"] for receipt in store.receipts("commits"))
        if n_nonfinite:
            self.reporter.say(
                f"{n_nonfinite:,} activations are NaN or infinite; they are counted apart, in n_nonfinite."
            )
        if failures and (not self.allow_partial or len(failures) == len(shards)):
            raise RunFailed(_told(failures, len(shards), store))
        if failures:
            self.reporter.say(_told(failures, len(shards), store))

    def statistics(self, store: Store) -> None:
        """Moments, overlap and salience of every layer, from the shards that are committed.

        Raises UsageError where shards are missing, unless that is allowed.
        """
        coverage = self.summary.coverage = coverage_of(store)
        if coverage["n_shards"] < coverage["n_planned_shards"] and not self.allow_partial:
            raise UsageError(
                f"{store.root} holds {coverage['n_shards']} of {coverage['n_planned_shards']} planned shards. Expected "
                "all of them: collect the others first, or go on without them by --allow-partial."
            )
        if not coverage["n_shards"]:
            raise UsageError(
                f"{store.root} holds no shard yet. Collect first: python -m jobs.collect RECIPE --store ..."
            )
        layers = layers_of(store.describe())
        with self.summary.timed("statistics"), self.reporter.stage("statistics", len(layers), "layers") as advance:
            compute_statistics(
                store,
                tau=self.recipe.ranges.tau,
                overlap=self.recipe.overlap,
                memory_limit=self.recipe.compute.memory_limit,
                on_done=lambda _: advance(1),
            )

    def ranges(self, store: Store) -> RangeTable:
        """The range table that the recipe asks for."""
        with self.summary.timed("ranges"):
            table = emit_table(store, self.recipe.ranges, self.reporter)
        self.summary.range_table = table.id
        return table

    def evaluate(self, store: Store, table: RangeTable, spares: Spares | None = None) -> None:
        """What the table erases and spares, where the recipe has a test."""
        if self.recipe.test is not None:
            with self.summary.timed("evaluate"), self._stop.gently():
                self.summary.erasure = evaluate_table(
                    self.recipe,
                    store,
                    table,
                    self.reporter,
                    Edit(action=self.recipe.test.action),
                    stop_requested=lambda: self._stop.requested,
                    spares=spares,
                )

    def _run_shards(
        self,
        plan: Plan,
        store: Store,
        shards: Sequence[Shard],
        todo: Sequence[Shard],
        lease: Lease,
        spares: Spares | None,
    ) -> list[Failure[Shard]]:
        compute, worker_bytes = self.recipe.compute, plan.estimate.total_worker_memory_bytes
        backend, per_batch = self.recipe.model.backend, compute.tokens_per_batch

        def layout_now() -> Layout:
            return choose_layout(compute, n_jobs=len(todo), worker_memory_bytes=worker_bytes, backend=backend)

        layout = layout_now()
        spec = WorkerSpec(
            model=self.recipe.model,
            store=store,
            layout=layout,
            collect=CollectSpec.of(plan.description, plan.answers),
            tokens_per_batch=None if per_batch == "auto" else per_batch,
            longest_prompt=plan.longest_prompt,
        )
        self.reporter.say(f"collecting with {_layout_text(layout)}")
        with (
            self._stop.gently(),
            self.reporter.stage("collect", sum(shard.n_tokens for shard in todo), "tokens") as advance,
        ):
            progress = CollectProgress(
                store,
                shards,
                todo,
                stop=self._stop,
                check=lease.check,
                on_tokens=advance,
                say=self.reporter.say,
            )
            starter = engine_starter(spec) if backend == "vllm" else worker_starter(spec, spares)
            try:
                with Pool[Shard](start=starter, size=lambda: layout_now().n_workers, depth=SHARDS_IN_HAND) as pool:
                    if spares is not None:
                        spares.end()
                    failures = pool.run(todo, lambda actor, shard: actor.collect.remote(shard), progress)
            finally:
                progress.write("stopped" if self._stop.requested else "collected")
                self.summary.collector_seconds = progress.seconds
                self.summary.bytes_written = progress.bytes_written
        return failures


def intact_shards(store: Store, reporter: Reporter, *, digests: bool = True) -> set[str]:
    """The names of the shards whose receipts and files are whole. What is not is taken away, to be made again.

    Without `digests`, only the sizes of files are compared.
    """
    receipts = {}
    for name in store.names("commits"):
        try:
            receipts[name.removesuffix(".json")] = store.read_json(f"commits/{name}")
        except RunFailed as error:
            reporter.say(f"{error} That shard is made again.")
            store.remove(f"commits/{name}")
    files = [(name, file) for name, receipt in receipts.items() for file in files_of(receipt)]
    n_bytes = sum(file.n_bytes for _, file in files)
    if not files:
        return set()
    with reporter.stage("check", n_bytes, "bytes") as advance:
        faults = store.faults_of([file for _, file in files], lambda file: advance(file.n_bytes), digests=digests)
    damaged = {name for (name, _), fault in zip(files, faults, strict=True) if fault is not None}
    for fault in filter(None, faults):
        reporter.say(f"damaged since it was committed: {fault}. Its shard is made again.")
    for name in damaged:
        store.remove(f"commits/{name}.json")
        for file in files_of(receipts[name]):
            store.remove(file.path)
    return set(receipts) - damaged


def run(
    recipe: Recipe,
    *,
    name: str,
    store_root: str | None = None,
    reporter: Reporter | None = None,
    allow_partial: bool = False,
    trust_files: bool = False,
    owns_process: bool = False,
) -> Summary:
    """Do the whole job, or what is left of it. Needs Ray to be running (`ray_session`).

    Raises UsageError before anything heavy for whatever is wrong with the recipe, the data or the store; RunFailed
    where shards were quarantined; StoreHeld where another driver works on the store; Stopped after a signal.
    """
    reporter = reporter or Silent()
    driver = Driver(
        recipe=recipe,
        reporter=reporter,
        allow_partial=allow_partial,
        trust_files=trust_files,
        owns_process=owns_process,
    )
    with driver, Spares(recipe.compute, recipe.model.backend) as spares:
        if on_one_machine():
            compile_ahead()
        plan, store = driver.plan(name=name, store_root=store_root)
        with driver.holding(store, "neuronlens run") as lease:
            driver.collect(plan, store, lease, spares)
            driver.statistics(store)
            table = driver.ranges(store)
            driver.evaluate(store, table, spares)
    return driver.summary


@contextlib.contextmanager
def ray_session(n_cpus: int | None = None) -> Iterator[None]:
    """Ray on this machine, or the cluster that RAY_ADDRESS names; stopped again at the end if we started it."""
    if ray.is_initialized():
        yield
        return
    threading.Thread(target=_import_libraries, daemon=True).start()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with ray_cluster(n_cpus=n_cpus):
        yield


def _import_libraries() -> None:
    """Ray needs seconds to start its processes, in which this one waits: time enough to import what the plan needs."""
    import datasets  # noqa: F401

    import_for_generation()


def _begun(plan: Plan, name: str, store_root: str | None, reporter: Reporter) -> tuple[Plan, Store]:
    """The store for a plan, and the plan as that store began it: one from before there were predictions goes on so."""

    def store_of(some: Plan) -> Store:
        return Store(store_root or f"{DEFAULT_FOLDER}/{name}-{some.store_hash[:12]}")

    store, older = store_of(plan), without_predictions(plan)
    if older is None or (store_root is None and store.exists("store.json")):
        return plan, store
    old_store = store_of(older)
    if not old_store.exists("store.json") or "predictions" in old_store.describe():
        return plan, store
    reporter.say(f"{old_store.root} is from before predictions were recorded; it goes on without them.")
    return older, old_store


def _device_type(recipe: Recipe) -> str:
    wanted = recipe.compute.gpus_per_worker
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    return "cuda" if (has_gpus if wanted == "auto" else wanted > 0) else "cpu"


def _layout_text(layout: Layout) -> str:
    workers = f"{layout.n_workers} worker{'s' if layout.n_workers > 1 else ''}"
    if layout.tensor_parallel > 1:
        workers += f" of {layout.tensor_parallel} ranks"
    if layout.n_gpus:
        return f"{workers}, {layout.n_gpus:g} GPU each"
    return f"{workers} on the CPU, {layout.n_threads} thread{'s' if layout.n_threads > 1 else ''} each"


def _told(failures: Sequence[Failure[Shard]], n_shards: int, store: Store) -> str:
    lines = []
    for failure in failures:
        shard, rows = failure.job, store.read_json(f"{QUARANTINE}/{failure.job.name}.json")["rows"]
        more = f" and {len(rows) - _N_ROWS_TOLD:,} more" if len(rows) > _N_ROWS_TOLD else ""
        lines.append(
            f"{shard.name} (concept {shard.concept}, {shard.n_samples} texts): failed {failure.n_tries} times, last "
            f"because {failure.reason}\n    rows of the data: {', '.join(map(str, rows[:_N_ROWS_TOLD]))}{more}"
        )
    return (
        f"{len(failures)} of {n_shards} shards failed and are quarantined; the others are committed.\n  "
        + "\n  ".join(lines)
        + f"\n  All their texts' ids stand in {store.path(QUARANTINE)}/. Mend the reason and run the same command "
        "again, or go on without them: --allow-partial."
    )
