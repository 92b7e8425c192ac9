"""What the server asks of an engine, and nothing else: the transformers engine and the vLLM engine both answer this.

    streams = engine.submit(generations)       # all of them or none: EngineBusy
    async for delta in streams[0]:
        ...

An engine owns a model. It runs many generations at once, each under its own program, and gives to each exactly the
tokens that it would have had alone. The caller has checked the request (`steering`, `openai_routes`) before it asks.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from neuronlens.programs import Program

Phase = Literal["prompt", "generation"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_p in (0, 1]; seed None draws one.

    top_logprobs None asks for no log probabilities, a number for the chosen token's and for that many most probable
    ones. They are those of the model's own distribution, before temperature and top_p.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One sequence to generate: a prompt of at least one token, and the program that it runs under in these phases.

    `id` names it in logs. `index` tells apart the choices of one request: each has its own stream of random numbers.
    The prompt phase is the forward pass over the prompt's tokens, the generation phase every later one.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    index: int = 0
    program: Program | None = None
    phases: frozenset[Phase] = frozenset({"prompt", "generation"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token, its text, its natural log probability, and the most probable ones with theirs."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a program did to one sequence, as `neuronlens.interventions.Applied` counts it; changed_by_rule has one
    number a rule, in the rules' order, and sums to `changed`."""

    tested: int = 0
    changed_by_rule: tuple[int, ...] = ()

    @property
    def changed(self) -> int:
        return sum(self.changed_by_rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What came since the last one: text that is certain not to belong to a stop string, and the tokens behind it.

    The last delta of a sequence, and only that one, has a finish_reason and the counts of the whole sequence.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    counts: Counts | None = None


class EngineBusy(Exception):
    """No room for a request now; try again after `seconds`. reason: "queue_full", "too_many_programs", or
    "engine_not_ready" while it starts, ends or has died."""

    def __init__(self, message: str, *, reason: str, seconds: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.seconds = seconds


class GenerationFailed(Exception):
    """This sequence cannot go on; the others do. `by_intervention` is True where its program drove the model to
    logits that are not numbers."""

    def __init__(self, message: str, *, by_intervention: bool = False) -> None:
        super().__init__(message)
        self.by_intervention = by_intervention


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a client may know of the engine and its model. model_id is its public name, aliases are others that requests
    may use. sites: hook point -> layers at which programs may act."""

    engine: str
    model_id: str
    aliases: tuple[str, ...] = ()
    config_hash: str
    window: int
    widths: Mapping[str, int]
    sites: Mapping[str, tuple[int, ...]]
    dtype: str
    device: str


@dataclass(slots=True, kw_only=True)
class EngineLoad:
    """How busy the engine is, for /metrics: sequences in the batch and waiting, distinct programs at work, and the
    size of every batch since the last look."""

    running: int = 0
    waiting: int = 0
    programs: int = 0
    batch_sizes: list[int] = field(default_factory=list)


class Stream(Protocol):
    """The deltas of one sequence, in order. It waits for no reader: what nobody has read yet is in the next delta."""

    def __aiter__(self) -> AsyncIterator[Delta]:
        """Raises GenerationFailed where the sequence cannot go on."""

    def close(self) -> None:
        """Free the sequence's place, finished or not. May be called twice."""


class Engine(Protocol):
    """A model at work."""

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def tokenizer(self) -> Any:
        """The model's fast tokenizer (transformers')."""

    async def start(self) -> None:
        """Begin to work; afterwards `ready` is True."""

    @property
    def ready(self) -> bool:
        """False before `start`, after `close`, and where the engine has died."""

    def submit(self, generations: Sequence[Generation]) -> list[Stream]:
        """Take on all of these sequences, from the event loop's thread. Raises EngineBusy, and takes none, where there
        is no room for all."""

    def load_now(self) -> EngineLoad:
        """How busy it is; empties `batch_sizes`."""

    async def close(self) -> None:
        """Stop; sequences that still run end with GenerationFailed."""
