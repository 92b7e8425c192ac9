"""What sequences become in OpenAI's two shapes, whole or in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from neuronlens.serving.engine import Delta, FinishReason, TokenLogprob


@dataclass(slots=True, kw_only=True)
class Answer:
    """All of one choice so far."""

    index: int
    text: str = ""
    n_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    n_logprob_characters: int = 0
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.n_logprob_characters += sum(len(token.text) for token in delta.logprobs)
        self.text += delta.text
        self.n_tokens += len(delta.token_ids)
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason


class Shape(Protocol):
    """How choices are written. `wants_logprobs`: a choice has log probabilities, even where it has no tokens."""

    prefix: str
    whole_object: str
    chunk_object: str

    def choice(self, answer: Answer, *, wants_logprobs: bool) -> dict[str, Any]: ...

    def chunk(self, before: Answer, delta: Delta, *, wants_logprobs: bool) -> dict[str, Any]:
        """What `delta` adds to the answer `before` it."""


class CompletionShape:
    """Text completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def choice(self, answer: Answer, *, wants_logprobs: bool) -> dict[str, Any]:
        return {
            "index": answer.index,
            "text": answer.text,
            "logprobs": _parallel_lists(answer.logprobs, 0) if wants_logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def chunk(self, before: Answer, delta: Delta, *, wants_logprobs: bool) -> dict[str, Any]:
        return {
            "index": before.index,
            "text": delta.text,
            "logprobs": _parallel_lists(delta.logprobs, before.n_logprob_characters) if wants_logprobs else None,
            "finish_reason": delta.finish_reason,
        }


class ChatShape:
    """Chat completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, answer: Answer, *, wants_logprobs: bool) -> dict[str, Any]:
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": {"content": _content(answer.logprobs)} if wants_logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def chunk(self, before: Answer, delta: Delta, *, wants_logprobs: bool) -> dict[str, Any]:
        role = {} if before.n_tokens else {"role": "assistant"}
        return {
            "index": before.index,
            "delta": {**role, "content": delta.text},
            "logprobs": {"content": _content(delta.logprobs)} if wants_logprobs else None,
            "finish_reason": delta.finish_reason,
        }


def _parallel_lists(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{text: p for _, text, p in token.top} | {token.text: token.logprob} for token in tokens],
        "text_offset": offsets,
    }


def _content(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {
            **_token(token.text, token.logprob),
            "top_logprobs": [_token(text, logprob) for _, text, logprob in token.top],
        }
        for token in tokens
    ]


def _token(text: str, logprob: float) -> dict[str, Any]:
    # The text of a token that is a part of a character does not tell its bytes.
    n_bytes = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": n_bytes}
