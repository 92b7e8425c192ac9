"""The statistics stage: what the shards hold of one layer becomes moments, merged histograms, distributions, overlap
and salience. One Ray task a layer, which takes its threads from Ray and its memory and scratch space from the node that
runs it. DuckDB merges and ranks; the pairs of concepts, of which there are most, are scored by compiled code.

    NEURONLENS_SCRATCH=/fast/disk neuronlens run recipe.yaml     # where queries spill; by default the system's TMPDIR
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from neuronlens.bumps import Bumps, open_counts, read_counts
from neuronlens.distributions import COLUMNS, DISTRIBUTIONS_SCHEMA, distributions_of
from neuronlens.errors import NeuronLensError, RunFailed
from neuronlens.information import information_of
from neuronlens.overlap import PAIRS_SCHEMA, SCORES, concept_overlap_of, kept_of, pairs_of
from neuronlens.query import attach, attach_rows, connect, rows_of, run_to_parquet
from neuronlens.recipe import SQL_SALIENCE_METHODS, OverlapSection
from neuronlens.store import Store, StoredFile, content_hash, files_of, new_attempt, receipt_of
from pipeline.compiling import have_scores
from pipeline.coverage import coverage_of
from pipeline.histograms import ROW_GROUP_ROWS, write_merged

MEMORY_SHARE = 0.6
"""Of a node's memory, what all the SQL tasks on it may use together before they spill."""
MIN_MEMORY_BYTES = 512 * 2**20
MAX_TASK_RETRIES = 3
"""How often Ray starts a layer again whose worker or node died."""
AUTO_PAIRS = 435
"""`keep: auto` keeps all pairs of up to 30 concepts: 435 rows of 20 bytes a neuron, which is less than its partials
take (30 rows of 46 bytes in each of 8 or more shards), so that overlap never becomes the largest part of a store."""
BLOCK_CONCEPTS = 16_384
BLOCK_PAIRS = 400_000
"""The pairs of so many neurons are scored at once that neurons times concepts, and neurons times pairs, stay below
these: a million rows of histograms, and twenty megabytes of pairs."""
SCRATCH_VARIABLE = "NEURONLENS_SCRATCH"

_MOMENT_COLUMNS = ("neuron", "concept", "mean", "std", "min", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one SQL task may use: threads, bytes of memory, and the folder in which it spills what is more."""

    n_threads: int
    memory_bytes: int
    scratch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One unit of the stage: a hook point of a layer, `width` neurons wide."""

    hook_point: str
    layer: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.hook_point}.{self.layer:03d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides a layer's statistics besides its inputs: where it differs, a kept layer is made again."""

    tau: float
    overlap: dict[str, Any]
    """Which pairs are kept, as `kept_pairs` says it."""

    def matches(self, receipt: Mapping[str, Any]) -> bool:
        return bool(receipt["tau"] == self.tau and receipt.get("overlap") == self.overlap)


def layers_of(description: dict[str, Any]) -> list[Layer]:
    return [
        Layer(hook_point=hook_point, layer=layer, width=description["widths"][hook_point])
        for hook_point in description["hook_points"]
        for layer in description["layers"]
    ]


def inputs_hash(commits: Sequence[dict[str, Any]]) -> str:
    """What a layer's statistics were merged from: the attempts that count, in the order of their shards."""
    return content_hash([[receipt["shard"], receipt["attempt"]] for receipt in commits])


def kept_pairs(section: OverlapSection, n_concepts: int) -> dict[str, Any]:
    """What a recipe's overlap section comes to with so many concepts: `keep`, and its number."""
    keep = section.keep
    if keep == "auto":
        keep = "all" if _n_pairs(n_concepts) <= AUTO_PAIRS else "top"
    numbers: dict[str, dict[str, Any]] = {"top": {"top": section.top}, "threshold": {"threshold": section.threshold}}
    return {"keep": keep, **numbers.get(keep, {})}


# --- all layers, on a cluster ----------------------------------------------------------------------------------------


def compute_statistics(
    store: Store,
    *,
    tau: float,
    memory_limit: int | None,
    on_done: Callable[[dict[str, Any]], None],
    overlap: OverlapSection | None = None,
) -> None:
    """Every layer of the store, as Ray tasks that share the cluster's cores; `on_done` gets each layer's receipt.

    A layer that fails does not stop the others. Raises RunFailed naming what failed and why.
    """
    layers = layers_of(store.describe())
    commits = store.receipts("commits")
    n_concepts = len({receipt["concept"] for receipt in commits})
    settings = Settings(tau=tau, overlap=kept_pairs(overlap or OverlapSection(), n_concepts))
    options = _task_options([node["Resources"] for node in ray.nodes() if node["Alive"]], len(layers), memory_limit)
    task = ray.remote(_compute_layer_here).options(max_retries=MAX_TASK_RETRIES, **options)
    shared = ray.put(commits)
    coverage = coverage_of(store, commits)
    pending = {
        task.remote(store, layer, shared, settings=settings, coverage=coverage, memory_limit=memory_limit): layer
        for layer in layers
    }
    failures: list[tuple[Layer, BaseException]] = []
    try:
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            layer = pending.pop(done[0])
            try:
                receipt = ray.get(done[0])
            except ray.exceptions.RayError as error:
                failures.append((layer, getattr(error, "cause", None) or error))
            else:
                on_done(receipt)
    finally:
        for ref in pending:
            ray.cancel(ref)
    if failures:
        raise RunFailed(_failed(failures, len(layers))) from failures[0][1]


def compute_statistics_here(
    store: Store,
    *,
    tau: float,
    memory_limit: int | None,
    on_done: Callable[[dict[str, Any]], None],
    overlap: OverlapSection | None = None,
) -> None:
    """As `compute_statistics`, but layer after layer in this process, without Ray; the first that fails is the last."""
    layers = layers_of(store.describe())
    commits = store.receipts("commits")
    n_concepts = len({receipt["concept"] for receipt in commits})
    settings = Settings(tau=tau, overlap=kept_pairs(overlap or OverlapSection(), n_concepts))
    n_threads = os.cpu_count() or 1
    resources = Resources(
        n_threads=n_threads,
        memory_bytes=memory_share({}, n_threads, memory_limit, machine_bytes=_machine_memory_bytes()),
        scratch=os.environ.get(SCRATCH_VARIABLE) or tempfile.gettempdir(),
    )
    coverage = coverage_of(store, commits)
    for layer in layers:
        try:
            receipt = compute_layer(store, layer, commits, settings=settings, coverage=coverage, resources=resources)
        except Exception as error:
            raise RunFailed(_failed([(layer, error)], len(layers))) from error
        on_done(receipt)


def _task_options(
    nodes: Sequence[Mapping[str, float]], n_layers: int, memory_limit: int | None
) -> dict[str, float | int]:
    """CPUs and memory that each task asks of Ray, given the resources of the nodes: no more than one node has."""
    n_threads = threads_a_layer([node.get("CPU", 0.0) for node in nodes], n_layers)
    able = [node for node in nodes if node.get("CPU", 0.0) >= n_threads and node.get("memory")]
    options: dict[str, float | int] = {"num_cpus": n_threads}
    if able and memory_limit is not None:
        options["memory"] = int(min(memory_limit, max(node["memory"] for node in able)))
    elif able:
        options["memory"] = int(min(node["memory"] * MEMORY_SHARE * n_threads / node["CPU"] for node in able))
    return options


def threads_a_layer(cpus: Sequence[float], n_layers: int) -> int:
    """The most threads with which all layers run at once on nodes of so many CPUs; at least 1, where they queue."""
    wanted = range(int(max(cpus, default=0)), 1, -1)
    return next((n for n in wanted if sum(int(cpu) // n for cpu in cpus) >= n_layers), 1)


def _compute_layer_here(
    store: Store,
    layer: Layer,
    commits: Sequence[dict[str, Any]],
    *,
    settings: Settings,
    coverage: Mapping[str, int],
    memory_limit: int | None,
) -> dict[str, Any]:
    """`compute_layer` within a Ray task, with what its node gives it."""
    context = ray.get_runtime_context()
    n_threads = max(1, int(context.get_assigned_resources().get("CPU", 1)))
    nodes: dict[str, dict[str, float]] = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    resources = Resources(
        n_threads=n_threads,
        memory_bytes=memory_share(
            nodes.get(context.get_node_id(), {}), n_threads, memory_limit, machine_bytes=_machine_memory_bytes()
        ),
        scratch=os.environ.get(SCRATCH_VARIABLE) or tempfile.gettempdir(),
    )
    return compute_layer(store, layer, commits, settings=settings, coverage=coverage, resources=resources)


def memory_share(node: Mapping[str, float], n_threads: int, memory_limit: int | None, *, machine_bytes: float) -> int:
    """Bytes for one task: what the person asked for, as far as the node has it, or its threads' share of the node.

    `node` are Ray's resources of the node. Ray may believe in more memory than the machine or its container has: the
    smaller number counts.
    """
    n_bytes = min(node.get("memory", machine_bytes), machine_bytes)
    if memory_limit is not None:
        return int(min(memory_limit, machine_bytes))
    n_cpus = max(node.get("CPU", os.cpu_count() or 1), n_threads)
    return max(MIN_MEMORY_BYTES, int(n_bytes * MEMORY_SHARE * n_threads / n_cpus))


def _machine_memory_bytes() -> float:
    """What the machine has, or what its container may use of it."""
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(float(Path(path).read_text()))
    return min(limits)


# --- one layer -------------------------------------------------------------------------------------------------------


def compute_layer(
    store: Store,
    layer: Layer,
    commits: Sequence[dict[str, Any]],
    *,
    settings: Settings,
    coverage: Mapping[str, int],
    resources: Resources,
) -> dict[str, Any]:
    """Merge one layer of the shards in `commits` (their receipts) and commit its files.

    Returns the receipt that counts; does nothing where it is there, with its files whole. `coverage` is stamped into
    the receipt and the files. Raises RunFailed where memory or scratch space does not suffice.
    """
    inputs = inputs_hash(commits)
    kept = _kept_receipt(store, layer, commits, settings)
    if kept is not None:
        return kept
    have_scores()
    started = time.perf_counter()
    work = _Work(store=store, layer=layer, commits=commits, settings=settings, coverage=coverage, resources=resources)
    try:
        files, found = work.write()
    except (duckdb.InternalException, duckdb.FatalException):
        # DuckDB 2.0.0 has an internal error that comes and goes with the order in which its threads run; it leaves the
        # connection unusable, not the files.
        files, found = work.write()
    found["seconds"]["total"] = time.perf_counter() - started
    receipt = receipt_of(
        files,
        hook_point=layer.hook_point,
        layer=layer.layer,
        inputs=inputs,
        tau=settings.tau,
        overlap=settings.overlap,
        salience=salience_methods(commits),
        coverage=dict(coverage),
        **found,
    )
    if store.create_json(_receipt_path(layer), receipt):
        return receipt
    _remove(store, [file.path for file in files])
    return store.read_json(_receipt_path(layer))


def _receipt_path(layer: Layer) -> str:
    return f"statistics/{layer.name}.json"


def _kept_receipt(
    store: Store, layer: Layer, commits: Sequence[dict[str, Any]], settings: Settings
) -> dict[str, Any] | None:
    """The receipt of the layer if it still counts. One that does not is removed, with its files."""
    path = _receipt_path(layer)
    if not store.exists(path):
        return None
    kept = store.read_json(path)
    files = files_of(kept)
    is_whole = {file.kind for file in files} == set(_kinds(commits)) and not any(map(store.fault_of, files))
    is_asked = kept["inputs"] == inputs_hash(commits) and settings.matches(kept)
    if is_asked and is_whole and kept.get("salience") == salience_methods(commits):
        return kept
    store.remove(path)
    _remove(store, [file.path for file in files])
    return None


def salience_methods(commits: Sequence[dict[str, Any]]) -> list[str]:
    """The methods that sql/salience.sql has rows for, given these shards."""
    left_out = set()
    if not _has_histograms(commits):
        left_out.add("mutual_information")
    if len({receipt["concept"] for receipt in commits}) < 2:
        left_out.add("selectivity")
    return [name for name in SQL_SALIENCE_METHODS if name not in left_out]


def _kinds(commits: Sequence[dict[str, Any]]) -> list[str]:
    """The kinds of file that a layer of these shards has."""
    merged = ["merged_histograms"] if _has_histograms(commits) else []
    return ["moments", *merged, "distributions", "overlap", "salience"]


def _has_histograms(commits: Sequence[dict[str, Any]]) -> bool:
    return any(file.kind == "histograms" for receipt in commits for file in files_of(receipt))


def _remove(store: Store, paths: Sequence[str]) -> None:
    for path in paths:
        store.remove(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """The making of one layer's files: `write` may be called again after it failed."""

    store: Store
    layer: Layer
    commits: Sequence[dict[str, Any]]
    settings: Settings
    coverage: Mapping[str, int]
    resources: Resources

    def write(self) -> tuple[list[StoredFile], dict[str, Any]]:
        """The files, and what the receipt says about their making."""
        attempt = new_attempt()
        paths = {kind: f"{kind}/{self.layer.name}.{attempt}.parquet" for kind in _kinds(self.commits)}
        try:
            with self._errors_in_words(), self._scratch() as scratch:
                return self._write(paths, scratch)
        except BaseException:
            with contextlib.suppress(Exception):
                _remove(self.store, list(paths.values()))
            raise

    def _write(self, paths: Mapping[str, str], scratch: str) -> tuple[list[StoredFile], dict[str, Any]]:
        seconds: dict[str, float] = {}
        merged = str(Path(scratch) / "merged.parquet") if "merged_histograms" in paths else None
        with self._connect(scratch) as con:
            with _timed(seconds, "moments"):
                attach(con, "partials", self._files("partials"), fs=self.store.fs)
                files = [self._query(con, "moments", "merge", paths["moments"])]
                attach(con, "moments", [self.store.path(files[0].path)], fs=self.store.fs)
            with _timed(seconds, "histograms"):
                if merged is not None:
                    files.append(self._merge_histograms(con, scratch, merged, paths["merged_histograms"]))
            bumps = Bumps.of(rows_of(con, "moments", *_MOMENT_COLUMNS), **self._site())
            with _timed(seconds, "distributions"):
                distributions, information = self._write_distributions(bumps, merged, paths["distributions"])
                attach_rows(con, "concept_information", information)
            with _timed(seconds, "overlap"):
                overlap, n_pairs, means = self._write_overlap(bumps, merged, paths["overlap"])
                attach_rows(con, "concept_overlap", means)
            with _timed(seconds, "salience"):
                files += [distributions, overlap, self._query(con, "salience", "salience", paths["salience"])]
        return files, {"n_pairs": n_pairs, "n_pairs_kept": overlap.n_rows, "seconds": seconds}

    def _connect(self, scratch: str) -> duckdb.DuckDBPyConnection:
        return connect(
            fs=self.store.fs,
            memory_limit=f"{self.resources.memory_bytes}B",
            threads=self.resources.n_threads,
            temp_directory=scratch,
            views="stored",
        )

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[str]:
        try:
            Path(self.resources.scratch).mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix="neuronlens-sql-", dir=self.resources.scratch)
        except OSError as error:
            raise RunFailed(
                f"nothing can be written to {self.resources.scratch} ({error.strerror}); set {SCRATCH_VARIABLE} to a "
                "folder that can be, on that node"
            ) from error
        with folder as path:
            yield path

    def _files(self, kind: str, concept: str | None = None) -> list[str]:
        return [
            self.store.path(file.path)
            for receipt in self.commits
            if concept is None or receipt["concept"] == concept
            for file in files_of(receipt)
            if file.kind == kind
        ]

    def _query(self, con: duckdb.DuckDBPyConnection, kind: str, query: str, relative: str) -> StoredFile:
        def write(path: str) -> None:
            run_to_parquet(con, query, path, metadata=self._metadata(), **self._site())

        self.store.write_through(relative, write)
        return self.store.adopt(kind, relative)

    def _merge_histograms(self, con: duckdb.DuckDBPyConnection, scratch: str, merged: str, relative: str) -> StoredFile:
        """Leave the counts of all shards in the file `merged`, in the order of neurons, and a copy in the store."""
        summed = {}
        for number, concept in enumerate(self._concepts()):
            attach(con, "histograms", self._files("histograms", concept), fs=self.store.fs)
            summed[concept] = str(Path(scratch) / f"concept-{number}.parquet")
            run_to_parquet(con, "merged_histograms", summed[concept], concept=concept, **self._site())
        write_merged(summed, merged, width=self.layer.width, metadata=self._metadata(), **self._site())
        for part in summed.values():
            Path(part).unlink()
        self.store.write_through(relative, lambda path: shutil.copyfile(merged, path))
        return self.store.adopt("merged_histograms", relative)

    def _write_distributions(self, bumps: Bumps, merged: str | None, relative: str) -> tuple[StoredFile, pa.Table]:
        """Returns also the rows of `concept_information`."""
        information: list[pa.Table] = []

        def write(path: str) -> None:
            information.clear()
            with RowsFile(path, DISTRIBUTIONS_SCHEMA, COLUMNS, self._metadata()) as file:
                for block in self._blocks(bumps, merged):
                    file.add(distributions_of(block, n_threads=self.resources.n_threads))
                    information.append(information_of(block, n_threads=self.resources.n_threads))

        self.store.write_through(relative, write)
        return self.store.adopt("distributions", relative), pa.concat_tables(information)

    def _write_overlap(self, bumps: Bumps, merged: str | None, relative: str) -> tuple[StoredFile, int, pa.Table]:
        """Write the pairs that are kept. Returns also how many pairs there were, and `concept_overlap` over all of
        them."""
        limits = {name: self.settings.overlap.get(name) for name in ("top", "threshold")}
        n_pairs, means = 0, list[pa.Table]()

        def write(path: str) -> None:
            nonlocal n_pairs
            n_pairs = 0
            means.clear()
            with RowsFile(path, PAIRS_SCHEMA, SCORES, self._metadata()) as file:
                for block in self._blocks(bumps, merged):
                    pairs = pairs_of(block, tau=self.settings.tau, n_threads=self.resources.n_threads)
                    n_pairs += pairs.num_rows
                    means.append(concept_overlap_of(pairs))
                    file.add(kept_of(pairs, **limits))

        self.store.write_through(relative, write)
        return self.store.adopt("overlap", relative), n_pairs, pa.concat_tables(means)

    def _blocks(self, bumps: Bumps, merged: str | None) -> Iterator[Bumps]:
        """All neurons, so many at a time that memory holds them, with their histograms."""
        counts, n_threads = merged and open_counts(merged), self.resources.n_threads
        for block in bumps.blocks(neurons_a_block(len(bumps.concepts))):
            if counts:
                rows = read_counts(counts, block.first, block.last, n_threads=n_threads)
                block = block.with_counts(rows, n_threads=n_threads)
            yield block

    def _concepts(self) -> list[str]:
        return sorted({receipt["concept"] for receipt in self.commits})

    def _site(self) -> dict[str, Any]:
        return {"hook_point": self.layer.hook_point, "layer": self.layer.layer}

    def _metadata(self) -> dict[str, str]:
        return {"coverage": json.dumps(dict(self.coverage)), "overlap": json.dumps(self.settings.overlap)}

    @contextlib.contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        """What a person can mend, as one sentence that says how."""
        try:
            yield
        except duckdb.OutOfMemoryException as error:
            raise RunFailed(self._no_scratch() if "failed to offload" in str(error) else self._no_memory()) from error
        except (duckdb.IOException, OSError) as error:
            is_full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if is_full and self.resources.scratch in str(error):
                raise RunFailed(self._no_scratch()) from error
            if is_full:
                raise RunFailed(f"the disk of {self.store.root} is full; make room there") from error
            raise

    def _no_memory(self) -> str:
        return (
            f"{self.resources.memory_bytes / 1e9:.2f} GB of memory with {self.resources.n_threads} threads do not "
            "suffice; set compute.memory_limit higher, or give the node more memory"
        )

    def _no_scratch(self) -> str:
        folder = self.resources.scratch
        n_free = shutil.disk_usage(folder).free
        return (
            f"{folder} has {n_free:,} bytes free, too few for what the queries must spill; set {SCRATCH_VARIABLE} to a "
            "larger disk on that node, or compute.memory_limit higher"
        )


class RowsFile:
    """A Parquet file of rows in the order of neurons, in row groups of a fair size whatever the blocks that arrive."""

    def __init__(self, path: str, schema: pa.Schema, floats: Sequence[str], metadata: Mapping[str, str]) -> None:
        encodings = {"neuron": "DELTA_BINARY_PACKED"} | dict.fromkeys(floats, "BYTE_STREAM_SPLIT")
        self._writer = pq.ParquetWriter(
            path,
            schema.with_metadata(dict(metadata)),
            compression="zstd",
            compression_level=3,
            use_dictionary=[name for name in schema.names if name not in encodings],
            column_encoding=encodings,
        )
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> "RowsFile":
        return self

    def add(self, rows: pa.Table) -> None:
        self._waiting.append(rows)
        if sum(table.num_rows for table in self._waiting) >= ROW_GROUP_ROWS:
            self._flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            rows = pa.concat_tables(self._waiting)
            self._writer.write_table(rows.cast(self._writer.schema), row_group_size=ROW_GROUP_ROWS)
        self._waiting = []


def neurons_a_block(n_concepts: int) -> int:
    return max(1, min(BLOCK_CONCEPTS // max(1, n_concepts), BLOCK_PAIRS // max(1, _n_pairs(n_concepts))))


def _n_pairs(n_concepts: int) -> int:
    return n_concepts * (n_concepts - 1) // 2


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _failed(failures: Sequence[tuple[Layer, BaseException]], n_layers: int) -> str:
    lines = [f"{layer.name}: {_reason(error)}." for layer, error in failures]
    return (
        f"The statistics of {len(failures)} of {n_layers} layers failed; the others and all shards are safe.\n  "
        + "\n  ".join(lines)
        + "\n  Mend the reason (a damaged file: neuronlens verify names it) and run the same command again."
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, NeuronLensError):
        return str(error).rstrip(".")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no message'}"
