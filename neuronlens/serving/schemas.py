"""What the OpenAI-shaped routes take and give. A field that is not here is refused by name, never ignored.

One thing is added to OpenAI's shapes: `intervention`, in the request and in the answer.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from neuronlens import programs
from neuronlens.serving.engine import FinishReason, Phase

MAX_RULES = 1_000
"""However a server is started."""
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "metadata": ({},),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields of OpenAI's that we do not have, and the values that ask for nothing; null does so too."""


# Strict: "1" is no number and 1 is no true, as the schema says.
Int = Annotated[int, Field(strict=True)]
Float = Annotated[float, Field(strict=True)]
Bool = Annotated[bool, Field(strict=True)]

T = TypeVar("T")
# A list ends at its first fault: a sentence for each of 300,000 would take ten seconds, in which nobody is answered.
Items = Annotated[list[T], Field(fail_fast=True)]
FixedItems = Annotated[tuple[T, ...], Field(fail_fast=True)]

Texts = Annotated[Items[str], Field(min_length=1)]
TokenIds = Annotated[Items[Annotated[Int, Field(ge=0)]], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
# As a schema's bounds 2**63 is rounded, and promises more than there is.
Seed = Annotated[Int, Field(ge=-(2**63), lt=2**63), WithJsonSchema({"type": "integer", "format": "int64"})]


class Rule(programs.Rule):
    """What is done to the values that belong to one concept.

    Inside the range, x becomes: zero: 0; mean: the concept's mean; others: the mean of all other concepts; set:
    `value`; dampen: `factor` * x; adaptive: x * `factor` * |x - centre| / half width; soften: x * (1 - posterior),
    without tau. others and soften are for tables of any method but paper. Left out or null, layers, hook_points,
    neurons and top_fraction mean all that the table has, and tau the table's own bounds.
    """

    factor: Float | None = Field(default=None, ge=0, le=1)
    value: Float | None = Field(default=None, allow_inf_nan=False)
    layers: FixedItems[Annotated[Int, Field(ge=0)]] | None = Field(default=None, json_schema_extra={"minItems": 1})
    hook_points: FixedItems[str] | None = Field(default=None, json_schema_extra={"minItems": 1})
    tau: Float | None = Field(default=None, gt=0, allow_inf_nan=False)
    top_fraction: Float | None = Field(default=None, gt=0, le=1)
    neurons: FixedItems[Annotated[Int, Field(ge=0)]] | None = Field(default=None, json_schema_extra={"minItems": 1})


class Intervention(BaseModel):
    """Which rules of which table hold for this request.

    table: an id or "latest". mode "neuron" takes every value of the rules' neurons, for comparison, in place of those
    inside a range. conflicts: where the ranges of two rules share values of a neuron, "order" lets the earlier rule
    decide, "refuse" refuses the request. compare_baseline: generate without the rules too, with the same seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str = Field(default="latest", max_length=100)
    rules: Items[Rule] = Field(min_length=1, max_length=MAX_RULES)
    phases: Items[Phase] = Field(default=["prompt", "generation"], min_length=1, max_length=2)
    mode: Literal["range", "neuron"] = "range"
    conflicts: Literal["order", "refuse"] = "order"
    compare_baseline: Bool = False


class StreamOptions(BaseModel):
    """OpenAI's stream_options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_usage: Bool = False


class GenerationRequest(BaseModel):
    """What both routes take. A value of null means the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    temperature: Float | None = Field(default=1.0, ge=0, le=2)
    top_p: Float | None = Field(default=1.0, gt=0, le=1)
    n: Int | None = Field(default=1, ge=1)
    max_tokens: Int | None = Field(default=None, ge=1)
    stop: Stop | Annotated[Items[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Seed | None = None
    stream: Bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=256)
    intervention: Intervention | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if not _asks_for_nothing(name, value)}

    @model_validator(mode="after")
    def _options_have_a_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true, or leave it out")
        return self

    @property
    def top_logprobs_asked(self) -> int | None:
        """How many of the most probable tokens each chosen one comes with; None: no log probabilities."""
        raise NotImplementedError

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. prompt: a text, token ids, or a list of either. logprobs: how many tokens beside the chosen
    one."""

    prompt: str | Texts | TokenIds | Annotated[Items[TokenIds], Field(min_length=1)]
    logprobs: Int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def top_logprobs_asked(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[TextPart]
    name: str | None = Field(default=None, max_length=256)

    def as_template_input(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name is not None else {})


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. max_completion_tokens is the newer name of max_tokens."""

    messages: Items[Message] = Field(min_length=1)
    max_completion_tokens: Int | None = Field(default=None, ge=1)
    logprobs: Bool | None = False
    top_logprobs: Int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set logprobs to true, or leave it out")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names of one field; give one of them")
        return self

    @property
    def top_logprobs_asked(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


# --- answers ---------------------------------------------------------------------------------------------------------


class Baseline(BaseModel):
    """What the model says without the rules, for one choice."""

    index: int
    text: str
    finish_reason: FinishReason


class AppliedIntervention(BaseModel):
    """What the rules did, over all choices: of the named neurons' values at every position of every forward pass,
    `tested` were compared with a range and `changed` were inside one and replaced."""

    id: str
    table: str
    layers: list[int]
    hook_points: list[str]
    neurons: int
    phases: list[Phase]
    mode: Literal["range", "neuron"]
    tested: int
    changed: int
    changed_by_rule: list[int]
    engine: str
    baseline: list[Baseline] | None = None


class Usage(BaseModel):
    """Tokens; prompts count once for each choice that they have."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Parallel lists over the tokens of a choice."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """OpenAI's text completion, and `intervention` where one was asked for."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    intervention: AppliedIntervention | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """OpenAI's chat completion, and `intervention` where one was asked for."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    intervention: AppliedIntervention | None = None


class ModelCard(BaseModel):
    """The model that is served, and where rules may act in it: hook point -> its layers."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    engine: str
    dtype: str
    hook_points: dict[str, list[int]]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def _asks_for_nothing(name: str, value: Any) -> bool:
    if name not in _NEUTRAL:
        return False
    return value is None or any(
        value == neutral and type(value) in (type(neutral), int, float) for neutral in _NEUTRAL[name]
    )
