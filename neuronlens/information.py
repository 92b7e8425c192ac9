"""How much a neuron's value says about whether its text has a concept, from histograms. Compiled by numba: the view
`concept_information` of sql/analysis.sql is the definition.
"""

import math

import numpy as np
import pyarrow as pa

from neuronlens.bumps import KEYS, Bumps, dictionary_column, in_threads
from neuronlens.compiled import jit, part
from neuronlens.histograms import MAX_BIN, N_BINS

INFORMATION_SCHEMA = pa.schema([*KEYS, ("bits", pa.float64())])


def information_of(bumps: Bumps, *, n_threads: int = 1) -> pa.Table:
    """One row per neuron and concept with a histogram, in the order of neurons, then concepts. `bits` is the mutual
    information of a value's bin and whether its text has the concept; NULL where no text has another."""
    bits_NC = np.full(bumps.start_NC.shape, np.nan)

    def work(first: int, last: int) -> None:
        _inform(first, last, bumps.start_NC, bumps.stop_NC, bumps.bin_X, bumps.n_X, bits_NC)

    in_threads(work, len(bumps.neuron_N), n_threads)
    row_R, code_R = np.nonzero(bumps.stop_NC > bumps.start_NC)
    columns = [
        pa.array(np.full(len(row_R), bumps.layer, np.int16)),
        dictionary_column(np.zeros(len(row_R), np.int8), [bumps.hook_point]),
        pa.array(bumps.neuron_N[row_R]),
        dictionary_column(code_R.astype(np.int32), bumps.concepts),
        pa.array(bits_NC[row_R, code_R], from_pandas=True),
    ]
    return pa.Table.from_arrays(columns, schema=INFORMATION_SCHEMA)


@jit
def _inform(first, last, start_NC, stop_NC, bin_X, n_X, bits_NC):  # type: ignore[no-untyped-def]
    n_concepts = start_NC.shape[1]
    all_B = np.zeros(N_BINS, np.int64)
    for i in range(first, last):
        all_B[:] = 0
        for c in range(n_concepts):
            for x in range(start_NC[i, c], stop_NC[i, c]):
                all_B[bin_X[x] + MAX_BIN] += n_X[x]
        n_all = all_B.sum()
        for c in range(n_concepts):
            n_own = 0
            for x in range(start_NC[i, c], stop_NC[i, c]):
                n_own += n_X[x]
            if 0 < n_own < n_all:
                bits_NC[i, c] = _bits(bin_X, n_X, start_NC[i, c], stop_NC[i, c], float(n_own), float(n_all), all_B)


@part
def _bits(bin_X, n_X, start, stop, n_own, n_all, all_B):  # type: ignore[no-untyped-def]
    """Over the bins that the concept reaches, its values and the others' there; in the bins that it does not reach, all
    are the others'."""
    n_others, total, n_reached = n_all - n_own, 0.0, 0.0
    for x in range(start, stop):
        n, n_bin = float(n_X[x]), float(all_B[bin_X[x] + MAX_BIN])
        total += n * math.log2(n * n_all / (n_bin * n_own))
        if n_bin > n:
            total += (n_bin - n) * math.log2((n_bin - n) * n_all / (n_bin * n_others))
        n_reached += n_bin
    return max(0.0, (total + (n_all - n_reached) * math.log2(n_all / n_others)) / n_all)
