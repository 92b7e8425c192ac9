"""A service of nothing, and an application that has the guard and a few routes, for tests of the server's shell."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from neuronlens.errors import RunFailed, UsageError
from neuronlens.retry import StorageFailed
from neuronlens.serving import errors, guard, health_routes
from neuronlens.serving.auth import Caller, Keys, may_read, may_write
from neuronlens.serving.bodies import JsonRoute
from neuronlens.serving.errors import ApiError
from neuronlens.serving.logs import note
from neuronlens.serving.metrics import Metrics
from neuronlens.serving.service import Service
from neuronlens.serving.settings import Limits, Settings

READ_KEY, WRITE_KEY = "nl-read-0123456789", "nl-write-0123456789"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def bare_service(
    *,
    keys: Keys | None = None,
    engine: Any = None,
    catalog: Any = None,
    cards: Any = None,
    limits: Limits | None = None,
    **settings: Any,
) -> Service:
    """A service without tables. `settings` and `limits` over the defaults."""
    return Service(
        settings=Settings(limits=limits or Limits(), **settings),
        catalog=catalog,
        cards=cards,
        keys=keys or Keys(),
        metrics=Metrics(),
        engine=engine,
    )


def guarded_app(service: Service) -> FastAPI:
    """The guard, the error handlers and the health routes as the server has them, before the routes below."""
    app = FastAPI(redirect_slashes=False, responses={"default": {"model": errors.ErrorEnvelope}})
    app.state.service = service
    errors.install(app)
    guard.install(app, service)
    app.include_router(health_routes.router)
    app.include_router(router)
    return app


class Rule(BaseModel):
    model_config = ConfigDict(extra="forbid")

    concept: str
    factor: float = 1.0


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str | list[str]
    temperature: float = Field(default=1.0, ge=0, le=2)
    n: int = 1
    rules: list[Rule] = []


router = APIRouter(route_class=JsonRoute)


@router.post("/v1/ask")
async def ask(asked: Asked, caller: Annotated[Caller, Depends(may_read)], request: Request) -> dict[str, Any]:
    note(request, prompt_tokens=3)
    return {"prompt": asked.prompt, "caller": caller.name}


@router.post("/v1/tables", dependencies=[Depends(may_write)])
async def upload(request: Request) -> dict[str, int]:
    return {"bytes": sum([len(chunk) async for chunk in request.stream()])}


@router.get("/v1/tables/{id}", dependencies=[Depends(may_read)])
async def table(id: str, layer: int = 0) -> dict[str, Any]:
    return {"id": id, "layer": layer}


@router.get("/v1/raise/{what}")
async def fail(what: str) -> None:
    raise {
        "api": ApiError(429, "The queue is full.", code="queue_full", retry_after_seconds=7),
        "usage": UsageError("There is no concept 'joi'. Did you mean joy?"),
        "run": RunFailed("/srv/store/ranges/tbl_1 is damaged."),
        "storage": StorageFailed("could not read s3://bucket/tbl_1"),
        "surrogate": UsageError("There is no concept '\ud800'."),
        "bug": ZeroDivisionError("secret 42"),
    }[what]


@router.get("/v1/ticks", dependencies=[Depends(may_read)])
async def ticks(n: int = 3, seconds: float = 0.01, fail_at: int | None = None) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        for i in range(n):
            if i == fail_at:
                raise ZeroDivisionError("secret 42")
            yield f"tick {i}\n"
            await asyncio.sleep(seconds)

    return StreamingResponse(lines(), media_type="text/plain")
