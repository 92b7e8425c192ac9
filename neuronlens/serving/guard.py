"""What stands before the routes, as plain ASGI (Starlette's BaseHTTPMiddleware breaks streams and disconnects).

From the outside in: `_Record` gives each request an id, a line in the log and its metrics, and answers for what nobody
foresaw; `_Hosts` keeps out web pages that reach a loopback server under a name of their own; CORS; `_Drain` turns
away new work while the server ends; `_KeyCheck` asks for a key before a byte of the body is read; `_Body` cuts off
bodies that are too large or too slow.
"""

import asyncio
import re
import time
import uuid
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neuronlens.serving.auth import authorization_of
from neuronlens.serving.errors import ApiError, answer, unexpected
from neuronlens.serving.logs import REQUEST_ID, begin, log
from neuronlens.serving.service import Service

_OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/docs", "/redoc", "/openapi.json"})
"""Answered without a key: they tell nothing that a key protects, and probes and browsers have none to send."""
_NEVER_DRAINED = frozenset({"/health", "/ready", "/metrics"})
_UPLOADS = ("POST", "/v1/tables")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_CLIENT_LEFT = 499
"""The status in log and metrics where the client left before it was answered, as nginx has it."""
_DRAIN_RETRY_SECONDS = 5
_SHOWN_PATH = 200
_EXPOSED = ("X-Request-Id", "Retry-After", "ETag", "Content-Encoding", "Content-Disposition")


def install(app: FastAPI, service: Service) -> None:
    """Put everything in this module before the routes of `app`."""
    # The one that is added last stands outermost.
    app.add_middleware(_Body, service=service)
    app.add_middleware(_KeyCheck, service=service)
    app.add_middleware(_Drain, service=service)
    if service.settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.allowed_origins,
            allow_methods=["GET", "POST", "HEAD"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
            max_age=3600,
        )
    if "*" not in service.settings.trusted_hosts:
        app.add_middleware(_Hosts, service=service)
    app.add_middleware(_Record, service=service)


class _Record:
    """An id, a line in the log and metrics for every request; 500 where the application fails."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.metrics = service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        token = REQUEST_ID.set(exchange.request_id)
        self.metrics.in_flight.inc()
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception:
            log.exception("request failed", method=scope["method"], path=_shown_path(scope))
            if exchange.status is not None:
                raise  # The server cuts the connection: the client sees that the answer is not whole.
            exchange.notes["error"] = "internal_error"
            await answer(unexpected(exchange.request_id))(scope, receive, exchange.send)
        finally:
            self.metrics.in_flight.dec()
            self._write_down(scope, exchange)
            REQUEST_ID.reset(token)

    def _write_down(self, scope: Scope, exchange: "_Exchange") -> None:
        seconds = time.perf_counter() - exchange.started
        status = exchange.status or (_CLIENT_LEFT if exchange.client_left else 500)
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self.metrics.saw_request(_route_of(scope), method, status, seconds)
        log.info(
            "request",
            method=scope["method"],
            path=_shown_path(scope),
            status=status,
            seconds=round(seconds, 4),
            **({"client_left": True} if exchange.client_left else {}),
            **exchange.notes,
        )


class _Exchange:
    """One request, and what became of it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.started = time.perf_counter()
        self.request_id = _request_id(scope)
        self.notes: dict[str, Any] = begin(scope, self.request_id)
        self.status: int | None = None
        self.client_left = False
        self._is_complete = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_complete:
            self.client_left = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = _CLIENT_LEFT if self.client_left else message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self.request_id
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_complete = True
        await self._send(message)


class _Hosts:
    """Answers only to the Host headers that the settings name."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.trusted = tuple(pattern.lower().strip("[]") for pattern in service.settings.trusted_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_trusted(_host_of(Headers(scope=scope).get("host", ""))):
            message = f"This server does not answer to this Host header. Expected: {', '.join(self.trusted)}."
            await _refuse(ApiError(400, message, code="host_not_allowed"), scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_trusted(self, host: str) -> bool:
        return any(
            host == pattern or (pattern.startswith("*.") and host.endswith(pattern[1:])) for pattern in self.trusted
        )


class _Drain:
    """503 for new work while the server ends."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.lifecycle = service.lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.lifecycle.draining and _path(scope) not in _NEVER_DRAINED:
            error = ApiError(
                503,
                "The server is shutting down and takes no new work. Ask another replica, or try again.",
                code="draining",
                retry_after_seconds=_DRAIN_RETRY_SECONDS,
            )
            await _refuse(error, scope, receive, send)
            return
        await self.app(scope, receive, send)


class _KeyCheck:
    """401 for whoever has no key where the server has keys, whatever is asked for. What a key allows is the routes'
    to check (`auth.may_read`, `auth.may_write`)."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.keys = service.keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _path(scope) not in _OPEN_PATHS:
            try:
                self.keys.caller(authorization_of(scope))
            except ApiError as error:
                await _refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)


class _Body:
    """413 for a body above its limit, by what it declares and by what comes; 408 for one that comes too slowly."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.limits = service.settings.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_upload = (scope["method"], _path(scope)) == _UPLOADS
        body = _CountedBody(
            receive,
            send,
            n_bytes=self.limits.upload_bytes if is_upload else self.limits.body_bytes,
            seconds=self.limits.body_seconds,
            bytes_a_second=self.limits.body_bytes / self.limits.body_seconds,
        )
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > body.n_bytes:
            await _refuse(body.too_large(), scope, receive, send)
            return
        await self.app(scope, body.receive, body.send)


class _CountedBody:
    """`receive` and `send` of a request whose body may have `n_bytes`, and may take `seconds` or, where it is large,
    as long as it needs at `bytes_a_second`."""

    def __init__(self, receive: Receive, send: Send, *, n_bytes: int, seconds: float, bytes_a_second: float) -> None:
        self._receive, self._send = receive, send
        self.n_bytes, self.seconds, self.bytes_a_second = n_bytes, seconds, bytes_a_second
        self.n_received = 0
        self._started: float | None = None
        self._is_over = False
        self._is_late = False

    def too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self.n_bytes:,} bytes.", code="body_too_large")

    async def receive(self) -> Message:
        if self._is_over:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline()):
                message = await self._receive()
        except TimeoutError:
            self._is_late = self._is_over = True
            raise ApiError(408, f"The body did not come within {self.seconds:g} s.", code="body_too_slow") from None
        self.n_received += len(message.get("body", b""))
        if self.n_received > self.n_bytes:
            self._is_over = True
            raise self.too_large()
        if not message.get("more_body", False):
            self._is_over = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_over = True  # What comes now is a rest that nobody reads.
            if self._is_late:
                MutableHeaders(scope=message)["Connection"] = "close"
        await self._send(message)

    def _deadline(self) -> float:
        now = asyncio.get_running_loop().time()
        if self._started is None:
            self._started = now
        return self._started + max(self.seconds, self.n_received / self.bytes_a_second)


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    scope["neuronlens.notes"]["error"] = error.code
    await answer(error)(scope, receive, send)


def _path(scope: Scope) -> str:
    """Of the route, without the prefix under which the application may be mounted."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _shown_path(scope: Scope) -> str:
    return quote(scope["path"])[:_SHOWN_PATH]


def _route_of(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "none"))


def _host_of(header: str) -> str:
    """The name in a Host header, without port and brackets."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
