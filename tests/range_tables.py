"""Small range tables for tests, built from numbers that a test can see."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from neuronlens.ranges import PIECES_SCHEMA, SCHEMA, RangeTable, TableModel

TAU = 2.5
HEADER = {
    "tau": TAU,
    "top_fraction": 0.5,
    "salience": "mean_abs",
    "store_hash": "5" * 16,
    "model": TableModel(id="tiny", revision=None, config_hash="c" * 16),
    "unit": "last_token",
    "coverage": {"shards": 3, "committed": 3},
    "created_with": {"pyarrow": "26"},
}


def row(concept: str, neuron: int, mean: float, std: float, **fields: Any) -> dict[str, Any]:
    """A row of a range table: by default of mlp_post in layer 0, most salient, with bounds mean -+ 2.5 std."""
    given = {
        "hook_point": "mlp_post",
        "layer": 0,
        "neuron": neuron,
        "concept": concept,
        "n": 10,
        "mean": mean,
        "std": std,
    }
    derived = {
        "mean_abs": abs(mean),
        "salience": abs(mean),
        "rank": 1,
        "lower": mean - TAU * std,
        "upper": mean + TAU * std,
    }
    return {**given, **derived, **fields}


def table_of(rows: Sequence[dict[str, Any]], *, widths: dict[str, int] | None = None, **header: Any) -> RangeTable:
    """The range table of these rows; `header` overrides the header's fields. Rows of another method than paper have a
    piece, a posterior and a mean of the others too."""
    fields = {**HEADER, "widths": widths or {"mlp_post": 4}, **header}
    schema = PIECES_SCHEMA if "method" in header else SCHEMA
    return RangeTable.make(pa.Table.from_pylist(list(rows), schema=schema), **fields)


def pieces(concept: str, neuron: int, bounds: Sequence[tuple[float, float, float]], **fields: Any) -> list[dict]:
    """Rows of one neuron's pieces (lower, upper, posterior), with the moments 0.5 -+ 0.5 unless `fields` has others."""
    shared = {"mean": 0.5, "std": 0.5, "mean_others": -0.25, **fields}
    return [
        row(concept, neuron, **shared, lower=lower, upper=upper, piece=piece, posterior=posterior)
        for piece, (lower, upper, posterior) in enumerate(bounds)
    ]


def random_pieces(
    seed: int, *, width: int, concepts: Sequence[str], layers: Sequence[int] = (0,), hook_point: str = "mlp_post"
) -> list[dict[str, Any]]:
    """Rows with up to four pieces a neuron, which hold about half of standard normal values; some neurons have none."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for layer in layers:
        for concept in concepts:
            salient = rng.permutation(width)[: max(1, int(0.8 * width))]
            for rank, neuron in enumerate(salient.tolist(), start=1):
                edges = np.sort(rng.normal(0, 1.2, 2 * int(rng.integers(1, 5)))).tolist()
                posteriors = rng.choice([0.0, 0.25, 0.9, 1.0], len(edges) // 2).tolist()
                bounds = list(zip(edges[::2], edges[1::2], posteriors, strict=True))
                moments = {"mean": float(rng.normal(0, 0.5)), "std": float(rng.uniform(0.1, 0.5))}
                moments["mean_others"] = float(rng.normal(0, 0.5))
                place = {"layer": layer, "hook_point": hook_point, "rank": rank, **moments}
                rows += pieces(concept, neuron, bounds, **place)
    return rows


def large_table_with_pieces(n_rows: int) -> RangeTable:
    """As `large_table`, with two pieces a neuron."""
    numbers = np.arange(n_rows)
    alike = pieces("joy", 0, [(0.0, 1.0, 0.5)])[0]
    columns = {field.name: pa.repeat(pa.scalar(alike[field.name], field.type), n_rows) for field in PIECES_SCHEMA}
    columns |= {"neuron": numbers // 2, "rank": numbers // 2 + 1, "piece": numbers % 2}
    columns |= {"lower": 2.0 * (numbers % 2), "upper": 2.0 * (numbers % 2) + 1}
    fields = {**HEADER, "top_fraction": 1.0, "widths": {"mlp_post": n_rows}, "method": "hpd"}
    return RangeTable.make(pa.table(columns), **fields)


RULES_ON_PIECES: list[list[dict[str, Any]]] = [
    [{"concept": "joy", "action": "soften"}],
    [{"concept": "fear"}, {"concept": "joy", "action": "others"}],
    [{"concept": "joy", "action": "adaptive", "factor": 0.5}, {"concept": "fear", "action": "soften"}],
    [{"concept": "fear", "action": "mean", "tau": 1.5}, {"concept": "joy", "action": "dampen", "factor": 0.5}],
]
"""Every action that pieces can have, alone and with a second rule."""


def apply_by_hand(
    rows: Sequence[dict[str, Any]], rules: Sequence[dict[str, Any]], x_N: np.ndarray
) -> tuple[np.ndarray, int, list[int]]:
    """What the rules make of one token's values at one site whose rows these are, from the words of the rules alone;
    how many values were tested, and how many each rule changed. Bounds are compared in float32."""
    out_N, n_tested, changed = x_N.astype(np.float64), 0, [0] * len(rules)
    for neuron, x in enumerate(x_N.tolist()):
        of_rule = [[r for r in rows if (r["neuron"], r["concept"]) == (neuron, rule["concept"])] for rule in rules]
        n_tested += any(of_rule) and bool(np.isfinite(x))
        for i, (rule, ranges) in enumerate(zip(rules, of_rule, strict=True)):
            replacements = [_replacement(rule, r, x) for r in ranges[: 1 if "tau" in rule else None]]
            inside = [value for value in replacements if value is not None]
            if inside:
                out_N[neuron] = inside[0]
                changed[i] += bool(np.isfinite(x))
                break
    return out_N, n_tested, changed


def _replacement(rule: dict[str, Any], r: dict[str, Any], x: float) -> float | None:
    """What x becomes under one row of a table; None where it is outside."""
    lower, upper = r["lower"], r["upper"]
    if "tau" in rule:
        lower, upper = r["mean"] - rule["tau"] * r["std"], r["mean"] + rule["tau"] * r["std"]
    if not np.float32(lower) <= x <= np.float32(upper):
        return None
    action = rule.get("action", "zero")
    if action == "soften":
        return x * (1 - r["posterior"])
    if action == "adaptive":
        half_width = (upper - lower) / 2
        return float(x * rule.get("factor", 0.125) * abs(x - (lower + upper) / 2) / half_width)
    if action == "dampen":
        return float(x * rule["factor"])
    return {"zero": 0.0, "mean": r["mean"], "others": r.get("mean_others"), "set": rule.get("value")}[action]


def large_table(n_rows: int, concept: str = "joy") -> RangeTable:
    """A table of one concept in one layer, with a range of every neuron."""
    number = pa.array(range(n_rows), pa.int32())
    alike = row(concept, 0, 0.1, 0.3)
    columns = {field.name: pa.repeat(pa.scalar(alike[field.name], field.type), n_rows) for field in SCHEMA}
    columns |= {"neuron": number, "rank": pc.add(number, 1)}
    return RangeTable.make(
        pa.table(columns, schema=SCHEMA), **{**HEADER, "top_fraction": 1.0, "widths": {"mlp_post": n_rows}}
    )
