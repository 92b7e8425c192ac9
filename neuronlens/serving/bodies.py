"""JSON bodies read as strictly as RFC 8259 has it, for the routes that take one.

    router = APIRouter(route_class=JsonRoute)

Python's own reader takes NaN and Infinity, numbers too large to be anything else, and halves of surrogate pairs, which
no tokenizer takes and no answer can repeat; pydantic then lets them pass where a field does not say otherwise.
"""

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from neuronlens.serving.errors import ApiError

MAX_NAMES = 1_000
"""Of one object. No field of ours has as many, and each that is not ours is a fault of its own, to be put in words."""
_MAY_BE_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRoute(APIRoute):
    """A route whose JSON body is refused with 400 where it is not UTF-8, holds a number that is none, names a field
    twice, or is nested deeper than Python can read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse(await self.body())
        return self._json


def parse(body: bytes) -> Any:
    """The value of a JSON text. Raises JSONDecodeError where it is not JSON, ApiError where it is not ours."""
    try:
        value = json.loads(body.decode(), parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_object)
        if _MAY_BE_HALF_A_PAIR.search(body):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise _refused(f"The body is not UTF-8 (byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise _refused("The body holds half of a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise _refused("The body is nested too deeply") from error
    except ValueError as error:
        raise _refused("The body has a whole number of more than 4,300 digits") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_NAMES:
        raise _refused(f"The body has an object of {len(pairs)} names, at most {MAX_NAMES} are read")
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in value if names.count(name) > 1)
        raise _refused(f"The body names {twice[:40]!r} twice in one object")
    return value


def _no_number(name: str) -> float:
    raise _refused(f"The body holds {name}, which is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _refused(f"The body holds the number {text[:40]}, which is too large for a double")
    return value


def _refused(message: str) -> ApiError:
    return ApiError(400, f"{message}. Expected JSON as RFC 8259 has it.", code="invalid_json")
