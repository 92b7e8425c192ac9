"""The rules of all slots on a GPU, in one launch a site: x is read once, and not at all where a token has no program.

Torch operations would walk over x a dozen times, in every forward pass, since a CUDA graph cannot leave them out.
Launch and grid depend on shapes only, so a captured graph serves every batch of its size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuronlens.vllm.tables import SiteTables

_BLOCK = 1024
_ENOUGH_PROGRAMS = 2048
"""Kernel programs that fill a GPU: until there are so many, a token's neurons are shared out over several."""


def replace_by_triton(x_TN: Tensor, tables: SiteTables, slot_T: Tensor, counts_TC: Tensor) -> None:
    """As `tables.replace_by_torch`. x_TN lies on the GPU, its neurons side by side."""
    n_tokens, n_neurons = x_TN.shape
    block = min(_BLOCK, triton.next_power_of_2(n_neurons))
    n_blocks = triton.cdiv(n_neurons, block)
    blocks_each = min(n_blocks, max(1, n_tokens * n_blocks // _ENOUGH_PROGRAMS))
    _replace[(n_tokens, triton.cdiv(n_blocks, blocks_each))](
        x_TN,
        x_TN.stride(0),
        n_neurons,
        slot_T,
        tables.n_rows_S,
        tables.rows_2SR,
        tables.rows_2SR.stride(0),
        tables.rows_2SR.stride(1),
        tables.named_SN,
        tables.numbers_KFN,
        tables.kinds_K2.view(torch.uint8),
        counts_TC,
        counts_TC.stride(0),
        BLOCK=block,
        N_BLOCKS=blocks_each,
        N_COUNTS=triton.next_power_of_2(counts_TC.shape[1]),
    )


@triton.jit
def _replace(  # type: ignore[no-untyped-def]
    x_ptr,
    x_stride,
    n_neurons,
    slot_ptr,
    n_rows_ptr,
    rows_ptr,
    rows_stride_2,
    rows_stride_S,
    named_ptr,
    numbers_ptr,
    kinds_ptr,
    counts_ptr,
    counts_stride,
    BLOCK: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    N_COUNTS: tl.constexpr,
):
    """One token, BLOCK * N_BLOCKS neurons."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot != 0:
        # Loads that wait for one another are most of the time on a few tokens: what can be asked for is asked for.
        n_rows = tl.load(n_rows_ptr + slot)
        first_row = tl.load(rows_ptr + slot * rows_stride_S)
        column = tl.arange(0, N_COUNTS)
        counted = tl.zeros([N_COUNTS], dtype=tl.int32)
        for i in range(N_BLOCKS):
            neuron = (tl.program_id(1) * N_BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
            here = neuron < n_neurons
            place = x_ptr + token * x_stride + neuron
            x = tl.load(place, mask=here, other=0.0).to(tl.float32)
            named = tl.load(named_ptr + slot * n_neurons + neuron, mask=here, other=0)
            finite = here & (x - x == 0.0)
            counted += tl.where(column == 0, tl.sum((finite & (named != 0)).to(tl.int32), axis=0), 0)
            out = x
            decided = neuron < 0
            row = first_row
            for r in range(n_rows):
                numbers = numbers_ptr + row * 6 * n_neurons + neuron
                lower = tl.load(numbers, mask=here, other=float("inf"))
                upper = tl.load(numbers + n_neurons, mask=here, other=-float("inf"))
                b = tl.load(numbers + 3 * n_neurons, mask=here, other=0.0)
                is_constant = tl.load(kinds_ptr + row * 2)
                is_adaptive = tl.load(kinds_ptr + row * 2 + 1)
                rule = tl.load(rows_ptr + rows_stride_2 + slot * rows_stride_S + r)
                row = tl.load(rows_ptr + slot * rows_stride_S + r + 1, mask=r + 1 < n_rows, other=0)
                inside = (x >= lower) & (x <= upper) & (decided == 0)
                new = b
                if is_constant == 0:
                    slope = tl.load(numbers + 2 * n_neurons, mask=inside, other=0.0)
                    if is_adaptive != 0:
                        g = tl.load(numbers + 4 * n_neurons, mask=inside, other=0.0)
                        centre = tl.load(numbers + 5 * n_neurons, mask=inside, other=0.0)
                        slope = slope + g * tl.abs(x - centre)
                    new = x * slope + b
                out = tl.where(inside, new, out)
                decided = decided | inside
                counted += tl.where(column == 1 + rule, tl.sum((inside & finite).to(tl.int32), axis=0), 0)
            tl.store(place, out.to(x_ptr.dtype.element_ty), mask=here & decided)
        tl.atomic_add(counts_ptr + token * counts_stride + column, counted, mask=counted > 0, sem="relaxed")
