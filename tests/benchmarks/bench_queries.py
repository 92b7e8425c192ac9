"""How long does a person wait for an answer?

    python -m tests.benchmarks.bench_queries [--layers 4] [--neurons 4096] [--concepts 8] [--keep FOLDER] [--json]

A store of synthetic values with raw values, statistics and a range table is made (or taken from --keep, where an
earlier run left it). Every view and macro is asked one typical question; the time is the median of the repeats, on a
lens that is open already, as at a prompt. The report is made once, from the command's start to its end.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from neuronlens.lens import Lens
from neuronlens.recipe import RangesSection
from neuronlens.store import Store
from pipeline.driver import Silent
from pipeline.emit import emit_table
from tests.synthetic_store import Shard, add_statistics, write_store

QUESTIONS = {
    "samples": "select concept, count(*), avg(n_tokens) from samples group by concept",
    "shards": "select concept, sum(n_samples) from shards where committed group by concept",
    "partials": "select shard, mean from partials where layer = 2 and neuron = 1000",
    "shard_histograms": "select shard, bin, n from shard_histograms where layer = 2 and neuron = 1000",
    "histograms": "select concept, lower, n from histograms where layer = 2 and neuron = 1000",
    "activations": "select sample, value from activations where layer = 2 and neuron = 1000 and concept = 'c1'",
    "moments": "select layer, median(kurtosis) from moments group by layer",
    "distributions": "select layer, avg(ks) from distributions group by layer",
    "quantiles": "select layer, concept, median(p50) from quantiles group by all",
    "gaussianity": "select layer, avg(near_gaussian::integer), median(ks) from gaussianity group by layer",
    "overlap": "select neuron, ovl from overlap where concept_a = 'c1' and concept_b = 'c4' order by ovl limit 9",
    "overlap_by_layer": "select layer, avg(mean_ovl) from overlap_by_layer group by layer",
    "concept_overlap": "select neuron, mean_ovl from concept_overlap where concept = 'c1' order by mean_ovl limit 9",
    "salience": "select layer, neuron, score from salience where method = 'f_ratio' and concept = 'c1' and rank <= 5",
    "salient_overlap": "select layer, avg(jaccard) from salient_overlap group by layer",
    "polysemantic": "select layer, n_concepts, count(*) from polysemantic group by all",
    "ranges": "select concept, count(*), avg(upper - lower) from ranges group by concept",
    "evaluations": "from evaluations",
    "ar": "from ar(layer := 2, neuron := 1000, concept := 'c1', tau := 2.0)",
    "capture": "from capture(2, 1000, 'c1')",
    "ovl": "from ovl(2, 1000, 'c1', 'c4')",
    "quantile_of": "from quantile_of(2, 1000, 0.9)",
    "ks_exact": "from ks_exact(2, neuron := 1000)",
    "neuron_card (target 50)": "from neuron_card(2, 1000)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--neurons", type=int, default=4096)
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=100, help="Samples of each of a concept's two shards.")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--keep", type=Path, help="A folder for the store, to be used again.")
    parser.add_argument("--json", action="store_true", help="Print one JSON line instead of the table.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="neuronlens-bench-") as folder:
        store = _store(args.keep or Path(folder) / "store", args)
        open_ms, first_ms, median_ms = _ask(store, args.repeats)
        report_seconds = _report(store, Path(folder))
    if args.json:
        print(json.dumps({"open_ms": open_ms, "median_ms": median_ms, "report_seconds": report_seconds}))
        return
    print("| question | median, ms | first time, ms |\n|---|---|---|")
    for name, ms in median_ms.items():
        print(f"| {name} | {ms:.1f} | {first_ms[name]:.1f} |")
    print(f"\nOpening the store {open_ms:.0f} ms; the report {report_seconds:.1f} s (target 20).")


def _store(root: Path, args: argparse.Namespace) -> Store:
    if not (root / "store.json").exists():
        rng = np.random.default_rng(0)
        centre_CLN = rng.normal(size=(args.concepts, args.layers, args.neurons)).astype(np.float32)
        shards = []
        for _ in range(2):
            for concept in range(args.concepts):
                x_LSN = rng.standard_normal((args.layers, args.samples, args.neurons), dtype=np.float32)
                shards.append(Shard(concept=f"c{concept}", x_LSN=x_LSN + centre_CLN[concept, :, None]))
        write_store(root, shards)
        emit_table(add_statistics(root), RangesSection(), Silent())
    return Store(str(root))


def _ask(store: Store, repeats: int) -> tuple[float, dict[str, float], dict[str, float]]:
    """Milliseconds to open the store, of every question's first answer, and of the median one."""
    started = time.perf_counter()
    first, medians = {}, {}
    with Lens(store, threads=2) as lens:
        open_ms = (time.perf_counter() - started) * 1e3
        for name, query in QUESTIONS.items():
            times = []
            for _ in range(repeats):
                asked = time.perf_counter()
                lens.sql(query).fetchall()
                times.append((time.perf_counter() - asked) * 1e3)
            first[name], medians[name] = times[0], statistics.median(times)
    return open_ms, first, medians


def _report(store: Store, folder: Path) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "neuronlens", "report", store.root, "-o", str(folder / "report.html")]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
