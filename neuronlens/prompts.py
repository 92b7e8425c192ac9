"""From texts to token ids: the prompt around each text, cut to the model's window without losing what follows the
text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuronlens.errors import UsageError

_CHUNK = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    token_ids: list[int]
    truncated: bool


def encode_prompts(tokenizer: Any, prompt: str, texts: Sequence[str], *, window: int) -> Iterator[EncodedPrompt]:
    """Each text within `prompt` (which holds `{text}` once), with the special tokens that the tokenizer itself adds.

    A prompt longer than `window` tokens loses the end of its text, never what the prompt has after the text.
    """
    before, after = prompt.split("{text}")
    for first in range(0, len(texts), _CHUNK):
        chunk = [before + text + after for text in texts[first : first + _CHUNK]]
        for text, token_ids in zip(texts[first:], tokenizer(chunk)["input_ids"], strict=False):
            if len(token_ids) <= window:
                yield EncodedPrompt(token_ids=token_ids, truncated=False)
            else:
                yield EncodedPrompt(token_ids=_cut(tokenizer, before, text, after, window), truncated=True)


def _cut(tokenizer: Any, before: str, text: str, after: str, window: int) -> list[int]:
    """The longest prompt that fits: cut the text where its tokens end, and look again, since a cut can change
    tokens."""
    encoded = tokenizer(before + text + after, return_offsets_mapping=True)
    n_over = len(encoded["input_ids"]) - window
    end_of_text = len(before) + len(text)
    ends = [end for start, end in encoded["offset_mapping"] if len(before) < end <= end_of_text and end > start]
    for n_kept in range(len(ends) - n_over, 0, -1):
        token_ids: list[int] = tokenizer(before + text[: ends[n_kept - 1] - len(before)] + after)["input_ids"]
        if len(token_ids) <= window:
            return token_ids
    raise UsageError(
        f"The prompt around the text alone fills the model's window of {window} tokens: {before[:40]!r} ... "
        f"{after[-40:]!r}. Shorten data.prompt, or take a model with a longer window."
    )


def answer_token_ids(tokenizer: Any, answers: Mapping[str, str]) -> dict[str, int]:
    """The one token of each concept's answer. Raises UsageError where an answer is several tokens or none."""
    token_ids = {}
    for concept, answer in answers.items():
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise UsageError(
                f"data.answers.{concept} is {answer!r}, which is {len(ids)} tokens for this tokenizer ({pieces}); "
                "expected exactly one. Choose a word that is one token (a leading space often makes it one)."
            )
        if ids[0] == tokenizer.unk_token_id:
            raise UsageError(
                f"data.answers.{concept} is {answer!r}, which this tokenizer does not know ({tokenizer.unk_token}). "
                "Choose an answer in its vocabulary."
            )
        token_ids[concept] = int(ids[0])
    twice = [c for c in token_ids if list(token_ids.values()).count(token_ids[c]) > 1]
    if twice:
        raise UsageError(
            f"data.answers gives {' and '.join(twice)} the same token. Give every concept an answer of its own."
        )
    return token_ids
