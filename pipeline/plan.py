"""The plan: what a run will do, decided and checked before anything heavy, then frozen so that a resume does the same.

    neuronlens plan recipe.yaml

Shards hold one concept, texts of similar length together, batches filled to a token budget. Nothing in a plan depends
on the number of workers: the same recipe and data give the same shards everywhere.
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from neuronlens.batches import batches_by_length
from neuronlens.errors import UsageError
from neuronlens.histograms import N_BINS
from neuronlens.hookpoints import RULES, Site, config_of, find_sites
from neuronlens.identity import model_identity, tokenizer_hash
from neuronlens.models import LoadedModel, load_model
from neuronlens.prompts import answer_token_ids, encode_prompts
from neuronlens.recipe import RawNeurons, Recipe
from neuronlens.sources import LabelledText, load_labelled
from neuronlens.store import FORMAT_VERSION, Store, content_hash
from pipeline.backends import check_model, checked_backend, vllm_version
from pipeline.frozen import (
    DECIDES_NOTHING,
    ROW_GROUPS_PER_SAMPLES_FILE,
    SAMPLES_SCHEMA,
    Shard,
    check_frozen,
    load_shards,
    store_hash_of,
    write_plan,
)

MIN_SHARD_TOKENS = 32_768
MAX_SHARD_TOKENS = 4_194_304
WANTED_SHARDS = 64
MAX_SHARD_RAW_BYTES = 256 * 2**20
"""The raw rows of one shard wait in memory to be written neuron by neuron."""
SHARDS_IN_HAND = 2
"""Shards that a collector holds at once: one in the model, one on its way to storage."""
TOKENS_PER_BATCH = {"cpu": 1_024, "cuda": 16_384}

# Bytes on disk as measured (docs/benchmarks.md): a row of partials, a bin of a histogram, a raw value by its width.
PARTIAL_ROW_BYTES = 48
HISTOGRAM_ROW_BYTES = 1.2
HISTOGRAM_BINS_USED = 90
MERGED_ROW_BYTES = 1.5
MERGED_BINS_USED = 140
RAW_VALUE_BYTES = {4: 3.6, 2: 1.6}
STATISTICS_ROW_BYTES = 150
PREDICTION_ROW_BYTES = 8
PREDICTIONS_FILE_BYTES = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A text as it will be run: its number in the run, its row in the source, its tokens."""

    sample: int
    labelled: LabelledText
    token_ids: list[int]
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will take. Bytes on disk by kind; memory of one worker."""

    disk_bytes: dict[str, int]
    worker_memory_bytes: dict[str, int]
    raw_kept: bool
    raw_note: str

    @property
    def total_disk_bytes(self) -> int:
        return sum(self.disk_bytes.values())

    @property
    def total_worker_memory_bytes(self) -> int:
        return sum(self.worker_memory_bytes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a run needs to know. `members[i]` are (samples, batch of each) of `shards[i]`."""

    description: dict[str, Any]
    shards: tuple[Shard, ...]
    members: tuple[tuple[tuple[Sample, ...], tuple[int, ...]], ...]
    estimate: Estimate
    answers: dict[str, int] | None
    """The token or class that is right for each concept, where the recipe or a classifier's labels say."""
    longest_prompt: int
    """In tokens."""

    @property
    def store_hash(self) -> str:
        return str(self.description["store_hash"])

    @property
    def n_samples(self) -> int:
        return sum(shard.n_samples for shard in self.shards)

    @property
    def n_tokens(self) -> int:
        return sum(shard.n_tokens for shard in self.shards)


def make_plan(recipe: Recipe, *, device_type: str = "cpu") -> Plan:
    """Read the data, tokenise it, look at the model's structure without its weights, and lay out the shards.

    Raises UsageError for everything in a recipe or its data that could not end well.
    """
    _check_made(recipe)
    recipe = checked_backend(recipe)
    skeleton = load_model(recipe.model.id, revision=recipe.model.revision, dtype=recipe.model.dtype, device="meta")
    hook_points, layers = recipe.collect.hook_points, recipe.collect.layers
    sites = find_sites(skeleton.module, hook_points, layers, recipe.model.modules or None)
    only_correct = _only_correct(recipe, skeleton)
    check_model(recipe, skeleton, only_correct=only_correct)
    labelled = load_labelled(
        recipe.data.source,
        split=recipe.data.split,
        text=recipe.data.text,
        concept=recipe.data.concept,
        max_per_concept=recipe.data.max_per_concept,
    )
    concepts = Counter(text.concept for text in labelled)
    _check_concepts(concepts, recipe.data.source)
    answers = _answers(recipe, skeleton, concepts)
    predictions = _predictions(recipe, skeleton, sites, answers, only_correct)
    samples = [
        Sample(sample=number, labelled=text, token_ids=encoded.token_ids, truncated=encoded.truncated)
        for number, (text, encoded) in enumerate(
            zip(
                labelled,
                encode_prompts(
                    skeleton.tokenizer, recipe.data.prompt, [text.text for text in labelled], window=skeleton.window
                ),
                strict=True,
            )
        )
    ]
    tokens_per_batch = recipe.compute.tokens_per_batch
    if tokens_per_batch == "auto":
        tokens_per_batch = TOKENS_PER_BATCH.get(device_type, TOKENS_PER_BATCH["cuda"])
    raw_sites = _wanted_raw(recipe, sites)
    shards, members = _lay_out(samples, tokens_per_batch, _raw_row_bytes(raw_sites, skeleton), recipe.collect.unit)
    estimate = _estimate(recipe, skeleton, sites, raw_sites, shards, predictions)
    _check_probe(recipe, estimate)
    description = _describe(
        recipe, skeleton, sites, samples, concepts, only_correct, estimate.raw_kept, answers if predictions else None
    )
    return Plan(
        description=description,
        shards=shards,
        members=members,
        estimate=estimate,
        answers=answers,
        longest_prompt=max(len(sample.token_ids) for sample in samples),
    )


def freeze(plan: Plan, store: Store) -> tuple[Shard, ...]:
    """Write the plan into the store, or check that the store was made by the same one. Returns the shards to work on.

    Raises UsageError where the store's content was decided by another recipe, model or data.
    """
    if not store.exists("store.json"):
        members = {shard.shard: group for shard, group in zip(plan.shards, plan.members, strict=True)}
        write_plan(store, plan.description, plan.shards, lambda shard: _samples_table(shard, *members[shard.shard]))
    kept = store.describe()
    if kept["store_hash"] != plan.store_hash:
        raise UsageError(_difference(store.root, kept, plan.description))
    check_frozen(store)
    return load_shards(store)


def without_predictions(plan: Plan) -> Plan | None:
    """The plan as it was before stores had predictions; None where it is the same, or the recipe insists on them."""
    asked = plan.description["recipe"]["collect"]["predictions"]
    if not plan.description["predictions"] or asked != "auto":
        return None
    description = {key: value for key, value in plan.description.items() if key != "answers"} | {"predictions": False}
    return replace(plan, description=description | {"store_hash": store_hash_of(description)})


def check_room(plan: Plan, store: Store) -> None:
    """Raises UsageError where the disk that holds a local store has less room than the run is expected to take."""
    if not store.is_local:
        return
    folder = next(path for path in [Path(store.root), *Path(store.root).parents] if path.exists())
    n_free = shutil.disk_usage(folder).free
    n_needed = plan.estimate.total_disk_bytes
    if n_needed > n_free:
        raise UsageError(
            f"The run is expected to write {n_needed / 1e9:.1f} GB ({plan.estimate.raw_note}), but {folder} has "
            f"{n_free / 1e9:.1f} GB free. Lower collect.raw_budget, set collect.raw to none, or choose another "
            "--store."
        )


def check_answers(loaded: LoadedModel, recipe: Recipe, concepts: Counter[str]) -> dict[str, int]:
    """The class or token that is right for each concept. Raises UsageError where one is missing or unfit."""
    answers = dict(recipe.data.answers or {})
    missing = [concept for concept in sorted(concepts) if concept not in answers]
    if missing:
        raise UsageError(
            f"data.answers has no entry for the label {missing[0]!r} ({concepts[missing[0]]:,} of "
            f"{concepts.total():,} rows of {recipe.data.source}).\n  Labels found: {', '.join(sorted(concepts))}. Add "
            f"{', '.join(missing)} to data.answers, or drop data.answers to\n  collect statistics without an "
            "evaluation."
        )
    if loaded.kind != "classifier":
        return answer_token_ids(loaded.tokenizer, answers)
    unknown = [concept for concept in sorted(concepts) if answers[concept] not in loaded.label_ids]
    if unknown:
        raise UsageError(
            f"data.answers.{unknown[0]} is {answers[unknown[0]]!r}, which is not a class of this model's head. "
            f"Its classes: {', '.join(loaded.label_ids)}."
        )
    return {concept: loaded.label_ids[answer] for concept, answer in answers.items()}


def package_versions(backend: str = "transformers") -> dict[str, str]:
    """Versions of what decides the numbers and the format."""
    found = {}
    for name in ("neuronlens", "torch", "transformers", "ray", "duckdb", "pyarrow", "numpy", "numba"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | ({"vllm": vllm_version()} if backend == "vllm" else {})


def _check_made(recipe: Recipe) -> None:
    """A model that is fine-tuned is a local folder: the hub's model of the same name would be another one."""
    if recipe.finetune is not None and not Path(recipe.model.id).is_dir():
        raise UsageError(
            f"There is no model in {recipe.model.id} yet. `python -m jobs.finetune RECIPE`, with this recipe, makes it "
            f"from {recipe.finetune.base}."
        )


def _only_correct(recipe: Recipe, skeleton: LoadedModel) -> bool:
    """The authors keep correctly answered samples only, except on GPT-2."""
    if recipe.preset == "paper" and "only_correct" not in recipe.data.model_fields_set:
        return bool(recipe.data.answers) and config_of(skeleton.module).model_type != "gpt2"
    return recipe.data.only_correct


def _answers(recipe: Recipe, skeleton: LoadedModel, concepts: Counter[str]) -> dict[str, int] | None:
    """As the recipe says; without, a classifier whose labels are the concepts answers by them."""
    if recipe.data.answers is not None:
        return check_answers(skeleton, recipe, concepts)
    if skeleton.kind == "classifier" and set(concepts) <= set(skeleton.label_ids):
        return skeleton.label_ids
    return None


def _predictions(
    recipe: Recipe,
    skeleton: LoadedModel,
    sites: tuple[Site, ...],
    answers: dict[str, int] | None,
    only_correct: bool,
) -> bool:
    """Whether collectors record what the model answers. Raises UsageError where they must and cannot."""
    asked, name = recipe.collect.predictions, type(skeleton.module).__name__
    if asked is True and skeleton.kind == "encoder":
        raise UsageError(
            f"collect.predictions is true, but {name} has neither next-token nor class logits: it answers nothing. "
            "Take a decoder or a sequence classifier, or set collect.predictions to auto."
        )
    if asked is True and answers is None:
        known = f" Its classes are {', '.join(skeleton.label_ids)}." if skeleton.kind == "classifier" else ""
        raise UsageError(
            f"collect.predictions is true, but nothing says which answer is right for a concept.{known} Add "
            "data.answers, or set collect.predictions to auto."
        )
    if asked != "auto":
        return asked
    # Of a decoder that we do not know, only its weights can tell whether we read its logits right: that has to be asked
    # for.
    is_known = skeleton.kind == "classifier" or config_of(skeleton.module).model_type in RULES
    can_answer = skeleton.kind != "encoder" and is_known and answers is not None
    return can_answer and (only_correct or _reaches_the_end(recipe, skeleton, sites))


def _reaches_the_end(recipe: Recipe, skeleton: LoadedModel, sites: tuple[Site, ...]) -> bool:
    hook_points = sorted({site.hook_point for site in sites})
    return not set(find_sites(skeleton.module, hook_points, [-1], recipe.model.modules or None)).isdisjoint(sites)


def _check_concepts(concepts: Counter[str], source: str) -> None:
    lonely = sorted(concept for concept, n in concepts.items() if n < 2)
    if lonely:
        raise UsageError(
            f"{source}: the concept {lonely[0]!r} has one sample; a standard deviation needs at least two. "
            f"Add texts for {', '.join(lonely)}, or drop those rows."
        )


def _lay_out(
    samples: list[Sample], tokens_per_batch: int, raw_row_bytes: int, unit: str
) -> tuple[tuple[Shard, ...], tuple[tuple[tuple[Sample, ...], tuple[int, ...]], ...]]:
    n_tokens = sum(len(sample.token_ids) for sample in samples)
    shard_tokens = min(max(n_tokens // WANTED_SHARDS, MIN_SHARD_TOKENS), MAX_SHARD_TOKENS)
    max_raw_rows = MAX_SHARD_RAW_BYTES // raw_row_bytes if raw_row_bytes else n_tokens
    shards: list[Shard] = []
    members = []
    for group in _cut_into_shards(samples, shard_tokens, max(1, max_raw_rows), unit):
        batches = batches_by_length([len(sample.token_ids) for sample in group], tokens_per_batch)
        batch_of = [0] * len(group)
        for number, texts in enumerate(batches):
            for text in texts:
                batch_of[text] = number
        file, row_group = divmod(len(shards), ROW_GROUPS_PER_SAMPLES_FILE)
        shards.append(
            Shard(
                shard=len(shards),
                concept=group[0].labelled.concept,
                n_samples=len(group),
                n_tokens=sum(len(sample.token_ids) for sample in group),
                n_batches=len(batches),
                samples_file=f"samples/part-{file:05d}.parquet",
                row_group=row_group,
            )
        )
        members.append((tuple(group), tuple(batch_of)))
    return tuple(shards), tuple(members)


def _cut_into_shards(samples: list[Sample], shard_tokens: int, max_raw_rows: int, unit: str) -> Iterator[list[Sample]]:
    """Concept by concept, shortest first, cut where a shard is full. The parts of a concept are made about equal."""
    by_concept: dict[str, list[Sample]] = {}
    for sample in samples:
        by_concept.setdefault(sample.labelled.concept, []).append(sample)
    for concept in sorted(by_concept):
        ordered = sorted(by_concept[concept], key=lambda sample: (len(sample.token_ids), sample.sample))
        cost = np.array([len(sample.token_ids) for sample in ordered])
        rows = cost if unit == "token" else np.ones_like(cost)
        n_parts = max(math.ceil(cost.sum() / shard_tokens), math.ceil(rows.sum() / max_raw_rows), 1)
        part = np.minimum((np.cumsum(cost) - cost) * n_parts // cost.sum(), n_parts - 1)
        for number in np.unique(part):
            yield [sample for sample, p in zip(ordered, part, strict=True) if p == number]


def _wanted_raw(recipe: Recipe, sites: tuple[Site, ...]) -> dict[int, int]:
    """Site index -> number of neurons whose raw values the recipe asks for, the budget aside."""
    raw = recipe.collect.raw
    if raw == "none":
        return {}
    if not isinstance(raw, RawNeurons):
        return {index: site.width for index, site in enumerate(sites)}
    chosen = range(len(sites))
    if raw.layers != "all":
        known = {site.layer for site in sites}
        unknown = [layer for layer in raw.layers if layer not in known]
        if unknown:
            raise UsageError(
                f"collect.raw.layers has {unknown[0]}, which this run does not collect. It collects layers "
                f"{sorted(known)}."
            )
        chosen = [index for index, site in enumerate(sites) if site.layer in raw.layers]  # type: ignore[assignment]
    if raw.neurons != "all":
        narrow = min(sites[index].width for index in chosen)
        beyond = [neuron for neuron in raw.neurons if not 0 <= neuron < narrow]
        if beyond:
            raise UsageError(
                f"collect.raw.neurons has {beyond[0]}, out of range: neurons are numbered 0 to {narrow - 1}."
            )
    return {index: sites[index].width if raw.neurons == "all" else len(raw.neurons) for index in chosen}


def _check_probe(recipe: Recipe, estimate: Estimate) -> None:
    """A linear probe learns from the raw values of every neuron: better to hear of it before the run than after."""
    raw = recipe.collect.raw
    is_part = isinstance(raw, RawNeurons) and (raw.layers != "all" or raw.neurons != "all")
    if recipe.ranges.salience == "probe" and (is_part or not estimate.raw_kept):
        raise UsageError(
            "ranges.salience is probe, which learns from the raw values of every neuron, and this run would not keep "
            f"them all ({'collect.raw names some' if is_part else estimate.raw_note}). Raise collect.raw_budget, set "
            "collect.raw to all, or take another method of salience."
        )


def _raw_row_bytes(raw_sites: dict[int, int], skeleton: LoadedModel) -> int:
    return sum(raw_sites.values()) * skeleton.dtype.itemsize


def _estimate(
    recipe: Recipe,
    skeleton: LoadedModel,
    sites: tuple[Site, ...],
    raw_sites: dict[int, int],
    shards: tuple[Shard, ...],
    predictions: bool,
) -> Estimate:
    n_neurons, n_shards = sum(site.width for site in sites), len(shards)
    n_tokens, n_samples = sum(shard.n_tokens for shard in shards), sum(shard.n_samples for shard in shards)
    rows = {shard.shard: shard.n_tokens if recipe.collect.unit == "token" else shard.n_samples for shard in shards}
    itemsize = skeleton.dtype.itemsize
    raw_bytes = int(sum(rows.values()) * sum(raw_sites.values()) * RAW_VALUE_BYTES.get(itemsize, 3.6))
    raw_kept, raw_note = _raw_decision(recipe, raw_bytes)
    n_concepts = len({shard.concept for shard in shards})
    concept_rows: Counter[str] = Counter()
    for shard in shards:
        concept_rows[shard.concept] += rows[shard.shard]
    merged_bins = sum(min(n, MERGED_BINS_USED) for n in concept_rows.values()) if recipe.collect.histograms else 0
    bins = sum(min(n, HISTOGRAM_BINS_USED) for n in rows.values()) if recipe.collect.histograms else 0
    disk = {
        "samples": int(n_tokens * 2.5 + n_samples * 100),
        "partials": n_neurons * n_shards * PARTIAL_ROW_BYTES,
        "histograms": int(n_neurons * bins * HISTOGRAM_ROW_BYTES),
        "predictions": n_samples * PREDICTION_ROW_BYTES + n_shards * PREDICTIONS_FILE_BYTES if predictions else 0,
        "raw": raw_bytes if raw_kept else 0,
        "merged_histograms": int(n_neurons * merged_bins * MERGED_ROW_BYTES),
        "statistics": n_neurons * n_concepts * (STATISTICS_ROW_BYTES + 20 * max(0, n_concepts - 1)),
    }
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in skeleton.module.parameters()),
        "moments": n_neurons * 9 * 8 * SHARDS_IN_HAND,
        "histograms": n_neurons * N_BINS * 4 * SHARDS_IN_HAND if recipe.collect.histograms else 0,
        "raw": max(rows.values()) * _raw_row_bytes(raw_sites, skeleton) * (SHARDS_IN_HAND + 1) if raw_kept else 0,
    }
    return Estimate(disk_bytes=disk, worker_memory_bytes=memory, raw_kept=raw_kept, raw_note=raw_note)


def _raw_decision(recipe: Recipe, raw_bytes: int) -> tuple[bool, str]:
    policy, budget = recipe.collect.raw, recipe.collect.raw_budget
    size = f"{raw_bytes / 1e9:.2f} GB of raw values"
    if policy == "none":
        return False, "raw values are not kept: collect.raw is none"
    if policy == "auto" and raw_bytes > budget:
        return False, f"raw values are not kept: {size} would pass collect.raw_budget, {budget / 1e9:.2f} GB"
    return True, f"{size} are kept"


def _describe(
    recipe: Recipe,
    skeleton: LoadedModel,
    sites: tuple[Site, ...],
    samples: list[Sample],
    concepts: Counter[str],
    only_correct: bool,
    raw_kept: bool,
    predicted: dict[str, int] | None,
) -> dict[str, Any]:
    identity = model_identity(recipe.model.id, recipe.model.revision)
    raw = recipe.collect.raw
    chosen = raw.model_dump() if isinstance(raw, RawNeurons) else {"layers": "all", "neurons": "all"}
    decides: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model": {
            **asdict(identity),
            "dtype": str(skeleton.dtype).removeprefix("torch."),
            "modules": dict(recipe.model.modules),
        },
        "tokenizer_hash": tokenizer_hash(skeleton.tokenizer),
        "hook_points": sorted({site.hook_point for site in sites}),
        "layers": sorted({site.layer for site in sites}),
        "widths": {site.hook_point: site.width for site in sites},
        "unit": recipe.collect.unit,
        "concepts": dict(sorted(concepts.items())),
        "dataset": {
            "source": recipe.data.source,
            "split": recipe.data.split,
            "prompt": recipe.data.prompt,
            "max_per_concept": recipe.data.max_per_concept,
            "fingerprint": content_hash([[s.labelled.row, s.labelled.text, s.labelled.concept] for s in samples]),
            "n_rows": len(samples),
            "n_truncated": sum(sample.truncated for sample in samples),
        },
        "histograms": recipe.collect.histograms,
        "raw": {"policy": "kept" if raw_kept else "none", **chosen},
        "only_correct": only_correct,
        "predictions": predicted is not None,
    }
    if predicted is not None:
        decides["answers"] = predicted
    if recipe.model.backend != "transformers":
        decides["backend"] = recipe.model.backend  # stores from before there were any have no such key
    return {
        **decides,
        "store_hash": store_hash_of(decides),
        "recipe": recipe.model_dump(mode="json"),
        "versions": package_versions(recipe.model.backend),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _difference(root: str, kept: dict[str, Any], wanted: dict[str, Any]) -> str:
    before: dict[str, Any] = {"predictions": False, "backend": "transformers"}
    kept, wanted = before | kept, before | wanted
    keys = [key for key in wanted | kept if key not in DECIDES_NOTHING and kept.get(key) != wanted.get(key)]
    shown = "; ".join(
        f"{key}: {_short(kept.get(key))} in the store, {_short(wanted.get(key))} asked for" for key in keys[:3]
    )
    return (
        f"{root} was made by another recipe ({shown}). Expected store hash {wanted['store_hash'][:12]}, found "
        f"{kept['store_hash'][:12]}. Give another --store, or the recipe that made this one."
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _samples_table(shard: Shard, samples: tuple[Sample, ...], batch_of: tuple[int, ...]) -> pa.Table:
    columns = {
        "sample": [sample.sample for sample in samples],
        "shard": [shard.shard] * len(samples),
        "batch": batch_of,
        "concept": [shard.concept] * len(samples),
        "row": [sample.labelled.row for sample in samples],
        "n_tokens": [len(sample.token_ids) for sample in samples],
        "truncated": [sample.truncated for sample in samples],
        "text": [sample.labelled.text for sample in samples],
        "token_ids": [sample.token_ids for sample in samples],
    }
    return pa.Table.from_pydict(columns, schema=SAMPLES_SCHEMA)
