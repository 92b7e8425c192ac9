"""Text: GET /v1/models, POST /v1/completions and POST /v1/chat/completions, with OpenAI's shapes and `intervention`."""

from collections.abc import Sequence

from fastapi import APIRouter, Depends, Request, Response

from neuronlens.serving.answers import ChatShape, CompletionShape, Shape
from neuronlens.serving.auth import may_read
from neuronlens.serving.bodies import JsonRoute
from neuronlens.serving.engine import Engine
from neuronlens.serving.errors import ApiError, responses
from neuronlens.serving.event_stream import EventStream
from neuronlens.serving.exchange import Exchange, unless_gone
from neuronlens.serving.prompts import Prompt, chat_prompt, completion_prompts
from neuronlens.serving.schemas import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    GenerationRequest,
    ModelCard,
    ModelList,
)
from neuronlens.serving.service import Service, service_of

_ERRORS = responses(400, 401, 404, 408, 409, 413, 415, 429, 500, 503)
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {"type": "string", "description": "A chunk of the answer as JSON, an error as JSON, or [DONE]."}
    },
}
_STREAM = {"text/event-stream": {"itemSchema": _EVENT}}

_READING_SECONDS = 10
"""So much longer than a request may take, a client may take to read its answer."""

router = APIRouter(tags=["text"], route_class=JsonRoute, dependencies=[Depends(may_read)])


@router.get("/v1/models", summary="Which model is served?", responses=responses(401))
async def models(request: Request) -> ModelList:
    """The one model, and where rules may act in it."""
    return ModelList(data=[_card(service_of(request))])


@router.get("/v1/models/{model:path}", summary="What is this model?", responses=responses(401, 404))
async def model(request: Request, model: str) -> ModelCard:
    """The model by the id that /v1/models gives."""
    service = service_of(request)
    _check_model(service, model)
    return _card(service)


@router.post(
    "/v1/completions",
    response_model=Completion,
    response_model_exclude_none=False,
    responses={200: {"content": _STREAM}, **_ERRORS},
    summary="Continue a text",
)
async def completions(request: Request, asked: CompletionRequest) -> Response:
    """OpenAI's completions, steered by `intervention`. With `stream`, the answer is a stream of server-sent events."""
    service = service_of(request)
    _check_model(service, asked.model)
    prompts = await completion_prompts(_engine(service), asked, service.settings.limits)
    return await _answer(request, service, asked, prompts, CompletionShape())


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    response_model_exclude_none=False,
    responses={200: {"content": _STREAM}, **_ERRORS},
    summary="Answer a chat",
)
async def chat_completions(request: Request, asked: ChatRequest) -> Response:
    """OpenAI's chat completions, steered by `intervention`, for models with a chat template."""
    service = service_of(request)
    _check_model(service, asked.model)
    prompts = await chat_prompt(_engine(service), asked, service.settings.limits, service.chat_template)
    return await _answer(request, service, asked, prompts, ChatShape())


async def _answer(
    request: Request,
    service: Service,
    asked: GenerationRequest,
    prompts: Sequence[Prompt],
    shape: Shape,
) -> Response:
    exchange = await Exchange.begin(request, service, asked, prompts, shape)
    if not asked.stream:
        try:
            return Response(await unless_gone(request, exchange.whole()), media_type="application/json")
        finally:
            exchange.close()
    events = exchange.events()
    try:
        # What goes wrong up to the first token still gets a status of its own.
        first = await unless_gone(request, anext(events))
    except BaseException:
        exchange.close()
        raise
    seconds = service.settings.limits.request_seconds + _READING_SECONDS
    return EventStream(first, events, exchange.close, seconds)


def _engine(service: Service) -> Engine:
    assert service.engine is not None, "these routes are mounted only where there is an engine"
    return service.engine


def _card(service: Service) -> ModelCard:
    facts = _engine(service).facts
    return ModelCard(
        id=facts.model_id,
        created=int(service.lifecycle.started_seconds),
        owned_by="neuronlens",
        max_model_len=facts.window,
        engine=facts.engine,
        dtype=facts.dtype,
        hook_points={name: list(layers) for name, layers in facts.sites.items()},
    )


def _check_model(service: Service, name: str) -> None:
    facts = _engine(service).facts
    if name not in (facts.model_id, *facts.aliases):
        message = f"There is no model {name!r} here. This server runs {facts.model_id!r}."
        raise ApiError(404, message, code="model_not_found", param="model")
