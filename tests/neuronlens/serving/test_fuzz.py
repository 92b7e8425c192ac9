"""The server under requests that nobody would write by hand: no 5xx, a sentence for every refusal, and others' tokens
stay right."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from neuronlens.errors import UsageError
from neuronlens.identity import model_identity
from neuronlens.models import LoadedModel, load_model
from neuronlens.ranges import RangeTable
from neuronlens.serving.app import create_app
from neuronlens.serving.auth import Keys
from neuronlens.serving.bodies import MAX_NAMES
from neuronlens.serving.cards import CardShelf
from neuronlens.serving.catalog import Catalog
from neuronlens.serving.metrics import Metrics
from neuronlens.serving.schemas import ChatRequest, CompletionRequest
from neuronlens.serving.service import Service
from neuronlens.serving.settings import Limits, Settings
from neuronlens.serving.transformers_engine import TransformersEngine
from tests.neuronlens.serving.schemathesis_hooks import CONCEPTS, MODEL
from tests.neuronlens.serving.tiny_engine import RULES, alone, wide_table
from tests.range_tables import large_table
from tests.report_stores import arrays, write_report_store
from tests.served import served
from tests.tiny_models import D_MLP, save_tiny

READ_KEY, WRITE_KEY = "read-key-of-the-tests", "write-key-of-the-tests"
HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
ROOT = HOOKS.parents[3]
PROMPTS = ("i feel so happy today", "the storm came closer", "he slammed the door")
N_TOKENS = 6
LONGEST_MESSAGE = 4_100
BODY_BYTES = 100_000
JOY = {"concept": "joy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fuzzed:
    """A server of a tiny model, its range table and the cards of a store; `folder` holds all that it may write to."""

    url: str
    service: Service
    loaded: LoadedModel
    table: RangeTable
    folder: Path

    def client(self, key: str = WRITE_KEY) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def files(self) -> set[Path]:
        return {path for path in self.folder.rglob("*") if path.is_file()}

    def statuses(self) -> dict[tuple[str, str], set[int]]:
        """Which statuses each (method, route) was answered with so far."""
        found: dict[tuple[str, str], set[int]] = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                if sample.name == "neuronlens_requests_total":
                    labels = sample.labels
                    found.setdefault((labels["method"], labels["route"]), set()).add(int(labels["status"]))
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Fuzzed]:
    folder = tmp_path_factory.mktemp("fuzzed")
    model = save_tiny(folder / MODEL, "gpt2")
    config_hash = model_identity(str(model)).config_hash
    described = {"id": MODEL, "revision": None, "config_hash": config_hash}
    store = write_report_store(folder / "store", arrays(CONCEPTS, width=D_MLP), raw=False, model=described)
    table = wide_table(config_hash)
    table.save(store.root)
    catalog = Catalog([store.root], uploads=str(folder / "uploads"))
    limits = Limits(body_bytes=BODY_BYTES, max_tokens=8, sequences=4, upload_bytes=1_000_000)
    service = Service(
        settings=Settings(limits=limits),
        catalog=catalog,
        cards=CardShelf(catalog.stores, catalog),
        keys=Keys.of([("read", READ_KEY), ("write", WRITE_KEY)]),
        metrics=Metrics(),
        engine=TransformersEngine.load(str(model), limits=limits, device="cpu", cache_bytes=64 << 20),
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    (folder / "tmp").mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(folder / "tmp")
    try:
        with served(create_app(service)) as url:
            yield Fuzzed(url=url, service=service, loaded=load_model(str(model)), table=table, folder=folder)
    finally:
        tempfile.tempdir = before


# --- its own OpenAPI -------------------------------------------------------------------------------------------------


def run_schemathesis(server: Fuzzed, folder: Path, *arguments: str) -> str:
    """What `schemathesis run` says of the server; fails where it found anything."""
    config = folder / "schemathesis.toml"
    config.write_text(f'hooks = "{HOOKS}"\n[auth.openapi.key]\nbearer = "{WRITE_KEY}"\n')
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
            *("run", f"{server.url}/openapi.json", "--no-color", "--continue-on-failure"),
            *("--seed", "1", "--generation-deterministic"),
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    return run.stdout


def test_api__keeps_what_its_openapi_says(server, tmp_path):
    print(run_schemathesis(server, tmp_path, "--phases", "coverage,fuzzing", "--max-examples", "4"))
    print(server.statuses())
