"""How long does a client wait for a neuron's card?

    python -m tests.benchmarks.bench_cards [STORE ...] [--neurons 14336] [--concepts 14] [--requests 3000] [--json]

A server over one store, in a process of its own, is asked for the cards of random neurons over one kept-alive
connection on loopback: of one concept, of all, and again with the ETag of the first. "First" is the first card of each
block of neurons, on a server that reads nothing ahead. Without STORE, one layer of synthetic statistics is made.
"""

import argparse
import http.client
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from neuronlens.query import connect, run_file
from neuronlens.ranges import RangeTable, TableModel
from neuronlens.recipe import OverlapSection
from neuronlens.serving import cards
from neuronlens.serving.auth import Keys
from neuronlens.serving.card_blocks import StoreBlocks
from neuronlens.serving.catalog import Catalog
from neuronlens.serving.metrics import Metrics
from neuronlens.serving.server import bind, serve_forever
from neuronlens.serving.service import Service
from neuronlens.serving.settings import Settings
from neuronlens.store import Store
from pipeline.statistics import Layer, Resources, compute_layer, kept_pairs
from pipeline.statistics import Settings as StatisticsSettings
from tests.benchmarks.bench_scale import HOOK_POINT, _write_shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="*", metavar="STORE")
    parser.add_argument("--neurons", type=int, default=14_336)
    parser.add_argument("--concepts", type=int, default=14)
    parser.add_argument("--requests", type=int, default=3_000)
    parser.add_argument("--json", action="store_true", help="Print one JSON line instead of the table.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="neuronlens-bench-") as folder:
        roots = args.stores or [_made(Path(folder) / "store", args)]
        rows = [row for root in roots for row in _measure(Store(root), args.requests)]
    if args.json:
        print(json.dumps({"settings": vars(args), "rows": rows}))
        return
    print("| store | card | bytes | requests | p50, ms | p99, ms | longest, ms |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['store']} | {row['card']} | {row['bytes']:,} | {row['requests']:,} | {row['p50']:.2f} "
            f"| {row['p99']:.2f} | {row['longest']:.2f} |"
        )


def _measure(store: Store, n_requests: int) -> Iterator[dict[str, Any]]:
    blocks = StoreBlocks(store)
    sites = [(hook_point, layer) for hook_point in blocks.widths for layer in blocks.layers]
    one = {"concept": min(blocks.concepts)}
    shape = f"{len(blocks.layers)} x {max(blocks.widths.values()):,} x {len(blocks.concepts)}"

    def row(card: str, answers: list[tuple[float, int]]) -> dict[str, Any]:
        ms = sorted(seconds * 1e3 for seconds, _ in answers)
        return {
            "store": shape,
            "card": card,
            "bytes": round(statistics.mean(n_bytes for _, n_bytes in answers)),
            "requests": len(ms),
            "p50": statistics.median(ms),
            "p99": ms[min(len(ms) - 1, int(0.99 * len(ms)))],
            "longest": ms[-1],
        }

    rng = random.Random(0)
    with _server(store.root, read_ahead=False) as ask:
        ask(*sites[0], 0)  # opens DuckDB, 0.2 s
        firsts = [
            (*site, number * blocks.neurons_a_block) for site in sites for number in range(blocks.n_blocks(site[0]))
        ][1:]
        if firsts:
            yield row("first of a block", [ask(*place, **one) for place in rng.sample(firsts, min(len(firsts), 50))])
    with _server(store.root, read_ahead=True) as ask:
        places = [(*site, rng.randrange(blocks.widths[site[0]])) for site in rng.choices(sites, k=n_requests)]
        time.sleep(cards.WARM_UP_SECONDS)
        yield row("one concept", [ask(*place, **one) for place in places])
        yield row("all concepts", [ask(*place) for place in places])
        etag = ask.etag  # type: ignore[attr-defined]
        yield row("unchanged", [ask(*places[-1], etag=etag) for _ in places])


@contextmanager
def _server(root: str, *, read_ahead: bool) -> Iterator[Callable[..., tuple[float, int]]]:
    """A function that asks for one card, and gives the seconds and the bytes of the answer."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(root, read_ahead, sender), daemon=True)
    process.start()
    where = urlsplit(receiver.recv())
    connection = http.client.HTTPConnection(str(where.hostname), where.port)

    def ask(hook_point: str, layer: int, neuron: int, *, concept: str = "", etag: str = "") -> tuple[float, int]:
        query = f"?concept={quote(concept)}" if concept else ""
        headers = {"If-None-Match": etag} if etag else {}
        started = time.perf_counter()
        connection.request("GET", f"/v1/neurons/{hook_point}/{layer}/{neuron}{query}", headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        seconds = time.perf_counter() - started
        assert answer.status == (304 if etag else 200), body
        ask.etag = answer.headers["etag"]  # type: ignore[attr-defined]
        return seconds, len(body)

    try:
        yield ask
    finally:
        connection.close()
        process.terminate()
        process.join()


def _serve(root: str, read_ahead: bool, sender: Any) -> None:
    if not read_ahead:
        cards.WARM_UP_SECONDS = -1.0
    catalog = Catalog([root])
    service = Service(
        settings=Settings(),
        catalog=catalog,
        cards=cards.CardShelf(catalog.stores, catalog),
        keys=Keys(),
        metrics=Metrics(),
    )
    place = bind("127.0.0.1", 0, has_keys=False)
    serve_forever(service, place, on_ready=lambda: sender.send(place.url))


def _made(root: Path, args: Namespace) -> str:
    """A store of one layer, with a range table."""
    store = Store(str(root))
    shape = Namespace(layers=1, neurons=args.neurons, concepts=args.concepts, shards=1, samples=200)
    commits = [_write_shard(store, shape, number) for number in range(args.concepts)]
    n_samples = sum(commit["n_samples"] for commit in commits)
    for commit in commits:
        store.create_json(f"commits/shard-{commit['shard']:05d}.json", commit)
    description: dict[str, Any] = {
        "format_version": 1,
        "store_hash": "0" * 64,
        "hook_points": [HOOK_POINT],
        "layers": [0],
        "widths": {HOOK_POINT: args.neurons},
        "unit": "last_token",
        "model": {"id": "synthetic", "revision": None, "config_hash": "0" * 64},
        "concepts": {commit["concept"]: commit["n_samples"] for commit in commits},
        "dataset": {"n_rows": n_samples},
        "files": [],
    }
    store.create_json("store.json", description)
    compute_layer(
        store,
        Layer(hook_point=HOOK_POINT, layer=0, width=args.neurons),
        commits,
        settings=StatisticsSettings(tau=2.5, overlap=kept_pairs(OverlapSection(), args.concepts)),
        coverage={"n_shards": len(commits), "n_planned_shards": len(commits)},
        resources=Resources(n_threads=2, memory_bytes=4 * 10**9, scratch=tempfile.gettempdir()),
    )
    ranges: dict[str, Any] = {"tau": 2.5, "top_fraction": 0.3, "salience": "mean_abs"}
    with connect(store.file_lists()) as con:
        rows = run_file(con, "ranges", **ranges)
    named = {name: description[name] for name in ("store_hash", "unit", "widths")}
    RangeTable.make(rows, model=TableModel(**description["model"]), **named, **ranges).save(store.root)
    return store.root


if __name__ == "__main__":
    main()
