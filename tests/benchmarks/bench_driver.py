"""How fast does the driver hand shards out, and does its memory grow?

    python -m tests.benchmarks.bench_driver --shards 10000 --collectors 1 4 16 64 256

Collectors only sleep, as a GPU seems to a driver, and give back a receipt as long as a real one. Each number of
collectors is a process of its own.
"""

import argparse
import subprocess
import sys
import tempfile
import time

import psutil
import ray

from neuronlens.store import Store
from pipeline.frozen import Shard
from pipeline.plan import SHARDS_IN_HAND
from pipeline.pool import Pool, Started, Watcher, here
from pipeline.progress import CollectProgress
from pipeline.stopping import StopSignals


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=SHARDS_IN_HAND)
class Sleeper:
    """A collector without a model. It gets a number, so that its process need not import what a shard is made of."""

    def ready(self):
        return here()

    def collect(self, shard: int, seconds: float):
        time.sleep(seconds)
        files = [
            {
                "kind": "raw",
                "path": f"raw/hook_point=mlp_post/layer={layer}/{shard}.parquet",
                "n_bytes": 1,
                "blake2b": "0" * 32,
            }
            for layer in range(32)
        ]
        return {"shard": shard, "n_tokens": 1, "seconds": {"forward": seconds}, "files": files}


class Memory(CollectProgress):
    """What follows a real run, and a look at the driver's memory now and then."""

    n_done = 0
    resident: tuple[float, ...] = ()

    def done(self, job, result) -> None:
        super().done(job, result)
        self.n_done += 1
        if self.n_done % 500 == 1:
            self.resident += (psutil.Process().memory_info().rss / 1e6,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--collectors", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=0.005, help="how long a shard takes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(_row(args.collectors[0], args.shards, args.seconds))
        return
    print("| collectors | shards | receipts/s | driver's memory after 1, half, all, MB | driver's CPU a receipt, ms |")
    print("|---|---|---|---|---|", flush=True)
    for n in args.collectors:
        command = [sys.executable, "-m", "tests.benchmarks.bench_driver", "--child", "--collectors", str(n)]
        command += ["--shards", str(args.shards), "--seconds", str(args.seconds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(next(line for line in done.stdout.splitlines() if line.startswith("| ")), flush=True)  # Ray prints too


def _row(n_collectors: int, n_shards: int, seconds: float) -> str:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)

    def start() -> Started:
        actor = Sleeper.remote()
        return Started(actor, actor.ready.remote())

    with (
        tempfile.TemporaryDirectory() as folder,
        Pool[Shard](start=start, size=lambda: n_collectors, depth=SHARDS_IN_HAND) as pool,
    ):
        warm, shards = _shards(n_collectors * SHARDS_IN_HAND), _shards(n_shards)
        pool.run(warm, lambda actor, shard: actor.collect.remote(shard.shard, 0.5), Watcher())
        memory = Memory(
            Store(folder), shards, shards, stop=StopSignals(), check=lambda: None, on_tokens=lambda n: None, say=print
        )
        began, cpu = time.perf_counter(), time.process_time()
        failures = pool.run(shards, lambda actor, shard: actor.collect.remote(shard.shard, seconds), memory)
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert not failures
    assert memory.n_done == n_shards
    levels = memory.resident[0], memory.resident[len(memory.resident) // 2], memory.resident[-1]
    shown = " / ".join(f"{level:.0f}" for level in levels)
    return f"| {n_collectors} | {n_shards:,} | {n_shards / took:.0f} | {shown} | {cpu / n_shards * 1000:.2f} |"


def _shards(n: int) -> list[Shard]:
    fields = {"concept": "joy", "n_samples": 1, "n_tokens": 1, "n_batches": 1, "samples_file": "", "row_group": 0}
    return [Shard(shard=number, **fields) for number in range(n)]


if __name__ == "__main__":
    main()
