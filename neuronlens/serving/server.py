"""Listens, says where, and ends well: `neuronlens serve` after it has put a service together.

    place = bind("127.0.0.1", 8000, has_keys=bool(keys), no_auth=0)    # cheap; refuses before anything heavy begins
    serve_forever(service, place, drain_seconds=30, on_ready=...)

SIGTERM or SIGINT once: no new connections, new work on open ones is answered with 503, and what has begun may go on
for `drain_seconds`. A second signal ends the process at once.
"""

import asyncio
import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

import uvicorn

from neuronlens.errors import NeuronLensError, RunFailed, UsageError
from neuronlens.serving.app import create_app
from neuronlens.serving.logs import log
from neuronlens.serving.service import Service
from neuronlens.serving.wire import bounded_http

SWITCH_SECONDS = 0.0005
"""The engine works in a thread of its own; Python's usual 5 ms would be a wait at each token."""
_KEEP_ALIVE_SECONDS = 75
"""Longer than the pools of common clients keep a connection, so that none sends into one that we are closing."""
_BACKLOG = 2048
_LAST_SECONDS = 1
"""What connections get, once drained, to take in the rest of their answers."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Place:
    """Where the server will listen: a bound socket, and the URL under which this machine reaches it."""

    socket: socket.socket
    url: str
    host: str
    is_public: bool

    def trusted_hosts(self, *, has_keys: bool) -> tuple[str, ...]:
        """The Host headers to answer to. Any where a key or the network guards the server; a loopback server without
        keys answers to the loopback's names alone, so that no web page reaches it under a name of its own."""
        if has_keys or self.is_public:
            return ("*",)
        return tuple(dict.fromkeys(("localhost", "127.0.0.1", "::1", self.host.lower())))


def bind(host: str, port: int, *, has_keys: bool, no_auth: int = 0) -> Place:
    """Take the port, without answering on it yet. `no_auth` is how many times the person said --no-auth.

    Raises UsageError where the host is unknown, the port taken, or where the address is public and no key guards it.
    """
    addresses = _resolve(host, port)
    is_public = not all(_is_loopback(address) for _, address in addresses)
    if has_keys and no_auth:
        raise UsageError("--no-auth says that there are no keys, but keys were given. Drop one of the two.")
    if is_public and not has_keys and no_auth < 2:
        _refuse_public(host, said_once=no_auth == 1)
    family, address = min(addresses, key=lambda found: found[0] != socket.AF_INET)
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _no_place(error, host, port) from error
    return Place(socket=bound, url=_url(bound), host=host, is_public=is_public)


def serve_forever(
    service: Service, place: Place, *, drain_seconds: float = 30, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Serve until a signal ends it, and drain. Raises RunFailed where requests had to be cut off, UsageError where
    someone else took the port meanwhile."""
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        place.socket.listen(_BACKLOG)
    except OSError as error:
        raise _no_place(error, place.host, place.socket.getsockname()[1]) from error
    app = create_app(service)
    config = uvicorn.Config(
        app,
        http=bounded_http(service.settings.limits.body_seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    server = _Server(config, service, drain_seconds=drain_seconds, on_ready=on_ready)
    try:
        server.run(sockets=[place.socket])
    except SystemExit as exit:
        failure = getattr(app.state, "start_error", "see above")
        if isinstance(failure, NeuronLensError):
            raise failure from exit
        raise RunFailed(f"The server did not start ({failure}); its log has more.") from exit
    if server.n_cut:
        requests = "1 request was" if server.n_cut == 1 else f"{server.n_cut} requests were"
        raise RunFailed(
            f"{requests} still at work {drain_seconds:g} s after the signal, and cut off. Give them longer with "
            "--drain-seconds."
        )


class _Server(uvicorn.Server):
    """uvicorn's server with our way of ending. `n_cut` is how many requests could not finish."""

    def __init__(
        self, config: uvicorn.Config, service: Service, *, drain_seconds: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.service, self.drain_seconds, self.on_ready = service, drain_seconds, on_ready
        self.n_cut = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's own: it raises the signal again once all is done, and the exit code would not be 0.
        if self.should_exit:
            os._exit(128 + sig)
        self.service.lifecycle.draining = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        state = self.server_state
        log.info("draining", requests=len(state.tasks), seconds=self.drain_seconds)
        for server in self.servers:
            server.close()
        for connection in list(state.connections):
            connection.shutdown()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.drain_seconds
        while (state.tasks or state.connections) and loop.time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        self.n_cut = max(len(state.tasks), len(state.connections))
        await super().shutdown(sockets)
        log.info("ended", cut=self.n_cut)


def _resolve(host: str, port: int) -> Sequence[tuple[int, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(
            f"--host {host!r} is no address and no name that this machine knows ({error}). Use 127.0.0.1, or 0.0.0.0 "
            "for every address of this machine."
        ) from error
    return [(int(family), address) for family, _, _, _, address in found]  # type: ignore[misc]


def _is_loopback(address: Sequence[str | int]) -> bool:
    try:
        return ipaddress.ip_address(str(address[0])).is_loopback
    except ValueError:  # an address with a zone, fe80::1%eth0
        return False


def _refuse_public(host: str, *, said_once: bool) -> None:
    if said_once:
        raise UsageError(
            f"{host} is reachable from other machines, and without keys everyone there could use the model. If that is "
            "what you want, say --no-auth a second time: --no-auth --no-auth"
        )
    raise UsageError(
        f"{host} is reachable from other machines, and there are no keys. Give --api-key-file FILE or set "
        "NEURONLENS_API_KEY, or listen on 127.0.0.1."
    )


def _no_place(error: OSError, host: str, port: int) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(f"Port {port} of {host} is taken. Choose another --port; 0 takes a free one.")
    if error.errno == errno.EACCES:
        return UsageError(f"Port {port} of {host} is for root alone. Choose a --port from 1024 on.")
    return UsageError(f"Cannot listen on port {port} of {host} ({error.strerror}). Choose another --host or --port.")


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
