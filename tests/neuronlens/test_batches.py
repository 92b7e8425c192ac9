"""Filling batches to a token budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronlens.batches import batches_by_length


@pytest.mark.parametrize(
    ("lengths", "tokens_per_batch", "expected"),
    [
        ([], 10, []),
        ([2, 2, 3, 3, 5], 6, [[0, 1], [2, 3], [4]]),
        ([2, 2, 2, 3], 8, [[0, 1, 2], [3]]),  # with the fourth all would be 3 long: 12 tokens
        ([20, 3, 3], 10, [[0], [1, 2]]),
        ([3, 20, 3], 10, [[0], [1], [2]]),
        ([4, 4, 4], 1, [[0], [1], [2]]),
    ],
)
def test_batches_by_length__fill_the_budget_with_pads_counted(
    lengths: list[int], tokens_per_batch: int, expected: list[list[int]]
) -> None:
    assert batches_by_length(lengths, tokens_per_batch) == expected


@given(st.lists(st.integers(1, 40), min_size=1), st.integers(1, 100))
def test_batches_by_length__keep_every_text_in_order_and_never_pass_the_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_length(lengths, budget)
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget
        if following is not None:
            assert max(longest, lengths[following[0]]) * (len(batch) + 1) > budget
