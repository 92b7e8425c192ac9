"""Tiny, randomly initialised models of every architecture in the table of hook points, with a tokenizer, for tests.

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    save_tiny(tmp_path / "m", "gpt2")                      # a folder that load_model and transformers can load

All have 2 layers, d_model 16, d_mlp 40 and 64 positions. Every parameter is drawn at random, norms and biases too, so
that a test which skips a norm or a bias fails.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

Head = Literal["lm", "classifier", "none"]

N_LAYERS = 2
D_MODEL = 16
D_MLP = 40
WINDOW = 64
LABELS = ("joy", "anger", "fear")
SPECIALS = ("<pad>", "<eos>", "<sep>", *(f"<{label}>" for label in LABELS))

SENTENCES = (
    "i feel so happy today that i could sing in the rain",
    "the children laughed and the sun was warm on the river",
    "he slammed the door and shouted at the driver",
    "i hate the way that they lied to me about the money",
    "she was afraid of the dark and of the noise in the cellar",
    "the storm came closer and my hands would not stop shaking",
)

_GATED = {
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": WINDOW,
}
_DENSE = {
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": WINDOW,
}
_GEMMA = {**_GATED, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, "sliding_window": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": D_MODEL, "n_inner": D_MLP, "n_layer": N_LAYERS, "n_head": 2, "n_positions": WINDOW},
    "llama": _GATED,
    "mistral": {**_GATED, "sliding_window": 8},
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": _DENSE,
    "phi3": _GATED,
    "gpt_neox": _DENSE,
    "opt": {
        "hidden_size": D_MODEL,
        "ffn_dim": D_MLP,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": WINDOW,
        "word_embed_proj_dim": D_MODEL,
    },
    "bert": _DENSE,
    "distilbert": {
        "dim": D_MODEL,
        "hidden_dim": D_MLP,
        "n_layers": N_LAYERS,
        "n_heads": 2,
        "max_position_embeddings": WINDOW,
    },
    "roberta": _DENSE,
}
"""Architecture (the config's model_type) -> the arguments of its config."""

ENCODERS = ("bert", "distilbert", "roberta")
DECODERS = tuple(name for name in CONFIGS if name not in ENCODERS)


def tiny_model(architecture: str, *, seed: int = 0, head: Head = "lm", **config: Any) -> nn.Module:
    """A model in eval mode, float32, on the CPU; the same seed gives the same weights.

    `head` is "lm" (causal or masked), "classifier" (three labels: joy, anger, fear) or "none" (the bare trunk). Further
    arguments go into the config, over the tiny values. An architecture that CONFIGS does not name gets Llama's.
    """
    ids = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    cfg = AutoConfig.for_model(architecture, **{**ids, **labels, **CONFIGS.get(architecture, _GATED), **config})
    model = _auto_class(architecture, head).from_config(cfg)
    cfg.architectures = [type(model).__name__]
    _randomise(model, seed)
    return model.eval().requires_grad_(False)


def _auto_class(architecture: str, head: Head) -> Any:
    if head == "lm":
        return AutoModelForMaskedLM if architecture in ENCODERS else AutoModelForCausalLM
    return AutoModelForSequenceClassification if head == "classifier" else AutoModel


def _randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.25 * noise)


@lru_cache(maxsize=1)
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: <pad> 0, <eos> 1, <sep> 2, then the answers <joy> 3, <anger> 4 and <fear> 5."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        pad_token="<pad>",
        eos_token="<eos>",
        sep_token="<sep>",
        model_max_length=WINDOW,
    )


def save_tiny(path: Path | str, architecture: str, *, seed: int = 0, head: Head = "lm", **config: Any) -> Path:
    """Write the model and the tokenizer to the folder `path`, as `from_pretrained` reads them; returns the folder."""
    folder = Path(path)
    tiny_model(architecture, seed=seed, head=head, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
