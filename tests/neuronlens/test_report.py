"""The erasure table as a person sees it."""

import io
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


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of each body row, as printed on a wide terminal."""
    printed = io.StringIO()
    Console(width=140, file=printed).print(erasure_table(rows))
    body = [line for line in printed.getvalue().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line[1:-1].split("│")] for line in body]


def test_erasure_table__shows_a_section_a_concept_and_the_mean_of_each_condition() -> None:
    rows = [
        erasure_row("joy", "base", target_accuracy=1.0),
        erasure_row("joy", "range", tested=1000, changed=250),
        erasure_row("fear", "base"),
        erasure_row("fear", "range", target_accuracy=0.1, perplexity=1234.5, tested=3000, changed=0),
    ]
    found = lines(rows)
    assert found[0] == ["joy", "base", "1.000 [0.25, 0.75]", "0.400", "0.900 [0.85, 0.95]", "0.800", "12.50", "-"]
    assert found[1][-1] == "25.0%"
    assert found[2][:3] == ["fear", "base", "0.500 [0.25, 0.75]"]
    assert found[3][6:] == ["1,234.50", "0.0%"]
    assert found[4] == ["mean", "base", "0.750", "0.400", "0.900", "0.800", "12.50", "-"]
    assert found[5][1:3] == ["range", "0.300"]
    assert found[5][6:] == ["623.50", "6.2%"]


def test_erasure_table__shows_a_dash_for_what_is_not_known() -> None:
    unknown = dict.fromkeys([key for key in erasure_row("joy", "base") if "accuracy" in key or "confidence" in key])
    found = lines([erasure_row("joy", "base", **unknown, perplexity=None)])
    assert found[0] == ["joy", "base", "-", "-", "-", "-", "-", "-"]
    assert found[1] == ["mean", "base", "-", "-", "-", "-", "-", "-"]
