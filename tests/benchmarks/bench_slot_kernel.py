"""What does the compiled pass that replaces values take, a value, on one core?

    python -m tests.benchmarks.bench_slot_kernel [--repeats 41]

Tokens in a prefill (one program, or a program for every sixteenth part of them) and single tokens of sixteen sequences,
each under a program of one row or of several (the pieces of a range). Beside it, in turn, the same memory read and
written once (x *= 1). Nanoseconds a value, the median.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from neuronlens.slot_kernel import BANK, LOWER, REPLACE_IN_PLACE, RULE, UPPER, A
from neuronlens.teams import Task

CASES = {
    "1,450 tokens of 1,024 neurons": (1_450, 1_024, 1, 1),
    "1,024 tokens of 4,864 neurons": (1_024, 4_864, 1, 1),
    "the same, 16 programs": (1_024, 4_864, 16, 1),
    "the same, one program of 3 rows": (1_024, 4_864, 1, 3),
    "16 tokens of 1,024 neurons, 16 programs": (16, 1_024, 16, 1),
    "the same, programs of 4 rows": (16, 1_024, 16, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=41)
    repeats = parser.parse_args().repeats
    print("| values | ns a value | read and written once |\n|---|---|---|")
    for name, (n_tokens, width, n_programs, n_rows) in CASES.items():
        replaced, touched = measured(n_tokens, width, n_programs, n_rows, repeats)
        print(f"| {name} | {replaced:.2f} | {touched:.2f} |", flush=True)


def measured(n_tokens: int, width: int, n_programs: int, n_rows: int, repeats: int) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    x_TN = rng.normal(size=(n_tokens, width)).astype(np.float32)
    arrays = _arrays(rng, width, n_programs, n_rows)
    slot_T = (1 + np.arange(n_tokens) * n_programs // n_tokens).astype(np.int32)
    counts_TC = np.zeros((n_tokens, 1 + n_rows), np.int32)
    y_TN = x_TN.copy()

    task = Task(REPLACE_IN_PLACE, [y_TN, slot_T, *arrays, counts_TC])

    def replace() -> None:
        task.run(n_tokens)

    def touch() -> None:
        np.multiply(y_TN, np.float32(1), out=y_TN)

    seconds: dict[Callable[[], None], list[float]] = {replace: [], touch: []}
    replace()
    for _ in range(repeats):
        for work, found in seconds.items():
            y_TN[:] = x_TN
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    replaced, touched = (statistics.median(found) / x_TN.size * 1e9 for found in seconds.values())
    return replaced, touched


def _arrays(rng: np.random.Generator, width: int, n_programs: int, n_rows: int) -> tuple[np.ndarray, ...]:
    """Three in ten neurons are named; each row dampens a quarter of their values."""
    n_rows_S = np.full(1 + n_programs, n_rows, np.int64)
    named_SN = (rng.random((1 + n_programs, width)) < 0.3).astype(np.int32)
    rows_2SR = np.zeros((2, 1 + n_programs, n_rows), np.int64)
    rows_2SR[BANK, 1:] = 1 + np.arange(n_programs * n_rows).reshape(n_programs, n_rows)
    rows_2SR[RULE, 1:] = np.arange(n_rows)
    numbers_KFN = np.zeros((1 + n_programs * n_rows, 6, width), np.float32)
    edges = np.linspace(-0.3, 0.5, n_rows + 1)
    for slot in range(1, 1 + n_programs):
        for r, k in enumerate(rows_2SR[BANK, slot]):
            numbers_KFN[k, LOWER] = np.where(named_SN[slot], edges[r], np.inf)
            numbers_KFN[k, UPPER] = np.where(named_SN[slot], edges[r + 1], -np.inf)
            numbers_KFN[k, A] = 0.5
    return n_rows_S, rows_2SR, named_SN, numbers_KFN, np.zeros((len(numbers_KFN), 2), bool)


if __name__ == "__main__":
    main()
