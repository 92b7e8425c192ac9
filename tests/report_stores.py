"""Stores as a report may meet them, written from numpy arrays: few or many concepts, hook points, layers; with parts
missing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from neuronlens.store import Store
from tests.synthetic_store import Shard, add_statistics, stored, write, write_store

NASTY = (
    "<script>alert('x')</script>",
    'it\'s "love"',
    "日本語の概念 と 愛",
    "a/b\\c",
    "$x^2$ & $\\frac{1",
    "_tab\tnew\nline",
    "é😀",
)
"""Names of concepts that break what quotes badly."""


def arrays(
    concepts: Sequence[str], *, n_layers: int = 2, n_samples: int = 60, width: int = 12, seed: int = 0
) -> dict[str, np.ndarray]:
    """float32 [layers, samples, neurons] for each concept: Gaussian, the mean moved from concept to concept, more in
    deeper layers and further along the neurons."""
    rng = np.random.default_rng(seed)
    return {
        concept: (
            rng.normal(size=(n_layers, n_samples, width))
            + k * np.linspace(0, 1.5, width) * (1 + np.arange(n_layers))[:, None, None]
        ).astype(np.float32)
        for k, concept in enumerate(concepts)
    }


def write_report_store(
    root: Path,
    values: Mapping[str, np.ndarray],
    *,
    hook_points: Sequence[str] = ("mlp_post",),
    histograms: bool = True,
    raw: bool = True,
    answered: bool = False,
    keep: str = "auto",
    n_lost: int = 0,
    with_statistics: bool = True,
    **description: Any,
) -> Store:
    """A store with one shard per concept. The values are those of the first hook point; every further one has them
    again, plus 1. `answered`: half of the texts of each concept were answered right. `n_lost` concepts, the last, were
    planned and never collected."""
    shards = [
        Shard(
            concept=concept,
            x_LSN=x_LSN,
            **({"answers": _answers(concept, x_LSN.shape[1])} if answered else {}),
        )
        for concept, x_LSN in values.items()
    ]
    write_store(root, shards, hook_point=hook_points[0], histograms=histograms, raw=raw)
    for i, hook_point in enumerate(hook_points[1:], start=1):
        _add_hook_point(root, [(s.concept, s.x_LSN + np.float32(i)) for s in shards], hook_point, i, histograms)
    for number in range(len(shards) - n_lost, len(shards)):
        (root / "commits" / f"shard-{number:05d}.json").unlink()
    _describe(root, hook_points, **description)
    return add_statistics(root, keep=keep) if with_statistics else Store(str(root))


def put_texts(root: Path, text: str) -> None:
    """Let every sample have this text."""
    path = root / "samples" / "part-00000.parquet"
    rows = pq.read_table(path)
    column = rows.schema.get_field_index("text")
    write(path, [rows.set_column(column, "text", pa.array([text] * rows.num_rows))])


def put_evaluation(root: Path, rows: Sequence[Mapping[str, Any]], *, name: str = "tbl_0.000", **edit: Any) -> None:
    """An evaluation as `pipeline.erasure` keeps it; a row is evaluation_row's."""
    (root / "evaluations").mkdir(exist_ok=True)
    content = {"table": "tbl_0000000000000000", "edit": {"action": "zero", **edit}, "coverage": {}, "n_texts": 90}
    (root / "evaluations" / f"{name}.json").write_text(json.dumps({**content, "rows": list(rows)}), encoding="utf-8")


def evaluation_row(concept: str, condition: str, target: float | None, others: float | None, **more: Any) -> dict:
    """Accuracies of the target and of the others, an interval of 0.1 to both sides; perplexity 2."""
    row: dict[str, Any] = {"concept": concept, "condition": condition, "n_target": 30, "n_complement": 60}
    for side, accuracy in (("target", target), ("complement", others)):
        row |= {f"{side}_accuracy": accuracy, f"{side}_confidence": accuracy}
        row |= {
            f"{side}_accuracy_low": accuracy and accuracy - 0.1,
            f"{side}_accuracy_high": accuracy and accuracy + 0.1,
        }
    return row | {"perplexity": 2.0, "tested": 100, "changed": 0 if condition == "base" else 40} | more


SETTING: dict[str, Any] = {
    **dict.fromkeys(("layers", "hook_points", "mass", "penalty", "budget", "factor", "value")),
    "tau": 2.5,
    "top_fraction": 0.3,
    "salience": "mean_abs",
    "method": "paper",
    "action": "zero",
    "positions": "all",
    "table_id": "tbl_0000000000000000",
}
"""What the rows of a sweep say of a setting."""


def sweep_row(condition: str, target: float | None, others: float | None, kl: float = 0.1, **more: Any) -> dict:
    """The row of one condition: drops with an interval of 0.02 to both sides, and the selectivity with one of 0.03."""
    row: dict[str, Any] = {
        "setting": 0,
        "concept": None,
        "control": None,
        "n_target": 60,
        "n_complement": 60,
        **SETTING,
    }
    drops = {"target_drop": (target, 0.02), "complement_drop": (others, 0.02)}
    drops["selectivity"] = (None if target is None or others is None else target - others, 0.03)
    for name, (value, reach) in drops.items():
        ends = (None, None) if value is None else (value - reach, value + reach)
        row |= {name: value, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    row |= {"kl_target": 2 * kl, "kl_complement": kl, "tested": 200, "changed": 80, "changed_share": 0.4}
    return row | {"condition": condition} | more


def put_sweep(
    root: Path,
    settings: Sequence[Mapping[str, Any]],
    *,
    concepts: Sequence[str] = ("a", "b"),
    name: str = "sweep.000000000001",
    controls: Mapping[str, tuple[float, float]] | None = None,
    bare: float | None = 0.9,
    n_texts: int = 120,
    texts_hash: str | None = "a",
) -> None:
    """A sweep as `pipeline.erasure` keeps it. A setting says `drops` (target, others, kl) under ranges, what else it
    says goes over SETTING. Under whole neurons and controls (name -> drops) they are 0.7 and 0.5, and as given. The
    concepts have 0.1 more and less, in turn. `bare`: the bare model's confidence. `texts_hash`: None as in
    old evaluations."""
    rows = []
    for number, setting in enumerate(settings):
        drops = {"neuron": (0.7, 0.5, 3.0), "range": setting["drops"]}
        drops |= {condition: (*pair, 0.2) for condition, pair in (controls or {}).items()}
        own = {key: value for key, value in setting.items() if key != "drops"} | {"setting": number}
        for k, concept in enumerate(concepts):
            rows.append(sweep_row("base", None, None, 0.0, concept=concept, target_confidence=bare, **own))
            for condition, (target, others, kl) in drops.items():
                moved = target + (0.1, -0.1)[k % 2]
                rows.append(sweep_row(condition, moved, others, kl, concept=concept, **own))
        rows.append(sweep_row("base", None, None, 0.0, target_confidence=bare, **own))
        rows += [sweep_row(condition, *three, **own) for condition, three in drops.items()]
    (root / "evaluations").mkdir(exist_ok=True)
    content = {"table": SETTING["table_id"], "edit": {"action": "zero"}, "coverage": {}, "n_texts": n_texts}
    content |= {} if texts_hash is None else {"texts_hash": texts_hash}
    (root / "evaluations" / f"{name}.json").write_text(json.dumps({**content, "rows": rows}), encoding="utf-8")


def put_generation(
    root: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    name: str = "tbl_0.000",
    classifier: str = "org/judge",
    n_prompts: int = 90,
    n_tokens: int = 32,
    temperature: float = 0.0,
    **edit: Any,
) -> None:
    """What was written, as `pipeline.generation` keeps it; a row is generation_row's."""
    (root / "generations").mkdir(exist_ok=True)
    asked = {"classifier": classifier, "n_tokens": n_tokens, "prompt_tokens": 8, "temperature": temperature, "seed": 0}
    content = {
        "table": "tbl_0000000000000000",
        "edit": {"action": "zero", **edit},
        "generation": asked,
        "coverage": {},
        "n_prompts": n_prompts,
        "n_passes": 5,
        "rows": list(rows),
    }
    (root / "generations" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def generation_row(
    concept: str | None,
    condition: str,
    target: float,
    others: float | None,
    *,
    bare: tuple[float, float] | None = None,
    prompt: str = "i feel",
    continuation: str = "",
    **more: Any,
) -> dict:
    """Probabilities of the target and of the others, an interval of 0.1 to both sides; drops from those of the `bare`
    model, with one of 0.02, and none for base. One example, none where the concept is None: a mean."""
    row: dict[str, Any] = {"concept": concept, "condition": condition, "n_target": 30, "n_complement": 60}
    lost = (None, None) if bare is None or others is None else (bare[0] - target, bare[1] - others)
    reaches: dict[str, tuple[float | None, float]] = {
        "target_probability": (target, 0.1),
        "complement_probability": (others, 0.1),
        "target_drop": (lost[0], 0.02),
        "complement_drop": (lost[1], 0.02),
        "selectivity": (None if lost[0] is None or lost[1] is None else lost[0] - lost[1], 0.02),
        "target_share": (target, 0.1),
        "complement_share": (others, 0.1),
    }
    for key, (value, reach) in reaches.items():
        ends = (None, None) if value is None else (value - reach, value + reach)
        row |= {key: value, f"{key}_low": ends[0], f"{key}_high": ends[1]}
    changed = 0 if condition == "base" else 40
    row |= {"perplexity": 7.25, "distinct_2": 0.875, "n_tokens": 31.5}
    row |= {"tested": 100, "changed": changed, "changed_share": changed / 100}
    example = {"prompt": prompt, "continuation": continuation, "probability": target}
    return row | {"examples": [] if concept is None else [example]} | more


def generation_rows(concepts: Sequence[str], **more: Any) -> list[dict]:
    """Those of all concepts and conditions, then the means. What ranges leave of the target is 0.2, 0.3, ... of 0.9."""
    rows = []
    for condition, target, others in (("base", 0.9, 0.8), ("neuron", 0.1, 0.3), ("range", 0.2, 0.7)):
        bare = None if condition == "base" else (0.9, 0.8)
        targets = [target + (0.1 * (k % 6) if condition == "range" else 0.0) for k in range(len(concepts))]
        rows += [
            generation_row(c, condition, p, others, bare=bare, continuation=f"{c} {condition}", **more)
            for c, p in zip(concepts, targets, strict=True)
        ]
        rows.append(generation_row(None, condition, sum(targets) / len(targets), others, bare=bare, **more))
    return sorted(rows, key=lambda row: row["concept"] is None)


def put_quarantine(root: Path, shard: int, concept: str, reason: str) -> None:
    (root / "quarantine").mkdir(exist_ok=True)
    receipt = {"shard": shard, "concept": concept, "reasons": ["first", "second", reason], "samples": [1], "rows": [1]}
    (root / "quarantine" / f"shard-{shard:05d}.json").write_text(json.dumps(receipt), encoding="utf-8")


def _answers(concept: str, n_samples: int) -> list[tuple[str, bool, float]]:
    return [(concept, True, 0.75) if i % 2 else ("?", False, 0.25) for i in range(n_samples)]


def _describe(root: Path, hook_points: Sequence[str], **changes: Any) -> None:
    path = root / "store.json"
    description = json.loads(path.read_text())
    width = next(iter(description["widths"].values()))
    description |= {
        "hook_points": list(hook_points),
        "widths": dict.fromkeys(hook_points, width),
        "model": {"id": "some/model", "revision": None, "architecture": "Tiny", "dtype": "float32"},
        "dataset": {"source": "train.jsonl", "split": "train", "n_rows": 1, "prompt": "{text}"},
        "unit": "last_token",
        "created_at": "2026-03-04T05:06:07+00:00",
        "versions": {"neuronlens": "0.1.0"},
        **changes,
    }
    path.write_text(json.dumps(description), encoding="utf-8")


def _add_hook_point(
    root: Path, shards: Sequence[tuple[str, np.ndarray]], hook_point: str, number: int, histograms: bool
) -> None:
    """The same shards at another hook point: further files in the receipts that are there."""
    other = root.with_name(f"{root.name}-{hook_point}")
    write_store(
        other,
        [Shard(concept=concept, x_LSN=x_LSN) for concept, x_LSN in shards],
        hook_point=hook_point,
        histograms=histograms,
        raw=False,
    )
    for shard in range(len(shards)):
        path = root / "commits" / f"shard-{shard:05d}.json"
        receipt = json.loads(path.read_text())
        for file in json.loads((other / "commits" / path.name).read_text())["files"]:
            moved = file["path"].replace(".parquet", f"{number}.parquet")
            (root / moved).write_bytes((other / file["path"]).read_bytes())
            receipt["files"].append(stored(root, file["kind"], moved))
        path.write_text(json.dumps(receipt), encoding="utf-8")
