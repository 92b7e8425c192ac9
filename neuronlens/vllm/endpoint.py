"""Our part of `vllm serve`, by vLLM's own plugin mechanism: the field `intervention`, and the routes of range tables.

    VLLM_PLUGINS=neuronlens NEURONLENS_SOURCES=STORE vllm serve MODEL --worker-cls neuronlens.vllm.Worker

NEURONLENS_SOURCES: stores, and folders of single range tables, with commas between them. NEURONLENS_UPLOADS: where
uploaded tables go (default: the first store). NEURONLENS_API_KEY_FILE, NEURONLENS_API_KEY and NEURONLENS_WRITE_KEY:
keys with scopes, beside vLLM's own --api-key. `neuronlens serve --engine vllm` sets all of them.
"""

import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuronlens.errors import UsageError
from neuronlens.vllm.config import WorkerConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

    from neuronlens.vllm.middleware import Desk

SOURCES, UPLOADS, KEY_FILE = "NEURONLENS_SOURCES", "NEURONLENS_UPLOADS", "NEURONLENS_API_KEY_FILE"
WORKER = "neuronlens.vllm.Worker"

_log = logging.getLogger(__name__)


class NeuronLensEndpoint:
    """vLLM's `EndpointPlugin`: asked to attach its routes as the application is built, told when the engine is up."""

    name = "neuronlens"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._desk: Desk | None = None

    def attach_router(self, app: "FastAPI") -> None:
        from neuronlens.vllm.middleware import InterventionMiddleware

        app.add_middleware(InterventionMiddleware, desk=lambda: self._desk)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is not None:
            self._desk = await _desk(engine_client, args)


async def _desk(engine_client: Any, args: Namespace) -> "Desk":
    """Raises UsageError for sources or keys that cannot be had."""
    from neuronlens.identity import model_identity
    from neuronlens.serving.app import create_app
    from neuronlens.serving.auth import Keys
    from neuronlens.serving.cards import CardShelf
    from neuronlens.serving.catalog import Catalog
    from neuronlens.serving.metrics import Metrics
    from neuronlens.serving.service import Service
    from neuronlens.serving.settings import Settings
    from neuronlens.serving.steering import Steering
    from neuronlens.vllm.admission import Admission
    from neuronlens.vllm.middleware import Desk

    sources = tuple(filter(None, os.environ.get(SOURCES, "").split(",")))
    if not sources and not os.environ.get(UPLOADS):
        raise UsageError(
            f"The plugin neuronlens has no range tables: neither {SOURCES} nor {UPLOADS} is set. Set {SOURCES} to a "
            "store or the folder of a table, or leave neuronlens out of VLLM_PLUGINS."
        )
    key_file = os.environ.get(KEY_FILE)
    keys = Keys.load(Path(key_file) if key_file else None, os.environ, _log.warning)
    catalog = Catalog(sources, uploads=os.environ.get(UPLOADS))
    metrics = Metrics()
    _show_in_vllms_metrics(metrics)
    settings = Settings()
    cards = CardShelf(catalog.stores, catalog)
    tables = create_app(Service(settings=settings, catalog=catalog, cards=cards, keys=keys, metrics=metrics))
    if args.worker_cls != WORKER:
        _log.warning("requests cannot be steered: --worker-cls is %s, expected %s", args.worker_cls, WORKER)
        return Desk(tables=tables, keys=keys, metrics=metrics)
    model = engine_client.vllm_config.model_config
    names = args.served_model_name or [args.model]
    admission = Admission(engine_client)
    facts = await admission.facts(
        model_id=names[0],
        aliases=names[1:],
        config_hash=model_identity(model.model, model.revision).config_hash,
        window=model.max_model_len,
    )
    rules = min(settings.limits.rules, WorkerConfig.of(engine_client.vllm_config.additional_config).rules)
    return Desk(
        tables=tables,
        keys=keys,
        metrics=metrics,
        steering=Steering(catalog, facts, rules),
        admission=admission,
        model_card={
            "engine": facts.engine,
            "dtype": facts.dtype,
            "hook_points": {name: list(layers) for name, layers in facts.sites.items()},
        },
    )


def _show_in_vllms_metrics(metrics: Any) -> None:
    """Our counters at vLLM's /metrics, which shows the process's registry."""
    import prometheus_client

    class Ours:
        def collect(self) -> Any:
            return (family for family in metrics.registry.collect() if family.name.startswith("neuronlens"))

        def describe(self) -> list[Any]:
            return []

    prometheus_client.REGISTRY.register(Ours())
