"""Tiny models behind a batcher or an engine, tables that change what they say, and what they say alone.

The expected tokens come from transformers' own `generate` on the bare model, under `neuronlens.intervene`.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from neuronlens import intervene
from neuronlens.models import LoadedModel
from neuronlens.programs import Program
from neuronlens.ranges import RangeTable, TableModel
from neuronlens.serving.batcher import Batcher, Row
from neuronlens.serving.engine import Counts, Delta, Generation, GenerationFailed, Sampling
from tests.range_tables import random_pieces, row, table_of
from tests.tiny_models import D_MLP, D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

EOS = frozenset({1})
FIRST_WORD = 6
"""The first token that is no special one."""


def tiny_loaded(architecture: str = "gpt2", **options: Any) -> LoadedModel:
    return LoadedModel.of(tiny_model(architecture, **options), tiny_tokenizer())


@lru_cache(maxsize=4)
def wide_table(config_hash: str = "c" * 16) -> RangeTable:
    """Ranges that catch about half of what a random tiny model computes, at two hook points of both layers."""
    rng = np.random.default_rng(5)
    rows = [
        row(concept, neuron, float(rng.normal(0, 0.3)), float(rng.uniform(0.1, 0.5)), hook_point=site, layer=layer,
            rank=neuron + 1)
        for site, width in (("mlp_post", D_MLP), ("resid_post", D_MODEL))
        for layer in range(N_LAYERS)
        for concept in ("joy", "anger", "fear")
        for neuron in range(width)
    ]  # fmt: skip
    widths = {"mlp_post": D_MLP, "resid_post": D_MODEL}
    model = TableModel(id="tiny", revision=None, config_hash=config_hash)
    return table_of(rows, widths=widths, top_fraction=1.0, model=model)


@lru_cache(maxsize=4)
def table_with_pieces(config_hash: str = "c" * 16) -> RangeTable:
    """Ranges of up to four pieces, with posteriors, at two hook points of both layers."""
    widths = {"mlp_post": D_MLP, "resid_post": D_MODEL}
    rows = [
        row
        for seed, (site, width) in enumerate(widths.items())
        for row in random_pieces(seed, width=width, concepts=("joy", "fear"), layers=range(N_LAYERS), hook_point=site)
    ]
    model = TableModel(id="tiny", revision=None, config_hash=config_hash)
    return table_of(rows, widths=widths, top_fraction=1.0, model=model, method="likelihood_ratio")


RULES: tuple[list[dict[str, Any]] | None, ...] = (
    None,
    [{"concept": "joy", "hook_points": ["mlp_post"]}],
    [{"concept": "joy", "hook_points": ["resid_post"], "layers": [1]}],
    [{"concept": "anger", "action": "dampen", "factor": 0.25}],
    [{"concept": "fear", "action": "mean", "tau": 1.0}, {"concept": "joy", "action": "adaptive"}],
    [{"concept": "anger", "action": "set", "value": 1.5, "layers": [0], "tau": 0.5}],
    [{"concept": "joy", "tau": float("inf"), "top_fraction": 0.4}],
)


def program_of(rules: Sequence[Mapping[str, Any]] | None) -> Program | None:
    return None if rules is None else Program.compile(wide_table(), rules)


def alone(
    loaded: LoadedModel, prompt_ids: Sequence[int], max_tokens: int, rules: Sequence[Mapping[str, Any]] | None,
) -> tuple[list[int], int, int]:  # fmt: skip
    """The greedy tokens of the bare model on its own, and what the intervention counted."""
    if rules is not None:
        with intervene(loaded.module, wide_table(), rules) as applied:
            ids, _, _ = alone(loaded, prompt_ids, max_tokens, None)
        return ids, applied.tested, applied.changed
    prompt_1T = torch.tensor([list(prompt_ids)])
    module: Any = loaded.module
    out_1T = module.generate(
        prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=max_tokens, do_sample=False,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return out_1T[0, len(prompt_ids) :].tolist(), 0, 0


def generation(
    prompt_ids: Sequence[int], max_tokens: int, rules: Sequence[Mapping[str, Any]] | None = None, **options: Any
) -> Generation:
    """A greedy one."""
    sampling = options.pop("sampling", None) or Sampling(max_tokens=max_tokens, temperature=0)
    return Generation(id="test", prompt_ids=tuple(prompt_ids), sampling=sampling, program=program_of(rules), **options)


class Run:
    """A batcher, and what each of its rows has said so far."""

    def __init__(self, loaded: LoadedModel, **options: Any) -> None:
        self.loaded = loaded
        given = {"max_batch": 4, "max_programs": 8, "cache_bytes": 10**8, "prefill_tokens": 9, **options}
        self.batcher = Batcher(loaded, **given)
        self.ids: dict[Row, list[int]] = {}
        self.text: dict[Row, str] = {}
        self.counts: dict[Row, Counts | None] = {}
        self.errors: dict[Row, GenerationFailed] = {}
        self.deltas: dict[Row, list[Delta]] = {}

    def add(self, wanted: Generation) -> Row:
        row = Row.of(wanted, self.loaded.tokenizer, EOS)
        self.ids[row], self.text[row], self.deltas[row] = [], "", []
        self.batcher.add(row)
        return row

    def step(self) -> None:
        for event in self.batcher.step():
            if event.error is not None:
                self.errors[event.row] = event.error
            if event.delta is not None:
                self.ids[event.row] += event.delta.token_ids
                self.text[event.row] += event.delta.text
                self.deltas[event.row].append(event.delta)
                if event.delta.finish_reason:
                    self.counts[event.row] = event.delta.counts

    def finish(self) -> None:
        while self.batcher.has_work:
            self.step()
