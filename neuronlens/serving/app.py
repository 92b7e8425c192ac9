"""The application: every route behind the guard, and an engine that lives as long as it does.

app = create_app(Service(settings=..., catalog=..., cards=..., keys=..., metrics=Metrics(), engine=...))
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from neuronlens.serving import errors, guard
from neuronlens.serving.service import Service

_SUMMARY = "Text steered per request by range tables, and the tables themselves."
_ANY_ERROR = {
    "model": errors.ErrorEnvelope,
    "description": "Whatever is not a success, such as 400 (the request does not fit), 401 and 403 (keys), 408, 413 "
    "and 429 (limits), 503 (the server ends).",
}


def create_app(service: Service) -> FastAPI:
    """The ASGI application of one server. It serves text only where there is an engine."""
    from neuronlens.serving import health_routes, neuron_routes, table_routes

    routers = [table_routes.router, neuron_routes.router, health_routes.router]
    steering = None
    if service.engine is not None:
        from neuronlens.serving import openai_routes
        from neuronlens.serving.steering import Steering

        routers.insert(0, openai_routes.router)
        steering = Steering(service.catalog, service.engine.facts, service.settings.limits.rules)
    app = FastAPI(
        title="NeuronLens",
        summary=_SUMMARY,
        version=version("neuronlens"),
        lifespan=_engine_at_work,
        # Named so, FastAPI adds no 422 of its own to a route: a request that does not fit is a 400.
        responses={"default": _ANY_ERROR},
        redirect_slashes=False,
    )
    app.state.service, app.state.steering = service, steering
    errors.install(app)
    guard.install(app, service)
    for router in routers:
        app.include_router(router)
    return app


@asynccontextmanager
async def _engine_at_work(app: FastAPI) -> AsyncIterator[None]:
    engine = app.state.service.engine
    if engine is None:
        yield
        return
    try:
        await engine.start()
    except Exception as error:
        app.state.start_error = error
        raise
    try:
        yield
    finally:
        await engine.close()
