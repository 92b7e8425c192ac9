"""The erasure table as a person sees it."""

import io
import re
from typing import Any

from rich.console import Console

from neuronlens.report import erasure_table


def erasure_row(concept: str, condition: str, **fields: Any) -> dict[str, Any]:
    known = {
        "target_accuracy": 0.5,
        "target_accuracy_low": 0.25,
        "target_accuracy_high": 0.75,
        "target_confidence": 0.4,
    }
    others = {"complement_accuracy": 0.9, "complement_accuracy_low": 0.85, "complement_accuracy_high": 0.95}
    rest = {
        "complement_confidence": 0.8,
        "perplexity": 12.5,
        "n_target": 10,
        "n_complement": 20,
        "tested": 0,
        "changed": 0,
    }
    return {"concept": concept, "condition": condition, **known, **others, **rest, **fields}


def printed(rows: list[dict[str, Any]], width: int = 140) -> list[str]:
    """The body of the table as lines, without its title and headings."""
    out = io.StringIO()
    Console(width=width, file=out).print(erasure_table(rows))
    lines = [line.strip() for line in out.getvalue().splitlines()]
    rule = next(i for i, line in enumerate(lines) if line.startswith("──"))
    return [line for line in lines[rule + 1 :] if line and not line.startswith("──")]


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [re.split(r"\s{2,}", line) for line in printed(rows)]


def test_erasure_table__shows_a_section_a_concept_and_the_mean_of_each_condition() -> None:
    rows = [
        erasure_row("joy", "base", target_accuracy=1.0),
        erasure_row("joy", "range", tested=1000, changed=250),
        erasure_row("fear", "base"),
        erasure_row("fear", "range", target_accuracy=0.1, perplexity=1234.5, tested=3000, changed=0),
    ]
    assert cells(rows) == [
        ["joy", "base", "1.000 (0.25–0.75)", "0.400", "0.900 (0.85–0.95)", "0.800", "12.50", "-"],
        ["range", "0.500 (0.25–0.75)", "0.400", "0.900 (0.85–0.95)", "0.800", "12.50", "25.0%"],
        ["fear", "base", "0.500 (0.25–0.75)", "0.400", "0.900 (0.85–0.95)", "0.800", "12.50", "-"],
        ["range", "0.100 (0.25–0.75)", "0.400", "0.900 (0.85–0.95)", "0.800", "1,234.50", "0.0%"],
        ["mean", "base", "0.750", "0.400", "0.900", "0.800", "12.50", "-"],
        ["range", "0.300", "0.400", "0.900", "0.800", "623.50", "6.2%"],
    ]


def test_erasure_table__loses_nothing_on_a_terminal_of_80_columns() -> None:
    first, second, *_ = printed(
        [erasure_row("surprise", "neuron", perplexity=12345.67, tested=10, changed=10)], width=80
    )
    assert first.split() == ["surprise", "neuron", "0.500", "0.400", "0.900", "0.800", "12,345.67", "100.0%"]
    assert second.split() == ["(0.25–0.75)", "(0.85–0.95)"]


def test_erasure_table__shows_a_dash_for_what_is_not_known() -> None:
    unknown = dict.fromkeys(key for key in erasure_row("joy", "base") if "accuracy" in key or "confidence" in key)
    assert cells([erasure_row("joy", "base", **unknown, perplexity=None)]) == [
        ["joy", "base", "-", "-", "-", "-", "-", "-"],
        ["mean", "base", "-", "-", "-", "-", "-", "-"],
    ]
