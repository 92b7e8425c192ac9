"""`neuronlens figures`: which files it writes, what stands on them, and what it says of those that it cannot."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neuronlens import gallery, sweep_pictures
from neuronlens.cli import app
from neuronlens.errors import RunFailed, UsageError
from neuronlens.gallery import write_figures
from neuronlens.query import connect, run_file
from neuronlens.store import Store
from neuronlens.sweep import Setting, parse_grid, settings_of
from neuronlens.sweep_lines import text_sets
from neuronlens.sweep_pictures import MAX_LINES, MAX_ROWS, comparisons, sweeps
from tests.range_tables import row as range_row
from tests.range_tables import table_of
from tests.report_stores import arrays, put_sweep, write_report_store

TAUS = [{"tau": tau, "layers": [1], "drops": (tau / 10, tau / 100, tau)} for tau in (1.0, 2.0, 3.0)]
KINDS = ("tau", "top_fraction", "layers", "penalty", "mass", "budget", "factor", "trade-off", "concepts", "controls")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gallery") / "store"
    write_report_store(root, arrays(["a", "b"], n_layers=1))
    put_sweep(root, TAUS, controls={"random": (0.1, 0.1)})
    return root


def run(*args: object):
    return CliRunner().invoke(app, ["figures", *map(str, args)])


def pictures(root: Path) -> dict[str, sweep_pictures.Picture]:
    store = Store(str(root))
    with connect(store.file_lists()) as con:
        sets = text_sets(run_file(con, "report_sweeps").to_pylist())
        drawn = [one for texts in sets for one in (*comparisons(con, texts, colours={}), *sweeps(texts))]
    return {picture.name: picture for picture in drawn}


def points(axes, label: str) -> list[list[float]]:
    [line] = [one for one in axes.lines if one.get_label() == label]
    return [list(map(float, values)) for values in line.get_data()]


# --- the command ---


def test_figures__writes_one_file_each_and_prints_their_paths(root, tmp_path):
    done = run(root, "-o", tmp_path / "drawn")
    assert done.exit_code == 0, done.output
    printed = [Path(line) for line in done.stdout.splitlines()]
    assert sorted(printed) == sorted((tmp_path / "drawn").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in printed)
    names = [path.stem for path in printed]
    assert [name for name in names if not name.startswith("neuron-")] == [
        *("trade-off", "concepts", "controls", "tau-000000000001")
    ]
    assert len([name for name in names if name.startswith("neuron-mlp_post-")]) >= gallery.N_NEURONS


def test_figures__says_what_lacks_data_and_the_command_that_makes_it(root, tmp_path):
    done = run(root, "-o", tmp_path / "drawn")
    said = dict(line.removeprefix("no data for ").split(": ", 1) for line in done.stderr.splitlines())
    assert set(said) == {"top_fraction", "layers", "penalty", "mass", "budget", "factor"}
    assert said["layers"] == (
        f"neuronlens evaluate {root} --sweep layers=each,all --set test.source=test.jsonl"  # the recipe has no test
    )


def test_figures__prints_json_with_files_and_what_is_missing(root, tmp_path):
    done = run(root, "-o", tmp_path / "drawn", "--format", "both", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    [tau] = [one for one in found["figures"] if one["figure"] == "tau"]
    assert [Path(file).name for file in tau["files"]] == ["tau-000000000001.png", "tau-000000000001.svg"]
    assert all(Path(file).is_absolute() and Path(file).is_file() for file in tau["files"])
    assert "sweep.000000000001" in tau["caption"]
    assert {one["figure"] for one in found["missing"]} | {one["figure"] for one in found["figures"]} == {
        *KINDS,
        "distributions",
    }


def test_figures__of_a_store_without_evaluations_draws_distributions_alone(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    found = write_figures(store, tmp_path / "drawn", forms=["svg"])
    assert {one.kind for one in found.drawn} == {"distributions"}
    assert tuple(found.missing) == KINDS


def swept_by(command: str) -> list[dict]:
    """Rows as the sweep of that command makes them, all with the same drops."""
    words = shlex.split(command)
    table = table_of([range_row(c, n, 0.0, 1.0, layer=layer) for c in "ab" for n in (0, 1) for layer in (0, 1)])
    grid = parse_grid([words[i + 1] for i, word in enumerate(words) if word == "--sweep"])
    settings = settings_of(grid, Setting.of(table), table, layers=(0, 1), hook_points=("mlp_post",))
    return [setting.columns(table) | {"drops": (0.5, 0.1, 0.1)} for setting in settings]


def test_figures__names_commands_whose_rows_are_then_drawn(tmp_path):
    root = tmp_path / "store"
    write_report_store(root, arrays(["a", "b"], n_layers=1), with_statistics=False)
    missing = write_figures(Store(str(root)), tmp_path / "drawn", forms=["png"]).missing
    put_sweep(root, [{"drops": (0.5, 0.1, 0.1)}])
    assert "concepts" in pictures(root)
    for kind, command in missing.items():
        if "--sweep" in command:
            put_sweep(root, swept_by(command))
            assert kind in {picture.kind for picture in pictures(root).values()}, command


def test_figures__of_a_store_without_statistics_says_how_to_make_them(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1), with_statistics=False)
    found = write_figures(store, tmp_path / "drawn", forms=["png"])
    assert not found.drawn
    assert found.missing["distributions"] == f"python -m jobs.statistics {store.root}"


def test_figures__of_texts_without_right_answers_asks_for_them(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["joy", "law"], n_layers=1))
    put_sweep(tmp_path / "store", [{"drops": (0, 0, 0.1)}], bare=None)
    path = tmp_path / "store" / "evaluations" / "sweep.000000000001.json"
    content = json.loads(path.read_text())
    for row in content["rows"]:
        row |= dict.fromkeys(("target_drop", "complement_drop", "selectivity"))
    path.write_text(json.dumps(content))
    found = write_figures(store, tmp_path / "drawn", forms=["png"])
    assert "--set 'data.answers={joy: TOKEN, ...}'" in found.missing["trade-off"]
    assert "data.answers" not in found.missing["tau"]


@pytest.mark.parametrize(
    ("folder", "said"), [("a-file", "is a file"), ("none/there", "There is no folder"), ("ok", "has no table tbl_none")]
)
def test_figures__refuses_what_cannot_be(root, tmp_path, folder, said):
    (tmp_path / "a-file").touch()
    with pytest.raises(UsageError, match=said):
        write_figures(Store(str(root)), tmp_path / folder, forms=["png"], table="tbl_none" if folder == "ok" else None)


def test_figures__that_cannot_be_written_say_where(root, tmp_path):
    (tmp_path / "drawn" / "trade-off.png").mkdir(parents=True)
    done = run(root, "-o", tmp_path / "drawn")
    assert isinstance(done.exception, RunFailed)
    assert f"{tmp_path / 'drawn'} cannot be written" in str(done.exception)


# --- whose ranges ---


def bands(monkeypatch, store: Store, folder: Path, **options) -> tuple[set[str | None], set[tuple[float, float]]]:
    """The tables whose ranges were drawn, and the ranges of neuron 11 under `a`."""
    drawn, tables, ranges = gallery.distributions, set(), set()

    def distributions(card, **more):
        tables.add(card.table)
        if card.neuron == 11:
            ranges.update(card.bumps[0].intervals)
        return drawn(card, **more)

    monkeypatch.setattr(gallery, "distributions", distributions)
    write_figures(store, folder, forms=["png"], **options)
    return tables, ranges


def test_figures__draw_the_ranges_of_the_best_table_that_was_evaluated(tmp_path, monkeypatch):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    tables = [table_of([range_row("a", 11, 0.0, std)], widths={"mlp_post": 12}) for std in (0.4, 0.8)]
    for table in tables:
        table.save(store.root)
    assert bands(monkeypatch, store, tmp_path / "drawn")[0] == {None}  # two tables, none of them evaluated
    settings = [
        {"tau": float(i + 1), "table_id": table.id, "drops": (target, 0.1, 0.1)}
        for i, (table, target) in enumerate(zip(tables, (0.3, 0.6), strict=True))
    ]
    put_sweep(tmp_path / "store", settings)
    put_sweep(tmp_path / "store", [settings[0] | {"drops": (0.4, 0.1, 0.1)}], name="sweep.2", texts_hash="b")
    assert bands(monkeypatch, store, tmp_path / "drawn")[0] == {tables[1].id}
    asked, ranges = bands(monkeypatch, store, tmp_path / "drawn", table=tables[0].id)
    assert asked == {tables[0].id}
    assert ranges == {(-1.0, 1.0)}


# --- what stands on them ---


def test_sweeps__draw_the_numbers_of_their_rows(root):
    above, below = pictures(root)["tau-000000000001"].figure.axes
    assert points(above, "ranges: target") == [[1, 2, 3], pytest.approx([0.1, 0.2, 0.3])]
    assert points(above, "ranges: others") == [[1, 2, 3], pytest.approx([0.01, 0.02, 0.03])]
    assert points(above, "ranges: whole neurons: target") == [[1, 2, 3], pytest.approx([0.7] * 3)]
    assert points(below, "ranges: others") == [[1, 2, 3], [1, 2, 3]]


def test_comparisons__draw_the_best_setting_concept_by_concept_and_with_its_controls(root):
    found = pictures(root)
    [concepts], [controls] = found["concepts"].figure.axes, found["controls"].figure.axes
    for name, target in (("a", 0.4), ("b", 0.2), ("mean of all", 0.3)):
        assert points(concepts, f"{name}: target")[0] == pytest.approx([target])
        assert points(concepts, f"{name}: others")[0] == pytest.approx([0.03])
    assert points(controls, "range: target")[0] == pytest.approx([0.3])
    assert points(controls, "whole neuron: others")[0] == pytest.approx([0.5])
    assert points(controls, "random neurons: target")[0] == pytest.approx([0.1])
    texts = [text.get_text() for text in found["concepts"].figure.texts]
    assert "tau 3" in " ".join(texts)


def test_comparisons__hold_evaluations_of_the_same_texts_together(tmp_path):
    root = tmp_path / "store"
    write_report_store(root, arrays(["a", "b"], n_layers=1), with_statistics=False)
    put_sweep(root, TAUS)
    budgets = [{"method": "budget", "tau": None, "budget": b, "drops": (b, b / 10, b)} for b in (0.1, 0.3)]
    put_sweep(root, budgets, name="sweep.000000000002")
    put_sweep(root, budgets, name="sweep.000000000003", texts_hash="b")
    store = Store(str(root))
    with connect(store.file_lists()) as con:
        sets = text_sets(run_file(con, "report_sweeps").to_pylist())
        drawn = [comparisons(con, texts, colours={})[0].figure.axes[0] for texts in sets]
    assert [sorted(texts.evaluations) for texts in sets] == [
        ["sweep.000000000001", "sweep.000000000002"],
        ["sweep.000000000003"],
    ]
    assert points(drawn[0], "paper, action zero") == [pytest.approx([0.1, 0.2, 0.3]), pytest.approx([1, 2, 3])]
    assert points(drawn[0], "budget, action zero") == [[0.1, 0.3], [0.1, 0.3]]
    assert points(drawn[1], "budget, action zero") == [[0.1, 0.3], [0.1, 0.3]]
    assert "paper, action zero" not in {line.get_label() for line in drawn[1].lines}


def test_figures__of_several_sets_of_texts_have_names_of_their_own(tmp_path):
    store = write_report_store(tmp_path / "store", arrays(["a", "b"], n_layers=1))
    for i, texts_hash in enumerate("ab"):
        put_sweep(tmp_path / "store", TAUS, name=f"sweep.{i}", texts_hash=texts_hash)
    found = write_figures(store, tmp_path / "drawn", forms=["png"])
    files = [file.name for one in found.drawn for file in one.files]
    assert len(set(files)) == len(files)
    assert {"trade-off-0.png", "trade-off-1.png"} <= set(files)


def test_sweeps__of_many_lines_draw_the_best_and_say_so(tmp_path):
    root = tmp_path / "store"
    write_report_store(root, arrays(["a", "b"], n_layers=1), with_statistics=False)
    n = MAX_LINES + 3
    grid = [(tau, top) for tau in (1.0, 2.0) for top in range(1, n + 1)]
    put_sweep(root, [{"tau": tau, "top_fraction": top / 20, "drops": (tau * top / 40, 0, 0.1)} for tau, top in grid])
    picture = pictures(root)["tau-000000000001"]
    drawn = {line.get_label() for line in picture.figure.axes[1].lines if "top_fraction" in line.get_label()}
    assert drawn == {f"top_fraction {top / 20:g}: others" for top in range(4, n + 1)}
    assert f"{MAX_LINES} of {n} lines" in picture.caption


def test_comparisons__of_many_concepts_draw_the_extremes_and_say_so(tmp_path):
    root = tmp_path / "store"
    concepts = [f"concept {i:02d}" for i in range(MAX_ROWS + 6)]
    write_report_store(root, arrays(concepts, n_layers=1, n_samples=20, width=3), with_statistics=False)
    put_sweep(root, TAUS, concepts=concepts)
    picture = pictures(root)["concepts"]
    [axes] = picture.figure.axes
    assert axes.get_ylim() == (MAX_ROWS + 1, 0)  # and the mean
    assert f"{MAX_ROWS} of {len(concepts)} concepts" in picture.caption
