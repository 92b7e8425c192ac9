"""Which rows a request asks for: against a plain loop over the rows."""

import math
import random

import pytest

from neuronlens.serving.errors import ApiError
from neuronlens.serving.selection import Filters, TableIndex
from tests.range_tables import row, table_of

WIDTHS = {"mlp_post": 12, "resid_post": 6, "attn_out": 6}
TOP = 0.5


def _rows() -> list[dict]:
    rng = random.Random(5)
    rows = []
    for hook_point in ("mlp_post", "resid_post"):
        for layer in (0, 3, 11):
            for concept in ("joy", "anger", "läs 怒"):
                if rng.random() < 0.2:
                    continue
                neurons = rng.sample(range(WIDTHS[hook_point]), int(TOP * WIDTHS[hook_point]))
                rows += [
                    row(concept, neuron, rng.random(), 1.0, layer=layer, hook_point=hook_point, rank=i + 1)
                    for i, neuron in enumerate(neurons)
                ]
    return rows


ROWS = _rows()
INDEX = TableIndex.of(table_of(ROWS, widths=WIDTHS, top_fraction=TOP))


def expected(filters: Filters) -> list[dict]:
    found = [
        r
        for r in sorted(ROWS, key=lambda r: (r["hook_point"], r["layer"], r["concept"], r["rank"], r["neuron"]))
        if (filters.hook_points is None or r["hook_point"] in filters.hook_points)
        and (filters.layers is None or r["layer"] in filters.layers)
        and (filters.concepts is None or r["concept"] in filters.concepts)
        and (filters.neurons is None or r["neuron"] in filters.neurons)
        and (
            filters.top_fraction is None
            or r["rank"] <= max(1, math.floor(filters.top_fraction * WIDTHS[r["hook_point"]]))
        )
    ]
    return found[: filters.limit]


def test_select__gives_what_a_loop_over_the_rows_gives() -> None:
    rng = random.Random(7)

    def some(values: list, p: float = 0.5) -> tuple | None:
        return tuple(rng.sample(values, rng.randint(1, len(values)))) if rng.random() < p else None

    n_empty = 0
    for _ in range(400):
        filters = Filters(
            hook_points=some(["mlp_post", "resid_post"]),
            layers=some([0, 3, 11]),
            concepts=some(["joy", "anger", "läs 怒"]),
            neurons=some(list(range(6)), 0.3),
            top_fraction=rng.choice([None, None, 0.01, 0.2, 0.34, TOP]),
            limit=rng.choice([None, None, 1, 7]),
        )
        got = INDEX.select(filters).to_pylist()
        assert got == expected(filters), filters
        n_empty += not got
    assert 0 < n_empty < 200


def test_index__says_what_the_table_holds() -> None:
    assert INDEX.hook_points == ("mlp_post", "resid_post")
    assert INDEX.layers == (0, 3, 11)
    assert INDEX.concepts == ("anger", "joy", "läs 怒")
    for found in INDEX.by_concept():
        own = [r for r in ROWS if r["concept"] == found.concept]
        assert found.ranges == len(own)
        assert set(found.layers) == {r["layer"] for r in own}
        assert set(found.hook_points) == {r["hook_point"] for r in own}
    assert [found.concept for found in INDEX.by_concept()] == ["anger", "joy", "läs 怒"]


@pytest.mark.parametrize(
    ("filters", "code", "message"),
    [
        (Filters(concepts=("joy", "fear")), "unknown_concept", "no concept fear. It has: anger, joy, läs 怒"),
        (Filters(layers=(4,)), "unknown_layer", "no layer 4. It has: 0, 3, 11"),
        (Filters(hook_points=("attn_out",)), "unknown_hook_point", "no hook point attn_out. It has: mlp_post"),
        (Filters(neurons=(3, 12)), "unknown_neuron", "no neuron 12. Expected 0 to 11"),
        (Filters(neurons=(6,), hook_points=("resid_post",)), "unknown_neuron", "Expected 0 to 5"),
        (Filters(top_fraction=0.6), "invalid_field", "expected above 0 and at most 0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_select__names_what_there_is(filters: Filters, code: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        INDEX.select(filters)
    assert (caught.value.status, caught.value.code) == (400, code)


def test_digest__is_that_of_what_is_asked_for() -> None:
    assert (
        Filters(layers=(1, 2), concepts=("a", "b")).digest() == Filters(layers=(2, 1, 2), concepts=("b", "a")).digest()
    )
    different = [
        Filters(),
        Filters(layers=(1,)),
        Filters(neurons=(1,)),
        Filters(layers=()),
        Filters(limit=1),
        Filters(top_fraction=0.1),
        Filters(concepts=("a", "b")),
        Filters(concepts=("a,b",)),
        Filters(hook_points=("a", "b")),
    ]
    assert len({filters.digest() for filters in different}) == len(different)
