"""What was run, as a store's receipts say it: models, data, counts, what is missing, how long it took.

facts = Facts.of(store)
facts.warnings()
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuronlens.store import Store, files_of

FEW_VALUES = 30
"""With fewer, a mean and a standard deviation are rough and histograms overlap by chance alone."""
ACTIVITIES = ("forward", "statistics", "storage_wait", "work_wait")
"""What a collector's time goes into; writing goes on beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The JSON of a store: store.json, the receipts of shards and layers, quarantined shards, tables, evaluations."""

    description: Mapping[str, Any]
    commits: Sequence[Mapping[str, Any]]
    statistics: Sequence[Mapping[str, Any]]
    quarantined: Sequence[Mapping[str, Any]]
    tables: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    n_planned: Mapping[str, int]
    """Samples planned, by concept."""
    n_planned_shards: int

    @classmethod
    def of(cls, store: Store) -> "Facts":
        plan = store.read_parquet("plan.parquet").select(["concept", "n_samples"]).to_pylist()
        n_planned: Counter[str] = Counter()
        for shard in plan:
            n_planned[shard["concept"]] += shard["n_samples"]
        commits = store.receipts("commits")
        committed = {receipt["shard"] for receipt in commits}
        return cls(
            description=store.describe(),
            commits=commits,
            statistics=store.receipts("statistics"),
            quarantined=[one for one in store.receipts("quarantine") if one["shard"] not in committed],
            tables=[store.read_json(f"ranges/{table}/table.json") for table in store.table_ids()],
            evaluations=store.receipts("evaluations"),
            n_planned=dict(sorted(n_planned.items())),
            n_planned_shards=len(plan),
        )

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(self.n_planned)

    @property
    def hook_points(self) -> tuple[str, ...]:
        return tuple(self.description["hook_points"])

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.description["layers"])

    @property
    def n_neurons(self) -> int:
        return sum(self.description["widths"][hook_point] for hook_point in self.hook_points) * len(self.layers)

    @property
    def tau(self) -> float:
        """The tau of the ranges that the overlap stands for."""
        return float(self.statistics[0]["tau"]) if self.statistics else 2.5

    @property
    def has_histograms(self) -> bool:
        return self._has("histograms") or self._has("shard_histograms")

    @property
    def has_raw(self) -> bool:
        return self._has("raw")

    @property
    def model_name(self) -> str:
        """The model's id; of a path, its last two parts."""
        model = str(self.description.get("model", {}).get("id", "the model"))
        return "/".join(model.replace("\\", "/").split("/")[-2:])

    def by_concept(self, key: str) -> dict[str, int]:
        """The sum of a number of the receipts (n_samples, n_kept, n_tokens, ...) over each concept's shards."""
        sums: Counter[str] = Counter(dict.fromkeys(self.concepts, 0))
        for receipt in self.commits:
            sums[receipt["concept"]] += int(receipt.get(key, 0))
        return dict(sums)

    def n_counted(self) -> dict[str, int]:
        """The texts of each concept whose values count: all that were collected, or those answered right."""
        has_kept = all("n_kept" in receipt for receipt in self.commits)
        return self.by_concept("n_kept" if has_kept else "n_samples")

    def total(self, key: str) -> int:
        return sum(int(receipt.get(key, 0)) for receipt in self.commits)

    def collector_seconds(self) -> dict[str, float]:
        """Seconds by activity, summed over all shards; `write` beside them."""
        return {
            activity: sum(float(receipt.get("seconds", {}).get(activity, 0.0)) for receipt in self.commits)
            for activity in (*ACTIVITIES, "write")
        }

    def bytes_by_kind(self) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for receipt in (*self.commits, *self.statistics, self.description):
            for file in files_of(receipt):
                sums[file.kind] += file.n_bytes
        return dict(sums.most_common())

    def warnings(self) -> list[str]:
        """What makes the numbers doubtful, a sentence each."""
        found = [self._coverage(), *map(_quarantine, self.quarantined), self._layers(), self._stale()]
        if n := self.total("n_nonfinite"):
            found.append(
                f"{n:,} values were not finite (NaN or infinite): they were counted apart and are in nothing else."
            )
        few = [concept for concept, n in self.n_counted().items() if 0 < n < FEW_VALUES]
        if few and self.description.get("unit") != "token":
            found.append(
                f"{_named(few)}: fewer than {FEW_VALUES} texts counted. Their means and ranges are rough, and their "
                "overlap with other concepts is partly chance."
            )
        return [warning for warning in found if warning]

    def notes(self) -> list[str]:
        """What was left out on purpose, or could not be shown, a sentence each."""
        found = []
        if not self.has_histograms:
            found.append(
                "The store has no histograms: curves are Gaussians with the measured mean and standard deviation, and "
                "overlap is that of these Gaussians."
            )
        if not self.has_raw:
            found.append("The store has no raw values: which texts drive a neuron cannot be shown.")
        if self.description.get("only_correct"):
            n, n_kept = self.total("n_samples"), self.total("n_kept")
            found.append(f"Only texts that the model answered right counted: {n_kept:,} of {n:,}.")
        if n := self.total("n_truncated"):
            found.append(f"{n:,} of {self.total('n_samples'):,} texts were cut to the model's window.")
        computed = sum(receipt.get("n_pairs", 0) for receipt in self.statistics)
        kept = sum(receipt.get("n_pairs_kept", receipt.get("n_pairs", 0)) for receipt in self.statistics)
        if kept < computed:
            found.append(
                f"Of {computed:,} overlaps (of two concepts at a neuron) the store keeps {kept:,}, the largest of each "
                "neuron (recipe: overlap.keep): means over pairs are of those, and too high."
            )
        return found

    def _coverage(self) -> str:
        n, n_samples, planned = len(self.commits), self.total("n_samples"), sum(self.n_planned.values())
        if n == self.n_planned_shards:
            return ""
        return (
            f"Partial: {n:,} of {self.n_planned_shards:,} shards, {n_samples:,} of {planned:,} texts. Every number is "
            "of these. Run the same recipe again to add the rest."
        )

    def _layers(self) -> str:
        n, planned = len(self.statistics), len(self.layers) * len(self.hook_points)
        if n == planned:
            return ""
        return f"Only {n:,} of {planned:,} layers have statistics: the others are not shown."

    def _stale(self) -> str:
        behind = {
            receipt["coverage"]["n_shards"]
            for receipt in self.statistics
            if receipt.get("coverage", {}).get("n_shards", len(self.commits)) != len(self.commits)
        }
        if not behind:
            return ""
        return (
            f"The statistics were made from {min(behind):,} shards; {len(self.commits):,} are committed now. Run the "
            "same recipe again to bring them up to date."
        )

    def _has(self, kind: str) -> bool:
        receipts = (*self.commits[:1], *self.statistics[:1])
        return any(file.kind == kind for receipt in receipts for file in files_of(receipt))


def _quarantine(receipt: Mapping[str, Any]) -> str:
    reasons = receipt.get("reasons") or ["no reason kept"]
    return (
        f"Shard {receipt['shard']} was given up after {len(reasons)} tries, with {len(receipt.get('rows', [])):,} of "
        f"the texts of {receipt['concept']}. The last reason: {reasons[-1]}"
    )


def _named(names: Sequence[str], n: int = 5) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + more
