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
from neuronlens.recipe_files import beside, read_recipe

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
RANGE_OPTIONS = {"mass": ("hpd", 0.9), "penalty": ("likelihood_ratio", 3.0), "budget": ("budget", 0.1)}
"""Key of `ranges` -> the one method that it belongs to, and what it is there by default."""
CHOOSY_METHODS = ("likelihood_ratio", "budget", "posterior")
"""These leave neurons out by themselves, so that all of them are salient by default."""
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


class GenerationSection(_Section):
    """Continuations of prompts, scored for their concept by a classifier."""

    classifier: str
    """A local folder or a hub id of a sequence classifier."""
    revision: str | None = None
    prompts: str | None = None
    """A source of texts whose first tokens are continued; by default the test texts."""
    n_tokens: int = Field(default=32, ge=1)
    n_prompts: int | None = Field(default=None, ge=1)
    prompt_tokens: int = Field(default=8, ge=1)
    """So many first tokens of a text are the prompt."""
    labels: dict[str, str] | None = None
    """Concept -> the classifier's label for it; by default they have the same names."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time."""
    seed: int = Field(default=0, ge=0)


class TestSection(_Section):
    source: str
    split: str = "test"
    max_per_concept: int | None = Field(default=None, ge=1)
    action: Literal["zero", "mean", "others"] = "zero"
    """What the evaluation at the end of a run puts in place of values inside a range."""
    off_task: str | None = None
    """A source of unlabelled text, on which perplexity and KL divergence are measured."""
    off_task_texts: int = Field(default=200, ge=1)
    """At most so many of them."""
    multiple_choice: str | None = None
    """A local JSONL file of questions with choices."""
    generation: GenerationSection | None = None


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
    method: Literal["paper", "hpd", "likelihood_ratio", "budget", "posterior"] = "paper"
    tau: float = Field(default=2.5, gt=0)
    """Method paper: half of a range's width, in standard deviations."""
    mass: float | None = Field(default=None, gt=0, le=1)
    penalty: float | None = Field(default=None, gt=0)
    budget: float | None = Field(default=None, gt=0, le=1)
    top_fraction: float = Field(default=0.3, gt=0, le=1)
    salience: Literal[SALIENCE_METHODS] = "mean_abs"  # type: ignore[valid-type]

    @property
    def options(self) -> dict[str, float]:
        """The method's own number, by its name; none for paper and posterior."""
        owned = {option: default for option, (method, default) in RANGE_OPTIONS.items() if method == self.method}
        return {option: getattr(self, option) or default for option, default in owned.items()}

    @model_validator(mode="before")
    @classmethod
    def _all_neurons_of_a_choosy_method(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("method") in CHOOSY_METHODS and given.get("top_fraction") is None:
            return {**given, "top_fraction": 1.0}
        return given

    @model_validator(mode="after")
    def _options_of_its_method(self) -> "RangesSection":
        for option, (method, _) in RANGE_OPTIONS.items():
            value = getattr(self, option)
            if value is not None and method != self.method:
                raise ValueError(
                    f"{option} is {value:g}, but it belongs to the method {method}, and the method is {self.method}. "
                    f"Set ranges.method to {method}, or drop ranges.{option}"
                )
        return self


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


class FinetuneSection(_Section):
    """How `python -m jobs.finetune` makes the model that the recipe names: model.id is then the folder it writes."""

    base: str
    """A local folder or a hub id of the model to start from."""
    revision: str | None = None
    epochs: float = Field(default=3, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    learning_rate: float = Field(default=5e-5, gt=0)
    batch_size: int = Field(default=32, ge=1)
    max_tokens: int = Field(default=256, ge=1)
    """Longer prompts lose the end of their text."""
    warmup_fraction: float = Field(default=0.06, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    seed: int = Field(default=0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in; weights are float32. `auto`: bfloat16 where the GPU can, else float32."""


class Recipe(_Section):
    """One run, whole. `preset` fills in a procedure under what the recipe says itself: `paper` the authors', `precise`
    the one that we recommend."""

    model: ModelSection
    data: DataSection
    test: TestSection | None = None
    collect: CollectSection = CollectSection()
    ranges: RangesSection = RangesSection()
    overlap: OverlapSection = OverlapSection()
    compute: ComputeSection = ComputeSection()
    finetune: FinetuneSection | None = None
    preset: Literal["paper", "precise"] | None = None

    @model_validator(mode="after")
    def _table_has_what_the_action_takes(self) -> "Recipe":
        if self.test is not None and self.test.action == "others" and self.ranges.method == "paper":
            raise ValueError(
                "test.action others needs the mean of the other concepts, which tables of method paper lack. Set "
                "ranges.method to likelihood_ratio, or test.action to zero"
            )
        return self


Section = TypeVar("Section", bound=BaseModel)

PRESETS: dict[str, dict[str, Any]] = {
    # Haider et al. 2025 (arXiv 2502.06809), sections 4 and 5: residual stream after the last block, last prompt token.
    "paper": {
        "collect": {"hook_points": ["resid_post"], "layers": [-1], "unit": "last_token"},
        "ranges": {"method": "paper", "tau": 2.5, "top_fraction": 0.3, "salience": "mean_abs"},
        "test": {"action": "zero"},
    },
    # What erased most for the least in docs/results.md.
    "precise": {
        "collect": {"hook_points": ["resid_post"], "layers": [-1], "unit": "last_token"},
        "ranges": {"method": "likelihood_ratio", "salience": "mean_abs"},
        "test": {"action": "others"},
    },
}


def load_recipe(path: str | Path, changes: Sequence[str] | None = None) -> Recipe:
    """Read a recipe file; `changes` are 'section.key=value' strings whose values are read as YAML.

    Relative paths of models and data that exist beside the recipe file are taken from there; those in a file that it
    extends, from beside that file. The folder of a model that is fine-tuned need not exist yet: it lies under the
    working directory then.
    """
    file = Path(path)
    content = beside(with_changes(read_recipe(file), changes), file.parent)
    return _with_folder(parse_recipe(content, origin=str(file)))


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
        faults = [_sentence(fault, model) for fault in _most_specific(error.errors())]
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
        if isinstance(own, dict) and (own or section != "test"):  # a recipe without a test gets none
            merged[section] = {**values, **own}
    return merged


def _with_folder(recipe: Recipe) -> Recipe:
    """A model that is fine-tuned is never a hub id: a name that is not taken here could be somebody else's there."""
    if recipe.finetune is None:
        return recipe
    folder = Path(recipe.model.id).expanduser().resolve()
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"id": str(folder)})})


def _most_specific(faults: list[Any]) -> list[Any]:
    """Of a union's faults (auto | number), one for each key."""
    by_key: dict[tuple[Any, ...], Any] = {}
    for fault in faults:
        key = tuple(
            part for part in fault["loc"] if not str(part).startswith(("literal[", "constrained-", "function-"))
        )
        by_key.setdefault(key[:2] if fault["type"] != "extra_forbidden" else key, fault)
    return list(by_key.values())


def _sentence(fault: Any, root: type[BaseModel]) -> str:
    parts = [str(part) for part in fault["loc"] if not str(part).startswith(("literal[", "constrained-", "function-"))]
    whole = "a recipe" if root is Recipe else root.__name__.removesuffix("Section")
    key, owner = ".".join(parts), ".".join(parts[:-1]) or whole
    if parts == ["extends"]:
        return "extends can only stand in a recipe's file: the files that it names are read with it."
    if fault["type"] == "extra_forbidden":
        known = _known_keys(root, parts[:-1])
        close = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        return f"{key} does not exist. {hint}The keys of {owner} are {', '.join(known)}."
    if fault["type"] == "missing":
        return f"{key} is missing. Add it: {owner} needs {' and '.join(_needed(root, parts[:-1]))}."
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{key}: {message}." if key else f"{message}."
    return f"{key} is {fault['input']!r}: {message[0].lower() + message[1:]}."


def _known_keys(root: type[BaseModel], path: list[str]) -> list[str]:
    return list(getattr(_section_at(root, path), "model_fields", {}))


def _needed(root: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that a section cannot do without."""
    fields = getattr(_section_at(root, path), "model_fields", {})
    return [key for key, field in fields.items() if field.is_required()]


def _section_at(root: type[BaseModel], path: list[str]) -> Any:
    """The section at a path of keys; None where there is none."""
    model: Any = root
    for part in path:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return None
    return model
