"""What a recipe accepts, and the sentence that a wrong one gets."""

import pytest
import yaml

from neuronlens.errors import UsageError
from neuronlens.recipe import load_recipe, parse_bytes, parse_recipe

MINIMAL = {"model": {"id": "m"}, "data": {"source": "d.jsonl"}}


def faults_of(content: dict) -> str:
    with pytest.raises(UsageError) as caught:
        parse_recipe(content)
    return str(caught.value)


def test_recipe__has_defaults_for_all_but_model_and_data():
    recipe = parse_recipe(MINIMAL)
    assert (recipe.collect.hook_points, recipe.collect.unit, recipe.ranges.tau) == (["mlp_post"], "last_token", 2.5)
    assert recipe.collect.raw_budget == 2_000_000_000


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("ranges", "tua", 2.0, "ranges.tua does not exist. Did you mean tau?"),
        ("ranges", "tau", -1, "ranges.tau is -1: input should be greater than 0"),
        ("ranges", "top_fraction", 1.5, "ranges.top_fraction is 1.5"),
        ("collect", "unit", "word", "collect.unit is 'word'"),
        ("collect", "raw_budget", "2 elephants", "'2 elephants' is not a number of bytes"),
        ("compute", "workers", "many", "compute.workers is 'many'"),
        ("data", "prompt", "no place", "must contain {text} exactly once"),
        ("data", "only_correct", True, "only_correct needs answers"),
        ("model", "backend", "onnx", "model.backend is 'onnx'"),
    ],
)
def test_recipe__says_which_key_is_wrong_and_how(section, key, value, expected):
    content = {**MINIMAL, section: {**MINIMAL.get(section, {}), key: value}}
    assert expected in faults_of(content)


def test_recipe__names_every_fault_at_once():
    message = faults_of({"model": {"id": "m", "dtyp": "auto"}, "data": {}, "rangs": {}})
    for part in ("model.dtyp does not exist. Did you mean dtype?", "data.source is missing", "rangs does not exist"):
        assert part in message


def test_recipe__changes_are_read_as_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    recipe = load_recipe(path, ["ranges.tau=2", "collect.layers=[0, -1]", "test.source=t.jsonl"])
    assert (recipe.ranges.tau, recipe.collect.layers, recipe.test.source) == (2.0, [0, -1], "t.jsonl")
    with pytest.raises(UsageError, match="not of the form"):
        load_recipe(path, ["tau"])


def test_recipe__finds_what_lies_beside_it(tmp_path):
    (tmp_path / "d.jsonl").write_text("{}")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(MINIMAL))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.data.source == str(tmp_path / "d.jsonl")
    assert recipe.model.id == "m"


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_recipe__refuses_a_file_that_is_not_a_recipe(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(UsageError, match="There is no recipe"):
        load_recipe(tmp_path / "absent.yaml")


def test_recipe__preset_paper_fills_in_what_is_not_said():
    recipe = parse_recipe({**MINIMAL, "preset": "paper", "ranges": {"tau": 1.5}})
    assert (recipe.collect.hook_points, recipe.collect.layers) == (["resid_post"], [-1])
    assert (recipe.ranges.tau, recipe.ranges.top_fraction) == (1.5, 0.3)


@pytest.mark.parametrize(("text", "n_bytes"), [("2GB", 2_000_000_000), ("1.5 MiB", 1_572_864), ("7", 7), (12, 12)])
def test_parse_bytes__reads_units(text, n_bytes):
    assert parse_bytes(text) == n_bytes
