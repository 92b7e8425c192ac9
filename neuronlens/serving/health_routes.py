"""Is it alive, does it take work, how busy is it: GET /health, /ready and /metrics. Open without a key."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel

from neuronlens.serving.errors import ApiError, responses
from neuronlens.serving.service import service_of

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """The server takes work."""

    status: Literal["ready"] = "ready"


@router.get("/health", summary="Does the process live?")
async def health() -> Health:
    """200 as long as the process answers, even while it drains: restart it only where this fails."""
    return Health()


@router.get("/ready", summary="Does it take work?", responses=responses(503))
async def ready(request: Request) -> Ready:
    """200 where requests may be sent; 503 while the server drains or where its engine has ended."""
    service = service_of(request)
    if service.lifecycle.draining:
        raise ApiError(503, "The server is shutting down.", code="draining", retry_after_seconds=5)
    if service.engine is not None and not service.engine.ready:
        raise ApiError(503, "The engine is not ready.", code="engine_not_ready", retry_after_seconds=5)
    return Ready()


@router.get(
    "/metrics",
    summary="What Prometheus reads.",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Requests, tokens, the queue, batch sizes, times, and activations changed by action, as Prometheus text."""
    service = service_of(request)
    load = None if service.engine is None else service.engine.load_now()
    return Response(service.metrics.render(load), media_type=CONTENT_TYPE_PLAIN_0_0_4)
