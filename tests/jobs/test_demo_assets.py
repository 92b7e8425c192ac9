"""The demo's corpus, model and recipe: what the package ships is what the jobs make, and it is fit for its purpose."""

import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import neuronlens
from jobs import make_demo_corpus, train_demo_model

DEMO = Path(neuronlens.__file__).parent / "demo"
CONCEPTS = {"sport", "music", "cooking", "weather", "law", "money"}
# Written down here on their own: the words that the demo rests on, each in use under at least two of the concepts.
SHARED_WORDS = """
pitch bank court note bar scale key spring match season score scored stock plate roll rolled current beat draft charge
charged trial case suit fan fans pan storm stormed dropped rise rose fell cool heat hot cold sharp flat record bass jam
break broke bill bench bond appeal served ran cut high low wind settled froze opened closed rest
"""

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def shipped() -> dict[str, Rows]:
    return {
        split: [json.loads(line) for line in (DEMO / "corpus" / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in ("train", "test")
    }


@pytest.fixture
def torch_as_before() -> Iterator[None]:
    """A training sets torch's threads and its deterministic mode; other tests must not notice."""
    n_threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(n_threads)
    torch.use_deterministic_algorithms(deterministic)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_corpus__is_what_the_job_writes(tmp_path: Path) -> None:
    make_demo_corpus.main(["--out", str(tmp_path)])
    for split in ("train", "test"):
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (DEMO / "corpus" / name).read_bytes()


def test_corpus__changes_with_the_seed(shipped: dict[str, Rows]) -> None:
    train, _ = make_demo_corpus.make_corpus(seed=1)
    assert len({row["text"] for row in train} & {row["text"] for row in shipped["train"]}) < len(train) / 4


def test_corpus__has_the_promised_sizes(shipped: dict[str, Rows]) -> None:
    assert Counter(row["label"] for row in shipped["train"]) == dict.fromkeys(CONCEPTS, 600)
    assert Counter(row["label"] for row in shipped["test"]) == dict.fromkeys(CONCEPTS, 150)
    assert sum(path.stat().st_size for path in (DEMO / "corpus").iterdir()) < 1_000_000
    for row in itertools.chain(*shipped.values()):
        assert set(row) == {"text", "label"}
        assert 5 <= len(row["text"].split()) <= 25, row


def test_corpus__repeats_no_text(shipped: dict[str, Rows]) -> None:
    texts = [row["text"].lower().rstrip(".!") for row in itertools.chain(*shipped.values())]
    assert len(set(texts)) == len(texts) == 4_500


def test_corpus__leaves_no_trace_of_the_notation(shipped: dict[str, Rows]) -> None:
    untidy = re.compile(r"[\[\]{}|]|\s\s|^\s|\s$| [,.]|\ba [aeio]|\ban [^aeiouh]|\b(\w+) \1\b", re.IGNORECASE)
    assert [row["text"] for row in itertools.chain(*shipped.values()) if untidy.search(row["text"])] == []


def test_corpus__shares_its_words_between_concepts(shipped: dict[str, Rows]) -> None:
    texts_with: dict[str, Counter[str]] = defaultdict(Counter)
    for row in shipped["train"]:
        for word in set(words(row["text"])):
            texts_with[word][row["label"]] += 1
    for word in SHARED_WORDS.split():
        assert sum(n >= 5 for n in texts_with[word].values()) >= 2, (word, texts_with[word])


def test_corpus__cannot_be_sorted_by_counting_words(shipped: dict[str, Rows]) -> None:
    """Naive Bayes over words stays below 0.97: the concept takes more than a key word."""
    n: dict[str, Counter[str]] = defaultdict(Counter)
    for row in shipped["train"]:
        n[row["label"]].update(words(row["text"]))
    vocabulary = set().union(*n.values())
    log_p = {
        concept: {
            w: torch.tensor((counts[w] + 1) / (counts.total() + len(vocabulary))).log().item() for w in vocabulary
        }
        for concept, counts in n.items()
    }
    right = 0
    for row in shipped["test"]:
        known = [word for word in words(row["text"]) if word in vocabulary]
        right += max(CONCEPTS, key=lambda concept: sum(log_p[concept][w] for w in known)) == row["label"]
    assert 0.8 < right / len(shipped["test"]) < 0.97


def test_expand__fills_slots_and_choices_at_any_depth() -> None:
    lexicon = {"who": ["the [old|young] {job}"], "job": ["cook"]}
    got = {make_demo_corpus.expand(random.Random(seed), "[a|b {who}] c", lexicon) for seed in range(50)}
    assert got == {"a c", "b the old cook c", "b the young cook c"}


@pytest.mark.parametrize(
    ("clause", "expected"),
    [("a old song by  a young band", "an old song by a young band"), ("it was a used oven", "it was a used oven")],
)
def test_finished__puts_articles_and_spaces_right(clause: str, expected: str) -> None:
    assert make_demo_corpus.finished(random.Random(0), clause).lower().rstrip(".!") == expected


def two_steps(rows: Rows, folder: Path, seed: int) -> bytes:
    config = train_demo_model.TrainingConfig(n_steps=2, seed=seed, batch_size=16, n_layers=2)
    model, tokenizer = train_demo_model.train(rows, config, Console(quiet=True))
    train_demo_model.save(model, tokenizer, folder)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("torch_as_before")
def test_train__gives_the_same_weights_twice(shipped: dict[str, Rows], tmp_path: Path) -> None:
    first = two_steps(shipped["train"][:200], tmp_path / "first", seed=0)
    torch.rand(3)  # whatever torch's generator did before must not matter
    assert two_steps(shipped["train"][:200], tmp_path / "second", seed=0) == first
    assert two_steps(shipped["train"][:200], tmp_path / "other", seed=1) != first


def test_tokenizer__is_what_the_job_trains(shipped: dict[str, Rows]) -> None:
    trained = train_demo_model.train_tokenizer(shipped["train"], train_demo_model.TrainingConfig())
    saved = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    assert trained.backend_tokenizer.get_vocab() == saved.get_vocab()
    for row in shipped["test"][:100]:
        assert trained(row["text"])["input_ids"] == saved.encode(row["text"]).ids
        assert saved.decode(saved.encode(row["text"]).ids) == row["text"]


def test_model__names_the_concept_with_one_token(shipped: dict[str, Rows]) -> None:
    """Each text alone, without padding, read at its last position."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model").eval()
    assert model.dtype == torch.float32
    right = 0
    for row in shipped["test"][:300]:
        ids = tokenizer(row["text"] + "<sep>")["input_ids"]
        with torch.inference_mode():
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        right += tokenizer.decode([best]) == f"<{row['label']}>"
    assert 0.90 <= right / 300 <= 0.98


def test_model__is_small() -> None:
    assert (DEMO / "model" / "model.safetensors").stat().st_size <= 4_200_000


def test_recipe__points_at_what_is_shipped(shipped: dict[str, Rows]) -> None:
    recipe = yaml.safe_load((DEMO / "recipe.yaml").read_text("utf-8"))
    for path in (recipe["model"]["id"], recipe["data"]["source"], recipe["test"]["source"]):
        assert (DEMO / path).exists()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    assert set(recipe["data"]["answers"]) == {row["label"] for row in shipped["train"]}
    for answer in recipe["data"]["answers"].values():
        assert len(tokenizer(answer)["input_ids"]) == 1
