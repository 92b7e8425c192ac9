"""What the report shows of what a model still writes."""

import shlex

import pytest
from typer.testing import CliRunner

from neuronlens import figures
from neuronlens.cli import app
from neuronlens.page import generations
from neuronlens.page.desk import Desk
from neuronlens.page.elements import Page, render
from neuronlens.page.facts import Facts
from neuronlens.page.generations import CONTINUATION_CHARACTERS, MAX_GENERATIONS, PROMPT_CHARACTERS
from neuronlens.query import connect
from tests.parsed_page import assert_loads_nothing, parsed, report_on, section_of, tables_of
from tests.report_stores import NASTY, arrays, generation_row, generation_rows, put_generation, write_report_store

CONCEPTS = ("anger", "joy")
CONDITIONS = ("no intervention", "whole neuron", "range")


def small_store(root, concepts=CONCEPTS):
    values = arrays(concepts, n_layers=1, n_samples=30, width=4)
    return write_report_store(root, values, raw=False, with_statistics=False)


def section_on(store, path):
    """The section alone, as a page of its own."""
    facts = Facts.of(store)
    with connect(store.file_lists()) as con:
        desk = Desk(con=con, facts=facts, shown=facts.concepts[-24:], colours={})
        section = generations.section(desk)
    path.write_text(render(Page(title="x", summary="", sections=(section,), footer="")), encoding="utf-8")
    return section_of(parsed(path), "generations")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated") / "store"
    store = small_store(root)
    put_generation(
        root, generation_rows(CONCEPTS), classifier="/a/long/path/to/judge/", n_prompts=1200, action="mean", tau=2.0
    )
    return store


@pytest.fixture(scope="module")
def section(store, tmp_path_factory):
    return section_on(store, tmp_path_factory.mktemp("page") / "report.html")


def test_section__stands_after_the_evaluations_and_before_timing(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(CONCEPTS, n_layers=1, width=4), raw=False)
    put_generation(tmp_path / "store", generation_rows(CONCEPTS))
    page = report_on(store, tmp_path / "r.html")
    anchors = [section.attributes["id"] for section in page.all("section")]
    assert anchors[-3:] == ["erasure", "generations", "timing"]


def test_section__is_left_out_where_nothing_was_generated(tmp_path):
    store = small_store(tmp_path / "store")
    with connect(store.file_lists()) as con:
        assert generations.section(Desk(con=con, facts=Facts.of(store), shown=CONCEPTS, colours={})) is None


def test_section__title_says_what_was_done_and_who_judged(section):
    [title] = section.all("h3")
    assert title.text == (
        "tbl_0000000000000000: action mean, tau 2, 1,200 prompts continued by up to 32 tokens, judged by judge"
    )


@pytest.mark.parametrize(
    ("classifier", "name"),
    [("org/emotion", "emotion"), ("C:\\models\\judge", "judge"), ("judge", "judge"), ("/", "/"), ("x" * 300, None)],
)
def test_section__names_a_classifier_in_few_characters(classifier, name, tmp_path):
    store = small_store(tmp_path / "store")
    put_generation(tmp_path / "store", generation_rows(CONCEPTS), classifier=classifier, temperature=0.5, n_prompts=1)
    [title] = section_on(store, tmp_path / "r.html").all("h3")
    said, _, judge = title.text.partition(", judged by ")
    assert said.endswith("1 prompt continued by up to 32 tokens, temperature 0.5")
    assert judge == name if name else (len(judge) < 40 and "…" in judge)


def test_section__has_the_means_side_by_side(section):
    means, _, _ = tables_of(section)
    assert {row["mean of all"]: [row[name] for name in CONDITIONS] for row in means} == {
        "target": ["0.900", "0.100", "0.250"],
        "others": ["0.800", "0.300", "0.700"],
        "target drop (95 %)": ["–", "0.800 (0.78 to 0.82)", "0.650 (0.63 to 0.67)"],
        "others' drop (95 %)": ["–", "0.500 (0.48 to 0.52)", "0.100 (0.08 to 0.12)"],
        "selectivity (95 %)": ["–", "0.300 (0.28 to 0.32)", "0.550 (0.53 to 0.57)"],
        "perplexity": ["7.2"] * 3,
        "different bigrams": ["88 %"] * 3,
        "changed": ["0 %", "40 %", "40 %"],
    }


def test_section__has_the_numbers_of_every_concept(section):
    _, scores, _ = tables_of(section)
    assert [(row["concept"], row["intervention"]) for row in scores] == [
        (concept, condition) for concept in CONCEPTS for condition in CONDITIONS
    ]
    assert scores[-1] == {
        "concept": "joy",
        "intervention": "range",
        "target": "0.300",
        "others": "0.700",
        "target drop (95 %)": "0.600 (0.58 to 0.62)",
        "others' drop (95 %)": "0.100 (0.08 to 0.12)",
        "selectivity (95 %)": "0.500 (0.48 to 0.52)",
        "perplexity": "7.2",
        "different bigrams": "88 %",
        "changed": "40 %",
    }


def test_section__draws_both_probabilities_with_their_intervals_once(store, tmp_path, monkeypatch):
    drawn, draw = [], figures.conditions_beside

    def conditions_beside(concepts, panels, **options):
        drawn.append((concepts, panels, options))
        return draw(concepts, panels, **options)

    monkeypatch.setattr(figures, "conditions_beside", conditions_beside)
    section = section_on(store, tmp_path / "r.html")
    assert len(section.all("svg")) == 1
    [(names, panels, options)] = drawn
    assert (names, options["n_apart"]) == (["anger", "joy", "mean of all"], 1)
    target, others = (
        {one.condition: [one.value_C, one.low_C, one.high_C] for one in panels[kind]} for kind in ("target", "others")
    )
    for found, expected in (
        (target["base"], [0.9, 0.9, 0.9]),
        (target["neuron"], [0.1, 0.1, 0.1]),
        (target["range"], [0.2, 0.3, 0.25]),
        (others["base"], [0.8, 0.8, 0.8]),
        (others["neuron"], [0.3, 0.3, 0.3]),
        (others["range"], [0.7, 0.7, 0.7]),
    ):
        for values, moved in zip(found, (0, -0.1, 0.1), strict=True):
            assert values.tolist() == pytest.approx([value + moved for value in expected])


def test_section__shows_how_each_concepts_first_prompt_goes_on(section):
    *_, examples = tables_of(section)
    assert examples[1] == {
        "concept": "joy",
        "prompt": "i feel",
        "no intervention": "joy base (0.90)",
        "whole neuron": "joy neuron (0.10)",
        "range": "joy range (0.30)",
    }
    assert [row["concept"] for row in examples] == list(CONCEPTS)


def test_section__cuts_long_texts_and_marks_empty_ones(tmp_path):
    store = small_store(tmp_path / "store")
    rows = [
        generation_row("joy", condition, 0.5, 0.5, prompt="p" * 5000, continuation=continuation)
        for condition, continuation in (("base", "a  b\n" * 2000), ("neuron", ""), ("range", "x" * 5000))
    ]
    put_generation(tmp_path / "store", rows)
    *_, [row] = tables_of(section_on(store, tmp_path / "r.html"))
    assert row["prompt"] == "p" * (PROMPT_CHARACTERS - 1) + "…"
    assert row["range"] == "x" * (CONTINUATION_CHARACTERS - 1) + "… (0.50)"
    assert row["no intervention"].startswith("a b a b ")
    assert row["whole neuron"] == "– (0.50)"


def test_section__escapes_names_and_texts(tmp_path):
    store = small_store(tmp_path / "store", NASTY)
    text = "<img src=x onerror=alert(1)> </td></table><script>alert(2)</script> $x$ \x01\u202e日本"
    put_generation(
        tmp_path / "store",
        [{**row, "examples": [{**example, "prompt": text, "continuation": text} for example in row["examples"]]}
         for row in generation_rows(NASTY)],
        classifier="x/<b>bold</b> <script>",
    )  # fmt: skip
    section = section_on(store, tmp_path / "r.html")
    assert_loads_nothing(parsed(tmp_path / "r.html"))
    _, scores, examples = tables_of(section)
    shown = {" ".join(name.split()) for name in NASTY}
    assert {row["concept"] for row in scores} == shown
    assert {row["concept"] for row in examples} == shown
    safe = "<img src=x onerror=alert(1)> </td></table><script>alert(2)</script> $x$ ··日本"
    assert {row["prompt"] for row in examples} == {safe}
    assert {row["range"].rpartition(" (")[0] for row in examples} == {safe}
    assert section.all("h3")[0].text.endswith("judged by b> <script>")
    assert not section.all("b")


def test_section__of_one_concept_has_no_others(tmp_path):
    store = small_store(tmp_path / "store")
    cases = [(concept, condition) for concept in ("joy", None) for condition in ("base", "neuron", "range")]
    put_generation(tmp_path / "store", [generation_row(*case, 0.5, None) for case in cases])
    section = section_on(store, tmp_path / "r.html")
    written = {text.text for text in section.all("svg")[0].all("text")}
    assert "target" in written
    assert "others" not in written
    means, scores, _ = tables_of(section)
    measured = ["target", "perplexity", "different bigrams", "changed"]
    assert [row["mean of all"] for row in means] == measured
    assert list(scores[0]) == ["concept", "intervention", *measured]


def test_section__of_many_concepts_draws_some_and_lists_all(tmp_path):
    names = [f"concept {i:02d}" for i in range(26)]
    store = small_store(tmp_path / "store", names)
    put_generation(tmp_path / "store", generation_rows(names))
    section = section_on(store, tmp_path / "r.html")
    _, scores, examples = tables_of(section)
    drawn = {text.text for text in section.all("svg")[0].all("text")} & set(names)
    assert {row["concept"] for row in examples} == drawn
    assert drawn == set(names[-24:])
    assert {row["concept"] for row in scores} == set(names)
    notes = [p.text for p in section.all("p") if p.attributes.get("class") == "note"]
    assert "24 of 26 concepts are drawn; the table has all." in notes
    assert "24 of 26 concepts." in notes


def test_section__of_many_evaluations_says_what_it_leaves_out(tmp_path):
    store = small_store(tmp_path / "store")
    n = MAX_GENERATIONS + 2
    for i in range(n):
        put_generation(tmp_path / "store", generation_rows(CONCEPTS), name=f"tbl_0.{i:03d}", n_prompts=10 + i)
    section = section_on(store, tmp_path / "r.html")
    titles = [h3.text for h3 in section.all("h3")]
    assert [f"{10 + i} prompts" in title for i, title in enumerate(titles)] == [True] * MAX_GENERATIONS
    assert len(section.all("svg")) == MAX_GENERATIONS
    assert f"{MAX_GENERATIONS} of {n} evaluations of what is written are shown." in section.text


def test_section__its_query_runs_as_printed(section, store):
    [command] = [pre.text for pre in section.all("pre") if pre.text.startswith("neuronlens")]
    words = [store.root if word == "STORE" else word for word in shlex.split(command)[1:]]
    done = CliRunner().invoke(app, [*words, "--format", "csv"])
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 1 + 9
