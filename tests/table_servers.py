"""A real server of range tables alone: the routes under test, keys and limits, and nothing else."""

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from neuronlens.serving import errors, table_routes
from neuronlens.serving.auth import Keys
from neuronlens.serving.catalog import Catalog
from neuronlens.serving.settings import Limits, Settings
from tests.served import served

READ_KEY, WRITE_KEY = "read-key-of-the-tests", "write-key-of-the-tests"


def service_of_tables(
    sources: Sequence[Any] = (), *, uploads: Any = None, engine: Any = None, keys: Keys | None = None, **limits: int
) -> SimpleNamespace:
    """The parts of a server that tables need."""
    return SimpleNamespace(
        settings=Settings(limits=Limits(**limits)),
        catalog=Catalog([str(source) for source in sources], uploads=None if uploads is None else str(uploads)),
        keys=Keys.of([("read", READ_KEY), ("write", WRITE_KEY)]) if keys is None else keys,
        engine=engine,
    )


def app_of(service: Any) -> FastAPI:
    app = FastAPI()
    app.state.service = service
    errors.install(app)
    app.include_router(table_routes.router)
    return app


@contextlib.contextmanager
def table_server(sources: Sequence[Any] = (), **options: Any) -> Iterator[str]:
    """The base URL of a server of these stores and tables."""
    with served(app_of(service_of_tables(sources, **options))) as url:
        yield url
