"""python -m jobs.finetune: tiny random models learn to tell easy texts apart, what was interrupted goes on, and what
cannot end well is refused before any training."""

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from jobs.finetune import app
from neuronlens.console import command_line
from neuronlens.errors import UsageError
from neuronlens.models import load_model
from neuronlens.recipe import load_recipe
from pipeline.driver import Silent
from pipeline.finetune import finetune
from pipeline.plan import make_plan
from pipeline.training import decoder_loss, last_whole_checkpoint
from tests.tiny_models import save_tiny, tiny_tokenizer

WORDS = {"calm": "sun river warm rain", "loud": "door shouted slammed driver", "sly": "money lied cellar dark"}
FAST = {
    "gpt2": {"epochs": 6, "learning_rate": 0.02, "batch_size": 16, "weight_decay": 0.0},
    "bert": {"epochs": 5, "learning_rate": 0.005, "batch_size": 8, "weight_decay": 0.0},
}


def write_texts(path: Path, n_texts: int, *, seed: int) -> None:
    """Texts of a concept hold three of its own words among four that all concepts share."""
    rng = random.Random(seed)
    rows = []
    for n in range(n_texts):
        concept = sorted(WORDS)[-1 - n % len(WORDS)]  # not first met in the order of their names
        words = rng.choices(WORDS[concept].split(), k=3) + rng.choices(["i", "feel", "the", "and", "was", "so"], k=4)
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": concept})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    save_tiny(folder / "gpt2", "gpt2")
    save_tiny(folder / "bert", "bert")
    write_texts(folder / "train.jsonl", 480, seed=0)
    write_texts(folder / "test.jsonl", 150, seed=1)
    return folder


def recipe_file(place: Path, folder: Path, base: str, **sections) -> Path:
    content = {
        "model": {"id": str(folder / "made")},
        "data": {"source": str(place / "train.jsonl")},
        "test": {"source": str(place / "test.jsonl")},
        "finetune": {"base": str(place / base), **FAST[base]},
    }
    if base == "gpt2":
        content["data"] |= {"prompt": "{text}<ask>", "answers": {concept: f"<{concept}>" for concept in WORDS}}
    for section, values in sections.items():
        content[section] = {**content[section], **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run_job(*arguments: str | Path):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(file: Path, **options) -> str:
    with pytest.raises(UsageError) as caught:
        finetune(load_recipe(file), Silent(), **options)
    return str(caught.value)


def share_right(place: Path, named: Callable[[str], str]) -> float:
    rows = [json.loads(line) for line in (place / "test.jsonl").read_text().splitlines()]
    with torch.inference_mode():
        return sum(named(row["text"]) == row["label"] for row in rows) / len(rows)


@pytest.fixture(scope="module")
def decoder(place, tmp_path_factory):
    """A GPT-2 that the command fine-tuned: its recipe and what the command printed."""
    file = recipe_file(place, tmp_path_factory.mktemp("decoder"), "gpt2")
    done = run_job(file, "--json")
    assert done.exit_code == 0, done.output
    return file, done


@pytest.fixture
def no_training(monkeypatch):
    """Any training fails; what it would have been given is kept."""
    given = SimpleNamespace(examples=None)

    def refuse(module, examples, *_, **__):
        given.examples = list(examples)
        raise AssertionError("trained")

    monkeypatch.setattr("pipeline.training.train", refuse)
    return given


def test_finetune__teaches_a_decoder_to_name_concepts_with_new_tokens(decoder, place):
    file, done = decoder
    made = json.loads(done.stdout)
    assert {key: made[key] for key in ("base", "n_train", "n_test")} == {
        "base": str(place / "gpt2"),
        "n_train": 480,
        "n_test": 150,
    }
    assert made["accuracy"] > 0.9
    assert made["seconds"] > 0
    assert f"Next:\n  neuronlens run {file}" in done.stderr
    tokenizer = load_model(made["model"]).tokenizer
    assert tokenizer("<ask>")["input_ids"] == [len(tiny_tokenizer()) + 3], "after the three answers"
    assert sorted(path.name for path in file.parent.iterdir()) == ["made", "recipe.yaml"], "no checkpoints are left"


def test_finetune__reports_the_accuracy_that_a_decoder_has(decoder, place):
    """Each text alone, without padding, by transformers."""
    made = json.loads(decoder[1].stdout)
    loaded = load_model(made["model"])

    def named(text: str) -> str:
        logits_V = loaded.module(loaded.tokenizer(text + "<ask>", return_tensors="pt")["input_ids"]).logits[0, -1]
        return loaded.tokenizer.decode([int(logits_V.argmax())]).strip("<>")

    assert made["accuracy"] == share_right(place, named)


def test_finetune__makes_what_the_same_recipe_then_runs_on(decoder):
    plan = make_plan(load_recipe(decoder[0]))
    n_known = len(tiny_tokenizer())
    assert plan.answers == {"calm": n_known, "loud": n_known + 1, "sly": n_known + 2}
    assert plan.n_samples == 480


def test_finetune__teaches_an_encoder_classes_in_the_order_of_their_names(place, tmp_path):
    made = finetune(load_recipe(recipe_file(place, tmp_path, "bert")), Silent())
    assert made.accuracy is not None
    assert made.accuracy > 0.9
    loaded = load_model(made.model)
    assert loaded.label_ids == {"calm": 0, "loud": 1, "sly": 2}

    def named(text: str) -> str:
        logits_L = loaded.module(loaded.tokenizer(text, return_tensors="pt")["input_ids"]).logits[0]
        return ("calm", "loud", "sly")[int(logits_L.argmax())]

    assert made.accuracy == share_right(place, named)
    assert make_plan(load_recipe(tmp_path / "recipe.yaml")).answers == {"calm": 0, "loud": 1, "sly": 2}


def test_finetune__does_not_train_again_what_was_made(decoder, no_training):
    file, done = decoder
    again = run_job(file, "--json")
    assert json.loads(again.stdout)["accuracy"] == json.loads(done.stdout)["accuracy"]
    assert "was made by this recipe before" in " ".join(again.stderr.split())  # a long path breaks the line


class Stopper(Silent):
    """Presses Ctrl-C once so many steps of the training are done; keeps by how much it was said to advance."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.steps = at, []

    def stage(self, name, total, unit):
        def advance(n):
            if name == "fine-tune":
                self.steps.append(n)
                if sum(self.steps) == self.at:
                    raise KeyboardInterrupt

        return contextlib.nullcontext(advance)


def test_finetune__goes_on_where_it_was_stopped_and_ends_with_the_same_weights(place, tmp_path):
    """45 steps, a checkpoint every 5 of them; 30 steps are an epoch."""
    files = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        files.append(recipe_file(place, tmp_path / name, "gpt2", finetune={"max_steps": 45}))
    finetune(load_recipe(files[0]), Silent())
    with pytest.raises(KeyboardInterrupt):
        finetune(load_recipe(files[1]), Stopper(at=38))
    assert not (tmp_path / "stopped" / "made").exists()
    second = Stopper()
    finetune(load_recipe(files[1]), second)
    assert second.steps == [35] + [1] * 10
    weights = [load_file(file.parent / "made" / "model.safetensors") for file in files]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


def test_last_whole_checkpoint__is_the_newest_that_was_written_to_its_end(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    for step, is_whole in ((9, True), (10, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if is_whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_finetune__starts_new_tokens_at_the_mean_of_the_old(place, tmp_path):
    finetune(
        load_recipe(recipe_file(place, tmp_path, "gpt2", finetune={"max_steps": 1, "learning_rate": 1e-9})), Silent()
    )
    old = load_file(place / "gpt2" / "model.safetensors")["transformer.wte.weight"].double()
    new = load_file(tmp_path / "made" / "model.safetensors")["transformer.wte.weight"].double()
    assert len(new) == len(old) + 4
    torch.testing.assert_close(new[:-4], old, rtol=0, atol=1e-6)
    torch.testing.assert_close(new[-4:], old.mean(dim=0).expand(4, -1), rtol=0, atol=1e-6)


def test_finetune__cuts_the_texts_of_long_prompts_and_keeps_what_comes_after(place, tmp_path, no_training):
    file = recipe_file(place, tmp_path, "gpt2", finetune={"max_tokens": 6})
    with pytest.raises(AssertionError, match="trained"):
        finetune(load_recipe(file), Silent())
    ask = len(tiny_tokenizer()) + 3
    assert {len(example.token_ids) for example in no_training.examples} == {5}, "and the answer is the sixth"
    assert all(example.token_ids[-1] == ask for example in no_training.examples)


def test_decoder_loss__is_the_answers_mean_plus_the_texts_mean():
    rng = np.random.default_rng(0)
    logits_BTV = rng.normal(size=(2, 5, 7))
    rows = [[3, 1, 4, 1, 5], [2, 6, 6]]
    labels_BT = torch.tensor([rows[0], [*rows[1], -100, -100]])
    losses = [
        [-(logits_BTV[b, t] - np.log(np.exp(logits_BTV[b, t]).sum()))[row[t + 1]] for t in range(len(row) - 1)]
        for b, row in enumerate(rows)
    ]
    wanted = np.mean([row[-1] for row in losses]) + np.mean([loss for row in losses for loss in row[:-1]])
    got = decoder_loss(SimpleNamespace(logits=torch.from_numpy(logits_BTV)), labels_BT)
    assert float(got) == pytest.approx(wanted, rel=1e-6)


def test_finetune__refuses_a_folder_that_holds_another_model_unless_told(decoder, place, tmp_path, no_training):
    file = recipe_file(place, tmp_path, "gpt2", model={"id": str(decoder[0].parent / "made")}, finetune={"seed": 1})
    assert "holds a model that was made by another recipe, base or data" in refusal(file)
    save_tiny(tmp_path / "other", "gpt2")
    file = recipe_file(place, tmp_path, "gpt2", model={"id": str(tmp_path / "other")})
    assert "made by something else. Give model.id another folder, or add --overwrite" in refusal(file)
    with pytest.raises(AssertionError, match="trained"):
        finetune(load_recipe(file), Silent(), overwrite=True)
    assert (tmp_path / "other" / "model.safetensors").exists(), "kept until the new one is whole"


def test_finetune__replaces_another_model_where_told(place, tmp_path):
    save_tiny(tmp_path / "made", "llama")
    (tmp_path / "made" / "notes.txt").write_text("old")
    finetune(load_recipe(recipe_file(place, tmp_path, "gpt2", finetune={"max_steps": 1})), Silent(), overwrite=True)
    assert json.loads((tmp_path / "made" / "config.json").read_text())["model_type"] == "gpt2"
    assert not (tmp_path / "made" / "notes.txt").exists()


def test_finetune__never_writes_over_a_folder_without_a_model(place, tmp_path, no_training):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "thesis.tex").write_text("")
    assert "holds no model, but thesis.tex" in refusal(recipe_file(place, tmp_path, "gpt2"), overwrite=True)


@pytest.mark.parametrize(
    ("base", "sections", "words"),
    [
        ("gpt2", {"data": {"answers": None}}, "Add data.answers, an entry for each of calm, loud, sly"),
        (
            "gpt2",
            {"data": {"answers": {"calm": "<calm>", "loud": "<loud>"}}},
            "data.answers has no entry for the label",
        ),
        ("gpt2", {"data": {"answers": dict.fromkeys(WORDS, "so")}}, "expected exactly one"),
        ("gpt2", {"data": {"answers": dict.fromkeys(WORDS, "<x>")}}, "the same token"),
        ("bert", {"data": {"answers": dict.fromkeys(WORDS, "x")}}, "gives two concepts the same answer"),
        ("bert", {"data": {"answers": {"calm": "calm"}}}, "data.answers has no entry for the label 'loud'"),
        ("bert", {"data": {"text": "texts"}}, "data.text names the column 'texts'"),
        ("bert", {"test": {"source": "odd.jsonl"}}, "The test texts have the concept 'odd'"),
        ("bert", {"data": {"source": "odd.jsonl"}}, "has one concept, 'odd'"),
        ("bert", {"finetune": {"base": "made"}}, "finetune.base and model.id are both"),
        ("bert", {"finetune": {"base": "odd"}}, "odd has no config.json"),
    ],
)
def test_finetune__refuses_before_any_training_what_cannot_end_well(
    place, tmp_path, no_training, base, sections, words
):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd.jsonl").write_text('{"text": "so", "label": "odd"}\n' * 2)
    if sections.get("finetune") == {"base": "made"}:
        save_tiny(tmp_path / "made", "bert")
    message = refusal(recipe_file(place, tmp_path, base, **sections))
    assert words in message


def test_finetune__refuses_a_recipe_that_says_nothing_of_it(place, tmp_path, monkeypatch, capsys):
    file = recipe_file(place, tmp_path, "gpt2")
    monkeypatch.setattr("sys.argv", ["jobs/finetune.py", str(file), "--set", "finetune=null"])
    with pytest.raises(SystemExit) as caught:
        command_line(app)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("neuronlens: The recipe has no finetune section")
    assert printed.out == ""


def test_finetune__says_which_package_it_lacks(place, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.finetune.find_spec", lambda name: None)
    assert "pip install 'neuronlens[finetune]'" in refusal(recipe_file(place, tmp_path, "gpt2"))


def test_plan__says_how_the_model_is_made_that_is_not_there_yet(place, tmp_path):
    recipe = load_recipe(recipe_file(place, tmp_path, "gpt2"))
    with pytest.raises(UsageError, match=r"There is no model in .*made yet\. `python -m jobs\.finetune RECIPE`"):
        make_plan(recipe)
