"""vLLM's answers on their way out, with `intervention` added: to the whole answer, or to a stream's last chunks."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

Finish = Callable[[], Awaitable[dict[str, Any]]]
"""Gives what to add to an answer, once its last token is there."""
_EVENT_END = b"\n\n"
_DATA = b"data: "
_DONE = b"data: [DONE]"


class Rewriter:
    """A `send` that adds `{"intervention": ...}` to a successful answer and leaves any other as it is.

    n_choices: how many choices a stream ends with. Of a stream, the last chunk with choices and the one with the usage
    are held until [DONE], since what the rules did is known at the very end; all others pass as they come.
    """

    def __init__(self, send: Send, finish: Finish, *, n_choices: int) -> None:
        self._send = send
        self._finish = finish
        self._n_open = n_choices
        self._start: Message | None = None
        self._body = bytearray()
        self._held: list[dict[str, Any]] = []
        self._rewrite: Callable[[Message], Awaitable[None]] = self._send

    async def send(self, message: Message) -> None:
        if message["type"] != "http.response.start":
            await self._rewrite(message)
            return
        kind = Headers(raw=message["headers"]).get("content-type", "")
        if message["status"] == 200 and kind.startswith("application/json"):
            self._start, self._rewrite = message, self._whole
            return
        if message["status"] == 200 and kind.startswith("text/event-stream"):
            self._rewrite = self._stream
        await self._send(message)

    async def _whole(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self._start is not None
        answer = json.loads(bytes(self._body))
        if "choices" in answer:
            answer |= await self._finish()
        body = json.dumps(answer, ensure_ascii=False).encode()
        MutableHeaders(raw=self._start["headers"])["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})

    async def _stream(self, message: Message) -> None:
        self._body += message.get("body", b"")
        *events, rest = bytes(self._body).split(_EVENT_END)
        self._body = bytearray(rest)
        ready = b"".join([await self._passed(event) for event in events])
        if not message.get("more_body", False):
            ready += rest
            self._body.clear()
        if ready or not message.get("more_body", False):
            await self._send({**message, "body": ready})

    async def _passed(self, event: bytes) -> bytes:
        """What may go out now that this event is there."""
        if event.strip() == _DONE:
            return await self._released() + event + _EVENT_END
        chunk = _chunk(event)
        if chunk is None or "choices" not in chunk:
            return event + _EVENT_END
        self._n_open -= sum(choice.get("finish_reason") is not None for choice in chunk["choices"])
        if self._n_open > 0:
            return event + _EVENT_END
        self._held.append(chunk)
        return b""

    async def _released(self) -> bytes:
        if not self._held:
            return b""
        more = await self._finish()
        with_choices = [i for i, chunk in enumerate(self._held) if chunk["choices"]]
        for i, chunk in enumerate(self._held):
            if not chunk["choices"] or i == with_choices[-1]:
                chunk |= more
        return b"".join(_DATA + json.dumps(chunk, ensure_ascii=False).encode() + _EVENT_END for chunk in self._held)


def _chunk(event: bytes) -> dict[str, Any] | None:
    """The JSON of an event; None for comments, which keep a connection alive."""
    if not event.startswith(_DATA):
        return None
    found = json.loads(event[len(_DATA) :])
    return found if isinstance(found, dict) else None
