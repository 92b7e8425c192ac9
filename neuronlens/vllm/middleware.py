"""What stands between vLLM's middleware and its routes: keys, our own routes, and requests that carry `intervention`.

Plain ASGI, and nothing of vLLM's handlers: a request for text is rewritten before they see it (a ticket and a cache
salt in place of `intervention`), and their answer on its way out.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neuronlens.errors import UsageError
from neuronlens.serving.auth import Keys, authorization_of
from neuronlens.serving.engine import EngineBusy
from neuronlens.serving.errors import ApiError, answer
from neuronlens.serving.metrics import Metrics
from neuronlens.serving.schemas import Intervention
from neuronlens.serving.steering import Steered, Steering
from neuronlens.vllm.admission import Admission, Admitted
from neuronlens.vllm.config import KEY
from neuronlens.vllm.offline import salt_of
from neuronlens.vllm.rewriting import Rewriter

_log = logging.getLogger(__name__)

TEXT_PATHS = ("/v1/completions", "/v1/chat/completions")
_OUR_PATHS = ("/v1/tables", "/v1/neurons")
_MODELS = "/v1/models"
_OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", "/load", "/docs", "/redoc", "/openapi.json"})
"""Read without a key: they tell nothing that a key protects, and probes have none to send."""
_FIELD, _XARGS, _SALT = "intervention", "vllm_xargs", "cache_salt"
_SEED_BITS = 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What the middleware works with; there once vLLM's engine is up. steering and admission are None where vLLM was
    started with another worker class."""

    tables: ASGIApp
    keys: Keys
    metrics: Metrics
    steering: Steering | None = None
    admission: Admission | None = None
    model_card: dict[str, Any] = field(default_factory=dict)
    """What our card of the model says beyond vLLM's."""


class InterventionMiddleware:
    """`desk` gives the Desk, or None while vLLM starts."""

    def __init__(self, app: ASGIApp, desk: Callable[[], Desk | None]) -> None:
        self.app = app
        self._desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        desk = self._desk()
        if scope["type"] != "http" or desk is None:
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        try:
            if scope["method"] == "POST" or path not in _OPEN_PATHS:
                desk.keys.caller(authorization_of(scope))
            if any(path == ours or path.startswith(ours + "/") for ours in _OUR_PATHS):
                await desk.tables(scope, receive, send)
            elif scope["method"] == "GET" and path == _MODELS:
                await self._models(desk, scope, send)
            elif scope["method"] == "POST":
                await self._post(desk, scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except ApiError as error:
            await answer(error)(scope, receive, send)

    async def _models(self, desk: Desk, scope: Scope, send: Send) -> None:
        status, body = await _ask(self.app, scope, None)
        if status == 200:
            models = json.loads(body)
            models["data"] = [card | desk.model_card for card in models["data"]]
            body = json.dumps(models, ensure_ascii=False).encode()
        await Response(body, status, media_type="application/json")(scope, _nothing_more, send)

    async def _post(self, desk: Desk, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body_of(receive)
        fields = _fields_that_concern_us(body)
        if fields is None:
            await self.app(scope, _replay(body, receive), send)
            return
        asked = _checked(scope["path"], fields)
        if asked is None:
            await self.app(scope, _replay(json.dumps(fields).encode(), receive), send)
            return
        if desk.steering is None or desk.admission is None:
            raise ApiError(
                400,
                "This server was started without our worker class, so it cannot steer. Start it with --worker-cls "
                "neuronlens.vllm.Worker.",
                code="no_steering",
                param=_FIELD,
            )
        steered = await asyncio.to_thread(desk.steering.steer, asked)
        try:
            async with desk.admission.admitted(steered.program, asked.phases) as ticket:
                await self._steer(desk, steered, ticket, fields, scope, receive, send)
        except EngineBusy as busy:
            desk.metrics.rejected(busy.reason)
            raise ApiError(429, f"{busy}. Try again.", code=busy.reason, retry_after_seconds=busy.seconds) from busy
        except UsageError as error:
            raise ApiError(400, str(error), code="bad_rule", param="intervention.rules") from error

    async def _steer(
        self,
        desk: Desk,
        steered: Steered,
        ticket: Admitted,
        fields: dict[str, Any],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        asked = steered.asked
        baseline: asyncio.Task[list[dict[str, Any]] | None] | None = None
        if asked.compare_baseline:
            if fields.get("seed") is None:
                fields["seed"] = secrets.randbits(_SEED_BITS)
            baseline = asyncio.ensure_future(self._baseline(scope, fields))

        async def finish() -> dict[str, Any]:
            counts = await ticket.counts()
            applied = steered.describe([counts], "vllm").model_dump()
            desk.metrics.saw_program(counts.tested, steered.changed_by_action(counts))
            if baseline is not None:
                applied["baseline"] = await baseline
            return {_FIELD: applied}

        own = {
            _XARGS: {**(fields.get(_XARGS) or {}), KEY: ticket.name},
            _SALT: salt_of(steered.program, asked.phases, fields.get(_SALT)),
        }
        rewriter = Rewriter(send, finish, n_choices=_n_choices(fields))
        try:
            await self.app(scope, _replay(json.dumps(fields | own).encode(), receive), rewriter.send)
        finally:
            if baseline is not None:
                baseline.cancel()

    async def _baseline(self, scope: Scope, fields: dict[str, Any]) -> list[dict[str, Any]] | None:
        """What the model says without the rules, in a request of its own; None where vLLM refused it."""
        status, body = await _ask(self.app, scope, {**fields, "stream": False, "stream_options": None})
        if status != 200:
            _log.warning("the baseline of a request failed with status %s: %s", status, body[:500])
            return None
        return [
            {
                "index": choice["index"],
                "text": choice["text"] if "text" in choice else choice["message"]["content"],
                "finish_reason": choice["finish_reason"],
            }
            for choice in json.loads(body)["choices"]
        ]


def _fields_that_concern_us(body: bytes) -> dict[str, Any] | None:
    """The body's fields, where it may hold one of ours; None for all that passes as it came."""
    may_hold = f'"{_FIELD}"'.encode() in body or f'"{KEY}"'.encode() in body or b"\\u" in body
    if not may_hold:
        return None
    try:
        fields = json.loads(body)
    except ValueError:
        return None  # vLLM says what is wrong with it
    if not isinstance(fields, dict):
        return None
    xargs = fields.get(_XARGS)
    concerns_us = _FIELD in fields or (isinstance(xargs, dict) and KEY in xargs)
    return fields if concerns_us else None


def _checked(path: str, fields: dict[str, Any]) -> Intervention | None:
    """Takes `intervention` out of the fields. None where it asks for nothing. Raises ApiError 400."""
    xargs = fields.get(_XARGS)
    if isinstance(xargs, dict) and KEY in xargs:
        raise ApiError(
            400,
            f"{_XARGS}.{KEY} is the server's own: it goes with a cache salt that keeps steered keys and values apart. "
            f"Ask with the field {_FIELD}.",
            code="reserved",
            param=_XARGS,
        )
    given = fields.pop(_FIELD)
    if given is None:
        return None
    if path not in TEXT_PATHS:
        raise ApiError(
            400,
            f"{path} takes no {_FIELD}. Steer {' or '.join(TEXT_PATHS)}.",
            code="unsupported_field",
            param=_FIELD,
        )
    if fields.get("use_beam_search"):
        raise ApiError(
            400,
            f"Beam search makes requests of its own, which would run without the {_FIELD}. Drop use_beam_search.",
            code="unsupported_field",
            param="use_beam_search",
        )
    try:
        return Intervention.model_validate(given)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, (_FIELD, *fault["loc"])))
        message = str(fault["msg"]).removeprefix("Value error, ")
        raise ApiError(400, f"{where}: {message}", code="invalid_request", param=where) from error


def _n_choices(fields: dict[str, Any]) -> int:
    prompt = fields.get("prompt")
    is_list = isinstance(prompt, list) and len(prompt) > 0 and not isinstance(prompt[0], int)
    return (len(prompt) if is_list and prompt is not None else 1) * int(fields.get("n") or 1)


async def _body_of(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return bytes(body)
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body, then whatever comes after the real one."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _nothing_more() -> Message:
    """The `receive` of a client that neither sends nor leaves."""
    await asyncio.Event().wait()
    raise AssertionError("nothing sets the event")


async def _ask(app: ASGIApp, scope: Scope, fields: dict[str, Any] | None) -> tuple[int, bytes]:
    """One request of our own, with the headers of another, and these fields or no body. Returns status and body."""
    body, status, answered = b"" if fields is None else json.dumps(fields).encode(), 0, bytearray()
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers["content-length"] = str(len(body))

    async def collect(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            answered.extend(message.get("body", b""))

    await app({**scope, "headers": headers.raw, "state": {}}, _replay(body, _nothing_more), collect)
    return status, bytes(answered)
