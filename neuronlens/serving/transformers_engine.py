"""The embedded engine: a transformers model in this process, on its CPU or one GPU, and step-level batching.

    engine = TransformersEngine.load("path/of/a/model", limits=Limits())
    await engine.start()
    streams = engine.submit([generation])

The model works in a thread of its own; the event loop hands it sequences and gets what each step brought in one call.
Why not transformers' own continuous batching: docs/serving.md.
"""

import asyncio
import itertools
import logging
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from neuronlens.batches import pad
from neuronlens.errors import UsageError
from neuronlens.hookpoints import HOOK_POINTS, find_sites
from neuronlens.identity import model_identity
from neuronlens.models import LoadedModel, load_model
from neuronlens.serving.batcher import Batcher, Event, Row
from neuronlens.serving.engine import (
    Delta,
    EngineBusy,
    EngineFacts,
    EngineLoad,
    Generation,
    GenerationFailed,
    Sampling,
    Stream,
)
from neuronlens.serving.settings import Limits
from neuronlens.slots import program_key

_log = logging.getLogger(__name__)

MAX_BATCH = 32
_RETRY_SECONDS = 1
_CPU_SHARE, _GPU_SHARE = 0.25, 0.8
"""Of the free memory, for keys and values."""
_CHECK_TOKENS = 12
_CHECK_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3}
_CHECK_ERROR_ELSE = 0.1
"""Relative, of the last hidden states; bfloat16 and float16 round a thousand times more coarsely."""


class TransformersEngine:
    """An `Engine` (see neuronlens.serving.engine) around a LoadedModel."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        model_id: str,
        config_hash: str,
        limits: Limits,
        max_batch: int = MAX_BATCH,
        cache_bytes: int | None = None,
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        self.loaded = loaded
        self._limits = limits
        self._batcher = Batcher(
            loaded,
            max_batch=max_batch,
            max_programs=limits.programs,
            cache_bytes=cache_bytes or free_bytes(loaded.device),
            overrides=overrides,
        )
        self._facts = _facts(loaded, model_id, config_hash, overrides or {})
        self._stop_ids = stop_ids(loaded)
        self._streams: dict[Row, _RowStream] = {}
        self._programs: Counter[object] = Counter()
        self._inbox: deque[Row] = deque()
        self._wake = threading.Condition()
        self._state = "new"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def load(
        cls,
        model_id: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        limits: Limits | None = None,
        max_batch: int = MAX_BATCH,
        cache_bytes: int | None = None,
        overrides: Mapping[str, str] | None = None,
    ) -> "TransformersEngine":
        """The engine of a local folder or a hub model. device "auto" is a GPU where torch sees one.

        Raises UsageError as `load_model` does, and for a model that generates no text.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        config_hash = model_identity(model_id, revision).config_hash
        loaded = load_model(model_id, revision=revision, dtype=dtype, device=device)
        if loaded.kind != "decoder":
            raise UsageError(
                f"{model_id} is a {type(loaded.module).__name__}, which generates no text; expected a decoder. Its "
                "range tables can be served without it: neuronlens serve STORE --tables-only"
            )
        return cls(
            loaded,
            model_id=model_id,
            config_hash=config_hash,
            limits=limits or Limits(),
            max_batch=max_batch,
            cache_bytes=cache_bytes,
            overrides=overrides,
        )

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def ready(self) -> bool:
        return self._state == "ready"

    async def start(self) -> None:
        """Check the model, then begin to work. Raises UsageError for a model that cannot be run step by step."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(_check_steps, self.loaded)
        self._thread = threading.Thread(target=self._work, name="neuronlens-engine", daemon=True)
        self._thread.start()
        self._state = "ready"

    def submit(self, generations: Sequence[Generation]) -> list[Stream]:
        if not self.ready:
            raise EngineBusy("The engine is not ready", reason="engine_not_ready", seconds=_RETRY_SECONDS)
        self._demand_room(generations)
        rows = [Row.of(generation, self.tokenizer, self._stop_ids) for generation in generations]
        for row in rows:
            self._streams[row] = _RowStream(self, row)
            if row.generation.program is not None:
                self._programs[program_key(row.generation.program)] += 1
        with self._wake:
            self._inbox.extend(rows)
            self._wake.notify()
        return [self._streams[row] for row in rows]

    def load_now(self) -> EngineLoad:
        sizes = [self._batcher.batch_sizes.popleft() for _ in range(len(self._batcher.batch_sizes))]
        running = self._batcher.n_running
        return EngineLoad(
            running=running,
            waiting=max(0, len(self._streams) - running),
            programs=len(self._programs),
            batch_sizes=sizes,
        )

    async def close(self) -> None:
        self._state = "closed"
        with self._wake:
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._fail_all("the server is shutting down")

    def forget(self, row: Row) -> None:
        """From the event loop: nobody wants the rest of this row."""
        if self._streams.pop(row, None) is None:
            return
        row.cancelled = True
        if row.generation.program is not None:
            key = program_key(row.generation.program)
            self._programs[key] -= 1
            self._programs += Counter()  # drops what fell to zero

    def _demand_room(self, generations: Sequence[Generation]) -> None:
        n_most = self._batcher.max_batch + self._limits.queue
        if len(self._streams) + len(generations) > n_most:
            found = f"{len(self._streams)} sequences are running or waiting, of at most {n_most}"
            raise EngineBusy(found, reason="queue_full", seconds=_RETRY_SECONDS)
        wanted = {program_key(g.program) for g in generations if g.program is not None} | self._programs.keys()
        if len(wanted) > self._limits.programs:
            found = f"{len(self._programs)} distinct programs are at work, of at most {self._limits.programs}"
            raise EngineBusy(found, reason="too_many_programs", seconds=_RETRY_SECONDS)
        for generation in generations:
            n_tokens = len(generation.prompt_ids) + generation.sampling.max_tokens
            if not self._batcher.fits(n_tokens):
                raise UsageError(
                    f"A sequence of {n_tokens} tokens does not fit the memory for keys and values. Ask for fewer "
                    "max_tokens, or start the server with a larger --cache-gb."
                )

    # --- the engine's thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._state != "closed":
                with self._wake:
                    self._wake.wait_for(lambda: self._inbox or self._batcher.has_work or self._state == "closed")
                    while self._inbox:
                        self._batcher.add(self._inbox.popleft())
                if events := self._batcher.step():
                    self._tell(self._deliver, events)
        except Exception:
            _log.exception("the engine died")
            self._state = "dead"
            self._tell(self._fail_all, "the engine died; the server's log says why")
        finally:
            self._batcher.close()

    def _tell(self, callback: Any, *args: Any) -> None:
        assert self._loop is not None, "the engine was started in an event loop"
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop has ended, and so has everybody who could listen
            _log.debug("nobody is left to tell")

    # --- back in the event loop --------------------------------------------------------------------------------------

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            stream = self._streams.get(event.row)
            if stream is None:
                continue
            stream.put(event.delta or event.error)
            if event.error is not None or (event.delta is not None and event.delta.finish_reason):
                self.forget(event.row)

    def _fail_all(self, why: str) -> None:
        for row, stream in list(self._streams.items()):
            stream.put(GenerationFailed(why))
            self.forget(row)


class _RowStream:
    """The deltas of one row. What nobody has read yet is joined, so a slow reader costs memory for its text alone."""

    def __init__(self, engine: TransformersEngine, row: Row) -> None:
        self._engine = engine
        self._row = row
        self._unread: list[Delta | GenerationFailed | None] = []
        self._news = asyncio.Event()
        self._ended = False

    def put(self, news: Delta | GenerationFailed | None) -> None:
        self._unread.append(news)
        self._news.set()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if not self._ended:
            await self._news.wait()
            self._news.clear()
        if self._ended:
            raise StopAsyncIteration
        unread, self._unread = self._unread, []
        deltas = [news for news in unread if isinstance(news, Delta)]
        failure = next((news for news in unread if isinstance(news, GenerationFailed)), None)
        if failure is not None:
            if not deltas:
                self._ended = True
                raise failure
            self.put(failure)
        delta = _joined(deltas)
        self._ended = delta.finish_reason is not None
        return delta

    def close(self) -> None:
        self._engine.forget(self._row)
        self._ended = True
        self._news.set()


def _joined(deltas: Sequence[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(itertools.chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(itertools.chain.from_iterable(delta.logprobs for delta in deltas)),
        finish_reason=deltas[-1].finish_reason,
        counts=deltas[-1].counts,
    )


def _facts(loaded: LoadedModel, model_id: str, config_hash: str, overrides: Mapping[str, str]) -> EngineFacts:
    # The path of a local folder is nobody's business.
    name = Path(model_id).resolve().name if Path(model_id).is_dir() else model_id
    sites = {}
    for hook_point in HOOK_POINTS:
        try:
            sites[hook_point] = find_sites(loaded.module, [hook_point], "all", overrides)
        except UsageError as error:
            _log.info("no programs at %s: %s", hook_point, error)
    if not sites:
        find_sites(loaded.module, ["mlp_post"], "all", overrides)  # says what the model has instead
    return EngineFacts(
        engine="transformers",
        model_id=name,
        aliases=(model_id,),
        config_hash=config_hash,
        window=loaded.window,
        widths={hook_point: found[0].width for hook_point, found in sites.items()},
        sites={hook_point: tuple(site.layer for site in found) for hook_point, found in sites.items()},
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
    )


def stop_ids(loaded: LoadedModel) -> frozenset[int]:
    """The tokens that end an answer: those of generation_config.json and the tokenizer's own."""
    named = getattr(getattr(loaded.module, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return frozenset(i for i in [*listed, loaded.tokenizer.eos_token_id] if i is not None)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    return int(psutil.virtual_memory().available * _CPU_SHARE)


@torch.inference_mode()
def _check_steps(loaded: LoadedModel) -> None:
    """Two texts, step by step in our cache, must give what the model gives without one: else a model whose attention
    we do not know would generate nonsense in silence. Raises UsageError."""
    n_rows = int(loaded.tokenizer.vocab_size)
    n_tokens = min(_CHECK_TOKENS, loaded.window)
    texts = [[(7 + 31 * (i + 5 * t)) % n_rows for t in range(n_tokens - i)] for i in range(2)]
    batcher = Batcher(loaded, max_batch=2, max_programs=1, cache_bytes=1 << 30, prefill_tokens=1 + n_tokens // 3)
    greedy = Sampling(max_tokens=1, temperature=0, top_logprobs=1)
    for i, ids in enumerate(texts):
        batcher.add(
            Row.of(Generation(id=f"check-{i}", prompt_ids=tuple(ids), sampling=greedy), loaded.tokenizer, frozenset())
        )
    found: dict[str, float] = {}
    while batcher.has_work:
        for event in batcher.step():
            if event.error is not None:
                raise UsageError(f"{type(loaded.module).__name__} cannot be served: {event.error}.") from event.error
            assert event.delta is not None
            found[event.row.generation.id] = event.delta.logprobs[0].logprob
    batch = pad(texts, pad_id=loaded.pad_id).to(loaded.device)
    hidden_BTD = loaded.hidden(batch)
    logits_BV = loaded.logits(hidden_BTD[torch.arange(2), batch.last_B])
    expected_B = torch.log_softmax(logits_BV.float(), dim=1).max(dim=1).values.tolist()
    limit = _CHECK_ERROR.get(loaded.dtype, _CHECK_ERROR_ELSE)
    for i, expected in enumerate(expected_B):
        error = abs(found[f"check-{i}"] - expected) / max(1.0, abs(expected))
        if not error <= limit:
            raise UsageError(
                f"{type(loaded.module).__name__}, run step by step, says {found[f'check-{i}']:.4f} where the whole "
                f"model says {expected:.4f} (log probability of the likeliest token); expected the same. This "
                "architecture cannot be served; its tables can: --tables-only."
            )
