"""The erasure table as a person sees it."""

import io
import re
from typing import Any

from rich.console import Console

from neuronlens.report import SETTING_COLUMNS, erasure_table, sweep_table


def erasure_row(concept: str | None, condition: str, **fields: Any) -> dict[str, Any]:
    known = {
        "target_accuracy": 0.5,
        "target_accuracy_low": 0.25,
        "target_accuracy_high": 0.75,
        "target_confidence": 0.4,
    }
    others = {"complement_accuracy": 0.9, "complement_accuracy_low": 0.85, "complement_accuracy_high": 0.95}
    rest = {
        "setting": 0,
        "complement_confidence": 0.8,
        "perplexity": 12.5,
        "n_target": 10,
        "n_complement": 20,
        "tested": 0,
        "changed": 0,
    }
    unknown = ("target_drop", "complement_drop", "selectivity", "selectivity_low", "selectivity_high", "kl_complement")
    more = ("changed_share", "off_task_kl", "off_task_perplexity", "choice_accuracy", *SETTING_COLUMNS)
    row = {"concept": concept, "condition": condition, **known, **others, **rest, **dict.fromkeys((*unknown, *more))}
    return {**row, **fields}


def mean_row(condition: str, **fields: Any) -> dict[str, Any]:
    ends = dict.fromkeys(f"{side}_accuracy_{end}" for side in ("target", "complement") for end in ("low", "high"))
    return erasure_row(None, condition, **{**ends, **fields})


def lost(target: float, others: float, **fields: Any) -> dict[str, Any]:
    """What a mean says of drops; the interval is 0.125 to both sides."""
    selectivity = target - others
    ends = {"selectivity_low": selectivity - 0.125, "selectivity_high": selectivity + 0.125}
    drops = {"target_drop": target, "complement_drop": others, "selectivity": selectivity, **ends}
    return {**drops, "kl_complement": 0.0625, "changed_share": 0.25, **fields}


def text_of(shown: Any, width: int) -> str:
    out = io.StringIO()
    Console(width=width, file=out).print(shown)
    return out.getvalue()


def printed(rows: list[dict[str, Any]], width: int = 140) -> list[str]:
    """The body of the table as lines, without its title and headings."""
    lines = [line.strip() for line in text_of(erasure_table(rows), width).splitlines()]
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
        mean_row("base", target_accuracy=0.75),
        mean_row("range", target_accuracy=0.3, perplexity=623.5, tested=4000, changed=250),
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
    ]


def test_erasure_table__says_below_what_the_means_lose() -> None:
    rows = [
        erasure_row("joy", "base"),
        erasure_row("joy", "range"),
        mean_row("base"),
        mean_row("neuron", **lost(0.75, 0.5)),
        mean_row("range", **lost(0.75, 0.25, off_task_kl=0.5)),
    ]
    below = text_of(erasure_table(rows), 140).partition("What is lost")[2]
    assert "off-task" in below.partition("──")[0]
    assert body_of(below) == [
        ["neuron", "0.750", "0.500", "0.250 (0.12–0.38)", "0.0625", "-", "25.0%"],
        ["range", "0.750", "0.250", "0.500 (0.38–0.62)", "0.0625", "0.5000", "25.0%"],
    ]


def body_of(text: str) -> list[list[str]]:
    """The cells under the last headings of a table: words, and numbers with their intervals."""
    lines = text.rpartition("──")[2].splitlines()[1:]
    return [re.findall(r"[^ ]+ \([^)]*\)|hpd 0.9|[^ ]+", line) for line in lines]


SWEPT = [
    row
    for setting, tau, layers, target, others in ((0, 0.5, None, 0.25, 0.125), (1, 2.5, [0, 5], 0.75, 0.25))
    for row in (
        erasure_row("joy", "range", setting=setting, **lost(1.0, 0.0)),
        mean_row("base", setting=setting, tau=tau, layers=layers, action="zero"),
        mean_row("neuron", setting=setting, tau=tau, layers=layers, action="zero", **lost(0.75, 0.5)),
        mean_row("range", setting=setting, tau=tau, layers=layers, action="zero", **lost(target, others)),
    )
]


def test_sweep_table__has_a_line_a_setting_and_marks_the_best() -> None:
    text = text_of(sweep_table(SWEPT), 140)
    assert body_of(text) == [
        ["0.5", "all", "0.250", "0.125", "0.125 (0.00–0.25)", "0.0625", "25.0%"],
        ["2.5", "0+5", "0.750", "0.250", "0.500 (0.38–0.62)", "0.0625", "25.0%", "best"],
    ]
    headings = text.rpartition("──")[0].split()
    assert {"tau", "layers"} <= set(headings)
    assert "action" not in headings


def test_sweep_table__names_methods_with_their_options() -> None:
    rows = [
        mean_row(condition, setting=i, **setting, **lost(0.5, 0.25))
        for i, setting in enumerate(({"method": "paper", "tau": 2.5}, {"method": "hpd", "mass": 0.9}))
        for condition in ("neuron", "range")
    ]
    assert [line[:2] for line in body_of(text_of(sweep_table(rows), 140))] == [["2.5", "paper"], ["-", "hpd 0.9"]]


def test_sweep_table__breaks_no_number_on_a_terminal_of_80_columns() -> None:
    found = text_of(sweep_table(SWEPT), 80)
    assert max(map(len, found.splitlines())) <= 80
    for number in ("0.125 (0.00–0.25)", "0.500 (0.38–0.62)", "0.0625", "25.0%", "best"):
        assert number in found


def test_sweep_table__without_answers_shows_divergence_alone() -> None:
    rows = [mean_row(c, tau=1.0, kl_complement=0.5, changed_share=0.5) for c in ("neuron", "range")]
    heading, more, _, line = text_of(sweep_table(rows), 80).splitlines()[-4:]
    assert (heading.split(), more.split(), line.split()) == (["others"], ["KL", "changed"], ["0.5000", "50.0%"])
