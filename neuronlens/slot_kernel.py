"""The rules of many programs on float32 activations in the CPU's memory, compiled by numba: one pass over x.

A chain of torch operations walks over x a dozen times and costs more to start than to run on a batch of single tokens
(docs/benchmarks.md). The arithmetic is that of `neuronlens.interventions`, operation by operation, so that both give
the same bits. Counts are 32 bits wide, like the values, so that one vector instruction handles as many of both.
"""

import numba
import numpy as np

LOWER, UPPER, A, B, G, CENTRE = range(6)
"""Rows of numbers_KFN[k]: k comes first, so that they lie in a row and numba knows it."""
CONSTANT, ADAPTIVE = range(2)
"""Entries of kinds_K2[k]."""
BANK, RULE = range(2)
"""Rows of rows_2SR."""

_jit = numba.njit(nogil=True, cache=True, error_model="numpy")


@_jit
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
    for b in range(x_BTN.shape[0]):
        s = slot_B[b]
        n_rows = n_rows_S[s]
        for t in range(x_BTN.shape[1]):
            x_N, out_N = x_BTN[b, t], out_BTN[b, t]
            if n_rows == 0 or not real_BT[b, t]:
                out_N[:] = x_N
            elif n_rows == 1:
                k = rows_2SR[BANK, s, 0]
                tested, changed = _by_one_row(x_N, named_SN[s], numbers_KFN[k], kinds_K2[k], out_N)
                counts_BC[b, 0] += tested
                counts_BC[b, 1 + rows_2SR[RULE, s, 0]] += changed
            else:
                rows_2R = rows_2SR[:, s, :n_rows]
                counts_BC[b, 0] += _by_rows(x_N, named_SN[s], rows_2R, numbers_KFN, kinds_K2, out_N, counts_BC[b])


@_jit
def _by_one_row(x_N, named_N, numbers_FN, kinds_2, out_N):  # type: ignore[no-untyped-def]
    """The most common case, without branches in its loops, so that they become vector instructions."""
    lower_N, upper_N, a_N, b_N = numbers_FN[LOWER], numbers_FN[UPPER], numbers_FN[A], numbers_FN[B]
    g_N, centre_N = numbers_FN[G], numbers_FN[CENTRE]
    tested, changed, zero = np.int32(0), np.int32(0), np.float32(0)
    if kinds_2[CONSTANT]:
        for j in range(x_N.shape[0]):
            x = x_N[j]
            finite, inside = np.int32(x - x == zero), (x >= lower_N[j]) & (x <= upper_N[j])
            out_N[j] = b_N[j] if inside else x
            tested = np.int32(tested + np.int32(named_N[j] & finite))
            changed = np.int32(changed + np.int32(np.int32(inside) & finite))
    elif kinds_2[ADAPTIVE]:
        for j in range(x_N.shape[0]):
            x = x_N[j]
            finite, inside = np.int32(x - x == zero), (x >= lower_N[j]) & (x <= upper_N[j])
            replaced = x * (a_N[j] + g_N[j] * abs(x - centre_N[j])) + b_N[j]
            out_N[j] = replaced if inside else x
            tested = np.int32(tested + np.int32(named_N[j] & finite))
            changed = np.int32(changed + np.int32(np.int32(inside) & finite))
    else:
        for j in range(x_N.shape[0]):
            x = x_N[j]
            finite, inside = np.int32(x - x == zero), (x >= lower_N[j]) & (x <= upper_N[j])
            replaced = x * a_N[j] + b_N[j]
            out_N[j] = replaced if inside else x
            tested = np.int32(tested + np.int32(named_N[j] & finite))
            changed = np.int32(changed + np.int32(np.int32(inside) & finite))
    return tested, changed


@_jit
def _by_rows(x_N, named_N, rows_2R, numbers_KFN, kinds_K2, out_N, counts_C):  # type: ignore[no-untyped-def]
    """Several rows; returns how many values were tested, and adds what each rule changed to counts_C."""
    tested = 0
    for j in range(x_N.shape[0]):
        x = x_N[j]
        finite = np.int32(x - x == 0)
        tested += named_N[j] & finite
        out_N[j] = x
        for r in range(rows_2R.shape[1]):
            k = rows_2R[BANK, r]
            if numbers_KFN[k, LOWER, j] <= x <= numbers_KFN[k, UPPER, j]:
                a, b = numbers_KFN[k, A, j], numbers_KFN[k, B, j]
                if kinds_K2[k, CONSTANT]:
                    out_N[j] = b
                elif kinds_K2[k, ADAPTIVE]:
                    out_N[j] = x * (a + numbers_KFN[k, G, j] * abs(x - numbers_KFN[k, CENTRE, j])) + b
                else:
                    out_N[j] = x * a + b
                counts_C[1 + rows_2R[RULE, r]] += finite
                break
    return tested


@_jit
def replace_in_place(  # type: ignore[no-untyped-def]
    x_TN, first, last, slot_T, n_rows_S, rows_2SR, named_SN, numbers_KFN, kinds_K2, counts_TC
):
    """As `replace_inside`, for rows that are single tokens of many sequences, changed where they lie.

    Token t, of `first` to `last`, runs under slot_T[t] and is counted in row t of counts_TC.
    """
    # A loop that writes where it reads does not become vector instructions.
    out_N = np.empty(x_TN.shape[1], x_TN.dtype)
    for t in range(first, last):
        s = slot_T[t]
        n_rows = n_rows_S[s]
        if n_rows == 0:
            continue
        x_N, counts_C = x_TN[t], counts_TC[t]
        if n_rows == 1:
            k = rows_2SR[BANK, s, 0]
            tested, changed = _by_one_row(x_N, named_SN[s], numbers_KFN[k], kinds_K2[k], out_N)
            counts_C[0] += tested
            counts_C[1 + rows_2SR[RULE, s, 0]] += changed
        else:
            rows_2R = rows_2SR[:, s, :n_rows]
            counts_C[0] += _by_rows(x_N, named_SN[s], rows_2R, numbers_KFN, kinds_K2, out_N, counts_C)
        x_N[:] = out_N


@_jit
def settle(n_tokens, slot_T, counter_T, counts_TC, counts_UC):  # type: ignore[no-untyped-def]
    """Add each token's counts to its row of counts_UC, and leave the tokens without slots and counts."""
    for t in range(n_tokens):
        for c in range(counts_TC.shape[1]):
            counts_UC[counter_T[t], c] += counts_TC[t, c]
            counts_TC[t, c] = 0
        slot_T[t] = 0


@_jit
def spread(about_4R, n_scheduled_R, n_computed_R, n_prompt_R, slot_T, counter_T):  # type: ignore[no-untyped-def]
    """Give every token its slot and its counter; returns how many tokens there are.

    Sequence r has n_scheduled_R[r] tokens, from position n_computed_R[r] on. about_4R[:, r]: its slot in the prompt,
    its slot after it, its counter, and up to which position it was counted before.
    """
    t = 0
    for r in range(n_scheduled_R.shape[0]):
        for position in range(n_computed_R[r], n_computed_R[r] + n_scheduled_R[r]):
            slot_T[t] = about_4R[0, r] if position < n_prompt_R[r] else about_4R[1, r]
            counter_T[t] = 0 if position < about_4R[3, r] else about_4R[2, r]
            t += 1
    return t
