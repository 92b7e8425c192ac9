"""From a request to the token ids of its prompts, checked against the model's window and the server's limits."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuronlens.serving.engine import Engine
from neuronlens.serving.errors import ApiError
from neuronlens.serving.schemas import ChatRequest, CompletionRequest, GenerationRequest
from neuronlens.serving.settings import Limits

PLAIN = "plain"
"""Stands for the template that puts the messages' texts one after the other: for models that were taught no turns."""
_PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"

_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for completions; a chat goes on as far as the window allows."""
_LONG_TEXT = 4_000
"""Characters above which a text is encoded off the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt's tokens, and how many may follow."""

    ids: tuple[int, ...]
    max_tokens: int


async def completion_prompts(engine: Engine, asked: CompletionRequest, limits: Limits) -> list[Prompt]:
    """Every prompt of the request. Raises ApiError 400 where one does not fit."""
    given = asked.prompt
    if isinstance(given, str):
        many: Sequence[str | list[int]] = [given]
    elif isinstance(given[0], int):
        many = [given]
    else:
        many = given
    fitted = []
    for prompt in many:
        ids = await _encoded(engine.tokenizer, prompt) if isinstance(prompt, str) else prompt
        fitted.append(_fitted(engine, ids, asked.max_tokens, _COMPLETION_TOKENS, limits, "prompt"))
    _check_ids(engine, fitted)
    return fitted


async def chat_prompt(engine: Engine, asked: ChatRequest, limits: Limits, template: str | None) -> list[Prompt]:
    """The messages as one prompt. Raises ApiError 400 where the model has no chat template or it does not take them."""
    tokenizer = engine.tokenizer
    if template is None and not tokenizer.chat_template:
        raise ApiError(
            400,
            f"{engine.facts.model_id} has no chat template. Send the text to /v1/completions, or start the server with "
            "--chat-template plain (the messages' texts in a row) or --chat-template FILE.jinja.",
            code="no_chat_template",
            param="messages",
        )
    template = _PLAIN_TEMPLATE if template == PLAIN else template
    messages = [message.as_template_input() for message in asked.messages]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise what they like: jinja2's errors, TypeErrors, their own
        message = f"The model's chat template does not take these messages ({error})."
        raise ApiError(400, message, code="bad_messages", param="messages") from error
    ids = await _encoded(tokenizer, text, add_special_tokens=False)
    max_tokens = asked.max_tokens or asked.max_completion_tokens
    return [_fitted(engine, ids, max_tokens, None, limits, "messages")]


async def _encoded(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    def encode() -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    return encode() if len(text) < _LONG_TEXT else await asyncio.to_thread(encode)


def _check_ids(engine: Engine, prompts: Sequence[Prompt]) -> None:
    """Raise ApiError 400 for an id that the tokenizer does not have."""
    n_tokens = len(engine.tokenizer)
    for prompt in prompts:
        if max(prompt.ids) >= n_tokens or min(prompt.ids) < 0:
            unknown = next(i for i in prompt.ids if not 0 <= i < n_tokens)
            message = f"There is no token {unknown}; expected 0 to {n_tokens - 1}."
            raise ApiError(400, message, code="invalid_field", param="prompt")


def _fitted(
    engine: Engine, ids: Sequence[int], asked: int | None, default: int | None, limits: Limits, param: str
) -> Prompt:
    """The prompt, once it and what may follow are known to fit the window and the limits."""
    window = engine.facts.window
    most_prompt = min(window - 1, limits.prompt_tokens or window)
    if not ids:
        raise ApiError(400, "The prompt has no tokens; expected one at least.", code="empty_prompt", param=param)
    if len(ids) > most_prompt:
        raise ApiError(
            400,
            f"The prompt has {len(ids)} tokens, at most {most_prompt} are taken (the model's window is {window}). "
            "Shorten it.",
            code="context_length_exceeded",
            param=param,
        )
    if asked is not None and limits.max_tokens is not None and asked > limits.max_tokens:
        message = f"max_tokens is {asked}, this server generates at most {limits.max_tokens}."
        raise ApiError(400, message, code="too_many_tokens", param="max_tokens")
    room = window - len(ids)
    if asked is not None and asked > room:
        raise ApiError(
            400,
            f"The prompt's {len(ids)} tokens and max_tokens {asked} are more than the model's window of {window}. "
            f"Ask for at most {room}.",
            code="context_length_exceeded",
            param="max_tokens",
        )
    return Prompt(ids=tuple(ids), max_tokens=asked or min(room, default or room, limits.max_tokens or room))


def n_choices(asked: GenerationRequest, n_prompts: int, limits: Limits) -> int:
    """Sequences that the request asks for. Raises ApiError 400 beyond the limit."""
    n = n_prompts * (asked.n or 1)
    if n > limits.sequences:
        message = f"{n_prompts} prompts times n = {asked.n} are {n} answers, at most {limits.sequences} are given."
        raise ApiError(400, message, code="too_many_sequences", param="n")
    return n
