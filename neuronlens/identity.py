"""Which model was this? The folder behind a model id, and cheap hashes of its config, its weights and its tokenizer.

Nothing here loads weights: the fingerprint of a 16 GB checkpoint reads about 10 MB of each file.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuronlens.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MB = 1 << 20
_WHOLE_BELOW = 16 * _MB
_EDGE = _MB
_N_CHUNKS = 128
_CHUNK = 64 << 10
_UNSTABLE_KEYS = frozenset({"transformers_version", "_name_or_path"})
"""Keys of config.json that change when a model is saved again or moved, without the model changing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What a store says about its model.

    id is as given; revision is the hub's commit hash, None for a local folder. config_hash and weights_fingerprint are
    hex digests of 16 bytes. architecture is the checkpoint's class, such as GPT2LMHeadModel; dtype is that of the
    stored weights, such as "bfloat16".
    """

    id: str
    revision: str | None
    config_hash: str
    weights_fingerprint: str
    architecture: str
    dtype: str


def model_identity(id: str, revision: str | None = None) -> ModelIdentity:
    """The identity of a local folder or a hub model. Raises UsageError as `resolve_folder` and `read_config` do."""
    folder = resolve_folder(id, revision)
    config = read_config(folder)
    files = weight_files(folder)
    return ModelIdentity(
        id=id,
        revision=None if Path(id).expanduser().is_dir() else folder.name,
        config_hash=_digest([json.dumps(_stable(config), sort_keys=True).encode()]),
        weights_fingerprint=_digest(piece for file in files for piece in _sampled(file)),
        architecture=(config.get("architectures") or [config.get("model_type", "unknown")])[0],
        dtype=_stored_dtype(config, files[0]),
    )


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hex digest (16 bytes) of what decides the token ids of a text: the fast tokenizer's own JSON and the special ids.

    The padding and truncation that the last caller happened to ask for are part of that JSON, and are left out.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    rest = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    names = (
        "bos_token_id",
        "eos_token_id",
        "unk_token_id",
        "sep_token_id",
        "pad_token_id",
        "cls_token_id",
        "mask_token_id",
    )
    specials = {name: getattr(tokenizer, name, None) for name in names}
    return _digest([json.dumps([rest, specials, sorted(tokenizer.all_special_ids)], sort_keys=True).encode()])


def resolve_folder(id: str, revision: str | None = None) -> Path:
    """The local folder of a model: `id` itself, or the hub's snapshot, downloaded once and then found in the cache.

    Raises UsageError: a revision of a local folder; no such model or revision on the hub; the hub cannot be reached and
    the cache does not hold the model.
    """
    folder = Path(id).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UsageError(
                f"model.revision is {revision!r}, but model.id {id!r} is a local folder, which has none. Drop one."
            )
        return folder
    return _snapshot(id, revision)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises UsageError where it is missing or is not JSON."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{folder} has no config.json; it holds {_listing(folder)}. "
            "Give the folder that save_pretrained wrote, or a Hugging Face hub id."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}. Write the model again with save_pretrained.") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} holds a JSON {type(config).__name__}, where a model's config is an object.")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The weight files, sorted by name: safetensors, else PyTorch's own. Raises UsageError where there are none."""
    # Mistral's releases carry the same weights a second time, in their own layout, as consolidated*.safetensors.
    found = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    found = found or sorted(folder.glob("pytorch_model*.bin"))
    if not found:
        raise UsageError(
            f"{folder} has no weights (*.safetensors or pytorch_model*.bin); it holds {_listing(folder)}. "
            "Write the model again with save_pretrained."
        )
    return found


def first_line(error: Exception) -> str:
    """What another library's error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _snapshot(id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    def fetch(*patterns: str) -> Path:
        ignore = ["*/*", "consolidated*"]
        return Path(snapshot_download(id, revision=revision, allow_patterns=list(patterns), ignore_patterns=ignore))

    try:
        folder = fetch("*.json", "*.txt", "*.model", "*.safetensors")
        if not any(folder.glob("*.safetensors")):
            fetch("pytorch_model*.bin")
    except HFValidationError as error:
        raise UsageError(
            f"model.id {id!r} is not a folder on this machine, and not a hub id either: {error}"
        ) from error
    except GatedRepoError as error:
        raise UsageError(
            f"The hub shows {id!r} only to those it knows: ask for access there, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"model.id {id!r} is neither a folder on this machine nor a model that the Hugging Face hub shows. "
            "Check the spelling; for a private model, `hf auth login` first."
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(
            f"The hub's {id!r} has no revision {revision!r}. Give a branch, a tag or a commit hash."
        ) from error
    except Exception as error:  # the hub's client lets errors of its HTTP library through, whatever that is at the time
        raise UsageError(
            f"model.id {id!r} is not a folder on this machine, is not in the Hugging Face cache, and the hub cannot be "
            f"reached ({first_line(error)}). Give a local folder, or run `hf download {id}` where there is a network."
        ) from error
    return folder


def _stable(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _stable(value) for key, value in config.items() if key not in _UNSTABLE_KEYS}
    return config


def _sampled(file: Path) -> Iterator[bytes]:
    """The file's name and size, then all of it if it is small, else its ends and chunks at even distances."""
    size = file.stat().st_size
    yield f"{file.name}\0{size}\0".encode()
    with file.open("rb") as stream:
        if size <= _WHOLE_BELOW:
            yield stream.read()
            return
        yield stream.read(_EDGE)
        for i in range(_N_CHUNKS):
            stream.seek(_EDGE + (size - 2 * _EDGE - _CHUNK) * i // (_N_CHUNKS - 1))
            yield stream.read(_CHUNK)
        stream.seek(size - _EDGE)
        yield stream.read()


def _stored_dtype(config: dict[str, Any], first_file: Path) -> str:
    """The config's word for it, else that of the first tensor; old configs name none."""
    named = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if isinstance(named, str):
        return named.removeprefix("torch.")
    if first_file.suffix == ".safetensors":
        from safetensors import safe_open

        names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        with safe_open(first_file, framework="pt") as tensors:
            dtypes = [tensors.get_slice(key).get_dtype() for key in tensors.keys()]  # noqa: SIM118 (it is not a dict)
        return next((names[dtype] for dtype in dtypes if dtype in names), "float32")
    return "float32"


def _digest(pieces: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
