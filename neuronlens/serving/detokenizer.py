"""From tokens to text as they come: no half characters, and nothing that may turn out to be a stop string."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

_CONTEXT_TOKENS = 8
"""So many of the prompt's last tokens decide whether the first new one begins with a space."""


class TextStream:
    """The text of one sequence. Control tokens (see `control_ids`) have none."""

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str], control_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._control_ids = control_ids
        self._stop = tuple(stop)
        self._held = ""
        self._ids: list[int] = []
        self._n_decoded = 0
        context = [i for i in prompt_ids if i not in control_ids][-_CONTEXT_TOKENS:]
        self._context = context
        self._decoder = DecodeStream(ids=context, skip_special_tokens=False)
        self.stopped = False
        """True once a stop string has appeared; the text ends before it."""

    def push(self, token_id: int) -> str:
        """The text that is certain after this token."""
        if self.stopped or token_id in self._control_ids:
            return ""
        self._ids.append(token_id)
        piece = self._decoder.step(self._tokenizer, token_id)
        if piece is None:
            return ""
        self._n_decoded = len(self._ids)
        return self._release(piece, is_last=False)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        if self.stopped:
            return ""
        return self._release(self._rest(), is_last=True)

    def _rest(self) -> str:
        """The text of tokens that end inside a character: the replacement character, as a whole decode has it."""
        if self._n_decoded == len(self._ids):
            return ""
        known = self._tokenizer.decode(self._context + self._ids[: self._n_decoded], skip_special_tokens=False)
        whole: str = self._tokenizer.decode(self._context + self._ids, skip_special_tokens=False)
        return whole[len(known) :]

    def _release(self, piece: str, *, is_last: bool) -> str:
        text = self._held + piece
        if not self._stop:
            return text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = 0 if is_last else max(_n_shared(text, stop) for stop in self._stop)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def control_ids(tokenizer: Any, stop_ids: Sequence[int]) -> frozenset[int]:
    """Tokens that are no text: those that end a sequence, and those with a role in the tokenizer (pad, bos, eos, sep,
    cls, mask). Other special tokens are shown: a recipe's answers are such."""
    return frozenset(stop_ids) | frozenset(tokenizer.all_special_ids)


def _n_shared(text: str, stop: str) -> int:
    """How long an end of `text` is the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
