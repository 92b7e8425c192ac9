import pytest
from rich.cells import cell_len

from neuronlens.labels import printable, short


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb\nc", "a·b·c"),
        ("\x01\u200b", "··"),
        ("naïve 愛 $x$ <b>", "naïve 愛 $x$ <b>"),
        ("two\u2028lines", "two·lines"),
    ],
)
def test_printable__puts_a_dot_for_what_has_no_shape(text, expected):
    assert printable(text) == expected


@pytest.mark.parametrize("text", ["concept number 007", "日本語の概念と愛と平和", "a" * 100, "愛a" * 20])
def test_short__keeps_both_ends_within_the_columns(text):
    cut = short(text, 11)
    assert cell_len(cut) in (10, 11)
    head, tail = cut.split("…")
    assert head
    assert text.startswith(head.rstrip())
    assert tail
    assert text.endswith(tail)


def test_short__leaves_what_fits():
    assert short("joy", 3) == "joy"
