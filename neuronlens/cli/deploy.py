"""The command that serves from several replicas on a Ray cluster: deploy."""

import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
import yaml

from neuronlens.cli.app import JsonOption, app
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
from neuronlens.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from neuronlens.serving.ray_serve import DeployArgs
    from neuronlens.serving.server import Place

_AUTO = "auto"
_KEEP_ALIVE_SECONDS = 75
"""As `neuronlens serve` keeps connections."""
_LOOK_SECONDS = 2.0
_GRACE_SECONDS = 20.0
_VITAL = ("raylet", "gcs_server")
_HEAD = "node:__internal_head__"
"""The resource by which Ray marks the head node."""
_IMPORT_PATH = "neuronlens.serving.ray_serve:build"


@app.command(
    epilog="Examples: `neuronlens deploy STORE --model path/or/hub-id --replicas 2` on this machine, until Ctrl-C · "
    "`neuronlens deploy s3://bucket/run --model some/model --replicas 2 --max-replicas 8 --gpus-per-replica 1 "
    "--address 10.0.0.1:6379 --host 0.0.0.0 --api-key-file /etc/neuronlens/keys.txt` on a cluster, where it stays "
    "· `neuronlens deploy STORE --print-config > serve.yaml` for `serve deploy serve.yaml`."
)
def deploy(
    sources: SourcesArgument = None,
    model: ModelOption = None,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the server, each with a model of its own.")] = 2,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="As many as the load needs, from --replicas up to this.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster [default: RAY_ADDRESS, else Ray is started on this machine]."),
    ] = None,
    gpus_per_replica: Annotated[str, typer.Option(help="auto is 1 where the cluster has GPUs.")] = _AUTO,
    cpus_per_replica: Annotated[str, typer.Option(help="auto shares the cores of the cluster out.")] = _AUTO,
    tables_only: TablesOnlyOption = False,
    host: Annotated[str, typer.Option(help="Where each node listens; 0.0.0.0 for every address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one of this machine.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys, a file on every node; also in NEURONLENS_API_KEY (read) and NEURONLENS_WRITE_KEY."),
    ] = None,
    no_auth: NoAuthOption = 0,
    uploads: Annotated[
        str | None,
        typer.Option(help="Where uploaded tables go, a folder or URL of all nodes [default: the first store]."),
    ] = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass of a replica.")] = 32,
    cache_gb: Annotated[
        float | None, typer.Option(min=0.001, help="For keys and values of a replica [default: by the free memory].")
    ] = None,
    chat_template: ChatTemplateOption = None,
    allow_origin: AllowOriginOption = None,
    log_prompts: LogPromptsOption = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="One of serve's limits: queue=256 is its --max-queue. Repeatable."),
    ] = None,
    drain_seconds: Annotated[float, typer.Option(min=0.1, help="What running requests get when a replica ends.")] = 30,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print Ray Serve's configuration, and start nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Serve from several replicas, as a Ray Serve application. A replica that dies is replaced.

    Where no cluster is named, Ray is started here and ends with the command, after what runs has finished."""
    _check_extra()
    from neuronlens.cluster import ray_cluster
    from neuronlens.recipe import parse_section
    from neuronlens.serving.ray_serve import DeployArgs

    given = {
        "sources": tuple(map(_absolute, sources or ())),
        "model": None if model is None else _absolute(model),
        "uploads": None if uploads is None else _absolute(uploads, must_exist=False),
        "chat_template": chat_template and _absolute(chat_template),
        "api_key_file": None if api_key_file is None else str(api_key_file.absolute()),
        "settings": {
            "limits": _limits(limit or ()),
            "log_prompts": log_prompts,
            "allowed_origins": tuple(allow_origin or ()),
        },
        "revision": revision,
        "tables_only": tables_only,
        "dtype": dtype,
        "max_batch": max_batch,
        "cache_gb": cache_gb,
        "replicas": replicas,
        "max_replicas": max_replicas,
        "drain_seconds": drain_seconds,
        **_given_shares(cpus_per_replica, gpus_per_replica),
    }
    args = parse_section(DeployArgs, given, origin="neuronlens deploy")
    is_ours = not (address or os.environ.get("RAY_ADDRESS"))
    has_keys = _has_keys(api_key_file, must_exist=is_ours)
    place = _place(host, port, has_keys=has_keys, no_auth=no_auth, is_ours=is_ours)
    settings = args.settings.model_copy(update={"trusted_hosts": place.trusted_hosts(has_keys=has_keys)})
    args = args.model_copy(update={"no_auth": not has_keys, "settings": settings})
    if print_config:
        typer.echo(_config(args, host, port), nl=False)
        return
    if is_ours:
        _check_here(args)
        port = urlsplit(place.url).port or port
    stderr().print("starting Ray" if is_ours else "joining the cluster", style="dim")
    with ray_cluster(address):
        args = args.model_copy(update=_own_shares(args))
        if is_ours:
            _check_room(args)
        _start(args, host, port, is_ours=is_ours)
        url = place.url if is_ours else _url(host, port)
        _announce(args, url, is_ours=is_ours, as_json=as_json)
        if is_ours:
            _serve_until_told(drain_seconds)


def _check_extra() -> None:
    try:
        import fastapi
        import prometheus_client
        import structlog
        from ray import serve
    except ImportError as error:
        raise UsageError(
            f"The packages of the server or of Ray Serve are not installed ({error}). Install them: "
            "pip install 'neuronlens[serve,deploy]'"
        ) from error
    del fastapi, prometheus_client, structlog, serve


def _absolute(path: str, *, must_exist: bool = True) -> str:
    """A local path in full, since replicas work in another folder; anything else (a URL, a hub id) as it is."""
    local = Path(path).expanduser()
    return str(local.absolute()) if "://" not in path and (local.exists() or not must_exist) else path


def _limits(given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for name, equals, _ in pairs:
        if not equals:
            raise UsageError(f"--limit {name} has no number. Expected NAME=NUMBER, such as queue=256.")
    return {name.strip(): number.strip() for name, _, number in pairs}


def _has_keys(file: Path | None, *, must_exist: bool) -> bool:
    """Whether a key will guard the replicas. On this machine the file is read now; on a cluster they read their own."""
    from neuronlens.serving.auth import READ_VARIABLE, WRITE_VARIABLE, Keys

    if must_exist:
        return bool(Keys.load(file, os.environ, _warn))
    return file is not None or any(os.environ.get(name) for name in (READ_VARIABLE, WRITE_VARIABLE))


def _place(host: str, port: int, *, has_keys: bool, no_auth: int, is_ours: bool) -> "Place":
    """Where Serve will listen, once it is known that it may. On a cluster the port is another machine's."""
    from neuronlens.serving.server import bind

    place = bind(host, port if is_ours else 0, has_keys=has_keys, no_auth=no_auth)
    place.socket.close()
    return place


def _check_here(args: "DeployArgs") -> None:
    """What is wrong with the sources or the model is said now, and not by each replica."""
    from neuronlens.serving.assembly import chat_template_of, chosen_model
    from neuronlens.serving.catalog import Catalog

    chat_template_of(args.chat_template)
    catalog = Catalog(args.sources, uploads=args.uploads)
    if not args.tables_only:
        chosen_model(args, catalog)


def _config(args: "DeployArgs", host: str, port: int) -> str:
    """A Serve configuration file."""
    from neuronlens.serving.ray_serve import NAME

    content = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port, "keep_alive_timeout_s": _KEEP_ALIVE_SECONDS},
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": _IMPORT_PATH,
                "args": args.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _given_shares(cpus: str, gpus: str) -> dict[str, float]:
    """What a replica shall have, as far as it was said."""
    given = {"cpus_per_replica": cpus, "gpus_per_replica": gpus}
    return {name: _number(name, text) for name, text in given.items() if text != _AUTO}


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--{name.replace('_', '-')} is {text!r}; expected a number, or auto.") from error


def _own_shares(args: "DeployArgs") -> dict[str, float]:
    """What a replica gets of the cluster where nothing was said: a GPU if there are any, and its part of the cores."""
    import ray

    there = ray.cluster_resources()
    biggest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    part = min(there.get("CPU", 1) / max(args.replicas, args.max_replicas or 0), biggest or 1)
    auto = {"gpus_per_replica": float(there.get("GPU", 0) > 0), "cpus_per_replica": int(part) if part >= 1 else part}
    return {name: value for name, value in auto.items() if name not in args.model_fields_set}


def _check_room(args: "DeployArgs") -> None:
    """Raise UsageError where our own Ray has too little for the replicas: they would wait without an end."""
    import ray

    there = ray.cluster_resources()
    for kind, each in (("CPU", args.cpus_per_replica), ("GPU", args.gpus_per_replica)):
        wanted = each * (args.max_replicas or args.replicas)
        if wanted > there.get(kind, 0):
            raise UsageError(
                f"{args.max_replicas or args.replicas} replicas with {each:g} {kind}s each want {wanted:g}, and this "
                f"machine has {there.get(kind, 0):g}. Ask for fewer replicas, or for less with "
                f"--{kind.lower()}s-per-replica."
            )


def _start(args: "DeployArgs", host: str, port: int, *, is_ours: bool) -> None:
    from ray import serve

    from neuronlens.serving.ray_serve import NAME, build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly" if is_ours else "EveryNode",
        http_options={"host": host, "port": port, "keep_alive_timeout_s": _KEEP_ALIVE_SECONDS},
    )
    try:
        serve.run(build(args), name=NAME, route_prefix="/")
    except RuntimeError as error:
        application = serve.status().applications.get(NAME)
        said = [found.message for found in application.deployments.values()] if application else []
        logs = f" Their logs: {_logs()}" if is_ours else ""
        raise RunFailed(f"The replicas did not start: {_sentence(said[0] if said else str(error))}{logs}") from error


def _sentence(message: str) -> str:
    """The last words of what Serve says of a replica: an error of ours where it ends in one."""
    _, _, ours = message.rpartition("\nneuronlens.errors.")
    return (ours.partition(": ")[2] or message.splitlines()[-1]).strip()


def _logs() -> str:
    import ray

    return f"{ray._private.worker._global_node.get_session_dir_path()}/logs/serve"


def _url(host: str, port: int) -> str:
    """Where a cluster is reached: every node that has a replica listens, and the head."""
    import ray

    if host in ("0.0.0.0", "::"):
        heads = [node for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]]
        host = heads[0]["NodeManagerAddress"] if heads else "HEAD"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(args: "DeployArgs", url: str, *, is_ours: bool, as_json: bool) -> None:
    n_replicas = f"{args.replicas} to {args.max_replicas}" if args.max_replicas else str(args.replicas)
    lines = [
        f"listening    {url}   (docs: {url}/docs{'; Ctrl-C ends' if is_ours else ''})",
        f"replicas     {n_replicas}, with {args.cpus_per_replica:g} CPUs and {args.gpus_per_replica:g} GPUs each",
    ]
    if is_ours:
        lines.append(f"logs         {_logs()}")
    else:
        lines.append("It stays: serve status says how it is, serve shutdown ends it.")
    stderr().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print_json({"url": url, "replicas": args.replicas, "max_replicas": args.max_replicas})


def _serve_until_told(drain_seconds: float) -> None:
    """Wait for SIGTERM or Ctrl-C, then let the replicas finish what they have begun. A second signal ends it at once.

    Raises RunFailed where Ray ends before."""
    from ray import serve

    from neuronlens.serving.ray_serve import NAME

    told = threading.Event()

    def tell(number: int, _: FrameType | None) -> None:
        if told.is_set():
            os._exit(128 + number)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    while not told.wait(_LOOK_SECONDS) and not _ray_is_gone():
        pass
    # Ray may have died first, and does not let go of those who wait for it.
    last_resort = threading.Timer(drain_seconds + _GRACE_SECONDS, os._exit, [1])
    last_resort.daemon = True
    last_resort.start()
    if _ray_is_gone():
        raise RunFailed(
            "Ray ended on this machine, and the replicas with it. Expected it to run as long as this command: a signal "
            "must go to this process alone, and memory must suffice for all replicas."
        )
    stderr().print("letting requests finish", style="dim")
    serve.delete(NAME)
    serve.shutdown()


def _ray_is_gone() -> bool:
    """Whether one of the processes that our own Ray cannot be without has ended."""
    from ray._private.worker import _global_node as node

    return node is not None and any(kind in _VITAL for kind, _ in node.dead_processes())


def _warn(sentence: str) -> None:
    stderr().print(f"neuronlens: {sentence}", style="yellow", highlight=False, markup=False, soft_wrap=True)
