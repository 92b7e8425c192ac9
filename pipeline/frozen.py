"""The frozen plan, as it lies in a store: the samples, the list of shards, and store.json, which comes last."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from neuronlens.errors import RunFailed
from neuronlens.store import Store, StoredFile, content_hash, files_of

ROW_GROUPS_PER_SAMPLES_FILE = 64
DECIDES_NOTHING = ("store_hash", "recipe", "versions", "created_at", "files")
"""Keys of store.json that say how a store came about, not what is in it."""

PLAN_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("concept", pa.string()),
        ("n_samples", pa.int64()),
        ("n_tokens", pa.int64()),
        ("n_batches", pa.int32()),
        ("samples_file", pa.string()),
        ("row_group", pa.int32()),
    ]
)
SAMPLES_SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("shard", pa.int32()),
        ("batch", pa.int32()),
        ("concept", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int64()),
        ("n_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One unit of work, as plan.parquet says it."""

    shard: int
    concept: str
    n_samples: int
    n_tokens: int
    n_batches: int
    samples_file: str
    row_group: int

    @property
    def name(self) -> str:
        return f"shard-{self.shard:05d}"


def write_plan(
    store: Store, description: dict[str, Any], shards: Sequence[Shard], samples_of: Callable[[Shard], pa.Table]
) -> None:
    """Write the samples, the shard list and, last, store.json: from then on the plan is frozen. Memory holds the
    samples of one shard at a time."""
    files = _write_samples(store, shards, samples_of)
    files.append(store.write_parquet("plan", "plan.parquet", PLAN_SCHEMA, lambda: iter([_plan_table(shards)])))
    store.create_json("store.json", description | {"files": [asdict(file) for file in files]})


def check_frozen(store: Store) -> None:
    """Raises RunFailed where the plan or the samples of a store were damaged after they were frozen."""
    damaged = [fault for fault in store.faults_of(files_of(store.describe())) if fault is not None]
    if damaged:
        raise RunFailed(
            f"{store.root}: the frozen plan was damaged: {damaged[0]}. Restore that file, or start again with a new "
            "--store."
        )


def load_shards(store: Store) -> tuple[Shard, ...]:
    """The frozen shard list of a store."""
    return tuple(Shard(**row) for row in store.read_parquet("plan.parquet").to_pylist())


def read_samples(store: Store, shard: Shard) -> pa.Table:
    """The samples of one shard, in the order in which they run."""
    table = store.read_parquet(shard.samples_file, shard.row_group)
    if table.num_rows != shard.n_samples or table["shard"][0].as_py() != shard.shard:
        raise RunFailed(
            f"{store.path(shard.samples_file)} holds {table.num_rows} samples of shard {table['shard'][0]} in row "
            f"group {shard.row_group}; the plan promises {shard.n_samples} of shard {shard.shard}. The plan was "
            "damaged: start again with a new --store."
        )
    return table


def store_hash_of(description: Mapping[str, Any]) -> str:
    """The hash of the keys of store.json that decide what is in the store. Where a file lies does not: the same model
    and data elsewhere make the same store."""
    decides = {key: value for key, value in description.items() if key not in DECIDES_NOTHING}
    if not decides.get("predictions"):
        decides.pop("predictions", None)  # stores from before there were any have no such key
    decides["model"] = {key: value for key, value in decides["model"].items() if key not in ("id", "revision")}
    decides["dataset"] = {key: value for key, value in decides["dataset"].items() if key not in ("source", "split")}
    return content_hash(decides)


def _plan_table(shards: Sequence[Shard]) -> pa.Table:
    return pa.Table.from_pylist([asdict(shard) for shard in shards], schema=PLAN_SCHEMA)


def _write_samples(store: Store, shards: Sequence[Shard], samples_of: Callable[[Shard], pa.Table]) -> list[StoredFile]:
    files: dict[str, list[Shard]] = {}
    for shard in shards:
        files.setdefault(shard.samples_file, []).append(shard)
    return [
        store.write_parquet("samples", path, SAMPLES_SCHEMA, partial(map, samples_of, group), compression="zstd")
        for path, group in files.items()
    ]
