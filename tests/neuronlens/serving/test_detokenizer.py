"""Text as it comes, piece by piece, against the whole decode."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from neuronlens.serving.detokenizer import TextStream, control_ids
from tests.tiny_models import SENTENCES, tiny_tokenizer

BYTES = tiny_tokenizer()
CONTROL = control_ids(BYTES, [1])


def stream(ids, *, stop=(), prompt=(), tokenizer=BYTES) -> tuple[list[str], TextStream]:
    text = TextStream(tokenizer, prompt, stop, control_ids(tokenizer, [1]))
    pieces = []
    for i in ids:
        pieces.append(text.push(i))
        if text.stopped:
            break
    return [*pieces, text.finish()], text


@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=40))
def test_text__in_pieces_is_the_whole_decode(ids):
    pieces, _ = stream(ids)
    assert "".join(pieces) == BYTES.decode([i for i in ids if i not in CONTROL])


def test_text__holds_back_half_a_character():
    ids = BYTES("naïve 😀!")["input_ids"]
    pieces, _ = stream(ids)
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == "naïve 😀!"
    assert "".join(stream(ids[:-2])[0]).endswith("\ufffd"), "what ends inside a character says so"


def test_text__has_the_answers_but_no_control_tokens():
    ids = BYTES("so happy<sep><joy>")["input_ids"]
    assert "".join(stream([*ids, 1])[0]) == "so happy<joy>"


def test_text__of_a_tokenizer_with_word_starts_keeps_the_space_after_the_prompt():
    """Llama's kind of tokenizer drops the space before the first word of a text; an answer is no first word."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(special_tokens=["<eos>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    prompt, answer = tokenizer("the storm")["input_ids"], tokenizer("came closer")["input_ids"]
    assert "".join(stream(answer, prompt=prompt, tokenizer=tokenizer)[0]) == " came closer"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["rain"], "i could sing in the "),
        (["sing in", "could"], "i "),
        (["xyz"], "i could sing in the rain"),
        (["n t"], "i could sing i"),
    ],
)
def test_stop__ends_the_text_before_it_and_lets_nothing_of_it_out(stop, expected):
    pieces, text = stream(BYTES("i could sing in the rain")["input_ids"], stop=stop)
    assert "".join(pieces) == expected
    assert text.stopped == (expected != "i could sing in the rain")


def test_stop__lets_out_what_only_looked_like_it():
    pieces, _ = stream(BYTES("sing in the sun")["input_ids"], stop=["sing in the rain"])
    assert "".join(pieces) == "sing in the sun"
    assert pieces[0] == ""


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop__cuts_where_a_search_of_the_text_so_far_first_finds_one(text, stop):
    ids = [i for letter in text for i in BYTES(letter)["input_ids"]]
    pieces, _ = stream(ids, stop=stop)
    for n in range(1, len(text) + 1):
        found = [text[:n].find(s) for s in stop if s in text[:n]]
        if found:
            assert "".join(pieces) == text[: min(found)]
            return
    assert "".join(pieces) == text
