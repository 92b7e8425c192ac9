"""What does a sweep cost beside one evaluation?

    python -m tests.benchmarks.bench_evaluate --model DIR --data test.jsonl [--texts 300] [--repeats 5] [--json]

Plain: the bare model, and whole neurons and ranges of every concept, a whole pass each, as when passes shared nothing;
once for the answers alone and once with the perplexity of every token. Sweep: 100 settings (10 values of tau by 10
shares of the neurons) in the last layer, from planning to the rows with their intervals, in the same process and on the
same texts. Plain is timed before and after each sweep; the ratio of each repeat, then their median.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch

from neuronlens.erasure import erasure_rows
from neuronlens.evaluation import EvaluationPlan, TestText, batch_of, measure_texts, plan_conditions
from neuronlens.hookpoints import attach, find_sites
from neuronlens.measure import batches_for
from neuronlens.models import LoadedModel, load_model
from neuronlens.prefix import WHOLE, SharedPrefix
from neuronlens.programs import Edit
from neuronlens.ranges import SCHEMA, RangeTable, TableModel
from neuronlens.sources import load_labelled
from neuronlens.sweep import Setting, parse_grid, settings_of

GRID = ["tau=0.5:5:0.5", "top_fraction=0.1:1:0.1"]
TOKENS_PER_BATCH = 1_024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--suffix", default="<sep>", help="What stands between a text and its answer, <label>.")
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="Print one JSON line instead of the table.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model)
    texts, answers = _texts(loaded, args)
    results = {}
    for hook_point in ("mlp_post", "resid_post"):
        table = _table(loaded, texts, hook_point)
        results[hook_point] = _compare(loaded, table, texts, answers, args.repeats)
    if args.json:
        print(json.dumps(results))
        return
    n_tokens = sum(len(text.token_ids) for text in texts)
    print(f"{len(texts)} texts, {n_tokens:,} tokens, {args.threads} threads, {args.repeats} repeats\n")
    print("| last layer | plain, s | sweep, s | ratio (median) | min | max | with perplexity |")
    print("|---|---|---|---|---|---|---|")
    for hook_point, found in results.items():
        spread = " | ".join(f"{found['ratio'][name]:.2f}" for name in ("median", "min", "max"))
        seconds = f"{found['plain_s']:.2f} | {found['sweep_s']:.2f}"
        print(f"| {hook_point}, {found['n_passes']} passes | {seconds} | {spread} | {found['ratio_perplexity']:.2f} |")
    print("\nTarget: 100 settings cost less than 10 plain evaluations.")


def _texts(loaded: LoadedModel, args: argparse.Namespace) -> tuple[list[TestText], dict[str, int]]:
    labelled = load_labelled(args.data, split="test", text="text", concept="label")[: args.texts]
    texts = [
        TestText(token_ids=tuple(loaded.tokenizer(text.text + args.suffix)["input_ids"]), concept=text.concept)
        for text in labelled
    ]
    concepts = sorted({text.concept for text in texts})
    return texts, {concept: loaded.tokenizer.convert_tokens_to_ids(f"<{concept}>") for concept in concepts}


def _table(loaded: LoadedModel, texts: list[TestText], hook_point: str) -> RangeTable:
    """Ranges of all neurons of the last layer, from the texts' own last tokens."""
    [site] = find_sites(loaded.module, [hook_point], [-1])
    values: dict[str, list[np.ndarray]] = {}
    for places in batches_for(loaded, [len(text.token_ids) for text in texts], TOKENS_PER_BATCH):
        batch = batch_of([texts[i].token_ids for i in places], loaded)
        seen: list[torch.Tensor] = []
        with torch.inference_mode(), attach(loaded.module, [site], lambda _, x_BTN, seen=seen: seen.append(x_BTN)):
            loaded.hidden(batch)
        for i, x_N in zip(places, seen[0][torch.arange(len(places)), batch.last_B].numpy(), strict=True):
            values.setdefault(texts[i].concept, []).append(x_N.astype(np.float64))
    parts = []
    for concept, x in values.items():
        x_SN = np.stack(x)
        order_N = np.argsort(-np.abs(x_SN).mean(axis=0), kind="stable")
        mean_N, std_N, mean_abs_N = x_SN.mean(axis=0), x_SN.std(axis=0), np.abs(x_SN).mean(axis=0)
        columns = {"neuron": order_N, "rank": np.arange(1, site.width + 1), "mean": mean_N[order_N]}
        columns |= {"std": std_N[order_N], "mean_abs": mean_abs_N[order_N], "salience": mean_abs_N[order_N]}
        columns |= {"lower": (mean_N - std_N)[order_N], "upper": (mean_N + std_N)[order_N]}
        same = {"hook_point": hook_point, "layer": site.layer, "concept": concept, "n": len(x)}
        columns |= {name: np.array([value] * site.width) for name, value in same.items()}
        parts.append(pa.table({field.name: pa.array(columns[field.name]).cast(field.type) for field in SCHEMA}))
    return RangeTable.make(
        pa.concat_tables(parts),
        tau=1.0,
        top_fraction=1.0,
        salience="mean_abs",
        store_hash="0" * 16,
        model=TableModel(id="benchmark", config_hash="0" * 16),
        unit="last_token",
        widths={hook_point: site.width},
    )


def _compare(
    loaded: LoadedModel, table: RangeTable, texts: list[TestText], answers: dict[str, int], repeats: int
) -> dict[str, object]:
    plain = partial(_plain, loaded, table, texts, answers, perplexity=False)
    sweep = partial(_sweep, loaded, table, texts, answers)
    n_passes = sweep()
    pairs, with_perplexity = [], []
    for _ in range(repeats):
        before, here, after = _seconds(plain), _seconds(sweep), _seconds(plain)
        pairs.append(((before + after) / 2, here))
        with_perplexity.append(here / _seconds(partial(_plain, loaded, table, texts, answers, perplexity=True)))
    ratios = [here / base for base, here in pairs]
    return {
        "n_passes": n_passes,
        "plain_s": statistics.median(base for base, _ in pairs),
        "sweep_s": statistics.median(here for _, here in pairs),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "ratio_perplexity": statistics.median(with_perplexity),
    }


def _plain(
    loaded: LoadedModel, table: RangeTable, texts: list[TestText], answers: dict[str, int], *, perplexity: bool
) -> None:
    plan = EvaluationPlan()
    plan_conditions(plan, 0, table, Edit(top_fraction=0.3), table.concepts)
    with patch.object(SharedPrefix, "start_of", lambda self, sites: WHOLE):
        measured = measure_texts(
            loaded, plan.at_work(), texts, answers, tokens_per_batch=TOKENS_PER_BATCH, perplexity=perplexity
        )
    erasure_rows(texts, measured, plan.cases)


def _sweep(loaded: LoadedModel, table: RangeTable, texts: list[TestText], answers: dict[str, int]) -> int:
    """How many passes it took."""
    settings = settings_of(
        parse_grid(GRID), Setting.of(table), table, layers=table.layers, hook_points=table.hook_points
    )
    plan = EvaluationPlan()
    for number, setting in enumerate(settings):
        plan_conditions(plan, number, table, setting.edit, table.concepts)
    measured = measure_texts(
        loaded,
        plan.at_work(),
        texts,
        answers,
        tokens_per_batch=TOKENS_PER_BATCH,
        perplexity=False,
        counted="answer",
    )
    erasure_rows(texts, measured, plan.cases, settings=[setting.columns(table) for setting in settings])
    return plan.n_passes


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
