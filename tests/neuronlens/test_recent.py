"""What is kept in memory up to a number of bytes, against a list that is gone through by hand."""

from hypothesis import given
from hypothesis import strategies as st

from neuronlens.recent import Recent

STEPS = st.lists(st.tuples(st.sampled_from(["get", "put", "drop"]), st.integers(0, 5), st.integers(1, 6)), max_size=60)


@given(steps=STEPS, max_bytes=st.integers(0, 12), keeps_newest=st.booleans())
def test_recent__holds_what_was_used_last_and_fits(steps, max_bytes, keeps_newest):
    recent = Recent(max_bytes, len, keeps_newest=keeps_newest)
    expected: list[tuple[int, bytes]] = []  # the one used longest ago first
    for step, key, size in steps:
        known = dict(expected).get(key)
        if step == "get":
            assert recent.get(key) == known
            if known is not None:
                expected = [(k, v) for k, v in expected if k != key] + [(key, known)]
        elif step == "put":
            recent.put(key, b"x" * size)
            expected = [(k, v) for k, v in expected if k != key] + [(key, b"x" * size)]
            while sum(len(v) for _, v in expected) > max_bytes and len(expected) > keeps_newest:
                expected.pop(0)
        else:
            recent.drop(lambda k, key=key: k < key)
            expected = [(k, v) for k, v in expected if k >= key]
        assert recent.n_bytes == sum(len(v) for _, v in expected)
    assert [recent.get(key) for key in range(6)] == [dict(expected).get(key) for key in range(6)]
