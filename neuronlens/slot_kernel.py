"""The rules of many programs on float32 activations in the CPU's memory, compiled by numba: one pass over x.

A chain of torch operations walks over x a dozen times and costs more to start than to run on a batch of single tokens
(docs/benchmarks.md). The arithmetic is that of `neuronlens.interventions`, operation by operation, so that both give
the same bits. Counts are 32 bits wide, like the values, so that one vector instruction handles as many of both.
"""

import numpy as np

from neuronlens.compiled import jit, part
from neuronlens.teams import Loop, cube, loop, matrix, next_items, vector

LOWER, UPPER, A, B, G, CENTRE = range(6)
"""Rows of numbers_KFN[k]: k comes first, so that they lie in a row and numba knows it."""
CONSTANT, ADAPTIVE = range(2)
"""Entries of kinds_K2[k]."""
BANK, RULE = range(2)
"""Rows of rows_2SR."""


@jit
def replace_inside(  # type: ignore[no-untyped-def]
    x_BTN, real_BT, slot_B, n_rows_S, rows_2SR, named_SN, numbers_KFN, kinds_K2, out_BTN, counts_BC
):
    """out_BTN becomes x_BTN (float32) with the values replaced that are inside a range of their row's program.

    Row b runs under slot_B[b]; a slot with no rows here, and tokens that are not real, are copied. Row r of slot s, of
    n_rows_S[s], is row k = rows_2SR[BANK, s, r] of numbers_KFN and kinds_K2, a piece of rule rows_2SR[RULE, s, r]; the
    first row whose bounds contain the value decides. named_SN is int32, 1 where a row of the slot names the neuron.
    counts_BC (int64) grows: column 0 by the finite values of named neurons, column 1 + rule by the finite values that
    this rule replaced.
    """
    decided_N = np.empty(x_BTN.shape[2], np.int32)
    for b in range(x_BTN.shape[0]):
        s = slot_B[b]
        for t in range(x_BTN.shape[1]):
            x_N, out_N = x_BTN[b, t], out_BTN[b, t]
            for j in range(x_N.shape[0]):  # numba's own copy of a row takes as long as replacing its values
                out_N[j] = x_N[j]
            if n_rows_S[s] and real_BT[b, t]:
                rows_2R = rows_2SR[:, s, : n_rows_S[s]]
                _replace(out_N, named_SN[s], rows_2R, numbers_KFN, kinds_K2, decided_N, counts_BC[b])


@loop
def _replace_in_place(task):  # type: ignore[no-untyped-def]
    """As `replace_inside`, for rows that are single tokens of many sequences, changed where they lie: token t runs
    under slot_T[t] and is counted in row t of counts_TC (int32). Both may have more tokens than x_TN."""
    x_TN, slot_T, n_rows_S = matrix(task, 0, np.float32), vector(task, 1, np.int32), vector(task, 2, np.int64)
    rows_2SR, named_SN, numbers_KFN = cube(task, 3, np.int64), matrix(task, 4, np.int32), cube(task, 5, np.float32)
    kinds_K2, counts_TC = matrix(task, 6, np.bool_), matrix(task, 7, np.int32)
    decided_N = np.empty(x_TN.shape[1], np.int32)
    first, last = next_items(task)
    while first < last:
        for t in range(first, last):
            s = slot_T[t]
            if n_rows_S[s]:
                rows_2R = rows_2SR[:, s, : n_rows_S[s]]
                _replace(x_TN[t], named_SN[s], rows_2R, numbers_KFN, kinds_K2, decided_N, counts_TC[t])
        first, last = next_items(task)


REPLACE_IN_PLACE = Loop(
    _replace_in_place,
    ((np.float32, 2), (np.int32, 1), (np.int64, 1), (np.int64, 3), (np.int32, 2), (np.float32, 3), (np.bool_, 2),
     (np.int32, 2)),
)  # fmt: skip
"""Its items are tokens, its arrays x_TN, slot_T, n_rows_S, rows_2SR, named_SN, numbers_KFN, kinds_K2 and counts_TC."""


@part
def _replace(x_N, named_N, rows_2R, numbers_KFN, kinds_K2, decided_N, counts_C):  # type: ignore[no-untyped-def]
    """One token's values, in place. decided_N is room for what several rows tell each other."""
    if rows_2R.shape[1] == 1:
        k = rows_2R[BANK, 0]
        tested, changed = _by_only_row(x_N, named_N, numbers_KFN[k], kinds_K2[k])
        counts_C[0] += tested
        counts_C[1 + rows_2R[RULE, 0]] += changed
        return
    counts_C[0] += _tested(x_N, named_N, decided_N)
    for r in range(rows_2R.shape[1]):
        k, row = rows_2R[BANK, r], np.int32(r + 1)
        counts_C[1 + rows_2R[RULE, r]] += _decide(x_N, numbers_KFN[k], row, decided_N)
        _by_row(x_N, numbers_KFN[k], kinds_K2[k], row, decided_N)


# The loops below have no branch and write to one array each: so they become vector instructions. A value that may stay
# as it is stands in one expression with its replacement: from a replacement worked out before, LLVM makes a store of
# some lanes of a vector only, which takes AMD's cores tens of cycles.


@part
def _by_only_row(x_N, named_N, numbers_FN, kinds_2):  # type: ignore[no-untyped-def]
    lower_N, upper_N, a_N, b_N = numbers_FN[LOWER], numbers_FN[UPPER], numbers_FN[A], numbers_FN[B]
    g_N, centre_N = numbers_FN[G], numbers_FN[CENTRE]
    tested, changed, zero = np.int32(0), np.int32(0), np.float32(0)
    if kinds_2[CONSTANT]:
        for j in range(x_N.shape[0]):
            x = x_N[j]
            finite, inside = np.int32(x - x == zero), (x >= lower_N[j]) & (x <= upper_N[j])
            x_N[j] = b_N[j] if inside else x
            tested = np.int32(tested + np.int32(named_N[j] & finite))
            changed = np.int32(changed + np.int32(np.int32(inside) & finite))
    elif kinds_2[ADAPTIVE]:
        for j in range(x_N.shape[0]):
            x = x_N[j]
            finite, inside = np.int32(x - x == zero), (x >= lower_N[j]) & (x <= upper_N[j])
            x_N[j] = x * (a_N[j] + g_N[j] * abs(x - centre_N[j])) + b_N[j] if inside else x
            tested = np.int32(tested + np.int32(named_N[j] & finite))
            changed = np.int32(changed + np.int32(np.int32(inside) & finite))
    else:
        for j in range(x_N.shape[0]):
            x = x_N[j]
            finite, inside = np.int32(x - x == zero), (x >= lower_N[j]) & (x <= upper_N[j])
            x_N[j] = x * a_N[j] + b_N[j] if inside else x
            tested = np.int32(tested + np.int32(named_N[j] & finite))
            changed = np.int32(changed + np.int32(np.int32(inside) & finite))
    return tested, changed


@part
def _tested(x_N, named_N, decided_N):  # type: ignore[no-untyped-def]
    """Before several rows: how many values there are to test. decided_N becomes 0, no row has decided."""
    tested, zero = np.int32(0), np.float32(0)
    for j in range(x_N.shape[0]):
        x = x_N[j]
        tested = np.int32(tested + np.int32(named_N[j] & np.int32(x - x == zero)))
        decided_N[j] = 0
    return tested


@part
def _decide(x_N, numbers_FN, row, decided_N):  # type: ignore[no-untyped-def]
    """decided_N becomes `row` (from 1 on) where it was 0 and the value is inside; returns how many finite ones are."""
    lower_N, upper_N = numbers_FN[LOWER], numbers_FN[UPPER]
    changed, zero = np.int32(0), np.float32(0)
    for j in range(x_N.shape[0]):
        x = x_N[j]
        inside = np.int32((x >= lower_N[j]) & (x <= upper_N[j]) & (decided_N[j] == 0))
        changed = np.int32(changed + np.int32(inside & np.int32(x - x == zero)))
        decided_N[j] = np.int32(decided_N[j] + np.int32(-inside & row))
    return changed


@part
def _by_row(x_N, numbers_FN, kinds_2, row, decided_N):  # type: ignore[no-untyped-def]
    """Replace what `row` has decided."""
    a_N, b_N, g_N, centre_N = numbers_FN[A], numbers_FN[B], numbers_FN[G], numbers_FN[CENTRE]
    if kinds_2[CONSTANT]:
        for j in range(x_N.shape[0]):
            x_N[j] = b_N[j] if decided_N[j] == row else x_N[j]
    elif kinds_2[ADAPTIVE]:
        for j in range(x_N.shape[0]):
            x = x_N[j]
            x_N[j] = x * (a_N[j] + g_N[j] * abs(x - centre_N[j])) + b_N[j] if decided_N[j] == row else x
    else:
        for j in range(x_N.shape[0]):
            x = x_N[j]
            x_N[j] = x * a_N[j] + b_N[j] if decided_N[j] == row else x


@loop
def _settle(task):  # type: ignore[no-untyped-def]
    """Add each token's counts to its row of counts_UC, and leave the tokens without slots and counts."""
    slot_T, counter_T = vector(task, 0, np.int32), vector(task, 1, np.int32)
    counts_TC, counts_UC = matrix(task, 2, np.int32), matrix(task, 3, np.int64)
    first, last = next_items(task)
    for t in range(first, last):
        for c in range(counts_TC.shape[1]):
            counts_UC[counter_T[t], c] += counts_TC[t, c]
            counts_TC[t, c] = 0
        slot_T[t] = 0


SETTLE = Loop(_settle, ((np.int32, 1), (np.int32, 1), (np.int32, 2), (np.int64, 2)))
"""Its items are tokens, all done by one thread; its arrays slot_T, counter_T, counts_TC and counts_UC."""

IN_PROMPT, AFTER_IT, COUNTER, COUNTED, N_TOKENS, START, N_PROMPT, N_ABOUT = range(8)
"""Columns of about_RA, what a sequence says of its tokens: their slot in the prompt and after it, their counter, up to
which position they were counted before, how many they are, from which position on, and how long the prompt is."""


@loop
def _spread(task):  # type: ignore[no-untyped-def]
    """Give every token its slot and its counter."""
    about_RA = matrix(task, 0, np.int64)
    slot_T, counter_T = vector(task, 1, np.int32), vector(task, 2, np.int32)
    first, last = next_items(task)
    t = 0
    for r in range(first, last):
        about_A = about_RA[r]
        for position in range(about_A[START], about_A[START] + about_A[N_TOKENS]):
            slot_T[t] = about_A[IN_PROMPT] if position < about_A[N_PROMPT] else about_A[AFTER_IT]
            counter_T[t] = 0 if position < about_A[COUNTED] else about_A[COUNTER]
            t += 1


SPREAD = Loop(_spread, ((np.int64, 2), (np.int32, 1), (np.int32, 1)))
"""Its items are sequences, all done by one thread; its arrays about_RA, slot_T and counter_T."""
