"""The command that serves range tables, and text steered by them: serve."""

import json
import os
import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuronlens.cli.app import app
from neuronlens.cli.serving_options import (
    AllowOriginOption,
    ChatTemplateOption,
    DtypeOption,
    LogPromptsOption,
    ModelOption,
    NoAuthOption,
    RevisionOption,
    SourcesArgument,
    TablesOnlyOption,
)
from neuronlens.console import print_json, stderr
from neuronlens.errors import UsageError

if TYPE_CHECKING:
    from neuronlens.serving.assembly import ServiceSpec
    from neuronlens.serving.server import Place
    from neuronlens.serving.service import Service

_N_SHOWN = 5


class EngineName(StrEnum):
    transformers = "transformers"
    vllm = "vllm"


def _limit(name: str, help: str, default: str) -> Any:
    """An option whose default is that of `settings.Limits`, which is not imported for --help."""
    least = 0.001 if name.endswith("-seconds") else 1
    return typer.Option(name, min=least, help=f"{help} [default: {default}]", rich_help_panel="Limits")


@app.command(
    epilog="Examples: `neuronlens serve STORE` with the model that the store names · `neuronlens serve STORE --model "
    "path/or/hub-id --port 8000 --api-key-file keys.txt` · `neuronlens serve STORE s3://bucket/other --tables-only` · "
    "a free port, for a script: `neuronlens serve STORE --port 0 --json`. A key file has a line `read KEY` or "
    "`write KEY` for each key."
)
def serve(
    sources: SourcesArgument = None,
    model: ModelOption = None,
    engine: Annotated[
        EngineName, typer.Option(help="What runs the model: transformers in this process, or vLLM's own server.")
    ] = EngineName.transformers,
    vllm_option: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="Goes to vllm serve: --vllm-option=--tensor-parallel-size=2. Repeatable."),
    ] = None,
    tables_only: TablesOnlyOption = False,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for every address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys; also in NEURONLENS_API_KEY (read) and NEURONLENS_WRITE_KEY.")
    ] = None,
    no_auth: NoAuthOption = 0,
    uploads: Annotated[
        str | None, typer.Option(help="Where uploaded tables go, a folder or URL [default: the first store].")
    ] = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the model on a CPU [default: one core less, for the requests].")
    ] = None,
    chat_template: ChatTemplateOption = None,
    allow_origin: AllowOriginOption = None,
    log_prompts: LogPromptsOption = False,
    drain_seconds: Annotated[float, typer.Option(min=0, help="What running requests get when the server ends.")] = 30,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Sequences in one forward pass.", rich_help_panel="Limits")
    ] = 32,
    cache_gb: Annotated[
        float | None,
        typer.Option(min=0.001, help="For keys and values [default: by the free memory].", rich_help_panel="Limits"),
    ] = None,
    max_body_bytes: Annotated[int | None, _limit("--max-body-bytes", "Of a request.", "2,000,000")] = None,
    body_seconds: Annotated[float | None, _limit("--body-seconds", "A client may take to send it.", "30")] = None,
    max_upload_bytes: Annotated[int | None, _limit("--max-upload-bytes", "Of a table.", "256,000,000")] = None,
    max_upload_rows: Annotated[int | None, _limit("--max-upload-rows", "Of a table.", "20,000,000")] = None,
    max_prompt_tokens: Annotated[int | None, _limit("--max-prompt-tokens", "Of a prompt.", "the window")] = None,
    max_tokens: Annotated[int | None, _limit("--max-tokens", "That a request may ask for.", "the window")] = None,
    max_sequences: Annotated[int | None, _limit("--max-sequences", "Of a request: prompts times n.", "32")] = None,
    max_rules: Annotated[int | None, _limit("--max-rules", "Of an intervention.", "16")] = None,
    max_programs: Annotated[int | None, _limit("--max-programs", "Distinct ones, at work or waiting.", "64")] = None,
    max_queue: Annotated[int | None, _limit("--max-queue", "Sequences that wait.", "512")] = None,
    request_seconds: Annotated[float | None, _limit("--request-seconds", "For a whole request.", "600")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout when the server is ready.")
    ] = False,
) -> None:
    """Serve range tables over HTTP and, with a model, OpenAI's completions and chat, steered per request.

    Ctrl-C or SIGTERM lets what runs finish; a second one ends it at once."""
    _check_extra()
    from neuronlens.recipe import parse_section
    from neuronlens.serving.assembly import ServiceSpec, assemble
    from neuronlens.serving.auth import Keys
    from neuronlens.serving.logs import configure
    from neuronlens.serving.server import bind, serve_forever

    limits = {
        "body_bytes": max_body_bytes,
        "body_seconds": body_seconds,
        "upload_bytes": max_upload_bytes,
        "upload_rows": max_upload_rows,
        "prompt_tokens": max_prompt_tokens,
        "max_tokens": max_tokens,
        "sequences": max_sequences,
        "rules": max_rules,
        "programs": max_programs,
        "queue": max_queue,
        "request_seconds": request_seconds,
    }
    given = {
        "sources": tuple(sources or ()),
        "uploads": uploads,
        "model": model,
        "revision": revision,
        "tables_only": tables_only,
        "dtype": dtype,
        "device": device,
        "max_batch": max_batch,
        "cache_gb": cache_gb,
        "threads": threads or max(1, (os.cpu_count() or 1) - 1),
        "chat_template": chat_template,
        "settings": {
            "limits": {name: limit for name, limit in limits.items() if limit is not None},
            "log_prompts": log_prompts,
            "allowed_origins": tuple(allow_origin or ()),
        },
    }
    spec = parse_section(ServiceSpec, given, origin="neuronlens serve")
    if vllm_option and engine is not EngineName.vllm:
        raise UsageError(
            f"--vllm-option {vllm_option[0]} is for --engine vllm, found {engine.value}. Drop one of the two."
        )
    keys = Keys.load(api_key_file, os.environ, _warn)
    place = bind(host, port, has_keys=bool(keys), no_auth=no_auth)
    if engine is EngineName.vllm:
        _serve_by_vllm(spec, place, api_key_file, vllm_option or [], as_json=as_json)
        return
    settings = spec.settings.model_copy(update={"trusted_hosts": place.trusted_hosts(has_keys=bool(keys))})
    configure()
    service = assemble(spec.model_copy(update={"settings": settings}), keys)
    serve_forever(
        service, place, drain_seconds=drain_seconds, on_ready=lambda: _announce(service, place, as_json=as_json)
    )


def _serve_by_vllm(
    spec: "ServiceSpec", place: "Place", key_file: Path | None, options: list[str], *, as_json: bool
) -> None:
    """vLLM listens itself: our socket has only shown that the place is free."""
    from neuronlens.serving.catalog import Catalog
    from neuronlens.vllm.launch import check_installed, environment, run_vllm, vllm_arguments

    check_installed()
    if spec.tables_only:
        raise UsageError("A server of tables only has no use for vLLM. Drop --engine or --tables-only.")
    catalog = Catalog(spec.sources, uploads=spec.uploads)
    host, port = place.socket.getsockname()[:2]
    arguments = vllm_arguments(spec, catalog, host=host, port=port, more=options)
    place.socket.close()
    tables = [entry.id for entry in catalog.entries()]
    model = arguments[3]
    shown = {"url": place.url, "model": model, "tables": tables}

    def announce() -> None:
        stderr().print(f"listening    {place.url}   (vLLM, model {model})", highlight=False, markup=False)
        if as_json:
            print_json(shown)

    environ = environment(spec, None if key_file is None else str(key_file), os.environ)
    run_vllm(arguments, environ, place.url, announce)


def _check_extra() -> None:
    try:
        import fastapi
        import prometheus_client
        import structlog
        import uvicorn
        from uvicorn.protocols.http import httptools_impl
    except ImportError as error:
        raise UsageError(
            f"The server's packages are not installed ({error}). Install them: pip install 'neuronlens[serve]'"
        ) from error
    del fastapi, prometheus_client, structlog, uvicorn, httptools_impl


def _warn(sentence: str) -> None:
    stderr().print(f"neuronlens: {sentence}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _announce(service: "Service", place: "Place", *, as_json: bool) -> None:
    """Say on stderr, and to a script on stdout, that requests may come."""
    from neuronlens.serving.logs import log

    model = service.engine.facts.model_id if service.engine else None
    tables = [entry.id for entry in service.catalog.entries()]
    example = _example(service, place.url, model, tables)
    console = stderr()
    if console.is_terminal:
        more = f" and {len(tables) - _N_SHOWN} more" if len(tables) > _N_SHOWN else ""
        lines = [
            f"listening    {place.url}   (docs: {place.url}/docs; Ctrl-C ends)",
            f"model        {model or 'none: tables only'}",
            f"tables       {', '.join(tables[:_N_SHOWN]) or 'none yet'}{more}",
            "\nTry:",
            f"  {example}",
        ]
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    else:
        log.info("ready", url=place.url, model=model, tables=tables, example=example)
    if as_json:
        print_json({"url": place.url, "model": model, "tables": tables})


def _example(service: "Service", url: str, model: str | None, tables: list[str]) -> str:
    key = " -H 'Authorization: Bearer KEY'" if service.keys else ""
    if model is None:
        return f"curl {url}/v1/tables{key}"
    asked: dict[str, Any] = {"model": model, "prompt": "i feel", "max_tokens": 20}
    concept = next((name for store in service.catalog.stores for name in store.describe()["concepts"]), None)
    if tables and concept:
        asked["intervention"] = {"table": "latest", "rules": [{"concept": concept, "action": "zero"}]}
    body = shlex.quote(json.dumps(asked, ensure_ascii=False))
    return f"curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d {body}"
