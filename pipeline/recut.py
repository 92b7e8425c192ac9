"""A store cut again, without the model: any of its samples from the raw values that it kept, any of its shards from
what was written of them.

neuronlens recut STORE -o NEW --where "n_tokens < 20"
"""

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from neuronlens.accumulate import CpuAccumulator
from neuronlens.errors import RunFailed, UsageError
from neuronlens.lens import Lens
from neuronlens.recipe import Recipe, parse_recipe
from neuronlens.store import Store, StoredFile, content_hash, files_of, new_attempt, receipt_of
from pipeline.collect import (
    create_receipt,
    write_histograms,
    write_partials,
    write_predictions,
    write_raw,
)
from pipeline.driver import Reporter, Silent, intact_shards
from pipeline.frozen import (
    ROW_GROUPS_PER_SAMPLES_FILE,
    SAMPLES_SCHEMA,
    Shard,
    check_frozen,
    load_shards,
    read_samples,
    store_hash_of,
    write_plan,
)
from pipeline.lease import Lease
from pipeline.plan import package_versions
from pipeline.statistics import Layer, compute_statistics_here, layers_of

READ_ROWS = 1_048_576
"""Rows of a raw file that are decoded at once."""
_ANSWER_COLUMNS = ("predicted", "correct", "confidence")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecutSummary:
    """What a recut made. `n_shards` and `n_samples` are those that count in the new store."""

    store: str
    n_samples: int
    n_shards: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a cut keeps of one shard."""

    old: Shard
    new: Shard
    """Under the same number, in its place in the new store's samples."""
    sample_S: np.ndarray
    """The numbers of the samples that stay, ascending."""
    receipt: dict[str, Any] | None
    """The old shard's; None where it was never collected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Everything that a recut needs to know, decided before anything is written."""

    description: dict[str, Any]
    recipe: Recipe
    parts: tuple[Part, ...]
    splits: bool
    """Whether a shard loses some of its samples and keeps others: then all are made again from raw values, else their
    files are copied."""

    @property
    def asked(self) -> dict[str, Any]:
        return dict(self.description["recut"])

    @property
    def collected(self) -> list[Part]:
        return [part for part in self.parts if part.receipt is not None]

    @property
    def lonely(self) -> list[str]:
        return [concept for concept, n in self.description["concepts"].items() if n == 1]


def recut(
    store: Store,
    target: Store,
    *,
    where: str | None = None,
    shards: str | None = None,
    reporter: Reporter | None = None,
) -> RecutSummary:
    """Make `target` a complete store of the samples of `store` for which `where` holds, in the shards for which
    `shards` does. Goes on where an earlier try with the same arguments stopped.

    `where` is an SQL predicate over the view samples, `shards` one over the view shards; one is needed, both may be
    given. A cut that splits no shard copies what was written of each; any other needs the raw values of all neurons,
    and has the layers of which they were kept. Samples and shards keep their numbers. Memory holds one shard.

    Raises UsageError, with nothing written, for what cannot be cut so; RunFailed where a file was damaged or the
    statistics failed; StoreHeld where another driver works on `target`.
    """
    started = time.perf_counter()
    reporter = reporter or Silent()
    cut = make_cut(store, target, where=where, shards=shards)
    _tell(cut, store, reporter)
    with Lease(target, "neuronlens recut", reporter.say) as lease:
        _freeze(cut, store, target)
        _make_shards(cut, store, target, reporter, lease.check)
        lease.check()
        with reporter.stage("statistics", len(layers_of(cut.description)), "layers") as advance:
            compute_statistics_here(
                target,
                tau=cut.recipe.ranges.tau,
                overlap=cut.recipe.overlap,
                memory_limit=cut.recipe.compute.memory_limit,
                on_done=lambda _: advance(1),
            )
    return RecutSummary(
        store=target.root,
        n_samples=sum(part.new.n_samples for part in cut.collected),
        n_shards=len(cut.collected),
        seconds=round(time.perf_counter() - started, 3),
    )


# --- what is kept ----------------------------------------------------------------------------------------------------


def make_cut(store: Store, target: Store, *, where: str | None, shards: str | None) -> Cut:
    """Decide what stays, and check that it can be had. Writes nothing; raises as `recut` does."""
    if where is None and shards is None:
        raise UsageError(
            'Nothing says what to keep. Give --where, such as --where "n_tokens < 20", or --shards, such as --shards '
            '"shard % 2 = 0".'
        )
    description = store.describe()
    asked = {"store_hash": description["store_hash"], "where": where, "shards": shards}
    _check_target(target, asked)
    check_frozen(store)
    receipts = {receipt["shard"]: receipt for receipt in store.receipts("commits")}
    chosen = _chosen(store, where, shards)
    if not chosen.keys() & receipts.keys():
        raise UsageError(_nothing_left(store, where, shards, n_found=len(chosen), n_committed=len(receipts)))
    found = _Found(store, chosen, receipts)
    splits = any(part.new.n_samples < part.old.n_samples for part in found.parts)
    if splits:
        _check_raw(store, description)
        description = description | {
            "layers": _raw_layers(description),
            "raw": {"policy": "kept", "layers": "all", "neurons": "all"},
        }
    decided = {key: value for key, value in description.items() if key != "files"} | {
        "concepts": dict(sorted(found.concepts.items())),
        "dataset": description["dataset"] | found.dataset(),
        "recut": asked,
        "versions": package_versions(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    recipe = parse_recipe(description["recipe"], origin=f"the recipe in {store.root}")
    return Cut(
        description=decided | {"store_hash": store_hash_of(decided)},
        recipe=recipe,
        parts=tuple(found.parts),
        splits=splits,
    )


class _Found:
    """What a pass over the chosen samples, a shard at a time, tells of them."""

    def __init__(self, store: Store, chosen: dict[int, np.ndarray], receipts: dict[int, dict[str, Any]]) -> None:
        self.parts: list[Part] = []
        self.concepts: Counter[str] = Counter()
        self._n_truncated = 0
        self._texts: list[str] = []
        for old in load_shards(store):
            if old.shard in chosen:
                samples = samples_of(store, old, chosen[old.shard])
                self.parts.append(
                    Part(
                        old=old,
                        new=_new_shard(old, samples, place=len(self.parts)),
                        sample_S=chosen[old.shard],
                        receipt=receipts.get(old.shard),
                    )
                )
                self.concepts[old.concept] += samples.num_rows
                self._n_truncated += _n_truncated(samples)
                self._texts.append(content_hash([old.concept, *(samples[c].to_pylist() for c in ("row", "text"))]))

    def dataset(self) -> dict[str, Any]:
        return {
            "fingerprint": content_hash(self._texts),
            "n_rows": self.concepts.total(),
            "n_truncated": self._n_truncated,
        }


def samples_of(store: Store, shard: Shard, sample_S: np.ndarray) -> pa.Table:
    """The samples of a shard that stay, in the order in which they ran."""
    samples = read_samples(store, shard).select(SAMPLES_SCHEMA.names).cast(SAMPLES_SCHEMA)
    return samples.filter(pa.array(np.isin(samples["sample"].to_numpy(), sample_S)))


def _new_shard(old: Shard, samples: pa.Table, *, place: int) -> Shard:
    file, row_group = divmod(place, ROW_GROUPS_PER_SAMPLES_FILE)
    return replace(
        old,
        n_samples=samples.num_rows,
        n_tokens=int(np.sum(samples["n_tokens"].to_numpy())),
        n_batches=len(np.unique(samples["batch"].to_numpy())),
        samples_file=f"samples/part-{file:05d}.parquet",
        row_group=row_group,
    )


def _n_truncated(samples: pa.Table) -> int:
    return int(np.sum(samples["truncated"].to_numpy()))


def _chosen(store: Store, where: str | None, shards: str | None) -> dict[int, np.ndarray]:
    """Shard -> the numbers of its samples that stay, ascending; no shard without any."""
    with Lens(store) as lens:
        rows_2R = _rows_where(lens, "samples", where, ["shard", "sample"], option="--where")
        if shards is not None:
            kept_1R = _rows_where(lens, "shards", shards, ["shard"], option="--shards")
            rows_2R = rows_2R[:, np.isin(rows_2R[0], kept_1R[0])]
    shard_X, first_X = np.unique(rows_2R[0], return_index=True)
    return dict(zip(shard_X.tolist(), np.split(rows_2R[1], first_X[1:]), strict=True)) if len(shard_X) else {}


def _rows_where(lens: Lens, view: str, predicate: str | None, columns: list[str], *, option: str) -> np.ndarray:
    """The columns, all integers, of a view's rows for which the predicate holds, sorted: int64 [columns, rows].

    Raises UsageError for a predicate that DuckDB cannot evaluate, that is not boolean, or that does not give the same
    rows each time.
    """
    relation = lens.sql(f"from {view}")
    if predicate is None:
        return _sorted_rows(relation, columns)
    problem = f"{option} {predicate!r} is no predicate over the view {view}: "
    hint = f"Its columns: {', '.join(relation.columns)}."
    try:
        types = [str(type_) for type_ in relation.project(predicate).types]
        if types != ["BOOLEAN"]:
            raise UsageError(f"{problem}expected one that is true or false, found {', '.join(types)}. {hint}")
        rows, again = (_sorted_rows(relation.filter(predicate), columns) for _ in range(2))
    except duckdb.Error as error:
        said = str(error).strip().splitlines()[0].rstrip(".!")
        if isinstance(error, (duckdb.IOException, duckdb.OutOfMemoryException, duckdb.InternalException)):
            raise RunFailed(f"{lens.store.root} could not be asked for {option} {predicate!r}: {said}.") from error
        raise UsageError(f"{problem}{said}. {hint}") from error
    if not np.array_equal(rows, again):
        raise UsageError(
            f"{option} {predicate!r} keeps other rows each time that it is asked, so nobody could cut so again. For a "
            "random half, say \"md5(row::varchar) < '8'\"."
        )
    return rows


def _sorted_rows(relation: duckdb.DuckDBPyRelation, columns: list[str]) -> np.ndarray:
    table = relation.select(*columns).to_arrow_table()
    rows = np.stack([table[name].to_numpy().astype(np.int64) for name in columns])
    return rows[:, np.lexsort(rows[::-1])]


def _nothing_left(store: Store, where: str | None, shards: str | None, *, n_found: int, n_committed: int) -> str:
    if not n_committed:
        return f"{store.root} holds no shard yet. Expected a store with statistics: let its run end first."
    if n_found:
        return f"No shard of {store.root} that this cut keeps was collected yet. Let its run go on first."
    told = " and ".join(f"{option} {asked!r}" for option, asked in (("--where", where), ("--shards", shards)) if asked)
    unanswered = "predictions" not in store.file_lists() and any(name in (where or "") for name in _ANSWER_COLUMNS)
    reason = f" This store holds no predictions: {', '.join(_ANSWER_COLUMNS)} are NULL." if unanswered else ""
    return f"No sample of {store.root} is left by {told}. Expected one or more.{reason}"


def _raw_layers(description: dict[str, Any]) -> list[int]:
    """The layers of which raw values were kept."""
    raw, layers = description["raw"], description["layers"]
    if raw["policy"] == "none":
        return []
    return list(layers) if raw["layers"] == "all" else sorted(raw["layers"])


def _check_raw(store: Store, description: dict[str, Any]) -> None:
    otherwise = (
        "Keep or drop whole shards, by --shards or by a --where that is the same for all samples of a shard (its "
        "concept, say), or run again with collect.raw: all."
    )
    raw = description["raw"]
    if raw["policy"] == "none":
        raise UsageError(f"--where splits shards, which needs raw values, and {store.root} kept none. {otherwise}")
    if raw["neurons"] != "all":
        raise UsageError(
            f"--where splits shards, which needs the raw values of all neurons, and {store.root} kept those of "
            f"{len(raw['neurons'])}. {otherwise}"
        )


def _check_target(target: Store, asked: dict[str, Any]) -> None:
    """Raises UsageError where `target` holds anything but what an earlier try of this cut left."""
    if not target.exists("store.json"):
        return
    found = target.describe().get("recut")
    if found != asked:
        was = "a store of its own" if found is None else f"another cut ({_told(found)})"
        raise UsageError(f"{target.root} holds {was}. Expected nothing there, or this cut begun: choose another -o.")


def _told(asked: dict[str, Any]) -> str:
    given = [f"{key} {asked[key]!r}" for key in ("where", "shards") if asked[key] is not None]
    return f"{', '.join(given)} of store {asked['store_hash'][:12]}"


def _tell(cut: Cut, store: Store, reporter: Reporter) -> None:
    old, n_samples, n_shards = store.describe(), sum(part.new.n_samples for part in cut.parts), len(load_shards(store))
    how = "made again from raw values" if cut.splits else "copied"
    reporter.say(f"{n_samples:,} of {old['dataset']['n_rows']:,} samples stay")
    reporter.say(f"{len(cut.parts):,} of {n_shards:,} shards stay: they are {how}")
    missing = set(old["layers"]) - set(cut.description["layers"])
    if missing:
        reporter.say(f"without the layers {sorted(missing)}, of which no raw values were kept")
    n_missing = len(cut.parts) - len(cut.collected)
    if n_missing:
        reporter.say(
            f"{n_missing:,} of the {len(cut.parts):,} shards were not collected; what comes out says so in its coverage"
        )
    if cut.lonely:
        named = ", ".join(cut.lonely[:5])
        reporter.say(f"{len(cut.lonely):,} concepts keep one sample each, which has no spread: {named}")


# --- the new store ---------------------------------------------------------------------------------------------------


def _freeze(cut: Cut, store: Store, target: Store) -> None:
    """Write the plan and the samples that stay, or check that an earlier try of the same cut did."""
    if not target.exists("store.json"):
        parts = {part.new.shard: part for part in cut.parts}

        def samples(shard: Shard) -> pa.Table:
            part = parts[shard.shard]
            return samples_of(store, part.old, part.sample_S)

        write_plan(target, cut.description, [part.new for part in cut.parts], samples)
    _check_target(target, cut.asked)
    kept = target.describe()
    if kept["store_hash"] != cut.description["store_hash"]:
        raise UsageError(
            f"{target.root} holds this cut of {store.root}, begun when that store gave other samples. Expected store "
            f"hash {cut.description['store_hash'][:12]}, found {kept['store_hash'][:12]}: choose another -o."
        )
    check_frozen(target)


def _make_shards(cut: Cut, store: Store, target: Store, reporter: Reporter, check: Callable[[], None]) -> None:
    committed = intact_shards(target, reporter)
    todo = [part for part in cut.collected if part.new.name not in committed]
    if len(todo) < len(cut.collected):
        reporter.say(f"{len(cut.collected) - len(todo)} of {len(cut.collected)} shards are committed already.")
    make = _cut_shard if cut.splits else _copy_shard
    with reporter.stage("recut", sum(part.new.n_samples for part in todo), "samples") as advance:
        for part in todo:
            check()
            make(cut, store, target, part)
            advance(part.new.n_samples)


def _copy_shard(cut: Cut, store: Store, target: Store, part: Part) -> None:
    assert part.receipt is not None
    for file in files_of(part.receipt):
        target.write_whole(file, store.read_whole(file))
    create_receipt(target, part.new, part.receipt)


def _cut_shard(cut: Cut, store: Store, target: Store, part: Part) -> None:
    """Write what a collector would have written, had it run the samples that stay, and commit it."""
    assert part.receipt is not None
    shard, attempt, sites = part.new, new_attempt(), layers_of(cut.description)
    samples, old_files = samples_of(store, part.old, part.sample_S), files_of(part.receipt)
    histogram = cut.description["histograms"]
    seconds = {"forward": 0.0, "statistics": 0.0, "write": 0.0}
    files: list[StoredFile] = []
    accumulators = []
    counted_S = np.array([], np.int64)
    for site in sites:
        with _added(seconds, "statistics"):
            rows = _rows_of(store, old_files, site, part.sample_S)
            accumulators.append(_accumulated(rows, samples, site, histogram=histogram))
            counted_S = np.unique(rows.sample_R)
        with _added(seconds, "write"):
            files += _write_rows(target, shard, attempt, site, rows)
    with _added(seconds, "write"):
        moments = [accumulator.moments() for accumulator in accumulators]
        files.append(write_partials(target, shard, attempt, sites, moments))
        if histogram:
            files.append(write_histograms(target, shard, attempt, sites, accumulators))
        answers = _answers_of(store, old_files, part.sample_S)
        if answers is not None:
            files.append(write_predictions(target, shard, attempt, answers))
    receipt = receipt_of(
        files,
        shard=shard.shard,
        attempt=attempt,
        concept=shard.concept,
        n_samples=shard.n_samples,
        **_counts(answers, counted_S, only_correct=cut.description["only_correct"], n_samples=shard.n_samples),
        n_tokens=shard.n_tokens,
        n_truncated=_n_truncated(samples),
        n_nonfinite=int(sum(of_site.n_nonfinite_N.sum() for of_site in moments)),
        versions=package_versions(),
        seconds=seconds | {"total": sum(seconds.values())},
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    create_receipt(target, shard, receipt)


def _counts(
    answers: pa.Table | None, counted_S: np.ndarray, *, only_correct: bool, n_samples: int
) -> dict[str, int | None]:
    """n_kept and n_correct as a collector's receipt has them. `counted_S` are the samples that have raw rows."""
    n_correct = None if answers is None else int(np.sum(answers["correct"].to_numpy()))
    if n_correct is None and only_correct:
        n_correct = len(counted_S)
    return {"n_kept": n_correct if only_correct else n_samples, "n_correct": n_correct}


@contextlib.contextmanager
def _added(seconds: dict[str, float], work: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[work] += time.perf_counter() - started


# --- raw values ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The values of R rows of activations at one site: x_NR float32; which sample and position (None: unit mean) each
    row is."""

    x_NR: np.ndarray
    sample_R: np.ndarray
    position_R: np.ndarray | None


def _rows_of(store: Store, files: list[StoredFile], site: Layer, sample_S: np.ndarray) -> _Rows:
    """The raw rows of these samples at one site, in the order in which they were collected. None where no sample of
    the shard counted: then its receipt names no raw file at all."""
    raw = [file for file in files if file.kind == "raw"]
    here = [file for file in raw if file.path.startswith(f"raw/hook_point={site.hook_point}/layer={site.layer}/")]
    if not raw:
        nothing = np.array([], np.int64)
        return _Rows(x_NR=np.zeros((site.width, 0), np.float32), sample_R=nothing, position_R=None)
    if not here:
        raise RunFailed(
            f"{store.root}: the receipt that names {raw[0].path} names no raw values of {site.name}, which store.json "
            "promises. It was damaged: restore it."
        )
    return _read_rows(store, here[0], site.width, sample_S)


def _read_rows(store: Store, file: StoredFile, width: int, sample_S: np.ndarray) -> _Rows:
    """Decoded some rows at a time: memory holds the file and the values that stay."""
    parquet = pq.ParquetFile(pa.BufferReader(store.read_whole(file)))
    n_rows, rest = divmod(parquet.metadata.num_rows, width)
    all_sample_R, all_position_R = _first_neuron(parquet, n_rows)
    keep_R = np.isin(all_sample_R, sample_S)
    x_X = np.empty(width * int(keep_R.sum()), np.float32)
    n_read = n_filled = 0
    in_order = rest == 0
    for rows in parquet.iter_batches(READ_ROWS, columns=["neuron", "sample", "value"]):
        neuron_X, row_X = np.divmod(np.arange(n_read, n_read + rows.num_rows), max(1, n_rows))
        in_order &= np.array_equal(rows["neuron"].to_numpy(), neuron_X)
        in_order &= np.array_equal(rows["sample"].to_numpy(), all_sample_R[row_X])
        if not in_order:
            break
        kept_X = rows["value"].to_numpy()[keep_R[row_X]]
        x_X[n_filled : n_filled + len(kept_X)] = kept_X
        n_read, n_filled = n_read + rows.num_rows, n_filled + len(kept_X)
    if not in_order:
        raise RunFailed(
            f"{store.path(file.path)} does not hold the same samples in the same order for each of {width:,} neurons, "
            "as a collector writes them: it cannot be cut."
        )
    return _Rows(
        x_NR=x_X.reshape(width, -1),
        sample_R=all_sample_R[keep_R],
        position_R=None if all_position_R is None else all_position_R[keep_R],
    )


def _write_rows(target: Store, shard: Shard, attempt: str, site: Layer, rows: _Rows) -> list[StoredFile]:
    if not len(rows.sample_R):
        return []
    neuron_N = np.arange(site.width)
    return [write_raw(target, shard, attempt, site, neuron_N, rows.x_NR, rows.sample_R, rows.position_R)]


def _first_neuron(parquet: pq.ParquetFile, n_rows: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Sample and position (None where NULL) of the rows of the first neuron, which those of all the others repeat."""
    parts, n_read = [], 0
    for rows in parquet.iter_batches(READ_ROWS, columns=["sample", "position"]):
        parts.append(rows)
        n_read += rows.num_rows
        if n_read >= n_rows:
            break
    table = pa.Table.from_batches(parts).slice(0, n_rows)
    position = None if table["position"].null_count else table["position"].to_numpy()
    return table["sample"].to_numpy(), position


def _accumulated(rows: _Rows, samples: pa.Table, site: Layer, *, histogram: bool) -> CpuAccumulator:
    """The statistics of the rows, added batch by batch as they were collected: a shard that keeps all its samples gets
    the very numbers that it had."""
    accumulator = CpuAccumulator(site.width, histogram=histogram)
    sample_S, batch_S = samples["sample"].to_numpy(), samples["batch"].to_numpy()
    order_S = np.argsort(sample_S)
    batch_R = batch_S[order_S[np.searchsorted(sample_S, rows.sample_R, sorter=order_S)]]
    edges = [0, *(np.flatnonzero(np.diff(batch_R)) + 1).tolist(), len(batch_R)]
    for first, last in itertools.pairwise(edges):
        x_RN = torch.from_numpy(np.ascontiguousarray(rows.x_NR[:, first:last].T))
        accumulator.add(x_RN, torch.arange(last - first))
    return accumulator


def _answers_of(store: Store, files: list[StoredFile], sample_S: np.ndarray) -> pa.Table | None:
    """What the model answered to the samples that stay; None where that was not recorded."""
    here = [file for file in files if file.kind == "predictions"]
    if not here:
        return None
    table = pq.read_table(pa.BufferReader(store.read_whole(here[0])))
    return table.filter(pa.array(np.isin(table["sample"].to_numpy(), sample_S)))
