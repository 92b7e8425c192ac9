"""The recipe: what a person asks of a run, as YAML, checked before anything heavy starts.

Every key has an owner section below; a key that does not exist, or a value that cannot be, is a UsageError that says
which.
"""

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from neuronlens.errors import UsageError

SQL_SALIENCE_METHODS = (
    "mean_abs",
    "mean",
    "probeless",
    "cohens_d",
    "selectivity",
    "f_ratio",
    "mutual_information",
)
"""What sql/salience.sql answers, for every run."""
SALIENCE_METHODS = (*SQL_SALIENCE_METHODS, "probe")
"""`probe` needs raw values, and is fitted when a range table asks for it."""
UNITS = ("last_token", "token", "mean", "cls")

_BYTE_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_bytes(value: Any) -> Any:
    """'2GB' -> 2_000_000_000; numbers pass through."""
    if not isinstance(value, str):
        return value
    text = value.strip().upper().replace("_", "")
    number = text.rstrip("KMGTIB ")
    try:
        return int(float(number) * _BYTE_UNITS[text[len(number) :].strip()])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{value!r} is not a number of bytes; write for example 500MB or 2GB") from error


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
Auto = Literal["auto"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    id: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    backend: Literal["transformers", "vllm"] = "transformers"
    """What the model runs in while texts are collected."""
    modules: dict[str, str] = Field(default_factory=dict)
    """Where the hook points are, for an architecture that we do not know: hook point -> 'module.path.{layer}:input'."""


class DataSection(_Section):
    source: str
    split: str = "train"
    text: str = "text"
    concept: str = "label"
    prompt: str = "{text}"
    answers: dict[str, str] | None = None
    max_per_concept: int | None = Field(default=None, ge=2)
    only_correct: bool = False

    @field_validator("prompt")
    @classmethod
    def _has_text(cls, prompt: str) -> str:
        if prompt.count("{text}") != 1:
            raise ValueError(f"{prompt!r} must contain {{text}} exactly once: that is where each text goes")
        return prompt

    @model_validator(mode="after")
    def _can_tell_correct(self) -> "DataSection":
        if self.only_correct and not self.answers:
            raise ValueError("only_correct needs answers: without them nothing can be correct. Add data.answers")
        return self


class TestSection(_Section):
    source: str
    split: str = "test"
    max_per_concept: int | None = Field(default=None, ge=1)


class RawNeurons(_Section):
    """Raw values of chosen layers and neurons only."""

    layers: Literal["all"] | list[int] = "all"
    neurons: Literal["all"] | list[int] = "all"


class CollectSection(_Section):
    hook_points: list[str] = Field(default=["mlp_post"], min_length=1)
    layers: Literal["all"] | list[int] = "all"
    unit: Literal["last_token", "token", "mean", "cls"] = "last_token"
    histograms: bool = True
    raw: Literal["auto", "all", "none"] | RawNeurons = "auto"
    raw_budget: Bytes = 2 * 10**9
    predictions: Literal["auto", True, False] = "auto"
    """Keep what the model answered to every text; `auto`: where it has answers and its pass reaches the end anyway."""


class RangesSection(_Section):
    tau: float = Field(default=2.5, gt=0)
    top_fraction: float = Field(default=0.3, gt=0, le=1)
    salience: Literal[SALIENCE_METHODS] = "mean_abs"  # type: ignore[valid-type]


class OverlapSection(_Section):
    """Which pairs of concepts of a neuron are kept: 100 concepts make 4,950 of them."""

    keep: Literal["auto", "all", "top", "threshold"] = "auto"
    """`top`: those that overlap most; `threshold`: those that overlap by so much or more; `auto`: all of up to 30
    concepts, else `top`."""
    top: int = Field(default=100, ge=1)
    threshold: float = Field(default=0.5, ge=0, le=1)


class ComputeSection(_Section):
    workers: Auto | Annotated[int, Field(ge=1)] = "auto"
    gpus_per_worker: Auto | Annotated[float, Field(ge=0)] = "auto"
    tensor_parallel: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Backend vllm: the ranks that one model is cut into; `auto`: a rank a GPU of the worker."""
    tokens_per_batch: Auto | Annotated[int, Field(ge=1)] = "auto"
    memory_limit: Annotated[int | None, BeforeValidator(parse_bytes)] = None
    """Bytes that each SQL task may use before it spills to disk; by default a share of what the machine has."""


class Recipe(_Section):
    """One run, whole. `preset: paper` fills in the authors' procedure under what the recipe says itself."""

    model: ModelSection
    data: DataSection
    test: TestSection | None = None
    collect: CollectSection = CollectSection()
    ranges: RangesSection = RangesSection()
    overlap: OverlapSection = OverlapSection()
    compute: ComputeSection = ComputeSection()
    preset: Literal["paper"] | None = None


Section = TypeVar("Section", bound=BaseModel)

PRESETS: dict[str, dict[str, Any]] = {
    # Haider et al. 2025 (arXiv 2502.06809), sections 4 and 5: residual stream after the last block, last prompt token.
    "paper": {
        "collect": {"hook_points": ["resid_post"], "layers": [-1], "unit": "last_token"},
        "ranges": {"tau": 2.5, "top_fraction": 0.3, "salience": "mean_abs"},
    },
}


def load_recipe(path: str | Path, changes: Sequence[str] | None = None) -> Recipe:
    """Read a recipe file; `changes` are 'section.key=value' strings whose values are read as YAML.

    Relative paths of models and data that exist beside the recipe file are taken from there.
    """
    file = Path(path)
    try:
        content = yaml.safe_load(file.read_text())
    except FileNotFoundError as error:
        raise UsageError(
            f"There is no recipe at {file}. Expected a YAML file; see the README for one to copy."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as a recipe: {error}. Expected a YAML text file.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}. Mend that line.") from error
    if not isinstance(content, dict):
        raise UsageError(
            f"{file} holds a {type(content).__name__}, expected sections: model, data, test, collect, ranges."
        )
    return _beside(parse_recipe(with_changes(content, changes), origin=str(file)), file.parent)


def parse_recipe(content: dict[str, Any], *, origin: str = "the recipe") -> Recipe:
    """Check a recipe given as plain data. Raises UsageError, one line a fault."""
    preset = content.get("preset")
    if isinstance(preset, str) and preset in PRESETS:
        content = _under(content, PRESETS[preset])
    return parse_section(Recipe, content, origin=origin)


def parse_section(model: type[Section], content: dict[str, Any], *, origin: str) -> Section:
    """Check plain data as one section, or as a whole recipe. Raises UsageError, one line a fault."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = [_sentence(fault) for fault in _most_specific(error.errors())]
        raise UsageError("\n  ".join([f"{origin}: {faults[0]}", *faults[1:]])) from error


def with_changes(content: dict[str, Any], changes: Sequence[str] | None) -> dict[str, Any]:
    """A recipe's plain data with 'section.key=value' strings applied, the values read as YAML."""
    changed = copy.deepcopy(content)
    for change in changes or []:
        _set(changed, change)
    return changed


def _set(content: dict[str, Any], change: str) -> None:
    key, separator, value = change.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UsageError(f"--set {change!r} is not of the form section.key=value, for example --set ranges.tau=2.0.")
    section = content
    for part in parts[:-1]:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    try:
        section[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(
            f"--set {change!r}: the value is not YAML. Quote it, for example --set 'data.text=\"my text\"'."
        ) from error


def _under(content: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`content` with what it does not say filled in from `defaults`, section by section."""
    merged = dict(content)
    for section, values in defaults.items():
        own = content.get(section) or {}
        if isinstance(own, dict):
            merged[section] = {**values, **own}
    return merged


def _beside(recipe: Recipe, folder: Path) -> Recipe:
    def resolved(name: str) -> str:
        beside = folder / name
        return str(beside.resolve()) if not Path(name).is_absolute() and beside.exists() else name

    model = recipe.model.model_copy(update={"id": resolved(recipe.model.id)})
    data = recipe.data.model_copy(update={"source": resolved(recipe.data.source)})
    test = recipe.test and recipe.test.model_copy(update={"source": resolved(recipe.test.source)})
    return recipe.model_copy(update={"model": model, "data": data, "test": test})


def _most_specific(faults: list[Any]) -> list[Any]:
    """Of a union's faults (auto | number), one for each key."""
    by_key: dict[tuple[Any, ...], Any] = {}
    for fault in faults:
        key = tuple(
            part for part in fault["loc"] if not str(part).startswith(("literal[", "constrained-", "function-"))
        )
        by_key.setdefault(key[:2] if fault["type"] != "extra_forbidden" else key, fault)
    return list(by_key.values())


def _sentence(fault: Any) -> str:
    parts = [str(part) for part in fault["loc"] if not str(part).startswith(("literal[", "constrained-", "function-"))]
    key = ".".join(parts)
    if fault["type"] == "extra_forbidden":
        known = _known_keys(parts[:-1])
        close = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        where = f"{'.'.join(parts[:-1])} has" if parts[:-1] else "A recipe has"
        return f"{key} does not exist. {hint}{where} the keys {', '.join(known)}."
    if fault["type"] == "missing":
        return f"{key} is missing. Add it: a recipe needs model.id and data.source."
    message = str(fault["msg"]).removeprefix("Value error, ")
    return (
        f"{key} is {fault['input']!r}: {message[0].lower() + message[1:]}."
        if fault["type"] != "value_error"
        else f"{key}: {message}."
    )


def _known_keys(path: list[str]) -> list[str]:
    model: Any = Recipe
    for part in path:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
