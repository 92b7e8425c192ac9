"""A real server of a tiny model with a table that catches much of what it computes, for tests of the text routes."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from neuronlens.identity import model_identity
from neuronlens.models import LoadedModel, load_model
from neuronlens.ranges import RangeTable
from neuronlens.serving.app import create_app
from neuronlens.serving.auth import Keys
from neuronlens.serving.cards import CardShelf
from neuronlens.serving.catalog import Catalog
from neuronlens.serving.metrics import Metrics
from neuronlens.serving.service import Service
from neuronlens.serving.settings import Limits, Settings
from neuronlens.serving.transformers_engine import TransformersEngine
from tests.neuronlens.serving.tiny_engine import table_with_pieces, wide_table
from tests.served import served
from tests.tiny_models import save_tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class TextServer:
    """A server, and the same model and table without it. `name` is the model's."""

    url: str
    name: str
    loaded: LoadedModel
    table: RangeTable
    pieces: RangeTable
    """Another table of the model, with pieces."""
    engine: TransformersEngine
    service: Service

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **{"max_retries": 0, **options})


@contextlib.contextmanager
def text_server(
    folder: Path,
    *,
    architecture: str = "gpt2",
    limits: Limits | None = None,
    max_batch: int = 8,
    seconds_a_step: float = 0,
    log_prompts: bool = False,
) -> Iterator[TextServer]:
    """A server whose forward passes take at least `seconds_a_step`."""
    model = save_tiny(folder / "tiny", architecture)
    config_hash = model_identity(str(model)).config_hash
    table = wide_table(config_hash)
    pieces = table_with_pieces(config_hash)
    others = [other.save(folder) for other in (wide_table("another" + "0" * 25), pieces)]
    for other in others:
        os.utime(Path(other) / "table.json", (0, 0))  # `table` is the latest
    catalog = Catalog([table.save(folder), *others])
    limits = limits or Limits()
    engine = TransformersEngine.load(str(model), limits=limits, max_batch=max_batch)
    if seconds_a_step:
        trunk: Any = engine.loaded.module.base_model
        trunk.register_forward_pre_hook(lambda *_: time.sleep(seconds_a_step))
    service = Service(
        settings=Settings(limits=limits, log_prompts=log_prompts),
        catalog=catalog,
        cards=CardShelf([], catalog),
        keys=Keys(),
        metrics=Metrics(),
        engine=engine,
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    with served(create_app(service)) as url:
        yield TextServer(
            url=url,
            name="tiny",
            loaded=load_model(str(model)),
            table=table,
            pieces=pieces,
            engine=engine,
            service=service,
        )
