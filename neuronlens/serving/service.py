"""What a running server is made of, in one frozen piece that the routes find at `request.app.state.service`."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from starlette.requests import HTTPConnection

if TYPE_CHECKING:
    from neuronlens.serving.auth import Keys
    from neuronlens.serving.cards import CardShelf
    from neuronlens.serving.catalog import Catalog
    from neuronlens.serving.engine import Engine
    from neuronlens.serving.metrics import Metrics
    from neuronlens.serving.settings import Settings
    from neuronlens.serving.steering import Steering


@dataclass(slots=True)
class Lifecycle:
    """When the server began (Unix time), and whether it still takes new work: once it drains, only what has begun goes
    on."""

    draining: bool = False
    started_seconds: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The parts of one server. `engine` is None where it serves tables only. `chat_template` stands in for the
    tokenizer's own, where given."""

    settings: "Settings"
    catalog: "Catalog"
    cards: "CardShelf"
    keys: "Keys"
    metrics: "Metrics"
    engine: "Engine | None" = None
    chat_template: str | None = None
    lifecycle: Lifecycle = field(default_factory=Lifecycle)


def service_of(connection: HTTPConnection) -> Service:
    """The service behind a request."""
    return cast(Service, connection.app.state.service)


def steering_of(connection: HTTPConnection) -> "Steering":
    """What compiles interventions; there is one where there is an engine."""
    return cast("Steering", connection.app.state.steering)
