"""Prompts, truncation and answers, against the tokenizer itself."""

import pytest

from neuronlens.errors import UsageError
from neuronlens.prompts import answer_token_ids, encode_prompts
from tests.tiny_models import tiny_tokenizer

SEP = 2


def encode(texts, *, prompt="{text}<sep>", window=64):
    return list(encode_prompts(tiny_tokenizer(), prompt, texts, window=window))


def test_encode_prompts__leaves_what_fits_alone():
    [encoded] = encode(["i feel so happy"])
    assert encoded.token_ids == tiny_tokenizer()("i feel so happy<sep>")["input_ids"]
    assert not encoded.truncated


@pytest.mark.parametrize("window", [2, 5, 20])
def test_encode_prompts__cuts_the_text_and_keeps_what_follows_it(window):
    text = "the storm came closer and my hands would not stop shaking " * 5
    short, [encoded] = "so happy", encode([text], prompt="{text}<sep>", window=window)
    assert encoded.truncated
    assert len(encoded.token_ids) == window
    assert encoded.token_ids[-1] == SEP
    whole = tiny_tokenizer()(text)["input_ids"]
    assert encoded.token_ids[:-2] == whole[: window - 2], "all but the token at the cut are the text's own"
    assert not encode([short], window=20)[0].truncated


def test_encode_prompts__refuses_a_prompt_that_alone_fills_the_window():
    with pytest.raises(UsageError, match="fills the model's window of 6 tokens"):
        encode(["i feel so happy"], prompt="he slammed the door and shouted: {text} <sep><sep>", window=6)


def test_answer_token_ids__gives_one_token_a_concept():
    assert answer_token_ids(tiny_tokenizer(), {"joy": "<joy>", "fear": "<fear>"}) == {"joy": 3, "fear": 5}


def test_answer_token_ids__refuses_what_is_not_one_token():
    with pytest.raises(UsageError, match=r"data\.answers\.joy is 'joyful joyful', which is \d+ tokens"):
        answer_token_ids(tiny_tokenizer(), {"joy": "joyful joyful"})
    with pytest.raises(UsageError, match="joy and fear the same token"):
        answer_token_ids(tiny_tokenizer(), {"joy": "<joy>", "fear": "<joy>"})
