"""One request for text, from its sequences' places in the engine to the last byte of its answer."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request

from neuronlens.serving.answers import Answer, Shape
from neuronlens.serving.engine import Counts, Delta, EngineBusy, Generation, GenerationFailed, Sampling, Stream
from neuronlens.serving.errors import ApiError
from neuronlens.serving.event_stream import client_left, data
from neuronlens.serving.logs import note, request_id_of
from neuronlens.serving.prompts import Prompt, n_choices
from neuronlens.serving.schemas import GenerationRequest
from neuronlens.serving.service import Service, steering_of
from neuronlens.serving.steering import Steered

T = TypeVar("T")

_CLIENT_LEFT = 499
"""nginx's status for a client that did not wait; nobody reads it but the log."""


class _Sequence:
    """A sequence, its place in the engine and what came of it."""

    def __init__(self, generation: Generation, *, is_baseline: bool) -> None:
        self.generation = generation
        self.is_baseline = is_baseline
        self.answer = Answer(index=generation.index)
        self.counts = Counts()
        self.stream: Stream | None = None
        self.first_token_at: float | None = None

    def take(self, delta: Delta) -> None:
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.answer.add(delta)
        self.counts = delta.counts or self.counts


class Exchange:
    """The sequences of one request. Make it with `begin`; `close` frees what still runs."""

    def __init__(
        self,
        request: Request,
        service: Service,
        asked: GenerationRequest,
        steered: Steered | None,
        sequences: Sequence[_Sequence],
        shape: Shape,
    ) -> None:
        self._request = request
        self._service = service
        self._asked = asked
        self._steered = steered
        self._sequences = sequences
        self._shape = shape
        self._began = time.monotonic()
        self._created = int(time.time())
        self._is_closed = self._has_expired = False
        seconds = service.settings.limits.request_seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    @classmethod
    async def begin(
        cls, request: Request, service: Service, asked: GenerationRequest, prompts: Sequence[Prompt], shape: Shape
    ) -> "Exchange":
        """Check what the request asks, and take its places in the engine. Raises ApiError."""
        assert service.engine is not None, "text is served where there is an engine"
        n_choices(asked, len(prompts), service.settings.limits)
        steered = None
        if asked.intervention is not None:
            steered = await asyncio.to_thread(steering_of(request).steer, asked.intervention)
            note(request, table=steered.program.table_id, program=steered.program.id)
        sequences = _sequences(request_id_of(request), asked, prompts, steered)
        try:
            streams = service.engine.submit([sequence.generation for sequence in sequences])
        except EngineBusy as busy:
            service.metrics.rejected(busy.reason)
            status = 503 if busy.reason == "engine_not_ready" else 429
            raise ApiError(status, f"{busy}. Try again.", code=busy.reason, retry_after_seconds=busy.seconds) from busy
        for sequence, stream in zip(sequences, streams, strict=True):
            sequence.stream = stream
            service.metrics.saw_prompt(len(sequence.generation.prompt_ids))
        exchange = cls(request, service, asked, steered, sequences, shape)
        exchange._note_prompts()
        return exchange

    async def whole(self) -> bytes:
        """The whole answer as JSON. Raises ApiError."""
        async for sequence, delta in self._deltas():
            self._take(sequence, delta)
        self._saw_end()
        choices = [
            self._shape.choice(sequence.answer, wants_logprobs=self._wants_logprobs)
            for sequence in self._sequences
            if not sequence.is_baseline
        ]
        more = {} if self._steered is None else {"intervention": self._applied()}
        return json.dumps(self._envelope(self._shape.whole_object, choices, usage=self._usage(), **more)).encode()

    async def events(self) -> AsyncIterator[bytes]:
        """The answer in chunks, as server-sent events. The last chunk with choices carries `intervention`, and so does
        the one with the usage. Raises ApiError."""
        n_open = sum(not sequence.is_baseline for sequence in self._sequences)
        held: list[dict[str, Any]] = []
        async for sequence, delta in self._deltas():
            if not sequence.is_baseline:
                choice = self._shape.chunk(sequence.answer, delta, wants_logprobs=self._wants_logprobs)
                n_open -= delta.finish_reason is not None
                if n_open == 0:
                    held.append(choice)  # what the rules did, and the baseline, are known at the very end
                else:
                    yield self._chunk([choice])
            self._take(sequence, delta)
        self._saw_end()
        more = {} if self._steered is None else {"intervention": self._applied()}
        yield self._chunk(held, **more)
        if self._asked.wants_usage:
            yield self._chunk([], usage=self._usage(), **more)
        yield data("[DONE]")

    def close(self) -> None:
        """Free what still runs, and write down what was done."""
        if self._is_closed:
            return
        self._is_closed = True
        self._timer.cancel()
        for sequence in self._sequences:
            if sequence.stream is not None:
                sequence.stream.close()
            if sequence.first_token_at is not None:
                seconds = time.monotonic() - sequence.first_token_at
                self._service.metrics.saw_tokens(sequence.answer.n_tokens, seconds)
        note(self._request, completion_tokens=sum(sequence.answer.n_tokens for sequence in self._sequences))
        if self._service.settings.log_prompts:
            note(self._request, answers=[sequence.answer.text for sequence in self._sequences])

    # --- parts of an answer ------------------------------------------------------------------------------------------

    @property
    def _wants_logprobs(self) -> bool:
        return self._sequences[0].generation.sampling.top_logprobs is not None

    def _chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> bytes:
        if self._asked.wants_usage:
            more.setdefault("usage", None)
        return data(json.dumps(self._envelope(self._shape.chunk_object, choices, **more)))

    def _envelope(self, kind: str, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": f"{self._shape.prefix}-{request_id_of(self._request)}",
            "object": kind,
            "created": self._created,
            "model": self._asked.model,
            "choices": list(choices),
            **more,
        }

    def _usage(self) -> dict[str, int]:
        """Of all that was generated, baselines included."""
        n_prompt = sum(len(sequence.generation.prompt_ids) for sequence in self._sequences)
        n_generated = sum(sequence.answer.n_tokens for sequence in self._sequences)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_generated,
            "total_tokens": n_prompt + n_generated,
        }

    def _applied(self) -> dict[str, Any]:
        assert self._steered is not None
        assert self._service.engine is not None
        counts = [sequence.counts for sequence in self._sequences if not sequence.is_baseline]
        applied = self._steered.describe(counts, self._service.engine.facts.engine).model_dump()
        if self._steered.asked.compare_baseline:
            applied["baseline"] = [
                {"index": one.answer.index, "text": one.answer.text, "finish_reason": one.answer.finish_reason}
                for one in self._sequences
                if one.is_baseline
            ]
        return applied

    # --- time, measures ----------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        self._has_expired = True
        for sequence in self._sequences:
            _open(sequence).close()

    async def _deltas(self) -> AsyncIterator[tuple[_Sequence, Delta]]:
        """The deltas of all sequences as they come. Raises ApiError where a sequence or the time ends too early."""
        try:
            async for sequence, delta in _merged(self._sequences):
                yield sequence, delta
        except GenerationFailed as error:
            raise _in_words(error) from error
        if self._has_expired:
            seconds = self._service.settings.limits.request_seconds
            message = f"The answer was not done within {seconds:g} s. Ask for fewer tokens, or try again later."
            raise ApiError(408, message, code="timeout")

    def _take(self, sequence: _Sequence, delta: Delta) -> None:
        if all(one.first_token_at is None for one in self._sequences):
            self._service.metrics.saw_first_token(time.monotonic() - self._began)
        sequence.take(delta)

    def _saw_end(self) -> None:
        if self._steered is None:
            return
        tested = changed = 0
        for sequence in self._sequences:
            if not sequence.is_baseline:
                by_action = self._steered.changed_by_action(sequence.counts)
                self._service.metrics.saw_program(sequence.counts.tested, by_action)
                tested, changed = tested + sequence.counts.tested, changed + sequence.counts.changed
        note(self._request, tested=tested, changed=changed)

    def _note_prompts(self) -> None:
        note(self._request, prompt_tokens=sum(len(sequence.generation.prompt_ids) for sequence in self._sequences))
        if self._asked.user is not None:
            note(self._request, user=self._asked.user)
        if self._service.settings.log_prompts and self._service.engine is not None:
            tokenizer = self._service.engine.tokenizer
            note(self._request, prompts=[tokenizer.decode(list(s.generation.prompt_ids)) for s in self._sequences])


def _sequences(
    request_id: str, asked: GenerationRequest, prompts: Sequence[Prompt], steered: Steered | None
) -> list[_Sequence]:
    """Every choice, and after them the baselines, which draw the same random numbers."""
    seed = secrets.randbits(62) if asked.seed is None else asked.seed
    compared = [False, True] if steered is not None and steered.asked.compare_baseline else [False]
    sequences = []
    for is_baseline in compared:
        for i in range(len(prompts) * (asked.n or 1)):
            prompt = prompts[i // (asked.n or 1)]
            sampling = Sampling(
                max_tokens=prompt.max_tokens,
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                seed=seed,
                stop=asked.stops,
                top_logprobs=asked.top_logprobs_asked,
            )
            generation = Generation(id=f"{request_id}-{i}", prompt_ids=prompt.ids, sampling=sampling, index=i)
            if steered is not None and not is_baseline:
                phases = frozenset(steered.asked.phases)
                generation = replace(generation, program=steered.program, phases=phases)
            sequences.append(_Sequence(generation, is_baseline=is_baseline))
    return sequences


async def _merged(sequences: Sequence[_Sequence]) -> AsyncIterator[tuple[_Sequence, Delta]]:
    """The deltas of all sequences as they come."""
    if len(sequences) == 1:
        async for delta in _open(sequences[0]):
            yield sequences[0], delta
        return
    news: asyncio.Queue[tuple[_Sequence, Delta] | Exception | None] = asyncio.Queue()

    async def follow(sequence: _Sequence) -> None:
        try:
            async for delta in _open(sequence):
                news.put_nowait((sequence, delta))
            news.put_nowait(None)
        except GenerationFailed as error:
            news.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(sequence)) for sequence in sequences]
    try:
        n_open = len(sequences)
        while n_open:
            found = await news.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                n_open -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()


def _open(sequence: _Sequence) -> Stream:
    assert sequence.stream is not None, "the sequence was submitted"
    return sequence.stream


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled where the client leaves before it is there."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(client_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(_CLIENT_LEFT, "The client left before its answer was there.", code="client_left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError, StopAsyncIteration):
                await task


def _in_words(error: GenerationFailed) -> ApiError:
    sentence = str(error)[:1].upper() + str(error)[1:]
    if error.by_intervention:
        message = f"{sentence}. Choose a smaller value, other layers or a milder action."
        return ApiError(400, message, code="non_finite_logits", param="intervention.rules")
    return ApiError(500, f"The answer could not be finished. {sentence}.", code="generation_failed")
