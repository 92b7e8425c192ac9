"""What a recipe accepts, and the sentence that a wrong one gets."""

import pytest
import yaml

from neuronlens.errors import UsageError
from neuronlens.recipe import RangesSection, load_recipe, parse_bytes, parse_recipe, parse_section
from neuronlens.recipe_files import recipe_files

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
        ("ranges", "method", "best", "ranges.method is 'best'"),
        ("ranges", "mass", 0.9, "mass is 0.9, but it belongs to the method hpd, and the method is paper"),
        ("ranges", "penalty", 2.0, "penalty is 2, but it belongs to the method likelihood_ratio"),
        ("ranges", "budget", 0.1, "budget is 0.1, but it belongs to the method budget"),
        ("ranges", "budget", 1.5, "ranges.budget is 1.5"),
        ("test", "off_task", "x.jsonl", "test.source is missing. Add it: test needs source."),
        ("finetune", "epochs", 3, "finetune.base is missing. Add it: finetune needs base."),
        ("finetune", "learnin_rate", 3, "finetune.learnin_rate does not exist. Did you mean learning_rate?"),
    ],
)
def test_recipe__says_which_key_is_wrong_and_how(section, key, value, expected):
    content = {**MINIMAL, section: {**MINIMAL.get(section, {}), key: value}}
    assert expected in faults_of(content)


@pytest.mark.parametrize(("method", "option"), [("hpd", "mass"), ("likelihood_ratio", "penalty"), ("budget", "budget")])
def test_recipe__takes_each_option_of_ranges_with_its_method(method, option):
    ranges = {"method": method, option: 0.5}
    assert getattr(parse_recipe({**MINIMAL, "ranges": ranges}).ranges, option) == 0.5
    with pytest.raises(UsageError, match=f"{option} is 0.5, but"):
        parse_section(RangesSection, {**ranges, "method": "paper"}, origin="ranges")


def test_recipe__names_the_keys_of_a_section_within_a_section():
    generation = {"clasifier": "c"}
    message = faults_of({**MINIMAL, "test": {"source": "t", "generation": generation}})
    assert "test.generation.clasifier does not exist. Did you mean classifier?" in message
    assert "test.generation.classifier is missing. Add it: test.generation needs classifier." in message


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


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def test_recipe__finds_what_lies_beside_it(tmp_path):
    for name in ("d.jsonl", "t.jsonl", "web.jsonl", "mc.jsonl", "judge", "starts.jsonl", "base"):
        (tmp_path / name).write_text("{}")
    test = {
        "source": "t.jsonl",
        "off_task": "web.jsonl",
        "multiple_choice": "mc.jsonl",
        "generation": {"classifier": "judge", "prompts": "starts.jsonl"},
    }
    recipe = load_recipe(write(tmp_path / "r.yaml", {**MINIMAL, "test": test}), ["finetune.base=base"])
    assert recipe.test is not None
    assert recipe.test.generation is not None
    assert recipe.finetune is not None
    found = [
        recipe.data.source,
        recipe.test.source,
        recipe.test.off_task,
        recipe.test.multiple_choice,
        recipe.test.generation.classifier,
        recipe.test.generation.prompts,
        recipe.finetune.base,
    ]
    names = ("d.jsonl", "t.jsonl", "web.jsonl", "mc.jsonl", "judge", "starts.jsonl", "base")
    assert found == [str(tmp_path / name) for name in names]
    assert load_recipe(write(tmp_path / "r.yaml", MINIMAL)).model.id == "m"


def test_recipe__puts_a_model_that_is_fine_tuned_beside_it_or_into_the_working_directory(tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    file = write(tmp_path / "r.yaml", {**MINIMAL, "finetune": {"base": "gpt2"}})
    assert load_recipe(file).model.id == str(there / "m")
    (tmp_path / "m").mkdir()
    assert load_recipe(file).model.id == str(tmp_path / "m")


def test_extends__merges_key_by_key_the_recipe_over_the_later_over_the_earlier(tmp_path):
    write(tmp_path / "a.yaml", {"data": {"source": "a", "text": "a", "prompt": "{text} a"}, "ranges": {"tau": 1}})
    write(tmp_path / "b.yaml", {"data": {"text": "b", "prompt": "{text} b"}, "collect": {"layers": [0, 1]}})
    own = {"extends": ["a.yaml", "b.yaml"], "model": {"id": "m"}, "data": {"prompt": "{text} r"}}
    recipe = load_recipe(write(tmp_path / "r.yaml", {**own, "collect": {"layers": [2]}}))
    assert (recipe.data.source, recipe.data.text, recipe.data.prompt) == ("a", "b", "{text} r")
    assert (recipe.ranges.tau, recipe.collect.layers) == (1.0, [2])
    assert "extends" not in recipe.model_dump()


def test_extends__goes_over_several_files_and_takes_paths_from_where_they_stand(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "d.jsonl").write_text("")
    (tmp_path / "t.jsonl").write_text("")
    write(tmp_path / "parts" / "lowest.yaml", {"data": {"source": "d.jsonl"}, "test": {"source": "t.jsonl"}})
    write(tmp_path / "parts" / "middle.yaml", {"extends": "lowest.yaml", "model": {"id": "m"}, "preset": "paper"})
    recipe = load_recipe(write(tmp_path / "r.yaml", {"extends": "parts/middle.yaml"}), ["ranges.tau=1"])
    assert recipe.data.source == str(tmp_path / "parts" / "d.jsonl")
    assert recipe.test is not None
    assert recipe.test.source == str(tmp_path / "t.jsonl"), "not beside the part: left for the recipe's own folder"
    assert (recipe.collect.hook_points, recipe.ranges.tau) == (["resid_post"], 1.0)


def test_extends__takes_away_with_null(tmp_path):
    write(tmp_path / "a.yaml", {**MINIMAL, "test": {"source": "t"}})
    assert load_recipe(write(tmp_path / "r.yaml", {"extends": "a.yaml", "test": None})).test is None


@pytest.mark.parametrize(
    ("extends", "words"),
    [
        ("absent.yaml", r"There is no recipe at .*absent\.yaml\. .*r\.yaml extends it"),
        ("r.yaml", r"r\.yaml extends itself: r\.yaml -> r\.yaml"),
        ("a.yaml", r"r\.yaml extends itself: r\.yaml -> a\.yaml -> r\.yaml"),
        ({"a.yaml": 1}, r"extends is \{'a\.yaml': 1\}, expected a file's name or a list"),
        ("list.yaml", r"list\.yaml holds a list"),
    ],
)
def test_extends__is_refused_in_one_sentence(tmp_path, extends, words):
    write(tmp_path / "a.yaml", {"extends": ["r.yaml"]})
    write(tmp_path / "list.yaml", [1])
    with pytest.raises(UsageError, match=words) as caught:
        load_recipe(write(tmp_path / "r.yaml", {**MINIMAL, "extends": extends}))
    assert "\n" not in str(caught.value)


def test_extends__cannot_come_from_a_change(tmp_path):
    with pytest.raises(UsageError, match="extends can only stand in a recipe's file"):
        load_recipe(write(tmp_path / "r.yaml", MINIMAL), ["extends=a.yaml"])


def test_extends__lets_two_parts_share_a_third(tmp_path):
    write(tmp_path / "shared.yaml", MINIMAL)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.yaml", {"extends": "shared.yaml"})
    file = write(tmp_path / "r.yaml", {"extends": ["a.yaml", "b.yaml"]})
    assert load_recipe(file).model.id == "m"
    assert {path.name for path in recipe_files(file)} == {"r.yaml", "a.yaml", "b.yaml", "shared.yaml"}


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


def test_recipe__preset_precise_needs_no_test_and_gives_way_to_what_is_said():
    recipe = parse_recipe({**MINIMAL, "preset": "precise"})
    assert (recipe.collect.hook_points, recipe.collect.layers, recipe.test) == (["resid_post"], [-1], None)
    assert (recipe.ranges.method, recipe.ranges.options, recipe.ranges.top_fraction) == (
        "likelihood_ratio",
        {"penalty": 3.0},
        1.0,
    )
    with_test = {**MINIMAL, "preset": "precise", "test": {"source": "t"}}
    assert parse_recipe(with_test).test.action == "others"
    with pytest.raises(UsageError, match=r"test\.action others needs the mean .* Set ranges\.method"):
        parse_recipe({**with_test, "ranges": {"method": "paper"}})


@pytest.mark.parametrize("given", [{"method": "budget"}, {"method": "posterior", "top_fraction": None}])
def test_recipe__methods_that_choose_neurons_have_all_of_them(given):
    assert parse_recipe({**MINIMAL, "ranges": given}).ranges.top_fraction == 1.0
    assert parse_recipe({**MINIMAL, "ranges": {**given, "top_fraction": 0.2}}).ranges.top_fraction == 0.2
    assert parse_recipe({**MINIMAL, "ranges": {"method": "hpd"}}).ranges.top_fraction == 0.3


@pytest.mark.parametrize(("text", "n_bytes"), [("2GB", 2_000_000_000), ("1.5 MiB", 1_572_864), ("7", 7), (12, 12)])
def test_parse_bytes__reads_units(text, n_bytes):
    assert parse_bytes(text) == n_bytes
