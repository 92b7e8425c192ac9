"""What do programs and statistics cost on a GPU, against the MLP blocks of an 8B model that they stand in?

    python -m tests.benchmarks.bench_gpu [--layers 8] [--repeats 3] [--only collecting]

Layers of d_model 4,096 and d_mlp 14,336 in bfloat16 with random weights: RMS norm, gate and up, SiLU, the hook, down.
Attention is left out, so every ratio is the worst case. Decode steps are CUDA graphs, as vLLM runs them.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from neuronlens import gpu_kernels
from neuronlens.accumulate import Accumulator, TorchAccumulator, TritonAccumulator
from neuronlens.vllm.board import Board
from neuronlens.vllm.config import WorkerConfig
from neuronlens.vllm.tables import SlotTables, replace_by_torch
from neuronlens.vllm.triton_kernel import replace_by_triton
from tests.neuronlens.vllm.boards import program, rank_site

D_MODEL, D_MLP = 4096, 14336
CONFIG = WorkerConfig(slots=16, rules=4, rule_rows=16)


def layer_weights(n_layers: int) -> list[tuple[Tensor, Tensor]]:
    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda") / shape[1] ** 0.5

    return [(weights(2 * D_MLP, D_MODEL), weights(D_MODEL, D_MLP)) for _ in range(n_layers)]


def blocks(weights: list[tuple[Tensor, Tensor]], x_TD: Tensor, hook: Callable[[Tensor, int], None] | None) -> Tensor:
    for layer, (gate_up, down) in enumerate(weights):
        normed_TD = torch.nn.functional.rms_norm(x_TD, (D_MODEL,))
        gate_TN, up_TN = (normed_TD @ gate_up.T).chunk(2, dim=1)
        x_TN = torch.nn.functional.silu(gate_TN) * up_TN
        if hook is not None:
            hook(x_TN, layer)
        x_TD = x_TD + x_TN @ down.T
    return x_TD


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[[], object], seconds: float = 0.25) -> float:
    """The median time of one run, by the device's clock."""
    run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    n = max(5, int(seconds * 1000 / max(start.elapsed_time(end), 1e-3)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def board_of(n_layers: int, n_tokens: int) -> Board:
    device = torch.device("cuda")
    sites = [rank_site(D_MLP, layer) for layer in range(n_layers)]
    tables = SlotTables(sites, CONFIG, device, torch.bfloat16)
    for slot in range(1, CONFIG.slots + 1):
        tables.put(slot, program([{"concept": "joy"}], D_MLP, range(n_layers), seed=slot).sites)
    return Board(tables, n_tokens=n_tokens, n_counters=16, n_rules=CONFIG.rules, rank=0, device=device)


def seats(n_tokens: int, n_programs: int) -> np.ndarray:
    """Which slot each token has: all tokens shared out over the programs; 0 programs are nobody's."""
    if n_programs == 0:
        return np.zeros(n_tokens, int)
    return 1 + np.arange(n_tokens) * n_programs // n_tokens


def tell(**found: str | float) -> None:
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}),
          flush=True)  # fmt: skip


def steering(n_layers: int, repeats: int) -> None:
    weights = layer_weights(n_layers)
    replaces: dict[str, Callable[..., None]] = {
        "triton": replace_by_triton,
        "torch": replace_by_torch,
    }
    for n_tokens in (1, 16, 256, 4096):
        x_TD = torch.randn(n_tokens, D_MODEL, dtype=torch.bfloat16, device="cuda")
        board = board_of(n_layers, n_tokens)

        def hook_of(replace: Callable[..., None], board: Board = board) -> Callable[[Tensor, int], None]:
            return lambda x_TN, layer: replace(x_TN, board.tables.sites[layer], board.slot_T, board.counts_TC)

        def graph_of(hook: Callable[[Tensor, int], None] | None, x_TD: Tensor = x_TD) -> Callable[[], None]:
            return captured(lambda: blocks(weights, x_TD, hook))

        plain = graph_of(None)
        for name, replace in replaces.items():
            if name == "torch" and n_tokens > 256:
                continue
            hooked = graph_of(hook_of(replace))
            for n_programs in (0, 1, min(16, n_tokens)):
                board.host_2T[:, :n_tokens] = seats(n_tokens, n_programs)
                board.seat(n_tokens)
                torch.cuda.synchronize()
                pairs = [(milliseconds(plain), milliseconds(hooked)) for _ in range(repeats)]
                ratio = statistics.median(b / a for a, b in pairs)
                plain_ms = statistics.median(a for a, _ in pairs) / n_layers
                hook_us = statistics.median(b - a for a, b in pairs) / n_layers * 1000
                tell(steer=name, tokens=n_tokens, programs=n_programs, plain_ms_layer=plain_ms, hook_us_layer=hook_us,
                     ratio=ratio)  # fmt: skip
                board.rest()


def collecting(repeats: int) -> None:
    """Statistics of all rows of a batch and of a few, alone and after the block that made them."""
    n_tokens, device = 4096, torch.device("cuda")
    weights = layer_weights(1)
    x_TD = torch.randn(n_tokens, D_MODEL, dtype=torch.bfloat16, device="cuda")
    made: list[Tensor] = []
    blocks(weights, x_TD, lambda x_TN, _: made.append(x_TN))
    kinds = {"torch": TorchAccumulator, "triton": TritonAccumulator, "triton, bins added": TritonAccumulator}
    rows_to_sort_out = gpu_kernels.ROWS_TO_SORT_OUT
    for (name, kind), histogram, n_rows in itertools.product(kinds.items(), (False, True), (n_tokens, 16)):
        adds_bins = name == "triton, bins added"
        if adds_bins and (n_rows == 16 or not histogram):
            continue
        gpu_kernels.ROWS_TO_SORT_OUT = 10**9 if adds_bins else rows_to_sort_out
        rows_K = torch.arange(0, n_tokens, n_tokens // n_rows, device="cuda")
        accumulator = kind(D_MLP, histogram=histogram, device=device)

        def hook(x_TN: Tensor, _: int, accumulator: Accumulator = accumulator, rows_K: Tensor = rows_K) -> None:
            accumulator.add(x_TN, rows_K)

        alone_ms = statistics.median(milliseconds(lambda hook=hook: hook(made[0], 0)) for _ in range(repeats))
        pairs = [
            (milliseconds(lambda: blocks(weights, x_TD, None)), milliseconds(lambda h=hook: blocks(weights, x_TD, h)))
            for _ in range(repeats)
        ]
        plain_ms = statistics.median(a for a, _ in pairs)
        ratio = statistics.median(b / a for a, b in pairs)
        tell(collect="histograms" if histogram else "moments", by=name, rows=n_rows, statistics_ms=alone_ms,
             ns_per_value=alone_ms * 1e6 / n_rows / D_MLP, plain_ms_layer=plain_ms, ratio=ratio)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["steering", "collecting"])
    asked = parser.parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))
    with torch.inference_mode():
        if asked.only != "collecting":
            steering(asked.layers, asked.repeats)
        if asked.only != "steering":
            collecting(asked.repeats)
