"""The recipes of the paper's grid: each is read, fine-tuned (one step of a tiny random model in place of the published
one) and planned, on a few texts that have the columns, splits and label names of the data set that it names."""

from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import AddedToken

from neuronlens.models import load_model
from neuronlens.recipe import Recipe, load_recipe
from pipeline.driver import Silent
from pipeline.erasure_texts import load_test_texts
from pipeline.finetune import finetune
from pipeline.plan import make_plan
from tests.tiny_models import SENTENCES, save_tiny, tiny_model, tiny_tokenizer

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"

# The hub's own cards, written down here: name of the text's column, the label's names in the order of their numbers,
# the split with labels that a model is tested on.
DATA = {
    "ag_news": ("fancyzhx/ag_news", "text", "World Sports Business Sci/Tech", "test"),
    "emotions": ("dair-ai/emotion", "text", "sadness joy love anger fear surprise", "test"),
    "dbpedia_14": (
        "fancyzhx/dbpedia_14",
        "content",
        "Company EducationalInstitution Artist Athlete OfficeHolder MeanOfTransportation Building NaturalPlace Village "
        "Animal Plant Album Film WrittenWork",
        "test",
    ),
    "sst2": ("stanfordnlp/sst2", "sentence", "negative positive", "validation"),
    "imdb": ("stanfordnlp/imdb", "text", "neg pos", "test"),
}
MODELS = {
    "bert-base": ("google-bert/bert-base-uncased", "bert"),
    "distilbert": ("distilbert/distilbert-base-uncased", "distilbert"),
    "gpt2": ("openai-community/gpt2", "gpt2"),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "llama"),
}
WINDOW = 1024

every_recipe = pytest.mark.parametrize(
    ("data", "model"), [(data, model) for data in DATA for model in MODELS], ids=lambda name: name
)


def recipe_path(data: str, model: str) -> Path:
    return RECIPES / "paper" / f"{data}_{model}.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder for each data set, with three texts a concept and split, and one for each base model."""
    folder = tmp_path_factory.mktemp("paper")
    for name, (_, column, concepts, tested) in DATA.items():
        names = concepts.split()
        features = Features({column: Value("string"), "label": ClassLabel(names=names)})
        for split in {"train", "validation", "test"}:
            labels = list(range(len(names))) * 3 if split in ("train", tested) else [-1] * 3
            texts = [SENTENCES[n % len(SENTENCES)] for n in range(len(labels))]
            (folder / name).mkdir(exist_ok=True)
            Dataset.from_dict({column: texts, "label": labels}, features).to_parquet(folder / name / f"{split}.parquet")
    for base in ("bert", "distilbert", "gpt2"):
        save_tiny(folder / base, base)
    return folder


def tiny_llama(folder: Path, answers: dict[str, str]) -> Path:
    """A model that knows the answers as words, in a window that a whole question fits."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in answers.values()])
    tokenizer.model_max_length = WINDOW
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=WINDOW)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def substituted(place: Path, folder: Path, data: str, model: str) -> Recipe:
    """The recipe as it stands, but for where its data and its model come from."""
    changes = [f"data.source={place / data}", f"test.source={place / data}", f"model.id={folder / 'model'}"]
    if model != "llama-3.2-3b":
        changes += [f"finetune.base={place / MODELS[model][1]}", "finetune.max_steps=1"]
    return load_recipe(recipe_path(data, model), changes)


def test_grid__has_a_recipe_for_every_data_set_on_every_model_and_no_part_too_many():
    names = {path.name for path in (RECIPES / "paper").iterdir()}
    assert names == {recipe_path(data, model).name for data in DATA for model in MODELS}
    extended = [yaml.safe_load(path.read_text())["extends"] for path in (RECIPES / "paper").iterdir()]
    assert {Path(name).name for names in extended for name in names} == {
        path.name for path in (RECIPES / "parts").iterdir()
    }


@every_recipe
def test_recipe__names_what_the_hub_has(data, model):
    recipe = load_recipe(recipe_path(data, model))
    source, column, _, tested = DATA[data]
    assert recipe.test is not None
    assert (recipe.data.source, recipe.data.split, recipe.data.text, recipe.data.concept) == (
        source,
        "train",
        column,
        "label",
    )
    assert (recipe.test.source, recipe.test.split) == (source, tested)
    published = recipe.finetune.base if recipe.finetune else recipe.model.id
    assert published == MODELS[model][0]
    assert (recipe.finetune is None) == (model == "llama-3.2-3b")


@every_recipe
def test_recipe__can_be_made_and_planned(place, tmp_path, data, model):
    recipe = substituted(place, tmp_path, data, model)
    if recipe.finetune is None:
        assert recipe.data.answers is not None
        tiny_llama(tmp_path / "model", recipe.data.answers)
    else:
        finetune(recipe, Silent())
    plan = make_plan(recipe)
    _, _, concepts, _ = DATA[data]
    assert plan.description["concepts"] == dict.fromkeys(sorted(concepts.split()), 3)
    assert plan.answers is not None
    assert sorted(plan.answers) == sorted(concepts.split())
    assert len(set(plan.answers.values())) == len(plan.answers), "no two concepts share an answer"
    assert (plan.description["hook_points"], plan.description["layers"]) == (["resid_post"], [1]), "of two layers"
    assert plan.description["unit"] == ("cls" if "bert" in model else "last_token")
    assert plan.description["only_correct"] == (model == "llama-3.2-3b"), "as the authors do"
    assert plan.description["predictions"]
    assert recipe.test is not None
    texts = load_test_texts(recipe, recipe.test, load_model(recipe.model.id, device="meta"))
    assert {text.concept for text in texts} == set(concepts.split())


@pytest.mark.parametrize("data", DATA)
def test_question__ends_where_the_answer_comes_and_names_every_answer(data):
    recipe = load_recipe(recipe_path(data, "llama-3.2-3b"))
    assert recipe.data.answers is not None
    assert recipe.data.prompt.endswith(":")
    question = recipe.data.prompt.partition("?")[0]
    for answer in recipe.data.answers.values():
        assert answer.startswith(" "), "the tokens of Llama's words begin with their space"
        assert answer in question


@pytest.mark.parametrize("data", DATA)
def test_prompt__of_gpt2_is_the_text_and_a_separator(data):
    recipe = load_recipe(recipe_path(data, "gpt2"))
    assert recipe.data.prompt == "{text}<sep>"
    assert recipe.data.answers is not None
    assert all(answer.startswith("<") and answer.endswith(">") for answer in recipe.data.answers.values())
