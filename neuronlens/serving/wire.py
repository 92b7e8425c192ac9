"""HTTP as uvicorn reads it, with bounds on a request's head: its size, and how long it may take to come.

The middlewares see a request once its headers are read. Until then uvicorn with httptools takes any number of bytes in
any time (https://github.com/Kludex/uvicorn/issues/157).
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from neuronlens.serving.errors import ApiError, envelope

MAX_HEAD_BYTES = 64 * 1024


def bounded_http(head_seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol where the request line and the headers may take `head_seconds` and MAX_HEAD_BYTES."""
    return type("BoundedHttp", (_BoundedHttp,), {"head_seconds": head_seconds})


class _BoundedHttp(HttpToolsProtocol):
    head_seconds: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = True
        self._n_head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            self._n_head_bytes += len(data)
            if self._head_timer is None:
                self._arm()
        super().data_received(data)
        if self._is_in_head and self._n_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            message = f"The request line and the headers are larger than {MAX_HEAD_BYTES:,} bytes."
            self._refuse(ApiError(431, message, code="headers_too_large"))

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._disarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_head, self._n_head_bytes = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="bad_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request, unless an answer is under way, and end the connection."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = json.dumps(envelope(error)).encode()
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _arm(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._is_too_late)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _is_too_late(self) -> None:
        if not self.transport.is_closing():
            message = f"The request line and the headers did not come within {self.head_seconds:g} s."
            self._refuse(ApiError(408, message, code="headers_too_slow"))
