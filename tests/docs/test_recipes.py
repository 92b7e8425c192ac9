"""docs/recipes.md names every key of a recipe, with the default that it has."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from neuronlens.recipe import GenerationSection, Recipe, parse_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
SMALLEST = {
    "model": {"id": "m"},
    "data": {"source": "d"},
    "test": {"source": "t", "generation": {"classifier": "c"}},
    "finetune": {"base": "b"},
}


def section_class(name: str) -> type[BaseModel]:
    annotation = Recipe.model_fields[name].annotation
    return next(each for each in (annotation, *getattr(annotation, "__args__", ())) if isinstance(each, type))


SECTIONS = {name: section_class(name) for name in Recipe.model_fields if name != "preset"}
SECTIONS["test.generation"] = GenerationSection


def rows_of(section: str) -> dict[str, str]:
    """key -> what the page says of its default."""
    [part] = re.findall(rf"^##+ {re.escape(section)}\n(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    return dict(re.findall(r"^\| `(\w+)`(?: •)? \| `?(.*?)`? \|", part, flags=re.MULTILINE))


def value_in(recipe: Recipe, section: str, key: str):
    content = recipe.model_dump()
    for name in (*section.split("."), key):
        content = content[name]
    return content


@pytest.mark.parametrize("section", SECTIONS)
def test_page__names_every_key_with_its_default(section):
    documented, fields = rows_of(section), SECTIONS[section].model_fields
    assert set(documented) == set(fields)
    plain = parse_recipe({**SMALLEST, "test": {"source": "t"}} if section == "test" else SMALLEST)
    for key, default in documented.items():
        if fields[key].is_required():
            assert default == "required", key
            continue
        content = yaml.safe_load(yaml.safe_dump(SMALLEST))
        if section == "test":
            del content["test"]["generation"]
        owner = content
        for name in section.split("."):
            owner = owner.setdefault(name, {})
        owner[key] = yaml.safe_load(default)
        assert value_in(parse_recipe(content), section, key) == value_in(plain, section, key), key
