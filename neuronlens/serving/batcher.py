"""Step-level batching: sequences join and leave between any two forward passes, each under its own program.

    batcher = Batcher(loaded, max_batch=32)
    row = Row.of(generation, loaded.tokenizer, stop_ids)
    batcher.add(row)
    while batcher.has_work:
        for event in batcher.step():
            ...                                # event.row, and its event.delta or event.error

A step first runs prompts: whole ones, and of the next one as much as fits `prefill_tokens`, in one forward pass. Then
every running sequence takes one token, in one forward pass. Prompts stand at the left in both, each in a place of the
cache of its own, so that a sequence's tokens do not depend on what stands beside it. One thread uses a batcher.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuronlens.hookpoints import Site, attach, config_of, find_sites
from neuronlens.models import LoadedModel
from neuronlens.serving.detokenizer import TextStream, control_ids
from neuronlens.serving.engine import Counts, Delta, FinishReason, Generation, GenerationFailed, TokenLogprob
from neuronlens.serving.sampling import Choice, Sampler, choose
from neuronlens.serving.slot_cache import SlotCache
from neuronlens.slots import ProgramSlots, Step

_log = logging.getLogger(__name__)

PREFILL_TOKENS = 512
_MASKS_BY_LAYER_TYPE = frozenset({"qwen2", "qwen3", "gemma2", "gemma3_text"})
"""Models that take a mask for each of the config's layer types."""


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """One sequence on its way: what it asked for, and how far it is. n_cached counts the tokens in the cache."""

    generation: Generation
    text: TextStream
    sampler: Sampler
    stop_ids: frozenset[int]
    slot: int = 0
    n_cached: int = 0
    n_generated: int = 0
    next_id: int | None = None
    counts_C: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    cancelled: bool = False

    @classmethod
    def of(cls, generation: Generation, tokenizer: Any, stop_ids: frozenset[int]) -> "Row":
        control = control_ids(tokenizer, tuple(stop_ids))
        return cls(
            generation=generation,
            text=TextStream(tokenizer, generation.prompt_ids, generation.sampling.stop, control),
            sampler=Sampler(generation.sampling, generation.index),
            stop_ids=stop_ids,
        )

    @property
    def n_reserved(self) -> int:
        """Tokens that the cache must have room for."""
        return len(self.generation.prompt_ids) + self.generation.sampling.max_tokens

    @property
    def n_prompt_left(self) -> int:
        return max(0, len(self.generation.prompt_ids) - self.n_cached)

    def accept(self, choice: Choice, decode: Callable[[int], str]) -> Delta:
        """What the chosen token adds to the answer."""
        self.next_id = choice.token_id
        self.n_generated += 1
        text = self.text.push(choice.token_id)
        reason: FinishReason | None = None
        if choice.token_id in self.stop_ids or self.text.stopped:
            reason = "stop"
        elif self.n_generated == self.generation.sampling.max_tokens:
            reason = "length"
        if reason:
            text += self.text.finish()
        logprobs = () if choice.logprob is None else (_token_logprob(choice, choice.logprob, decode),)
        return Delta(
            text=text,
            token_ids=(choice.token_id,),
            logprobs=logprobs,
            finish_reason=reason,
            counts=self.counts() if reason else None,
        )

    def counts(self) -> Counts | None:
        """What the program did so far; None without a program."""
        if self.generation.program is None:
            return None
        n_rules = len(self.generation.program.rules)
        changed = self.counts_C[1:].tolist() + [0] * (n_rules + 1 - len(self.counts_C))
        return Counts(tested=int(self.counts_C[0]), changed_by_rule=tuple(changed[:n_rules]))

    def add_counts(self, counts_C: np.ndarray) -> None:
        if len(counts_C) > len(self.counts_C):
            self.counts_C = np.pad(self.counts_C, (0, len(counts_C) - len(self.counts_C)))
        self.counts_C[: len(counts_C)] += counts_C


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What became of a row in a step: a delta, or the error that ended it."""

    row: Row
    delta: Delta | None = None
    error: GenerationFailed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """The tokens of one row that go through the model in a forward pass. is_last: the next token is chosen after."""

    row: Row
    ids: Sequence[int]
    is_last: bool
    is_prompt: bool

    @property
    def slot(self) -> int:
        phase = "prompt" if self.is_prompt else "generation"
        return self.row.slot if phase in self.row.generation.phases else 0


class Batcher:
    """The sequences of one model. cache_bytes bounds the memory for keys and values; a sequence that needs more than
    that alone is refused by `fits`."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_batch: int,
        max_programs: int,
        cache_bytes: int,
        prefill_tokens: int = PREFILL_TOKENS,
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        self.loaded = loaded
        self.max_batch = max_batch
        self.prefill_tokens = prefill_tokens
        self.batch_sizes: deque[int] = deque(maxlen=10_000)
        """Of the forward passes since somebody last emptied it."""
        self._overrides = overrides
        self._cache = SlotCache(max_tokens=loaded.window)
        self._max_cached = max(1, cache_bytes // _bytes_per_token(loaded))
        self._slots = ProgramSlots(max_programs)
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._partial: Row | None = None
        self._step: Step | None = None
        self._hooks = contextlib.ExitStack()
        self._hooked: tuple[Site, ...] = ()
        self._masks_of = _masks_of(loaded)

    @property
    def n_running(self) -> int:
        """Rows with a place in the cache; row i of the running ones is at place i, a partly read prompt after them."""
        return len(self._running) + (self._partial is not None)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._partial)

    def fits(self, n_tokens: int) -> bool:
        """Would a sequence of so many tokens fit the cache if it were alone?"""
        n_places, n_columns = SlotCache(self.loaded.window).sizes(n_places=1, n_tokens=n_tokens)
        return n_places * n_columns <= self._max_cached

    def add(self, row: Row) -> None:
        self._waiting.append(row)

    def close(self) -> list[Row]:
        """Let go of the model; the rows that were not finished come back."""
        rows = [*self._running, *([self._partial] if self._partial else []), *self._waiting]
        self._running, self._partial = [], None
        self._waiting.clear()
        self._cache.clear()
        self._hooks.close()
        self._hooked = ()
        return rows

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One round: prompts, then a token for every running sequence."""
        self._drop_cancelled()
        events = []
        prompts = list(self._next_prompts())
        if prompts:
            first = len(self._running)
            events += self._run(prompts, first)
            for piece in prompts:
                if piece.is_last:
                    self._running.append(piece.row)
                else:
                    self._partial = piece.row
        self._drop_finished(events)
        if self._running:
            pieces = [_Piece(row=r, ids=(_known(r.next_id),), is_last=True, is_prompt=False) for r in self._running]
            decoded = self._run(pieces, 0)
            self._drop_finished(decoded)
            events += decoded
        return events

    # --- who runs --------------------------------------------------------------------------------------------------

    def _next_prompts(self) -> Iterator[_Piece]:
        """The partly read prompt and those that wait, as far as places, memory and the budget of tokens go. Only the
        last piece can be a part of its prompt."""
        budget = self.prefill_tokens
        if self._partial:
            piece = _piece_of_prompt(self._partial, budget)
            budget -= len(piece.ids)
            self._partial = None
            yield piece
        n_joined = 0 if budget == self.prefill_tokens else 1
        while budget > 0 and self._waiting and self._has_place(n_joined, self._waiting[0]):
            row = self._waiting.popleft()
            if row.cancelled:
                continue
            if row.generation.program is not None:
                row.slot = self._slots.load(row.generation.program)
                self._hook()
            piece = _piece_of_prompt(row, budget)
            budget -= len(piece.ids)
            n_joined += 1
            self._cache.reserve(n_places=len(self._running) + n_joined, n_tokens=row.n_reserved)
            yield piece

    def _has_place(self, n_joined: int, row: Row) -> bool:
        n_places = len(self._running) + n_joined + 1
        if n_places > self.max_batch:
            return False
        if n_places == 1:
            self._cache.clear()
        places, tokens = self._cache.sizes(n_places=n_places, n_tokens=row.n_reserved)
        return places * tokens <= self._max_cached

    def _drop_finished(self, events: Sequence[Event]) -> None:
        ended = {id(e.row) for e in events if e.error is not None or (e.delta is not None and e.delta.finish_reason)}
        self._drop(lambda row: id(row) in ended)

    def _drop_cancelled(self) -> None:
        self._drop(lambda row: row.cancelled)
        self._waiting = deque(row for row in self._waiting if not row.cancelled)

    def _drop(self, is_gone: Callable[[Row], bool]) -> None:
        """Free the places of rows: the last running row moves into a gap, and a partly read prompt after it."""
        if self._partial and is_gone(self._partial):
            self._leave(self._partial, len(self._running))
            self._partial = None
        for place in range(len(self._running) - 1, -1, -1):
            if not is_gone(self._running[place]):
                continue
            last = len(self._running) - 1
            self._leave(self._running[place], place)
            if place != last:
                self._cache.move(last, place)
                self._running[place] = self._running[last]
            self._running.pop()
            if self._partial:
                self._cache.move(last + 1, last)

    def _leave(self, row: Row, place: int) -> None:
        self._cache.give_up(place)
        if row.slot:
            self._slots.release(row.slot)

    # --- the forward pass ------------------------------------------------------------------------------------------

    def _run(self, pieces: Sequence[_Piece], first: int) -> list[Event]:
        """Run the pieces, whose rows are at the places from `first` on, and choose the next tokens.

        Where a pass fails, each row is run alone, so that only the row that made it fail ends.
        """
        try:
            choices, counts_BC = self._forward(pieces, first)
        except Exception as error:
            if len(pieces) > 1:
                _log.warning("a forward pass over %d rows failed (%s); each is run alone", len(pieces), error)
                return [event for b, piece in enumerate(pieces) for event in self._run([piece], first + b)]
            _log.exception("sequence %s failed", pieces[0].row.generation.id)
            return [Event(row=pieces[0].row, error=GenerationFailed(f"the model failed on this sequence: {error}"))]
        self.batch_sizes.append(len(pieces))
        events = []
        for piece, counts_C, choice in zip(pieces, counts_BC, choices, strict=True):
            piece.row.n_cached += len(piece.ids)
            piece.row.add_counts(counts_C)
            if piece.is_last:
                events.append(self._event(piece.row, choice))
        return events

    def _forward(self, pieces: Sequence[_Piece], first: int) -> tuple[list[Choice | None], np.ndarray]:
        """The token chosen after each piece (None where its logits are not numbers, or its prompt goes on), and the
        counts [B, 1 + rules] of this pass."""
        device = self.loaded.device
        starts = [piece.row.n_cached for piece in pieces]
        lengths = [len(piece.ids) for piece in pieces]
        n_tokens = max(lengths)
        ids_BT = torch.tensor([[*piece.ids, *[self.loaded.pad_id] * (n_tokens - len(piece.ids))] for piece in pieces])
        real_BT = torch.arange(n_tokens)[None] < torch.tensor(lengths)[:, None]
        start_B1 = torch.tensor(starts, device=device)[:, None]
        # Pads must not ask for a position that the model does not have.
        positions_BT = (start_B1 + torch.arange(n_tokens, device=device)).clamp(max=self.loaded.window - 1)
        self._cache.aim(first=first, starts=starts, n_tokens=n_tokens, device=device)
        masks = self._masks_of(start_B1 + torch.arange(n_tokens, device=device), max(starts) + n_tokens)
        self._step = step = self._slots.step([piece.slot for piece in pieces], real_BT)
        try:
            hidden_BTD = self.loaded.hidden_after(ids_BT.to(device), positions_BT, masks, self._cache)
        finally:
            self._step = None
        ends = [b for b, piece in enumerate(pieces) if piece.is_last]
        choices: list[Choice | None] = [None] * len(pieces)
        if ends:
            logits_EV = self.loaded.logits(hidden_BTD[ends, [lengths[b] - 1 for b in ends]])
            for b, choice in zip(ends, choose(logits_EV, [pieces[b].row.sampler for b in ends]), strict=True):
                choices[b] = choice
        counts_BC = step.counts() if step else np.zeros((len(pieces), 1), dtype=np.int64)
        return choices, counts_BC

    def _event(self, row: Row, choice: Choice | None) -> Event:
        if choice is not None:
            return Event(row=row, delta=row.accept(choice, self._decode))
        place = f"token {row.n_generated + 1}"
        if row.slot:
            message = f"the intervention drove the model to logits that are not numbers at {place}"
            return Event(row=row, error=GenerationFailed(message, by_intervention=True))
        return Event(row=row, error=GenerationFailed(f"the model's logits are not numbers at {place}"))

    def _decode(self, token_id: int) -> str:
        return str(self.loaded.tokenizer.decode([token_id]))

    def _hook(self) -> None:
        """Hook the sites at which the loaded programs act, where they are others than before."""
        wanted = self._slots.sites
        if wanted <= {(site.hook_point, site.layer) for site in self._hooked}:
            return
        hook_points = sorted({hook_point for hook_point, _ in wanted})
        found = find_sites(self.loaded.module, hook_points, "all", self._overrides)
        self._hooks.close()
        self._hooked = tuple(site for site in found if (site.hook_point, site.layer) in wanted)
        self._hooks.enter_context(attach(self.loaded.module, self._hooked, self._see))

    def _see(self, index: int, x_BTN: Tensor) -> Tensor | None:
        if self._step is None:
            return None
        site = self._hooked[index]
        return self._step.run(site.hook_point, site.layer, x_BTN)


def _piece_of_prompt(row: Row, budget: int) -> _Piece:
    ids = row.generation.prompt_ids[row.n_cached : row.n_cached + budget]
    return _Piece(row=row, ids=ids, is_last=len(ids) == row.n_prompt_left, is_prompt=True)


def _known(token_id: int | None) -> int:
    assert token_id is not None, "a running row has chosen a token"
    return token_id


def _token_logprob(choice: Choice, logprob: float, decode: Callable[[int], str]) -> TokenLogprob:
    top = tuple((token_id, decode(token_id), p) for token_id, p in choice.top)
    return TokenLogprob(token_id=choice.token_id, text=decode(choice.token_id), logprob=logprob, top=top)


def _masks_of(loaded: LoadedModel) -> Callable[[Tensor, int], Any]:
    """(positions [B, T], tokens in the cache) -> what the model takes as its attention mask."""
    config = config_of(loaded.module)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or []

    def full(positions_BT: Tensor, n_cached: int) -> Tensor:
        return _additive(positions_BT, n_cached, None, loaded.dtype)

    def sliding(positions_BT: Tensor, n_cached: int) -> Tensor:
        return _additive(positions_BT, n_cached, window, loaded.dtype)

    def by_type(positions_BT: Tensor, n_cached: int) -> dict[str, Tensor]:
        made = {"full_attention": full, "sliding_attention": sliding}
        return {kind: made[kind](positions_BT, n_cached) for kind in dict.fromkeys(layer_types)}

    if config.model_type in _MASKS_BY_LAYER_TYPE:
        return by_type
    return sliding if window is not None else full


def _additive(positions_BT: Tensor, n_cached: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, n_cached]: 0 where a token is seen, the lowest number elsewhere."""
    column_C = torch.arange(n_cached, device=positions_BT.device)
    hidden_BTC = column_C > positions_BT[:, :, None]
    if window is not None:
        hidden_BTC |= column_C <= positions_BT[:, :, None] - window
    mask_BTC = torch.zeros(hidden_BTC.shape, dtype=dtype, device=positions_BT.device)
    return mask_BTC.masked_fill_(hidden_BTC, torch.finfo(dtype).min)[:, None]


def _bytes_per_token(loaded: LoadedModel) -> int:
    """What one token takes in the cache, at most: as if every head had keys and values of its own."""
    config = config_of(loaded.module)
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * 2 * n_heads * head_size * torch.empty(0, dtype=loaded.dtype).element_size())
