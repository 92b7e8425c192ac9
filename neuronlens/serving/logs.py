"""One line a request on stderr: JSON, or words where stderr is a terminal.

    note(request, prompt_tokens=12, table="tbl_9f...")     # adds fields to the request's one line
    log.warning("engine is gone", seconds=3.2)

Without `configure`, which the server calls and a library must not, nothing is printed but warnings. Prompts and answers
are no fields of a line unless the server was started with --log-prompts.
"""

import logging
import sys
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any, TextIO, cast

import structlog
from starlette.requests import HTTPConnection
from structlog.typing import EventDict, Processor

REQUEST_ID: ContextVar[str | None] = ContextVar("neuronlens_request_id", default=None)
"""Of the request at work: on every line that is logged meanwhile."""

_ID, _NOTES = "neuronlens.request_id", "neuronlens.notes"
_NAME = "neuronlens.serving"


def _add_request_id(_: Any, __: str, event: EventDict) -> EventDict:
    request_id = REQUEST_ID.get()
    if request_id is not None:
        event.setdefault("request_id", request_id)
    return event


_SHARED: tuple[Processor, ...] = (
    _add_request_id,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
)

log: structlog.stdlib.BoundLogger = structlog.wrap_logger(
    logging.getLogger(_NAME),
    processors=[structlog.stdlib.filter_by_level, *_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
    wrapper_class=structlog.stdlib.BoundLogger,
    context_class=dict,
    cache_logger_on_first_use=True,
)


def configure(stream: TextIO | None = None) -> None:
    """Send every log of this process to `stream` (stderr): ours from INFO on, uvicorn's and others' from WARNING on."""
    stream = stream or sys.stderr
    renderers = _for_people() if stream.isatty() else _for_machines()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers, root.level = [handler], logging.WARNING
    logging.getLogger(_NAME).setLevel(logging.INFO)
    logging.captureWarnings(True)


def begin(scope: MutableMapping[str, Any], request_id: str) -> dict[str, Any]:
    """Give a request its id; returns what `note` fills."""
    scope[_ID], scope[_NOTES] = request_id, {}
    return cast(dict[str, Any], scope[_NOTES])


def note(request: HTTPConnection, **fields: Any) -> None:
    """Add fields to the line that is logged at the end of this request."""
    request.scope.setdefault(_NOTES, {}).update(fields)


def request_id_of(request: HTTPConnection) -> str:
    """The id under which the log has this request."""
    return str(request.scope.get(_ID, "-"))


def _for_machines() -> list[Processor]:
    return [structlog.processors.format_exc_info, _in_order, structlog.processors.JSONRenderer(default=str)]


def _for_people() -> list[Processor]:
    return [_escaped, structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]


def _in_order(_: Any, __: str, event: EventDict) -> EventDict:
    """Every line begins with the same three keys."""
    return {key: event[key] for key in ("time", "level", "event") if key in event} | dict(event)


def _escaped(_: Any, __: str, event: EventDict) -> EventDict:
    """What a client sent must not steer the terminal that shows it."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = value.encode("unicode_escape").decode()
    return event
