"""The report as a reader's browser parses it."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from neuronlens import figures
from neuronlens.cli import app
from neuronlens.errors import RunFailed, UsageError
from neuronlens.page import write_report
from neuronlens.store import Store
from tests.parsed_page import assert_loads_nothing, parsed, report_on, section_of, tables_of
from tests.range_tables import pieces, table_of
from tests.range_tables import row as range_row
from tests.report_stores import (
    NASTY,
    arrays,
    evaluation_row,
    put_evaluation,
    put_quarantine,
    put_sweep,
    put_texts,
    write_report_store,
)
from tests.s3 import S3Server
from tests.synthetic_store import bins_of, moments_of

CONCEPTS = ("anger", "joy", "law")
SECTIONS = ("run", "gaussianity", "overlap", "salience", "neurons", "erasure", "timing")
N_KEPT = {"anger": 58, "joy": 57, "law": 59}


@pytest.fixture(scope="module")
def values():
    """Similar concepts do not stand side by side in the order of names: law, anger and joy do."""
    return arrays(("law", "anger", "joy"))


@pytest.fixture(scope="module")
def store(values, tmp_path_factory):
    root = tmp_path_factory.mktemp("page") / "store"
    store = write_report_store(root, values, answered=True)
    conditions = (("base", 0.9, 0.8), ("neuron", 0.3, 0.4), ("range", 0.35, 0.7))
    put_evaluation(root, [evaluation_row(c, name, a, b) for c in CONCEPTS for name, a, b in conditions])
    for path in (root / "commits").iterdir():
        receipt = json.loads(path.read_text())
        path.write_text(json.dumps(receipt | {"n_kept": N_KEPT[receipt["concept"]]}))
    return store


@pytest.fixture(scope="module")
def written(store, tmp_path_factory):
    return write_report(store, tmp_path_factory.mktemp("html") / "report.html").path


@pytest.fixture(scope="module")
def page(written):
    return parsed(written)


# --- the page as a whole ---


def test_report__has_every_section_and_a_way_to_it(page):
    assert [section.attributes["id"] for section in page.all("section")] == list(SECTIONS)
    assert [a.attributes["href"] for a in page.all("nav")[0].all("a")] == [f"#{anchor}" for anchor in SECTIONS]
    assert page.all("title")[0].text.startswith("some/model under 3 concepts")


def test_report__loads_nothing(page):
    assert_loads_nothing(page)


def test_report__every_reference_within_it_has_its_target_once(page):
    ids = [e.attributes["id"] for e in page.everything() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    used = {v[1:] for e in page.everything() for k, v in e.attributes.items() if k.endswith("href") and v[0] == "#"}
    used |= {e.attributes["clip-path"][5:-1] for e in page.everything() if "clip-path" in e.attributes}
    assert used <= set(ids)


def test_report__every_figure_has_a_caption_and_words_for_a_screen_reader(page):
    figures = page.all("figure")
    assert len(figures) > 20
    for figure in figures:
        [svg], [caption] = figure.all("svg"), figure.all("figcaption")
        assert len(caption.text) > 8
        assert len(svg.attributes["aria-label"]) > 20
        assert svg.attributes["role"] == "img"
    assert len({svg.attributes["aria-label"] for svg in page.all("svg")}) == len(figures)


def test_report__shows_the_queries_that_gave_its_numbers(page):
    for anchor in SECTIONS[:-1]:
        details = [d for d in section_of(page, anchor).all("details") if "SQL" in d.all("summary")[0].text]
        assert details, anchor
        for detail in details:
            command, text = detail.all("pre")[:2]
            name = command.text.split()[3]
            assert text.text == " ".join((Path("sql") / f"{name}.sql").read_text().split())


def test_report__the_commands_on_it_run_as_printed(page, store):
    import shlex

    commands = [pre.text for pre in page.all("pre") if pre.text.startswith("neuronlens sql STORE ")]
    assert len({command.split()[3] for command in commands}) >= 10
    for command in dict.fromkeys(commands):
        done = CliRunner().invoke(
            app, [*(store.root if a == "STORE" else a for a in shlex.split(command)[1:]), "--format", "csv"]
        )
        assert done.exit_code == 0, (command, done.output, done.exception)


def test_report__is_the_same_again(store, written, tmp_path):
    assert write_report(store, tmp_path / "again.html").path.read_bytes() == written.read_bytes()


# --- its numbers ---


def test_report__says_what_was_run(page):
    facts, concepts = tables_of(section_of(page, "run"))
    said = {row["what"]: row["value"] for row in facts}
    assert said["model"] == "some/model"
    assert said["data"].startswith("train.jsonl, split train")
    assert said["shards"] == "3 of 3 committed, 0 given up"
    assert said["kept"].startswith("moments, histograms, raw values")
    for row, concept in zip(concepts, CONCEPTS, strict=True):
        assert (row["concept"], row["texts planned"], row["texts collected"]) == (concept, "60", "60")
        assert row["texts counted"] == str(N_KEPT[concept])
        assert (row["answered right"], row["confidence"]) == ("50 %", "0.50")
    assert "There are none yet" in section_of(page, "run").text


def test_report__gaussianity_is_that_of_the_values(page, values):
    for row in tables_of(section_of(page, "gaussianity"))[0]:
        shapes = [moments_of(x_LSN[int(row["layer"]), :, n]) for x_LSN in values.values() for n in range(12)]
        near = np.mean([abs(s["skewness"]) < 1 and 2 <= s["kurtosis"] <= 5 for s in shapes])
        assert row["near-Gaussian"] == f"{100 * near:.0f} %"
        assert row["distributions"] == "36"
        median = np.median([s["kurtosis"] - 3 for s in shapes])
        assert float(row["median excess kurtosis"].replace("−", "-")) == pytest.approx(median, abs=0.006)


def test_report__overlap_is_that_of_the_values(page, values):
    section = section_of(page, "overlap")
    for row in tables_of(section)[0]:
        layer = int(row["layer"])
        means = {
            (a, b): np.mean([_ovl(values[a][layer, :, n], values[b][layer, :, n]) for n in range(12)])
            for a, b in itertools.combinations(CONCEPTS, 2)
        }
        assert float(row["mean overlap"]) == pytest.approx(np.mean(list(means.values())), abs=0.001)
        assert float(row["least"]) == pytest.approx(min(means.values()), abs=0.001)
        [figure] = [svg for svg in section.all("svg") if svg.attributes["aria-label"].startswith(f"layer {layer}.")]
        written = {text.text for text in figure.all("text")}
        assert {f"{mean:.2f}".removeprefix("0") for mean in means.values()} <= written
        least, most = (set(extreme(means, key=means.__getitem__)) for extreme in (min, max))
        caption = figure.attributes["aria-label"]
        assert least == set(re.findall(r"Least: (\w+) and (\w+)", caption)[0])
        assert most == set(re.findall(r"Most: (\w+) and (\w+)", caption)[0])


def _ovl(x: np.ndarray, y: np.ndarray) -> float:
    p, q = bins_of(x), bins_of(y)
    return sum(min(p.get(b, 0) / len(x), q.get(b, 0) / len(y)) for b in p)


def test_report__shows_the_neurons_that_keep_concepts_apart(page, values):
    titles = [svg.all("text")[-1].text for svg in section_of(page, "neurons").all("svg")]
    texts = [[text.text for text in svg.all("text")] for svg in section_of(page, "neurons").all("svg")]
    means = {
        (layer, n): np.mean(
            [_ovl(values[a][layer, :, n], values[b][layer, :, n]) for a, b in itertools.combinations(CONCEPTS, 2)]
        )
        for layer in range(2)
        for n in range(12)
    }
    best = sorted(means, key=means.__getitem__)[:6]
    for (layer, neuron), written in zip(best, texts, strict=False):
        assert f"layer {layer}, neuron {neuron}" in written
        assert set(CONCEPTS) <= set(written)
    assert len(titles) >= 8


def test_report__draws_what_was_measured_where_it_says(store, tmp_path, monkeypatch):
    drawn, draw = {}, figures.conditions

    def conditions(concepts, measured, *, title, **options):
        drawn[title] = {one.condition: one.value_C.tolist() for one in measured}
        return draw(concepts, measured, title=title, **options)

    monkeypatch.setattr(figures, "conditions", conditions)
    write_report(store, tmp_path / "r.html")
    target, others = (
        {k: [v] * 3 for k, v in zip(("base", "neuron", "range"), values, strict=True)}
        for values in ((0.9, 0.3, 0.35), (0.8, 0.4, 0.7))
    )
    assert drawn["Accuracy on the target"] == drawn["Confidence on the target"] == target
    assert drawn["Accuracy on the others"] == drawn["Confidence on the others"] == others
    assert drawn["Perplexity of the others"] == dict.fromkeys(target, [2.0] * 3)


def test_report__erasure_has_the_means_of_its_rows(page):
    section = section_of(page, "erasure")
    rows = tables_of(section)[0]
    means = {row["intervention"]: row for row in rows[:3]}
    assert {row["concept"] for row in rows[:3]} == {"mean of all"}
    assert (means["no intervention"]["target accuracy"], means["no intervention"]["others' accuracy"]) == (
        "0.900",
        "0.800",
    )
    assert (means["range"]["target accuracy"], means["range"]["others' accuracy"]) == ("0.350", "0.700")
    assert [row["changed"] for row in rows[3:6]] == ["0 %", "40 %", "40 %"]
    tiles = [div.text for div in page.all("div") if div.attributes.get("class") == "tile"]
    assert any(tile.startswith("90 % → 35 %") and "30 %" in tile for tile in tiles)
    assert any(tile.startswith("80 % → 70 %") and "40 %" in tile for tile in tiles)


def test_report__timing_adds_the_receipts_up(page):
    [rows] = tables_of(section_of(page, "timing"))
    said = {row["what"]: row["amount"] for row in rows}
    assert said["collectors"] == "1.5 s"  # three shards of half a second
    assert said["first shard committed (UTC)"] == "2026-03-04 05:06:07"


def test_report__shows_the_texts_of_a_neurons_highest_values(page, values):
    first = section_of(page, "neurons").all("figure")[0]
    layer, neuron = map(int, re.findall(r"layer (\d+), neuron (\d+)", first.text)[0])
    every = np.concatenate([x_LSN[layer, :, neuron] for x_LSN in values.values()])
    place = int(every.argmax())
    shown = first.all("li")[0].text
    assert shown == f"{every.max():.3g} ({list(values)[place // 60]}): text {place}"


# --- stores that lack something ---


def test_report__escapes_what_came_with_the_data(tmp_path):
    store = write_report_store(
        tmp_path / "store",
        arrays(NASTY, n_layers=1, width=5),
        model={"id": "<b>bold</b>", "architecture": "<i>"},
        dataset={"source": "</table><script>", "prompt": "{text}<sep>"},
    )
    put_texts(tmp_path / "store", "<script>alert(1)</script> & $x$ 日本\x01")
    put_evaluation(tmp_path / "store", [evaluation_row(NASTY[0], "base", 0.5, None)])
    put_quarantine(tmp_path / "store", 99, NASTY[0], "<img src=x onerror=alert(1)>")
    page = report_on(store, tmp_path / "report.html")
    assert_loads_nothing(page)
    assert not page.all("b") or all("bold" not in b.text for b in page.all("b"))
    text = page.text
    for said in (
        "<script>alert('x')</script>",
        'it\'s "love"',
        "日本語の概念 と 愛",
        "$x^2$ & $\\frac{1",
        "<img src=x onerror",
    ):
        assert said in text, said
    assert "<script>alert(1)</script> & $x$ 日本·" in section_of(page, "neurons").text


def test_report__of_one_concept_says_that_there_is_no_pair(tmp_path):
    page = report_on(write_report_store(tmp_path / "store", arrays(["joy"], n_layers=1)), tmp_path / "r.html")
    for anchor in ("overlap", "salience", "neurons"):
        section = section_of(page, anchor)
        assert "The store has one concept, joy: there is no pair to compare." in section.text
    assert not section_of(page, "overlap").all("svg")
    assert len(section_of(page, "gaussianity").all("svg")) >= 4


def test_report__without_histograms_says_that_it_draws_gaussians(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1), histograms=False, raw=False)
    page = report_on(store, tmp_path / "r.html")
    assert "The store has no histograms" in page.all("header")[0].text
    assert "Dashed curves are Gaussians" in section_of(page, "neurons").text
    assert section_of(page, "neurons").all("svg")
    assert not section_of(page, "neurons").all("li")
    assert "median KS distance" not in section_of(page, "gaussianity").text


def test_report__without_an_evaluation_says_how_to_get_one(tmp_path):
    page = report_on(write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1)), tmp_path / "r.html")
    assert "Nothing was evaluated" in section_of(page, "erasure").text
    assert not section_of(page, "erasure").all("svg")


def test_report__without_answers_shows_the_perplexity_alone(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    rows = [evaluation_row(c, k, None, None) for c in "ab" for k in ("base", "neuron", "range")]
    put_evaluation(tmp_path / "store", rows, action="dampen", factor=0.5, layers=[0])
    section = section_of(report_on(store, tmp_path / "r.html"), "erasure")
    assert len(section.all("svg")) == 1
    assert "action dampen, factor 0.5, layers 0, 90 test texts" in section.text
    assert set(tables_of(section)[0][0]) == {"concept", "intervention", "perplexity", "changed"}


def test_report__warns_of_what_is_missing(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b", "c"], n_layers=1), n_lost=1)
    put_quarantine(tmp_path / "store", 2, "c", "out of memory")
    page = report_on(store, tmp_path / "r.html")
    [box] = [div for div in page.all("div") if div.attributes.get("class") == "warnings"]
    assert "Partial: 2 of 3 shards" in box.text
    assert "out of memory" in box.text
    rows = tables_of(section_of(page, "run"))[1]
    assert [row["texts collected"] for row in rows] == ["60", "60", "0"]


def test_report__lists_range_tables_with_their_methods(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    split = table_of(pieces("a", 1, [(0.0, 1.0, 0.5), (2.0, 3.0, 0.5)]), method="budget", options={"budget": 0.02})
    for table in (split, table_of([range_row("a", 1, 0.0, 1.0)])):
        table.save(store.root)
    rows = tables_of(section_of(report_on(store, tmp_path / "r.html"), "run"))[-1]
    assert sorted((row["method"], row["rows"]) for row in rows) == [("budget, budget 0.02", "2"), ("paper", "1")]


def test_report__of_many_concepts_draws_those_that_overlap_most(tmp_path):
    names = [f"concept number {i:03d}" for i in range(40)]
    store = write_report_store(tmp_path / "store", arrays(names, n_layers=1, n_samples=30, width=4), keep="all")
    page = report_on(store, tmp_path / "r.html")
    assert "24 of 40 concepts are drawn" in section_of(page, "overlap").text
    _, pairs = section_of(page, "overlap").all("svg")
    labels = {text.text for text in pairs.all("text") if "…" in text.text}
    assert len(labels) == 24
    assert len(tables_of(section_of(page, "run"))[1]) == 40
    assert "8 of 40 concepts" in section_of(page, "neurons").text


def test_report__of_pairs_that_were_not_all_kept_says_so(tmp_path):
    store = write_report_store(tmp_path / "store", arrays([*"abcdef"], n_layers=1, width=3), keep="top")
    page = report_on(store, tmp_path / "r.html")
    assert "the largest of each neuron" in page.all("header")[0].text
    assert not any("mean overlap" in d.text for d in page.all("div") if d.attributes.get("class") == "tile")
    assert "Hatched: the store keeps nothing of the pair" in section_of(page, "overlap").text


def test_report__of_constant_values_shows_what_there_is(tmp_path):
    values = {concept: np.full((1, 40, 4), 2.0, np.float32) for concept in ("a", "b")}
    page = report_on(write_report_store(tmp_path / "store", values), tmp_path / "r.html")
    assert "No neuron's values vary" in section_of(page, "gaussianity").text
    assert "There is no neuron whose values vary" in section_of(page, "neurons").text


def test_report__needs_statistics(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1), with_statistics=False)
    with pytest.raises(UsageError, match="no statistics yet"):
        write_report(store, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_report__of_a_store_of_the_first_format(tmp_path):
    shutil.copytree("tests/stores/version-1", tmp_path / "store")
    page = report_on(Store(str(tmp_path / "store")), tmp_path / "r.html")
    assert len(page.all("svg")) > 20
    assert_loads_nothing(page)


def test_report__of_a_remote_store_is_that_of_a_local_one(tmp_path, monkeypatch):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1, width=4))
    local = write_report(store, tmp_path / "local.html").path
    with S3Server() as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        s3.make_bucket("bucket")
        client = s3.client()
        for path in Path(store.root).rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "bucket", f"run/{path.relative_to(store.root)}")
        remote = write_report(Store("s3://bucket/run"), tmp_path / "remote.html").path
    assert remote.read_bytes() == local.read_bytes()


# --- the command ---


def run(*args: str):
    return CliRunner().invoke(app, ["report", *args])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A store with few figures to draw."""
    return write_report_store(tmp_path_factory.mktemp("small") / "store", arrays(["a", "b"], n_layers=1, width=4))


def test_report_command__prints_the_path(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(small.root)
    assert done.exit_code == 0, done.output
    assert done.stdout == "report.html\n"
    assert "figures" in done.stderr
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_report_command__prints_json_and_opens_the_page(small, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    path = tmp_path / "a b.html"
    answer = json.loads(run(small.root, "-o", str(path), "--json", "--open").stdout)
    assert answer["report"] == str(path)
    assert answer["bytes"] == path.stat().st_size
    assert opened == [path.as_uri()]


def test_report_command__says_warnings_on_stderr(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1), n_lost=1)
    done = run(store.root, "-o", str(tmp_path / "r.html"))
    assert "Partial: 1 of 2 shards" in done.stderr


def test_report_command__names_a_damaged_store(tmp_path):
    write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    [moments] = (tmp_path / "store" / "moments").iterdir()
    moments.write_bytes(moments.read_bytes()[:-400] + b"x" * 400)
    done = run(str(tmp_path / "store"), "-o", str(tmp_path / "r.html"))
    assert isinstance(done.exception, RunFailed)
    assert "neuronlens verify" in str(done.exception)
    assert moments.name in str(done.exception)


def test_report_command__says_why_a_file_cannot_be_written(small, tmp_path, monkeypatch):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    done = run(small.root, "-o", str(tmp_path / "r.html"))
    assert isinstance(done.exception, RunFailed)
    assert "r.html cannot be written (No space left on device)" in str(done.exception)


def test_report_command__refuses_before_any_work(store, tmp_path):
    for args, expected in (
        ((store.root, "-o", str(tmp_path / "no" / "r.html")), "There is no folder"),
        ((store.root, "-o", str(tmp_path)), "is a folder"),
        ((str(tmp_path / "nowhere"),), "There is no store"),
    ):
        done = run(*args)
        assert isinstance(done.exception, UsageError)
        assert expected in str(done.exception)


# --- sweeps and controls ---


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    root = tmp_path_factory.mktemp("swept") / "store"
    store = write_report_store(root, arrays(CONCEPTS, n_layers=1))
    taus = [{"tau": tau, "drops": (tau / 10, tau / 100, tau)} for tau in (1.0, 3.0, 2.0)]
    put_sweep(root, taus, concepts=CONCEPTS, controls={"random": (0.125, 0.25)})
    others = [{"method": "hpd", "tau": None, "mass": 0.5, "action": "others", "drops": (0.6, -0.004, 0.1)}]
    put_sweep(root, others, concepts=CONCEPTS, name="sweep.000000000002")
    put_sweep(root, taus[:1], concepts=CONCEPTS, name="sweep.000000000003", bare=0.5, n_texts=30, texts_hash="b")
    return store


@pytest.fixture(scope="module")
def swept_page(swept, tmp_path_factory):
    return report_on(swept, tmp_path_factory.mktemp("swept-page") / "report.html")


def test_report__has_sweeps_where_there_are_any(swept_page, page):
    assert [section.attributes["id"] for section in swept_page.all("section")] == [
        *SECTIONS[:-1],
        "sweeps",
        "timing",
    ]
    assert "sweeps" not in {section.attributes["id"] for section in page.all("section")}


def test_report__sweeps_are_drawn_for_each_set_of_texts(swept_page):
    section = section_of(swept_page, "sweeps")
    assert [h3.text for h3 in section.all("h3")] == [
        "On 120 test texts (bare confidence 0.900)",
        "On 30 test texts (bare confidence 0.500)",
    ]
    titles = [svg.attributes["aria-label"].partition(".")[0] for svg in section.all("svg")]
    assert titles == [
        *("Erased against spared", "Concept by concept", "A range and its controls", "Sweep of tau"),
        "Concept by concept",
    ]


def test_report__sweeps_stand_in_a_table_the_best_first(swept_page):
    first, second = tables_of(section_of(swept_page, "sweeps"))
    best = dict(first[0])
    keys = [best.pop(key) for key in ("tau", "method", "mass", "action")]
    assert keys == ["–", "hpd", "0.5", "others"]
    assert best == {
        "target drop": "0.600",
        "others' drop": "−0.004",
        "selectivity (95 %)": "0.604 (0.57 to 0.63)",
        "KL on others": "0.1000",
        "changed": "40 %",
        "selectivity, whole neuron": "0.200",
        "selectivity, random neurons": "–",
    }
    assert [row["tau"] for row in first] == ["–", "3", "2", "1"]
    assert [row["selectivity, random neurons"] for row in first[1:]] == ["−0.125"] * 3
    assert [row["target drop"] for row in second] == ["0.100"]
    assert "selectivity, random neurons" not in second[0]


def test_report__the_queries_of_sweeps_run_as_printed(swept_page, swept):
    import shlex

    commands = [pre.text for pre in section_of(swept_page, "sweeps").all("pre") if pre.text.startswith("neuronlens")]
    assert {command.split()[3] for command in commands} == {"report_sweeps", "report_sweep_concepts"}
    for command in commands:
        words = [swept.root if word == "STORE" else word for word in shlex.split(command)[1:]]
        done = CliRunner().invoke(app, [*words, "--format", "csv"])
        assert done.exit_code == 0, (command, done.output)
        assert len(done.stdout.splitlines()) > 1


def test_report__of_many_settings_says_what_it_leaves_out(tmp_path):
    from neuronlens.page.sweeps import MAX_ROWS

    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    n = MAX_ROWS + 5
    put_sweep(tmp_path / "store", [{"tau": 1 + i, "drops": (i / 100, 0, 0.1)} for i in range(n)])
    section = section_of(report_on(store, tmp_path / "r.html"), "sweeps")
    assert f"The table has {MAX_ROWS} of {n} settings" in section.text
    [rows] = tables_of(section)
    assert [rows[0]["tau"], rows[-1]["tau"], len(rows)] == [str(n), "6", MAX_ROWS]
