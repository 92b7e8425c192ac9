"""Models behind one face: load, run the trunk over a batch of tokens, and read logits only where they are wanted.

    loaded = load_model("path/or/hub-id")
    with torch.inference_mode():
        hidden_BTD = loaded.hidden(batch)
        logits_BV = loaded.logits(hidden_BTD[torch.arange(len(hidden_BTD)), batch.last_B])

A text gets the same values whatever stands beside it in the batch and on whichever side it is padded: positions are
counted from the mask, and pads are masked, or stand after the text where a causal model cannot see them.
"""

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from neuronlens.batches import TokenBatch
from neuronlens.errors import UsageError
from neuronlens.hookpoints import RULES, config_of, trunk_of
from neuronlens.identity import (
    ModelIdentity,
    first_line,
    model_identity,
    read_config,
    resolve_folder,
    tokenizer_hash,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["LoadedModel", "ModelIdentity", "load_model", "model_identity", "tokenizer_hash"]

Kind = Literal["decoder", "classifier", "encoder"]

LOGITS_AT_ONCE = 1 << 24
"""Logits held at a time: the LM head runs over slices of tokens, so that memory does not grow with the vocabulary."""

_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNLIMITED = 1 << 20
_TANH_GELUS = frozenset({"NewGELUActivation", "FastGELUActivation"})
"""Classes of transformers that compute the tanh form of GELU from elementary operations: a fifth of GPT-2's time."""
_ENCODER_TYPES = frozenset({"bert", "distilbert", "roberta", "xlm-roberta", "camembert"})
_POSITIONS_AFTER_PAD = frozenset({"roberta", "xlm-roberta", "camembert"})
"""Types whose position ids start after the pad's id: RoBERTa's first token stands at position pad_token_id + 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in eval mode without gradients, and its fast tokenizer.

    kind: "decoder" (has next-token logits), "classifier" (has class logits), "encoder" (statistics only). window: the
    most tokens that a text may have. pad_id: the id to pad with; it may stand in texts too, since masks decide.
    """

    module: nn.Module
    tokenizer: "PreTrainedTokenizerFast"
    kind: Kind
    device: torch.device
    dtype: torch.dtype
    window: int
    pad_id: int
    _causal: bool = field(init=False)

    def __post_init__(self) -> None:
        trunk = trunk_of(self.module)
        object.__setattr__(self, "_causal", _is_causal(trunk))
        if hasattr(trunk, "warn_if_padding_and_no_attention_mask"):
            # It would warn of pads that a causal model cannot see, and wait for the device on every batch to find them.
            object.__setattr__(trunk, "warn_if_padding_and_no_attention_mask", _no_warning)

    @classmethod
    def of(cls, module: nn.Module, tokenizer: "PreTrainedTokenizerFast") -> "LoadedModel":
        """A model that is in memory already; it is put in eval mode, its parameters stop asking for gradients.

        Activations that transformers writes out in eight steps become torch's one kernel of the same function.
        """
        module.eval().requires_grad_(False)
        _fuse_activations(module)
        first = next(module.parameters())
        n_rows = cast(Any, module).get_input_embeddings().weight.shape[0]
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        return cls(
            module=module,
            tokenizer=tokenizer,
            kind=_kind_of(module),
            device=first.device,
            dtype=first.dtype,
            window=_window(module, tokenizer),
            pad_id=next((pad_id for pad_id in pads if pad_id is not None and pad_id < n_rows), 0),
        )

    @property
    def label_ids(self) -> dict[str, int]:
        """The classifier's labels -> index of their logit."""
        return dict(cast(Any, self.module).config.label2id)

    @property
    def head_reads_first(self) -> bool:
        """True for an encoder's classifier: its head reads the first column, which must not be a pad. A decoder's, of
        whatever kind, reads each text's last token."""
        return self.kind == "classifier" and not hasattr(self.module, "score")

    def hidden(self, batch: TokenBatch) -> Tensor:
        """The trunk's output after the final norm, [B, T, d_model], in the model's dtype; rows of pads mean nothing.

        No LM head and no cache. The batch must be on the model's device. Hooks see the forward pass as usual.
        """
        trunk = trunk_of(self.module)
        return trunk(**self._inputs(batch, trunk))[0]

    def hidden_after(self, ids_BT: Tensor, positions_BT: Tensor, masks: Any, cache: Any) -> Tensor:
        """As `hidden`, for tokens that follow those in `cache` (a transformers Cache, which takes them up).

        positions_BT counts from 0 in each text. masks is additive [B, 1, T, tokens in the cache], 0 where a token is
        seen; for models whose layers differ, a dict of them by layer type.
        """
        trunk = trunk_of(self.module)
        first = _first_position(config_of(self.module), causal=self._causal) or 0
        return trunk(
            input_ids=ids_BT,
            position_ids=positions_BT + first,
            attention_mask=masks,
            past_key_values=cache,
            use_cache=True,
        )[0]

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """Next-token logits [X, vocabulary] of chosen rows of `hidden`, exactly as the whole model gives them."""
        if self.kind != "decoder":
            raise UsageError(f"{type(self.module).__name__} is no decoder: it has no next-token logits.")
        return _lm_head(self.module, hidden_XD)

    def class_logits(self, batch: TokenBatch) -> Tensor:
        """A classifier's logits, [B, number of labels]."""
        if self.kind != "classifier":
            raise UsageError(f"{type(self.module).__name__} is no classifier: it has no class logits.")
        if not self.head_reads_first:
            # transformers looks for the last token by the pad's id, we have the mask.
            hidden_BTD = self.hidden(batch)
            rows_B = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
            return self.module.get_submodule("score")(hidden_BTD[rows_B, batch.last_B])
        return self.module(**self._inputs(batch.left_aligned(), self.module)).logits

    def _inputs(self, batch: TokenBatch, runs: nn.Module) -> dict[str, Any]:
        accepted = _arguments(type(runs).forward)
        inputs: dict[str, Any] = {"input_ids": batch.ids_BT}
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        if self._causal and batch.is_left_aligned:
            return inputs
        inputs["attention_mask"] = batch.mask_BT.long()
        first = _first_position(config_of(self.module), causal=self._causal)
        if first is not None and "position_ids" in accepted:
            inputs["position_ids"] = batch.positions_BT + first
        return inputs


def load_model(
    id: str, *, revision: str | None = None, dtype: str = "auto", device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load a local folder or a hub model with its tokenizer.

    dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16"; on a CPU, float16 becomes float32, and a
    warning says so. On the device "meta" the model has its structure but no weights, and nothing heavy is read; what
    the weights alone can tell (a head that is not there or not plain) is then taken on trust.

    Raises UsageError: nothing found under that id, no tokenizer, an architecture that transformers does not know, an
    encoder-decoder, weights that lack the head named in config.json, no such device.
    """
    where = _device(device)
    chosen = _dtype(dtype)
    folder = resolve_folder(id, revision)
    stated = read_config(folder)
    weight_files(folder)
    with quiet_transformers():
        config = _config(id, folder, stated)
        tokenizer = _tokenizer(id, folder)
        module = _skeleton(config, chosen) if where.type == "meta" else _weights(id, folder, config, chosen)
    if where.type == "cpu" and module.dtype == torch.float16:
        _log.warning("%s: float16 is slow on a CPU and overflows at 65,504; computing in float32.", id)
        module = module.float()
    _check_vocabulary(id, module, tokenizer)
    return LoadedModel.of(module.to(where), tokenizer)


def _check_vocabulary(id: str, module: Any, tokenizer: Any) -> None:
    """Every ordinary token needs a row of the embedding; special ones may have none: transformers adds some itself."""
    n_rows = module.get_input_embeddings().weight.shape[0]
    n_tokens = 1 + max(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    if n_tokens > n_rows:
        raise UsageError(
            f"{id}: the tokenizer knows {n_tokens} tokens, the model {n_rows}. They do not belong together: "
            "save the model after resize_token_embeddings, or put its own tokenizer beside it."
        )


def _fuse_activations(module: nn.Module) -> None:
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child).__name__ in _TANH_GELUS:
                setattr(parent, name, nn.GELU(approximate="tanh"))


def _device(device: str | torch.device) -> torch.device:
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"{device!r} is not a device. Give cpu, cuda or cuda:0.") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"The device is {device}, but torch sees no GPU here. Use cpu, or mend the driver (nvidia-smi)."
        )
    return where


def _dtype(name: str) -> torch.dtype | Literal["auto"]:
    if name == "auto":
        return "auto"
    if name not in _DTYPES:
        raise UsageError(f"model.dtype is {name!r}; expected auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _config(id: str, folder: Path, stated: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # a ValueError, KeyError, OSError or huggingface_hub's own validation errors
        raise UsageError(
            f"{id}: transformers cannot read a config of type {stated.get('model_type')!r} ({first_line(error)}). "
            f"Mend its config.json, or give a model of a type that is known: {', '.join(RULES)}."
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{id} is an encoder-decoder ({config.model_type}). Give a decoder or an encoder.")
    return config


def _tokenizer(id: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UsageError(
            f"{id}: its tokenizer cannot be loaded ({first_line(error)}). "
            "Save one beside the model: tokenizer.save_pretrained(folder)."
        ) from error
    if not tokenizer.is_fast:
        raise UsageError(f"{id}: {type(tokenizer).__name__} is not a fast tokenizer. Save one with a tokenizer.json.")
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        # Where no vocabulary is saved, transformers makes up a tokenizer that reads every text as empty.
        raise UsageError(
            f"{id}: there is no tokenizer's vocabulary beside the model. "
            "Save one there: tokenizer.save_pretrained(folder)."
        )
    return tokenizer


def _weights(id: str, folder: Path, config: Any, dtype: torch.dtype | Literal["auto"]) -> Any:
    auto_class = _auto_class(config)
    try:
        module, info = auto_class.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"{id}: the weights cannot be loaded ({first_line(error)}). Save or download the model again."
        ) from error
    is_trunk = auto_class.__name__ == "AutoModel"
    missing = sorted(key for key in info["missing_keys"] if not (is_trunk and "pooler" in key))
    if missing:
        raise UsageError(
            f"{id}: the weights lack {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}, which a "
            f"{type(module).__name__} needs: it would run on random numbers. Save the model again with its head, "
            "or name in config.json's architectures the class that was saved."
        )
    return module


def import_for_generation() -> None:
    """Import what loading a decoder imports of transformers, but scikit-learn and scipy: where they are installed,
    transformers takes 3 s of a core for them, because of one option of assisted generation and of a loss. For
    processes that are ours alone: transformers takes both for missing from then on. We may still import them."""
    hidden = [name for name in ("scipy", "sklearn") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden, cast(Any, None)))
    try:
        import transformers.generation.candidate_generator
        import transformers.modeling_utils  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]


def _skeleton(config: Any, dtype: torch.dtype | Literal["auto"]) -> Any:
    """The module without memory for its weights: shapes and names only."""
    wanted = getattr(config, "dtype", None) if dtype == "auto" else dtype
    with torch.device("meta"):
        return _auto_class(config).from_config(config, dtype=wanted or torch.float32)


def _auto_class(config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    named = (config.architectures or [None])[0]
    if named is not None and named.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if named == CAUSAL.get(config.model_type) or (named is None and config.model_type not in _ENCODER_TYPES):
        return AutoModelForCausalLM if config.model_type in CAUSAL else AutoModel
    return AutoModel


def _kind_of(module: nn.Module) -> Kind:
    if type(module).__name__.endswith("ForSequenceClassification"):
        return "classifier"
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if head is None or not _is_causal(trunk_of(module)):
        return "encoder"
    tested = cast(Any, module).config.model_type in RULES.keys() - _ENCODER_TYPES
    if tested or _head_is_plain(module):
        return "decoder"
    _log.warning(
        "%s does more after its last layer than a projection: its next-token logits are not read, only its statistics.",
        type(module).__name__,
    )
    return "encoder"


def _is_causal(trunk: nn.Module) -> bool:
    """True where every attention in the trunk says that no token sees a later one."""
    flags = [part.is_causal for part in trunk.modules() if isinstance(getattr(part, "is_causal", None), bool)]
    return bool(flags) and all(flags)


def _lm_head(module: Any, hidden_XD: Tensor) -> Tensor:
    logits_XV = module.get_output_embeddings()(hidden_XD)
    cap = getattr(config_of(module), "final_logit_softcapping", None)
    return logits_XV if cap is None else torch.tanh(logits_XV / cap) * cap


@torch.inference_mode()
def _head_is_plain(module: nn.Module) -> bool:
    """Does `_lm_head` give the whole model's logits? Asked of architectures for which no test of ours answers."""
    if next(module.parameters()).is_meta:
        return True
    ids_BT = torch.arange(3, device=next(module.parameters()).device)[None]
    whole = module(input_ids=ids_BT).logits
    return torch.allclose(_lm_head(module, trunk_of(module)(input_ids=ids_BT)[0]), whole, rtol=1e-3, atol=1e-3)


def _first_position(config: Any, *, causal: bool) -> int | None:
    """The position id of a text's first token; None where we do not know that, and leave it to the model."""
    if config.model_type in _POSITIONS_AFTER_PAD:
        return config.pad_token_id + 1
    return 0 if causal or config.model_type in _ENCODER_TYPES else None


def _window(module: nn.Module, tokenizer: Any) -> int:
    config = config_of(module)
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    if limits[0] is not None and config.model_type in _POSITIONS_AFTER_PAD:
        limits[0] -= config.pad_token_id + 1
    return min([int(limit) for limit in limits if limit is not None] + [_UNLIMITED])


@lru_cache(maxsize=64)
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _no_warning(*_: Any) -> None:
    return None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no reports of unused weights: what matters in them, we say ourselves."""
    from transformers.utils import logging as theirs

    verbosity, had_bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if had_bars:
            theirs.enable_progress_bar()
