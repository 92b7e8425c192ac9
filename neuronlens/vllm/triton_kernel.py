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


def replace_by_triton(x_TN: Tensor, tables: SiteTables, slot_T: Tensor, counter_T: Tensor, counts_UC: Tensor) -> None:
    """As `tables.replace_by_torch`. x_TN lies on the GPU, its neurons side by side."""
    n_tokens, n_neurons = x_TN.shape
    block = min(_BLOCK, triton.next_power_of_2(n_neurons))
    with torch.cuda.device(x_TN.device):
        _replace[(n_tokens, triton.cdiv(n_neurons, block))](
            x_TN,
            x_TN.stride(0),
            n_neurons,
            slot_T,
            counter_T,
            tables.n_rules_S,
            tables.rules_2SR,
            tables.rules_2SR.stride(0),
            tables.rules_2SR.stride(1),
            tables.named_SN,
            tables.numbers_KFN,
            tables.kinds_K2.view(torch.uint8),
            counts_UC,
            counts_UC.stride(0),
            BLOCK=block,
        )


@triton.jit
def _replace(  # type: ignore[no-untyped-def]
    x_ptr,
    x_stride,
    n_neurons,
    slot_ptr,
    counter_ptr,
    n_rules_ptr,
    rules_ptr,
    rules_stride_2,
    rules_stride_S,
    named_ptr,
    numbers_ptr,
    kinds_ptr,
    counts_ptr,
    counts_stride,
    BLOCK: tl.constexpr,
):
    """One token, BLOCK neurons."""
    token = tl.program_id(0)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot != 0:
        n_rules = tl.load(n_rules_ptr + slot)
        if n_rules != 0:
            neuron = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            here = neuron < n_neurons
            place = x_ptr + token.to(tl.int64) * x_stride + neuron
            x = tl.load(place, mask=here, other=0.0).to(tl.float32)
            finite = here & (x - x == 0.0)
            named = tl.load(named_ptr + slot * n_neurons + neuron, mask=here, other=0)
            counts = counts_ptr + tl.load(counter_ptr + token).to(tl.int64) * counts_stride
            n_tested = tl.sum((finite & (named != 0)).to(tl.int32), axis=0)
            tl.atomic_add(counts, n_tested.to(tl.int64))
            out = x
            decided = neuron < 0
            for r in range(n_rules):
                row = tl.load(rules_ptr + slot * rules_stride_S + r)
                numbers = numbers_ptr + row * 6 * n_neurons + neuron
                lower = tl.load(numbers, mask=here, other=float("inf"))
                upper = tl.load(numbers + n_neurons, mask=here, other=-float("inf"))
                inside = (x >= lower) & (x <= upper) & ~decided
                b = tl.load(numbers + 3 * n_neurons, mask=inside, other=0.0)
                new = b
                if tl.load(kinds_ptr + row * 2) == 0:
                    slope = tl.load(numbers + 2 * n_neurons, mask=inside, other=0.0)
                    if tl.load(kinds_ptr + row * 2 + 1) != 0:
                        g = tl.load(numbers + 4 * n_neurons, mask=inside, other=0.0)
                        centre = tl.load(numbers + 5 * n_neurons, mask=inside, other=0.0)
                        slope = slope + g * tl.abs(x - centre)
                    new = x * slope + b
                out = tl.where(inside, new, out)
                decided = decided | inside
                rule = tl.load(rules_ptr + rules_stride_2 + slot * rules_stride_S + r)
                n_changed = tl.sum((inside & finite).to(tl.int32), axis=0)
                tl.atomic_add(counts + 1 + rule, n_changed.to(tl.int64))
            tl.store(place, out.to(x_ptr.dtype.element_ty), mask=here & decided)
