"""Tiny random models that vLLM's CPU build can run, tables that change what they say, and vLLM engines in this process.

Two layers, d_model 64 in two heads of 32 (the narrowest that its attention takes), d_mlp 96, 512 positions. What a
sequence has to say comes from transformers' own `generate` under `neuronlens.intervene`.
"""

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from neuronlens.identity import model_identity
from neuronlens.models import LoadedModel, load_model
from neuronlens.programs import Program
from neuronlens.ranges import RangeTable, TableModel
from neuronlens.vllm.collection import mend_llvmlite
from tests.neuronlens.serving import tiny_engine
from tests.range_tables import random_pieces, row, table_of
from tests.tiny_models import save_tiny

D_MODEL, D_MLP, N_LAYERS, WINDOW, BLOCK = 64, 96, 2, 512, 32
EOS = 1
WIDTHS = {"mlp_post": D_MLP, "mlp_out": D_MODEL, "attn_out": D_MODEL, "resid_post": D_MODEL}
_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": D_MODEL, "n_inner": D_MLP, "n_layer": N_LAYERS, "n_head": 2, "n_positions": WINDOW},
    "opt": {"hidden_size": D_MODEL, "ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL, "num_attention_heads": 2,
            "max_position_embeddings": WINDOW, "num_hidden_layers": N_LAYERS},
}  # fmt: skip
_DENSE = {"hidden_size": D_MODEL, "intermediate_size": D_MLP, "num_attention_heads": 2,
          "num_hidden_layers": N_LAYERS, "max_position_embeddings": WINDOW}  # fmt: skip
_GATED = {**_DENSE, "num_key_value_heads": 2, "head_dim": 32}


def save_model(folder: Path, architecture: str, **config: Any) -> Path:
    """A model folder with its tokenizer."""
    dense = architecture in ("phi", "gpt_neox")
    sizes = _SIZES.get(architecture, _DENSE if dense else _GATED)
    return save_tiny(folder / architecture, architecture, **{**sizes, **config})


@lru_cache(maxsize=8)
def table_for(folder: Path, hook_points: tuple[str, ...] = ("mlp_post", "resid_post")) -> RangeTable:
    """Ranges that catch a good part of what the model computes, at these hook points of both layers."""
    rng = np.random.default_rng(7)
    rows = [
        row(concept, neuron, float(rng.normal(0, 0.6)), float(rng.uniform(0.2, 0.8)), hook_point=site, layer=layer,
            rank=neuron + 1)
        for site in hook_points
        for layer in range(N_LAYERS)
        for concept in ("joy", "anger", "fear")
        for neuron in range(WIDTHS[site])
    ]  # fmt: skip
    model = TableModel(id=str(folder), revision=None, config_hash=model_identity(str(folder)).config_hash)
    widths = {site: WIDTHS[site] for site in hook_points}
    return table_of(rows, widths=widths, top_fraction=1.0, model=model)


RULES = tiny_engine.RULES


@lru_cache(maxsize=8)
def table_with_pieces(folder: Path) -> RangeTable:
    """Ranges of up to four pieces for joy and fear, with posteriors."""
    widths = {site: WIDTHS[site] for site in ("mlp_post", "resid_post")}
    rows = [
        row
        for seed, (site, width) in enumerate(widths.items())
        for row in random_pieces(seed, width=width, concepts=("joy", "fear"), layers=range(N_LAYERS), hook_point=site)
    ]
    model = TableModel(id=str(folder), revision=None, config_hash=model_identity(str(folder)).config_hash)
    return table_of(rows, widths=widths, top_fraction=1.0, model=model, method="likelihood_ratio")


def program_of(
    folder: Path, rules: Sequence[Mapping[str, Any]], table: RangeTable | None = None, **options: Any
) -> Program:
    return Program.compile(table or table_for(folder, **options), rules)


@lru_cache(maxsize=4)
def loaded_of(folder: Path) -> LoadedModel:
    return load_model(str(folder), dtype="float32")


def alone(
    folder: Path, prompt_ids: Sequence[int], max_tokens: int, rules: Sequence[Mapping[str, Any]] | None,
    table: RangeTable | None = None,
) -> tuple[list[int], int, int]:  # fmt: skip
    """The greedy tokens of the bare transformers model, with the count of tested and changed values."""
    from neuronlens import intervene

    if rules is None:
        return tiny_engine.alone(loaded_of(folder), prompt_ids, max_tokens, None)
    with intervene(loaded_of(folder).module, table or table_for(folder), rules) as applied:
        ids, _, _ = tiny_engine.alone(loaded_of(folder), prompt_ids, max_tokens, None)
    return ids, applied.tested, applied.changed


def alone_in_phases(
    folder: Path, prompt_ids: Sequence[int], max_tokens: int, rules: Sequence[Mapping[str, Any]], phases: Sequence[str]
) -> tuple[list[int], int, int]:
    """As `alone`, step by step, with the rules in these phases only: the pass over the prompt, and all that follow."""
    import torch

    from neuronlens import intervene

    module: Any = loaded_of(folder).module
    ids: list[int] = []
    tested = changed = 0
    cache, step = None, torch.tensor([list(prompt_ids)])
    while len(ids) < max_tokens and (not ids or ids[-1] != EOS):
        is_steered = ("generation" if ids else "prompt") in phases
        with (
            intervene(module, table_for(folder), rules) if is_steered else contextlib.nullcontext() as applied,
            torch.inference_mode(),
        ):
            out = module(step, past_key_values=cache, use_cache=True)
        if applied is not None:
            tested, changed = tested + applied.tested, changed + applied.changed
        cache, ids = out.past_key_values, [*ids, int(out.logits[0, -1].argmax())]
        step = torch.tensor([ids[-1:]])
    return ids, tested, changed


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM's LLM with our worker, in this process, until the context closes."""
    mend_llvmlite()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    ours = {"v2_model_runner": os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1", **options.pop("neuronlens", {})}
    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": BLOCK,
        "worker_cls": "neuronlens.vllm.Worker",
        "additional_config": {"neuronlens": {"hook_points": ["mlp_post", "resid_post"], **ours}},
        "kv_cache_memory_bytes": 1 << 26,
        "max_num_seqs": 8,
        "disable_log_stats": True,
        "seed": 0,
    }
    llm = LLM(model=str(folder), **{**given, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
