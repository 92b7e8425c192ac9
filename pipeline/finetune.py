"""The model that a recipe names, made from a published one: as the paper does for GPT-2, BERT and DistilBERT.

    python -m jobs.finetune recipe.yaml

A decoder gets a token of its own for every answer and separator that is written <like_this>, and learns to name a
text's concept after the prompt. An encoder gets a head with a class for each concept.
"""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuronlens.batches import batches_by_length, pad
from neuronlens.errors import UsageError
from neuronlens.evaluation import TestText
from neuronlens.identity import model_identity, resolve_folder, tokenizer_hash
from neuronlens.models import LoadedModel, load_model, quiet_transformers
from neuronlens.predictions import AnswerKey, predict
from neuronlens.prompts import encode_prompts
from neuronlens.recipe import FinetuneSection, Recipe
from neuronlens.sources import LabelledText, load_labelled
from neuronlens.store import content_hash
from pipeline.erasure_texts import load_test_texts
from pipeline.plan import TOKENS_PER_BATCH, check_answers, package_versions

if TYPE_CHECKING:
    from pipeline.driver import Reporter
    from pipeline.training import Example

MARKER = "finetune.json"
"""The file in a model's folder that says what it was made from; written last."""

_MARKED = re.compile(r"<[^<>\s]+>")
"""A word that is to be one token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """What came out. The accuracy is that on the recipe's test texts; None where it has none."""

    model: str
    base: str
    n_train: int
    n_test: int
    accuracy: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """Everything that decides the weights. `right` is the token (decoder) or class (classifier) of each concept."""

    asked: FinetuneSection
    base: LoadedModel
    prompt: str
    train: list[LabelledText]
    right: dict[str, int]
    labels: list[str] | None
    """A classifier's classes, in their order; None for a decoder."""

    @property
    def hash(self) -> str:
        base = model_identity(self.asked.base, self.asked.revision)
        settings = self.asked.model_dump(exclude={"base", "revision"})
        texts = [[text.text, text.concept] for text in self.train]
        weights = [base.config_hash, base.weights_fingerprint, tokenizer_hash(self.base.tokenizer)]
        return content_hash([weights, settings, self.prompt, texts, self.right, self.labels])


def finetune(recipe: Recipe, reporter: "Reporter", *, overwrite: bool = False) -> Finetuned:
    """Make the folder that model.id names, unless it was made by the same recipe before, and measure its accuracy.

    The same call goes on where an interrupted one stopped. Raises UsageError before anything heavy: no finetune
    section, texts or answers that do not fit, a folder that holds something else.
    """
    started = time.perf_counter()
    asked, folder = _asked(recipe), Path(recipe.model.id)
    task, test = _prepare(recipe, asked)
    if _is_made(folder, task.hash, overwrite=overwrite):
        reporter.say(f"{folder} was made by this recipe before")
    else:
        with quiet_transformers():
            _make(folder, task, recipe, reporter)
    return Finetuned(
        model=str(folder),
        base=asked.base,
        n_train=len(task.train),
        n_test=len(test),
        accuracy=_accuracy(recipe, test, task.right, reporter) if test else None,
        seconds=round(time.perf_counter() - started, 1),
    )


def _asked(recipe: Recipe) -> FinetuneSection:
    if find_spec("accelerate") is None:
        raise UsageError(
            "Fine-tuning needs transformers' Trainer, and that the package accelerate, which is not installed: "
            "pip install 'neuronlens[finetune]'."
        )
    if recipe.finetune is None:
        raise UsageError(
            "The recipe has no finetune section, so nothing says which model to start from. Add finetune: {base: "
            "hub-id-or-folder}."
        )
    if Path(recipe.finetune.base).expanduser().resolve() == Path(recipe.model.id).resolve():
        raise UsageError(
            f"finetune.base and model.id are both {recipe.model.id}: the model would be written over the one that it "
            "starts from. Give model.id another folder."
        )
    return recipe.finetune


def _prepare(recipe: Recipe, asked: FinetuneSection) -> tuple[_Task, tuple[TestText, ...]]:
    """What to train on and what to test on, checked. Reads the base's structure, not its weights."""
    base = load_model(asked.base, revision=asked.revision, device="meta")
    train = load_labelled(
        recipe.data.source,
        split=recipe.data.split,
        text=recipe.data.text,
        concept=recipe.data.concept,
        max_per_concept=recipe.data.max_per_concept,
    )
    concepts = Counter(text.concept for text in train)
    if len(concepts) < 2:
        raise UsageError(
            f"{recipe.data.source} has one concept, {next(iter(concepts))!r}; a model needs two or more to tell apart."
        )
    labels = None if base.kind == "decoder" else _labels(recipe, concepts)
    right = _answer_tokens(recipe, base, concepts) if labels is None else _classes(concepts)
    test = load_test_texts(recipe, recipe.test, base) if recipe.test is not None else ()
    unknown = sorted({text.concept for text in test} - set(right))
    if unknown:
        raise UsageError(
            f"The test texts have the concept {unknown[0]!r}, which {recipe.data.source} has not. It has: "
            f"{', '.join(sorted(concepts))}. Drop those rows, or train on texts of that concept."
        )
    task = _Task(asked=asked, base=base, prompt=recipe.data.prompt, train=train, right=right, labels=labels)
    return task, test


def _answer_tokens(recipe: Recipe, base: LoadedModel, concepts: Counter[str]) -> dict[str, int]:
    """The token of each concept's answer, once the base's tokenizer has been taught the new ones."""
    if recipe.data.answers is None:
        raise UsageError(
            f"{recipe.finetune and recipe.finetune.base} continues texts, and nothing says with which token it names a "
            f'concept. Add data.answers, an entry for each of {", ".join(sorted(concepts))}, such as "<word>".'
        )
    _add_tokens(base.tokenizer, [word for word in recipe.data.answers.values() if _MARKED.fullmatch(word)])
    _add_tokens(base.tokenizer, _MARKED.findall(recipe.data.prompt))
    return check_answers(base, recipe, concepts)


def _add_tokens(tokenizer: Any, words: Sequence[str]) -> None:
    from tokenizers import AddedToken

    def is_one_token(word: str) -> bool:
        return len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1

    unknown = [word for word in dict.fromkeys(words) if not is_one_token(word)]
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in unknown], special_tokens=True)


def _labels(recipe: Recipe, concepts: Counter[str]) -> list[str]:
    """A classifier's labels in the order of the concepts' names: these names, or what data.answers calls them."""
    answers = recipe.data.answers or {concept: concept for concept in concepts}
    missing = sorted(set(concepts) - set(answers))
    if missing:
        raise UsageError(f"data.answers has no entry for the label {missing[0]!r}. Add it, or drop data.answers.")
    labels = [answers[concept] for concept in sorted(concepts)]
    if len(set(labels)) < len(labels):
        raise UsageError("data.answers gives two concepts the same answer. Give every concept an answer of its own.")
    return labels


def _classes(concepts: Counter[str]) -> dict[str, int]:
    return {concept: index for index, concept in enumerate(sorted(concepts))}


def _is_made(folder: Path, wanted: str, *, overwrite: bool) -> bool:
    """Was this very model made before? Raises UsageError where the folder holds something else that may not go."""
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not held and (folder.is_dir() or not folder.exists()):
        return False
    if "config.json" not in held:
        raise UsageError(
            f"{folder} holds no model, but {', '.join(held[:4]) or 'is a file'}. Give model.id a folder that is new or "
            "empty."
        )
    marker = folder / MARKER
    found = json.loads(marker.read_text(encoding="utf-8")).get("hash") if marker.is_file() else None
    if found != wanted and not overwrite:
        how = "by another recipe, base or data" if found else "by something else"
        raise UsageError(
            f"{folder} holds a model that was made {how}. Give model.id another folder, or add --overwrite to replace "
            "that model."
        )
    return found == wanted


def _make(folder: Path, task: _Task, recipe: Recipe, reporter: "Reporter") -> None:
    """Train in a folder beside, then put the whole model in its place."""
    from transformers import set_seed

    from pipeline.training import train

    workspace = folder.with_name(f"{folder.name}.training-{task.hash[:8]}")
    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{workspace} cannot be made: {error.strerror}. Choose another model.id.") from error
    set_seed(task.asked.seed)
    module = _new_classifier(task, task.labels) if task.labels else _grown_decoder(task)
    loss = train(
        module,
        _examples(task),
        task.asked,
        is_decoder=task.labels is None,
        pad_id=task.base.pad_id,
        workspace=workspace,
        reporter=reporter,
    )
    reporter.say(f"trained on {len(task.train):,} texts, mean loss {loss:.3f}")
    done = workspace / "model"
    module.save_pretrained(done)
    task.base.tokenizer.save_pretrained(done)
    made_of = {
        "hash": task.hash,
        "finetune": task.asked.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "versions": package_versions(),
    }
    (done / MARKER).write_text(json.dumps(made_of, indent=2), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    done.rename(folder)
    shutil.rmtree(workspace)


def _examples(task: _Task) -> list["Example"]:
    from pipeline.training import Example

    is_decoder = task.labels is None
    window = min(task.asked.max_tokens, task.base.window) - is_decoder
    encoded = encode_prompts(task.base.tokenizer, task.prompt, [text.text for text in task.train], window=window)
    return [
        Example(token_ids=prompt.token_ids, right=task.right[text.concept])
        for prompt, text in zip(encoded, task.train, strict=True)
    ]


def _grown_decoder(task: _Task) -> Any:
    """The base with an embedding for each new token: the mean of the old ones, from which none is far."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = resolve_folder(task.asked.base, task.asked.revision)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    n_known, n_tokens = module.get_input_embeddings().weight.shape[0], len(task.base.tokenizer)
    if n_tokens > n_known:
        module.resize_token_embeddings(n_tokens, mean_resizing=False)
        with torch.no_grad():
            for matrix in (module.get_input_embeddings().weight, module.get_output_embeddings().weight):
                matrix[n_known:] = matrix[:n_known].mean(dim=0)
    return module


def _new_classifier(task: _Task, labels: list[str]) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        resolve_folder(task.asked.base, task.asked.revision),
        dtype=torch.float32,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )


def _accuracy(recipe: Recipe, test: Sequence[TestText], right: dict[str, int], reporter: "Reporter") -> float:
    """The share of test texts whose most probable token or class is the right one, read as a run reads it."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(recipe.model.id, dtype=recipe.model.dtype, device=device)
    n_right = 0
    with reporter.stage("test", len(test), "texts") as advance:
        for concept in sorted({text.concept for text in test}):
            key = AnswerKey.of(right, concept)
            rows = sorted((text.token_ids for text in test if text.concept == concept), key=len)
            for batch in batches_by_length([len(row) for row in rows], TOKENS_PER_BATCH[device]):
                found = predict(loaded, pad([rows[i] for i in batch], pad_id=loaded.pad_id), key)
                n_right += int(found.correct_B.sum())
                advance(len(batch))
    return n_right / len(test)
