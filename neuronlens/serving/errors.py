"""Errors as OpenAI's clients expect them: one envelope for everything that is not a success.

    raise ApiError(404, "There is no table 'tbl_0'. Tables: ...", code="table_not_found", param="intervention.table")

`install` answers with the envelope whatever a route raises. `UsageError` from the library (an unknown concept, a rule
that does not fit) becomes 400: its sentence already names what was found, what was expected and the mend. What nobody
foresaw is `guard`'s to answer, with `unexpected`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match

from neuronlens.errors import RunFailed, UsageError
from neuronlens.retry import StorageFailed
from neuronlens.serving.logs import log, note, request_id_of

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    406: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
_CODES = {404: "not_found", 405: "method_not_allowed"}
_SHOWN = 80
"""How many characters of something that a client sent are repeated to it."""
_N_FAULTS_SHOWN = 5
_LONGEST = 4_000
"""Characters of a message. Some sentences repeat names that a client sent, of which there may be a megabyte."""


@dataclass(slots=True, eq=False)
class ApiError(Exception):
    """What a request is answered with in place of a result. `param` is the field at fault, with dots."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_seconds: int | None = None

    def __str__(self) -> str:
        return self.message


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorBody


def envelope(error: ApiError) -> dict[str, Any]:
    """The JSON body of an error."""
    param = None if error.param is None else _encodable(error.param)
    return {
        "error": {
            "message": _encodable(_short(error.message, _LONGEST)),
            "type": _type_of(error.status),
            "param": param,
            "code": error.code,
        }
    }


def answer(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The whole HTTP answer of an error."""
    more = dict(headers or {})
    if error.retry_after_seconds is not None:
        more["Retry-After"] = str(error.retry_after_seconds)
    if error.status == 401:
        more["WWW-Authenticate"] = "Bearer"
    return JSONResponse(envelope(error), error.status, more)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` argument of a route: these statuses answer with the envelope."""
    return {status: {"model": ErrorEnvelope, "description": _type_of(status)} for status in statuses}


def unexpected(request_id: str) -> ApiError:
    """What a client is told where the server is at fault: the request's id, and nothing of what lies within."""
    return ApiError(
        500,
        f"Something went wrong in the server; the request was not at fault. Its log says more under the request id "
        f"{request_id}.",
        code="internal_error",
    )


def install(app: FastAPI) -> None:
    """Answer with the envelope whatever the routes of `app` raise and we foresaw."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return _noted(request, error)

    @app.exception_handler(UsageError)
    async def usage_error(request: Request, error: UsageError) -> JSONResponse:
        return _noted(request, ApiError(400, str(error), code="bad_request"))

    @app.exception_handler(RunFailed)
    async def run_failed(request: Request, error: RunFailed) -> JSONResponse:
        # Such a sentence names files of the server: it is for the log.
        log.error("failed", reason=str(error))
        if isinstance(error, StorageFailed):
            message = "The server's storage did not answer. Try again."
            return _noted(request, ApiError(503, message, code="storage_failed", retry_after_seconds=5))
        return _noted(request, unexpected(request_id_of(request)))

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _noted(request, _of_faults(request, error))

    @app.exception_handler(HTTPException)
    async def http_exception(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_offered(request))
        return _noted(request, _of_http_exception(request, error), headers)


def _type_of(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def _noted(request: Request, error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    note(request, error=error.code)
    return answer(error, headers)


def _of_http_exception(request: Request, error: HTTPException) -> ApiError:
    """FastAPI wraps what goes wrong while it reads a body; Starlette's own errors have a status and no more."""
    if isinstance(error.__cause__, ApiError):
        return error.__cause__
    if error.__cause__ is not None and error.status_code == 400:
        return ApiError(400, f"The body could not be read ({_short(str(error.__cause__))}).", code="invalid_json")
    message = str(error.detail)
    if message == HTTPStatus(error.status_code).phrase:
        asked = f"{request.method} {_short(request.scope['path'])}"
        if error.status_code == 404:
            message = f"There is no {asked}. GET /openapi.json lists what there is."
        elif error.status_code == 405:
            message = f"{asked} is not offered. Offered: {', '.join(_offered(request))}."
    return ApiError(error.status_code, message, code=_CODES.get(error.status_code, "bad_request"))


def _offered(request: Request) -> list[str]:
    """The methods of this path: Starlette names those of the first route alone."""
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    scopes = ({**request.scope, "method": method} for method in methods)
    return [
        scope["method"]
        for scope in scopes
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes)
    ]


def _of_faults(request: Request, error: RequestValidationError) -> ApiError:
    """Every fault in words, grouped by field: a union reports one fault for each of its kinds."""
    faults = [_Fault.of(found, error.body) for found in error.errors()]
    first = faults[0]
    if first.kind == "json_invalid":
        return ApiError(400, f"The body is not JSON: {first.reason}.", code="invalid_json")
    if first.field is None and isinstance(error.body, bytes):
        found = _short(request.headers.get("content-type") or "missing")
        return ApiError(
            415,
            f"The body's Content-Type is {found}. Expected application/json.",
            code="unsupported_media_type",
        )
    fields = dict.fromkeys(fault.field for fault in faults)
    sentences = [
        _sentence(
            [fault for fault in faults if fault.field == field], f"{request.method} {_short(request.scope['path'])}"
        )
        for field in list(fields)[:_N_FAULTS_SHOWN]
    ]
    if len(fields) > _N_FAULTS_SHOWN:
        sentences.append(f"And {len(fields) - _N_FAULTS_SHOWN} more.")
    return ApiError(400, " ".join(sentences), code=first.code, param=first.field)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fault:
    """One thing that pydantic found wrong. `noun` is what `field` is: a field of the body, a query parameter."""

    kind: str
    noun: str
    field: str | None
    found: str
    reason: str

    @classmethod
    def of(cls, found: Mapping[str, Any], body: Any) -> "_Fault":
        where, *path = found["loc"]
        kind, reason = found["type"], found["msg"]
        if kind == "json_invalid":
            reason = f"{found['ctx']['error']} (character {path[0]})"
        elif where == "body":
            path = _real_steps(path, body, keep_last=kind in ("missing", "extra_forbidden"))
        return cls(
            kind=kind,
            noun="field" if where == "body" else f"{where} parameter",
            field=_short(".".join(map(str, path))) if path else None,
            found=_shown(found.get("input")),
            reason=reason,
        )

    @property
    def code(self) -> str:
        return {"missing": "missing_field", "extra_forbidden": "unsupported_field"}.get(self.kind, "invalid_field")

    @property
    def expected(self) -> str:
        if self.kind == "tuple_type":
            return "a valid list"
        for start in ("Value error, ", "Assertion failed, ", "Input should be "):
            if self.reason.startswith(start):
                return self.reason.removeprefix(start).rstrip(".")
        return self.reason[:1].lower() + self.reason[1:].rstrip(".")


def _real_steps(path: Sequence[str | int], body: Any, *, keep_last: bool) -> list[str | int]:
    """The steps of `path` that lie in the body; between them pydantic puts the names of a union's kinds."""
    steps: list[str | int] = []
    for i, step in enumerate(path):
        is_there = (isinstance(body, dict) and step in body) or (
            isinstance(body, list) and isinstance(step, int) and 0 <= step < len(body)
        )
        if is_there:
            body = body[step]
        if is_there or (keep_last and i == len(path) - 1):
            steps.append(step)
    return steps


def _sentence(faults: Sequence[_Fault], asked: str) -> str:
    """All that is wrong with one field."""
    fault = faults[0]
    if fault.field is None:
        if fault.kind == "missing":
            return f"{asked} needs a body. Expected a JSON object, sent as application/json."
        return f"The body does not fit: {'; '.join(dict.fromkeys(fault.expected for fault in faults))}."
    if fault.kind == "missing":
        return f"The {fault.noun} '{fault.field}' is missing."
    if fault.kind == "extra_forbidden":
        return f"The {fault.noun} '{fault.field}' is not supported by {asked}. Leave it out."
    expected = ", or ".join(dict.fromkeys(fault.expected for fault in faults))
    return f"The {fault.noun} '{fault.field}' is {fault.found}, expected: {expected}."


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _short(repr(value))


def _short(text: str, n_characters: int = _SHOWN) -> str:
    return text if len(text) <= n_characters else f"{text[:n_characters]}..."


def _encodable(text: str) -> str:
    """JSON may hold half of a surrogate pair, and UTF-8 may not."""
    return text.encode(errors="replace").decode()
