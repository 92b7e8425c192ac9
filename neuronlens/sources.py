"""Labelled texts from where people keep them: CSV, JSONL, Parquet, a folder of them, or a Hugging Face dataset id."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuronlens.errors import UsageError

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """One text under one concept; `row` is its number in the source, from 0."""

    row: int
    text: str
    concept: str


def load_labelled(
    source: str, *, split: str, text: str, concept: str, max_per_concept: int | None = None
) -> list[LabelledText]:
    """The rows of a source, in its order. Integer class labels become their names.

    Raises UsageError for a source, split or column that does not exist, an empty text or a label that is null.
    `max_per_concept` keeps the first rows of each concept.
    """
    dataset = _load(source, split)
    for role, column in (("text", text), ("concept", concept)):
        if column not in dataset.column_names:
            raise UsageError(
                f"data.{role} names the column {column!r}, which {source} does not have. "
                f"It has: {', '.join(dataset.column_names)}. Set data.{role} to one of them."
            )
    texts, labels = list(dataset[text]), _label_names(dataset, concept)
    _check(source, text, texts, concept, labels)
    seen: Counter[str] = Counter()
    rows = []
    for row, (content, label) in enumerate(zip(texts, labels, strict=True)):
        seen[label] += 1
        if max_per_concept is None or seen[label] <= max_per_concept:
            rows.append(LabelledText(row=row, text=content, concept=label))
    return rows


def load_texts(source: str, *, split: str, text: str, at_most: int) -> list[str]:
    """The first so many texts of a source that need no label, blank ones passed over.

    text: the column; where the source has no such column, `text`. Raises UsageError as `load_labelled` does.
    """
    dataset = _load(source, split)
    column = next((name for name in (text, "text") if name in dataset.column_names), None)
    if column is None:
        raise UsageError(
            f"{source} has no column {text!r} and none called 'text'. It has: {', '.join(dataset.column_names)}. "
            "Rename the one that holds the texts to 'text'."
        )
    texts: list[str] = []
    for content in dataset[column]:
        if isinstance(content, str) and content.strip():
            texts.append(content)
        if len(texts) == at_most:
            break
    if not texts:
        raise UsageError(f"{source} has no text in its column {column!r}. Expected a row a text.")
    return texts


def _load(source: str, split: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    path = Path(source)
    if path.is_file() and path.suffix.lower() not in _READERS:
        raise UsageError(f"{source} ends in {path.suffix!r}; expected a file ending in one of {', '.join(_READERS)}.")
    if not path.exists() and (path.suffix.lower() in _READERS or path.is_absolute() or source.startswith(".")):
        raise UsageError(f"There is no file or folder {source}. Check data.source; paths are relative to the recipe.")
    try:
        if path.is_file():
            return datasets.load_dataset(_READERS[path.suffix.lower()], data_files=str(path), split="train")
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # datasets raises many kinds for the same few mistakes
        reason = " ".join(str(error).split()) or type(error).__name__
        place = "the folder" if path.is_dir() else "the file" if path.is_file() else "the Hugging Face dataset"
        raise UsageError(
            f"{place} {source} (split {split!r}) cannot be read: {reason[:300]}. Expected CSV, JSONL or Parquet rows, "
            "or a dataset id and a network that reaches its hub."
        ) from error


def _label_names(dataset: Any, concept: str) -> list[Any]:
    feature, labels = dataset.features[concept], list(dataset[concept])
    names = getattr(feature, "names", None)
    if names is None:
        return labels
    return [None if label is None or label < 0 else names[label] for label in labels]


def _check(source: str, text: str, texts: list[Any], concept: str, labels: list[Any]) -> None:
    if not texts:
        raise UsageError(f"{source} has no rows. Expected a row a text, with the columns {text} and {concept}.")
    unlabelled = [row for row, label in enumerate(labels) if label is None]
    if unlabelled:
        raise UsageError(
            f"{source}: {concept} is null in {_rows(unlabelled, len(labels))}. Every text needs one concept; label "
            "or drop them."
        )
    unfit = next((label for label in labels if isinstance(label, list | dict | float)), None)
    if unfit is not None:
        raise UsageError(
            f"{source}: {concept} holds {unfit!r}, a {type(unfit).__name__}; expected one name or whole number a row. "
            "Repeat a text on one row per concept if it has several."
        )
    unread = [row for row, content in enumerate(texts) if not isinstance(content, str) or not content.strip()]
    if unread:
        raise UsageError(
            f"{source}: {text} is empty or not a string in {_rows(unread, len(texts))}. Mend or drop them."
        )
    labels[:] = [str(label) for label in labels]


def _rows(rows: list[int], n_total: int) -> str:
    shown = ", ".join(str(row) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
    return f"{len(rows)} of {n_total:,} rows (row {shown}, counted from 0)"
