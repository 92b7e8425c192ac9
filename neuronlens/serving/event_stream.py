"""Server-sent events that end when the client leaves, whether or not there is something to send just then."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from neuronlens.serving.errors import ApiError, envelope


class EventStream(Response):
    """A 200 whose body is `first` and then `events`, each a whole `data:` line. An ApiError that comes in between is
    the last event. A client that has not read all of it after `seconds` is cut off. `close` is called at the end,
    whatever ended it."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncIterator[bytes], close: Callable[[], None], seconds: float) -> None:
        self.status_code = 200
        self.background = None
        self._first, self._events, self._close, self._seconds = first, events, close, seconds
        # No proxy may hold events back.
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(client_left(receive))
        try:
            await asyncio.wait({sending, leaving}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await task
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _part(send, self._first)
        try:
            async for event in self._events:
                await _part(send, event)
        except ApiError as error:
            await _part(send, data(json.dumps(envelope(error))))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def data(text: str) -> bytes:
    """One event."""
    return f"data: {text}\n\n".encode()


async def client_left(receive: Receive) -> None:
    """Returns once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
