"""Questions with choices, against prompts and passes written out by hand."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neuronlens.batches import pad
from neuronlens.errors import UsageError
from neuronlens.interventions import apply
from neuronlens.measure import Intervention, Meter
from neuronlens.models import LoadedModel
from neuronlens.multiple_choice import encode_questions, load_questions
from neuronlens.programs import Program, Rule
from tests.range_tables import row, table_of
from tests.tiny_models import D_MLP, tiny_model, tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"question": "Which is hot?", "choices": ["ice", "fire"], "answer": 1},
    {"question": "And cold?", "choices": ["ice", "fire", "sun"], "answer": "A"},
    {"question": "What rises?", "choices": ["sun", "rain", "snow", "hail"], "answer": "d"},
]


def written(folder: Path, rows: list[Any]) -> str:
    path = folder / "questions.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_load_questions__reads_numbers_and_letters(tmp_path: Path) -> None:
    questions = load_questions(written(tmp_path, [*ROWS, ""]))
    assert [question.right for question in questions] == [1, 0, 3]
    assert questions[1].prompt == "And cold?\nA. ice\nB. fire\nC. sun\nAnswer:"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "it is not JSON"),
        ([1], "it has no question"),
        ({**ROWS[0], "question": 3}, "it has no question"),
        ({**ROWS[0], "choices": ["ice"]}, r"its choices are \['ice'\], no list of 2 to 26"),
        ({**ROWS[0], "choices": "ice"}, "its choices are 'ice'"),
        ({**ROWS[0], "answer": 2}, "its answer is 2, none of its 2 choices"),
        ({**ROWS[0], "answer": "C"}, "its answer is 'C', none of its 2 choices"),
        ({**ROWS[0], "answer": True}, "its answer is True"),
        ({**ROWS[0], "answer": None}, "its answer is None"),
    ],
)
def test_load_questions__says_which_line_is_wrong(tmp_path: Path, row: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=f"line 2: {reason}.*Expected"):
        load_questions(written(tmp_path, [ROWS[0], row]))


def test_load_questions__wants_a_file_with_questions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which cannot be read"):
        load_questions(str(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="which has no questions"):
        load_questions(written(tmp_path, [""]))


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Words at their spaces, which belong to no token."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_encode_questions__takes_the_letters_tokens(tmp_path: Path) -> None:
    questions = load_questions(written(tmp_path, ROWS))
    words = word_tokenizer(["A", "B", "C", "D", "Answer:"])
    encoded = encode_questions(words, questions, window=64)
    assert encoded.letter_ids == (1, 2, 3, 4)
    assert [prompt[-1] for prompt in encoded.prompts] == [5, 5, 5]
    np.testing.assert_array_equal(encoded.n_choices_Q, [2, 3, 4])
    np.testing.assert_array_equal(encoded.right_Q, [1, 0, 3])


def test_encode_questions__ends_the_prompt_with_what_the_letters_share(tmp_path: Path) -> None:
    """Bytes of which none were merged: a space, then a letter."""
    questions, tokenizer = load_questions(written(tmp_path, ROWS)), tiny_tokenizer()
    space, *letters = (tokenizer.convert_tokens_to_ids(token) for token in "ĠABCD")
    encoded = encode_questions(tokenizer, questions, window=200)
    assert encoded.letter_ids == tuple(letters)
    for question, prompt in zip(questions, encoded.prompts, strict=True):
        assert prompt == (*tokenizer(question.prompt)["input_ids"], space)


def test_encode_questions__leaves_out_what_is_too_long(tmp_path: Path) -> None:
    questions, tokenizer = load_questions(written(tmp_path, ROWS)), tiny_tokenizer()
    lengths = [len(prompt) for prompt in encode_questions(tokenizer, questions, window=200).prompts]
    encoded = encode_questions(tokenizer, questions, window=max(lengths) - 1)
    assert (encoded.n_too_long, len(encoded.prompts)) == (1, 2)
    np.testing.assert_array_equal(
        encoded.right_Q, [q.right for q, n in zip(questions, lengths, strict=True) if n < max(lengths)]
    )
    with pytest.raises(
        UsageError, match=rf"None of the 3 questions .* window of 5 tokens; the shortest has {min(lengths)}"
    ):
        encode_questions(tokenizer, questions, window=5)


def test_encode_questions__refuses_letters_that_are_no_tokens(tmp_path: Path) -> None:
    questions = load_questions(written(tmp_path, ROWS))
    with pytest.raises(UsageError, match=re.escape("[['A'], ['B'], ['<unk>'], ['<unk>']]")):
        encode_questions(word_tokenizer(["A", "B", "Answer:"]), questions, window=64)


@pytest.mark.parametrize("counted", ["all", "answer"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_choices__are_the_letters_that_a_whole_pass_finds_most_probable(
    tmp_path: Path, counted: Any, positions: Any
) -> None:
    loaded = LoadedModel.of(tiny_model("llama", max_position_embeddings=128), tiny_tokenizer())
    encoded = encode_questions(loaded.tokenizer, load_questions(written(tmp_path, ROWS * 4)), window=128)
    table = table_of(
        [row("joy", n, 0.0, 0.4, layer=layer, rank=n + 1) for layer in (0, 1) for n in range(20)],
        widths={"mlp_post": D_MLP},
    )
    programs = [
        Program.compile(table, [Rule(concept="joy", layers=layers, action="set", value=value)])
        for layers, value in (((1,), 3.0), ((0, 1), -3.0))
    ]
    meter = Meter(loaded, [Intervention(program=p, positions=positions) for p in programs], counted=counted)
    batch = pad(encoded.prompts, pad_id=loaded.pad_id)
    got_RB = meter.choices(batch, torch.tensor(encoded.letter_ids), torch.from_numpy(encoded.n_choices_Q))
    for r, program in enumerate([None, *programs]):
        for b, prompt in enumerate(encoded.prompts):
            offered = list(encoded.letter_ids[: encoded.n_choices_Q[b]])
            ids_1T = torch.tensor([prompt])
            with torch.no_grad():
                if program is None:
                    logits = loaded.module(input_ids=ids_1T).logits[0, -1]
                else:
                    with apply(loaded.module, program) as applied:
                        is_last = torch.arange(len(prompt))[None] == len(prompt) - 1
                        applied.set_where(is_last if positions == "last" else None)
                        logits = loaded.module(input_ids=ids_1T).logits[0, -1]
            assert got_RB[r, b] == int(logits[offered].argmax())
    assert len({tuple(row) for row in got_RB.tolist()}) > 1
