"""A recipe's file and the files that it extends, as one piece of plain data. Nothing here knows what a recipe may say.

    extends: ../parts/ag_news.yaml                    # or a list; paths are relative to the file that has them

Mappings are merged key by key, at any depth; anything else that is said again replaces what was said before, a list
too, and null takes it away. Later files go over earlier ones, a file over those that it extends.
"""

import copy
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from neuronlens.errors import UsageError

PATHS = (
    ("model", "id"),
    ("finetune", "base"),
    ("data", "source"),
    ("test", "source"),
    ("test", "off_task"),
    ("test", "multiple_choice"),
    ("test", "generation", "classifier"),
    ("test", "generation", "prompts"),
)
"""The keys of a recipe that may name a file or a folder."""


def read_recipe(file: Path) -> dict[str, Any]:
    """The content of a recipe with all that it extends under it; `extends` itself is gone.

    What an extended file names is taken from that file's folder where it lies there; the names of the recipe itself are
    left as they are.

    Raises UsageError, one sentence: a file that does not exist or is not YAML, sections that are none, a cycle.
    """
    *extended, (_, own) = _lineage(file, ())
    return reduce(over, [*(beside(content, path.parent) for path, content in extended), own])


def recipe_files(file: Path) -> list[Path]:
    """The recipe and every file that it extends. Raises UsageError as `read_recipe` does."""
    return [path for path, _ in _lineage(file, ())]


def beside(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`content` with the relative paths that exist in `folder` made absolute."""
    found = copy.deepcopy(content)
    for *sections, key in PATHS:
        section: Any = found
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        named = section.get(key) if isinstance(section, dict) else None
        if isinstance(named, str) and not Path(named).is_absolute() and (folder / named).exists():
            section[key] = str((folder / named).resolve())
    return found


def over(under: Any, upper: Any) -> Any:
    """`upper` merged over `under`: mappings key by key, anything else replaced."""
    if not isinstance(under, dict) or not isinstance(upper, dict):
        return upper
    return under | {key: over(under.get(key), value) for key, value in upper.items()}


def _lineage(file: Path, descendants: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """The files that make up `file` and what each says itself, lowest first, `file` last."""
    here = file.resolve()
    if here in descendants:
        circle = " -> ".join(path.name for path in (*descendants[descendants.index(here) :], here))
        raise UsageError(f"{file} extends itself: {circle}. Take one of them out of extends.")
    content = _read(file, needed_by=descendants[-1] if descendants else None)
    parents = _parents(file, content.pop("extends", None))
    lineages = [_lineage(file.parent / parent, (*descendants, here)) for parent in parents]
    return [*(entry for lineage in lineages for entry in lineage), (file, content)]


def _parents(file: Path, named: Any) -> Sequence[str]:
    parents = [] if named is None else [named] if isinstance(named, str) else named
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UsageError(
            f"{file}: extends is {named!r}, expected a file's name or a list of them, relative to this recipe."
        )
    return parents


def _read(file: Path, needed_by: Path | None) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        mend = (
            "Expected a YAML file; see the README for one to copy."
            if needed_by is None
            else f"{needed_by} extends it. Expected a YAML file there: paths in extends are relative to the recipe."
        )
        raise UsageError(f"There is no recipe at {file}. {mend}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as a recipe: {error}. Expected a YAML text file.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}. Mend that line.") from error
    if not isinstance(content, dict):
        raise UsageError(
            f"{file} holds a {type(content).__name__}, expected sections: model, data, test, collect, ranges."
        )
    return content
