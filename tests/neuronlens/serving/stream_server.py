"""A real server process that has the routes of `shells` beside its own, for tests of signals.

python -m tests.neuronlens.serving.stream_server --drain-seconds 5
"""

import json
import tempfile
from enum import StrEnum
from typing import Any

import typer
from fastapi import FastAPI

from neuronlens.console import command_line
from neuronlens.errors import UsageError
from neuronlens.serving import server
from neuronlens.serving.app import create_app
from neuronlens.serving.cards import CardShelf
from neuronlens.serving.catalog import Catalog
from neuronlens.serving.engine import EngineFacts
from neuronlens.serving.logs import configure
from neuronlens.serving.service import Service
from tests.neuronlens.serving.shells import bare_service, router

app = typer.Typer(pretty_exceptions_enable=False)


class Engine(StrEnum):
    none = "none"
    good = "good"
    unusable = "unusable"
    broken = "broken"


class FakeEngine:
    """An engine that only starts, or does not, and says when it is closed."""

    ready = True
    facts = EngineFacts(
        engine="fake",
        model_id="fake",
        config_hash="0" * 32,
        window=64,
        widths={"mlp_post": 4},
        sites={"mlp_post": (0,)},
        dtype="float32",
        device="cpu",
    )

    def __init__(self, kind: Engine) -> None:
        self.kind = kind

    async def start(self) -> None:
        if self.kind is Engine.unusable:
            raise UsageError("The model does not fit on the device.")
        if self.kind is Engine.broken:
            raise ZeroDivisionError("of the engine")

    async def close(self) -> None:
        print("closed", flush=True)


@app.command()
def main(port: int = 0, drain_seconds: float = 5, engine: Engine = Engine.none) -> None:
    def with_streams(service: Service) -> FastAPI:
        application = create_app(service)
        application.include_router(router)
        return application

    server.create_app = with_streams
    running: Any = None if engine is Engine.none else FakeEngine(engine)
    place = server.bind("127.0.0.1", port, has_keys=False)
    configure()
    with tempfile.TemporaryDirectory() as folder:
        catalog = Catalog([], uploads=folder)
        service = bare_service(engine=running, catalog=catalog, cards=CardShelf((), catalog))
        serve(service, place, drain_seconds)


def serve(service: Service, place: server.Place, drain_seconds: float) -> None:
    server.serve_forever(
        service,
        place,
        drain_seconds=drain_seconds,
        on_ready=lambda: print(json.dumps({"url": place.url}), flush=True),
    )


if __name__ == "__main__":
    command_line(app)
