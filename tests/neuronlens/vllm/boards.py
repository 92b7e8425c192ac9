"""Boards without vLLM: sites of any width, random programs that catch about half of standard normal values, and what a
program does to values, written out in numpy, one value at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from neuronlens.programs import Program
from neuronlens.vllm.board import Board
from neuronlens.vllm.config import WorkerConfig
from neuronlens.vllm.sites import RankSite
from neuronlens.vllm.tables import SlotTables
from neuronlens.vllm.tickets import Tickets
from tests.range_tables import random_pieces, row, table_of

CONFIG = WorkerConfig(slots=4, rules=3, rule_rows=6)
RULES: tuple[list[dict[str, Any]], ...] = (
    [{"concept": "joy"}],
    [{"concept": "fear", "action": "dampen", "factor": 0.25}],
    [{"concept": "joy", "action": "adaptive"}, {"concept": "fear", "action": "mean"}],
    [{"concept": "fear", "action": "set", "value": 1.5, "tau": 0.5}, {"concept": "joy", "action": "dampen",
      "factor": 0.5}, {"concept": "anger", "tau": float("inf")}],
)  # fmt: skip


def rank_site(width: int, layer: int = 0, first: int = 0, full_width: int | None = None) -> RankSite:
    full_width = width if full_width is None else full_width
    return RankSite(
        hook_point="mlp_post",
        layer=layer,
        module_name="m",
        side="input",
        full_width=full_width,
        width=width,
        first=first,
    )


def program(rules: Sequence[dict[str, Any]], width: int, layers: Sequence[int] = (0,), seed: int = 1) -> Program:
    rng = np.random.default_rng(seed)
    rows = [
        row(concept, neuron, float(rng.normal(0, 0.3)), float(rng.uniform(0.1, 0.4)), layer=layer)
        for layer in layers
        for concept in ("joy", "fear", "anger")
        for neuron in range(width)
        if rng.random() < 0.7
    ]
    return Program.compile(table_of(rows, widths={"mlp_post": width}), rules)


def program_with_pieces(rules: Sequence[dict[str, Any]], width: int) -> Program:
    """Of joy and fear, with up to four pieces a neuron."""
    rows = random_pieces(1, width=width, concepts=("joy", "fear"))
    table = table_of(rows, widths={"mlp_post": width}, method="likelihood_ratio", top_fraction=1.0)
    return Program.compile(table, rules)


def board(
    sites: Sequence[RankSite], *, n_tokens: int = 64, config: WorkerConfig = CONFIG, rank: int = 0,
    device: str = "cpu", dtype: torch.dtype = torch.float32, n_counters: int = 8,
) -> tuple[Board, Tickets]:  # fmt: skip
    place = torch.device(device)
    tables = SlotTables(sites, config, place, dtype)
    made = Board(tables, n_tokens=n_tokens, n_counters=n_counters, n_rules=config.rules, rank=rank, device=place)
    return made, Tickets(made, n_slots=config.slots, n_counters=n_counters)


def values(n_tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values with some infinities and NaN among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_tokens, width))
    odd = rng.random(x.shape) < 0.02
    x[odd] = rng.choice([np.inf, -np.inf, np.nan], size=int(odd.sum()))
    return torch.from_numpy(x).to(dtype)


def by_hand(made: Program, layer: int, x_N: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, list[int]]:
    """What one token's values become, and the counts: tested, then changed by each rule."""
    counts, out = [0] * (1 + len(made.rules)), x_N.copy()
    sites = [site for site in made.sites if site.layer == layer]
    for site in sites:
        lower_RN, upper_RN = (
            torch.from_numpy(bounds).to(dtype).double().numpy() for bounds in (site.lower_RN, site.upper_RN)
        )
        for j, x in enumerate(x_N):
            counts[0] += int(np.isfinite(x) and site.named_N[j])
            for r, rule in enumerate(site.rule_R):
                if lower_RN[r, j] <= x <= upper_RN[r, j]:
                    slope = site.a_RN[r, j]
                    if site.g_RN is not None and site.centre_RN is not None:
                        slope += site.g_RN[r, j] * abs(x - site.centre_RN[r, j])
                    out[j] = site.b_RN[r, j] + (0.0 if site.constant_R[r] else x * slope)
                    counts[1 + rule] += int(np.isfinite(x))
                    break
    return out, counts
