"""`neuronlens show`: what is refused before any work, and what stands in the terminal."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from neuronlens.cli import app
from neuronlens.errors import UsageError
from neuronlens.show import check_picture, check_site, print_card
from tests.cards_by_hand import NOTHING, bump_of, card_of
from tests.range_tables import pieces, table_of
from tests.range_tables import row as row_of
from tests.report_stores import NASTY, arrays, write_report_store

DESCRIPTION = {"hook_points": ["mlp_post", "resid_post"], "layers": [0, 2], "widths": {"mlp_post": 8, "resid_post": 4}}


def run(*args: str):
    return CliRunner().invoke(app, ["show", *args])


def drawn(card, *, width: int = 80, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding) as file:
        print_card(Console(file=file, width=width), card)
        file.flush()
        return raw.getvalue().decode(encoding).splitlines()


@pytest.fixture(scope="module")
def values():
    return arrays(["joy", "law", *NASTY[:3]])


@pytest.fixture(scope="module")
def store(values, tmp_path_factory):
    return write_report_store(tmp_path_factory.mktemp("show") / "store", values)


# --- what is refused ---


@pytest.mark.parametrize(
    ("layer", "neuron", "hook_point", "expected"),
    [
        (0, 0, None, "--hook-point mlp_post or resid_post"),
        (0, 0, "attn_out", "Hook points: mlp_post, resid_post"),
        (0, 0, "nonsense", "Hook points: mlp_post, resid_post"),
        (0, 0, "blocks.2.mlp.hook_post", "is in layer 2, and layer 0 was asked for"),
        (1, 0, "mlp_post", "Layers: 0, 2"),
        (0, 8, "mlp_post", "Neurons: 0 to 7"),
        (0, -1, "mlp_post", "Neurons: 0 to 7"),
        (0, 4, "resid_post", "Neurons: 0 to 3"),
    ],
)
def test_check_site__names_what_there_is(layer, neuron, hook_point, expected):
    with pytest.raises(UsageError, match=expected):
        check_site(DESCRIPTION, layer, neuron, hook_point)


def test_check_site__finds_the_hook_point_that_is_meant():
    assert check_site(DESCRIPTION, 2, 7, "mlp_post") == "mlp_post"
    assert check_site(DESCRIPTION, 2, 3, "blocks.2.hook_resid_post") == "resid_post"
    assert check_site(DESCRIPTION | {"hook_points": ["resid_post"]}, 0, 3, None) == "resid_post"


def test_check_picture__knows_forms_by_their_ending(tmp_path):
    assert check_picture(tmp_path / "a.PNG") == "png"
    assert check_picture(tmp_path / "a.svg") == "svg"
    (tmp_path / "b.png").mkdir()
    for name, expected in (
        ("a.pdf", r"\.png or \.svg"),
        ("none/a.svg", "There is no folder"),
        ("b.png", "is a folder"),
    ):
        with pytest.raises(UsageError, match=expected):
            check_picture(tmp_path / name)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("1", "99"), "Neurons: 0 to 11"),
        (("7", "0"), "Layers: 0, 1"),
        (("1", "0", "--hook-point", "attn_out"), "Hook points: mlp_post"),
        (("1", "0", "--concept", "hate"), "There is no concept 'hate'"),
        (("1", "0", "--tau", "0"), "--tau is 0"),
        (("1", "0", "--tau", "nan"), "--tau is nan"),
        (("1", "0", "--table", "tbl_0"), "has no table tbl_0. Its tables: none"),
        (("1", "0", "--table", "tbl_0", "--tau", "2"), "Give one of them"),
        (("1", "0", "-o", "x.pdf"), "does not end in .png or .svg"),
    ],
)
def test_show__refuses_what_is_not_there(store, args, expected):
    done = run(store.root, *args)
    assert isinstance(done.exception, UsageError)
    assert expected in str(done.exception)
    assert done.stdout == ""


def test_show__refuses_a_picture_before_it_looks_for_the_store(tmp_path):
    done = run(str(tmp_path / "nowhere"), "1", "0", "-o", "x.pdf")
    assert "does not end in .png" in str(done.exception)


# --- what is drawn ---


def test_print_card__draws_the_blocks_as_high_as_the_shares():
    rng = np.random.default_rng(5)
    low, high = rng.normal(-3, 0.5, 800).astype(np.float32), rng.normal(3, 0.5, 800).astype(np.float32)
    card = card_of(
        bump_of(low, "low", nearest="high", nearest_ovl=0.0), bump_of(high, "high", nearest="low", nearest_ovl=0)
    )
    _, low_bars, low_range, high_bars, high_range, axis, _ = drawn(card)
    assert low_bars.startswith("low")
    assert high_bars.startswith("high")
    edges = np.linspace(*card.limits(), _width(low_bars) + 1)
    for bars, bump in ((low_bars, card.bumps[0]), (high_bars, card.bumps[1])):
        levels = np.array([" ▁▂▃▄▅▆▇█".index(c) for c in _drawing(bars)])
        shares = bump.shares(edges)
        np.testing.assert_allclose(levels / 8, np.ceil(8 * shares / shares.max()) / 8, atol=1e-9)
    for marks, bump in ((low_range, card.bumps[0]), (high_range, card.bumps[1])):
        row = _drawing(marks.ljust(80))
        for mark, value in (("├", bump.lower), ("┼", bump.mean), ("┤", bump.upper)):
            place = row.index(mark)
            assert edges[place] <= value <= edges[place + 1]
        assert set(row.strip()) == set("├─┼┤")
    assert f"{card.limits()[0]:.3g}" in axis
    assert low_bars.rstrip().endswith("n 800, 0.00 high")


_START = len("high") + 2
"""Where the drawing begins: after the longest name and two blanks."""


def _width(line: str) -> int:
    return line.index("n 800") - 2 - _START


def _drawing(line: str) -> str:
    width = 80 - _START - 2 - len("n 800, 0.00 high")
    return line[_START : _START + width]


def test_print_card__stays_within_the_terminal_and_cuts_long_names():
    x = np.random.default_rng(0).normal(size=300).astype(np.float32)
    card = card_of(*(bump_of(x, name, nearest="a" * 99, nearest_ovl=1.0) for name in (*NASTY, "b" * 99)))
    lines = drawn(card, width=80)
    from rich.cells import cell_len

    assert max(map(cell_len, lines)) <= 80
    assert "<script>" in " ".join(lines)


def test_print_card__draws_in_ascii_where_the_terminal_knows_no_more():
    x = np.random.default_rng(0).normal(size=300).astype(np.float32)
    lines = drawn(card_of(bump_of(x)), encoding="ascii")
    assert "@" in lines[1]
    assert "|" in lines[2]
    assert "+-" in lines[0]


def test_print_card__says_what_is_missing():
    x = np.random.default_rng(0).normal(size=300).astype(np.float32)
    empty = dict.fromkeys(("mean", "std", "lower", "upper", "min", "max"), math.nan)
    bumps = [bump_of(x, str(i), histogram=False, rank=i + 1) for i in range(9)]
    none = type(bumps[0])(concept="none", n=0, histogram=None, **empty, **NOTHING)
    text = " ".join(" ".join(drawn(card_of(none, *bumps).of_most_salient(8))).split())
    assert "8 of 10 concepts" in text
    assert "no histograms" in text
    assert "no values" in " ".join(drawn(card_of(none, bumps[0])))


def test_print_card__draws_a_line_for_each_piece_of_a_range():
    x = np.random.default_rng(0).normal(size=300).astype(np.float32)
    split = bump_of(x, pieces=((-1.0, -0.5), (1.0, 1.5)))
    _, _, marks, _, none, *_ = drawn(card_of(split, bump_of(x, "law", pieces=())))
    assert marks.split("%")[0].count("├") == marks.count("┤") == 2
    share = ((x >= -1) & (x <= -0.5)).mean() + ((x >= 1) & (x <= 1.5)).mean()
    assert float(marks.split()[-4]) / 100 == pytest.approx(share, abs=0.02)
    assert "├" not in none
    assert none.endswith("not salient")


def test_show__draws_the_ranges_of_a_table(values, tmp_path):
    store = write_report_store(tmp_path / "store", values)
    bounds = [(-math.inf, -1.0, 0.75), (0.5, 1.0, 0.5)]
    rows = [*pieces("joy", 4, bounds, layer=1), *pieces("joy", 3, bounds[:1], layer=1, rank=2)]
    split = table_of(rows, widths={"mlp_post": 12}, method="hpd")
    whole = table_of([row_of("joy", 4, 1.0, 0.5, layer=1)], widths={"mlp_post": 12})
    for table in (split, whole):
        table.save(store.root)
    done = run(store.root, "1", "4", "--table", split.id, "--json", "-o", str(tmp_path / "n.svg"))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    joy, law = (next(row for row in found["rows"] if row["concept"] == name) for name in ("joy", "law"))
    expected = [{"lower": None, "upper": -1.0, "posterior": 0.75}, {"lower": 0.5, "upper": 1.0, "posterior": 0.5}]
    assert (joy["lower"], joy["upper"], joy["pieces"]) == (None, 1.0, expected)
    assert (law["lower"], law["pieces"]) == (None, [])
    assert (found["table"], "tau" in found) == (split.id, False)
    picture = (tmp_path / "n.svg").read_text()
    assert picture.count('id="range') == 2
    assert f"range of {split.id}" in picture
    done = run(store.root, "1", "4", "--table", whole.id, "--json")
    joy = next(row for row in json.loads(done.stdout.splitlines()[-1])["rows"] if row["concept"] == "joy")
    assert joy["pieces"] == [{"lower": -0.25, "upper": 2.25, "posterior": None}]


def test_show__draws_every_concept_and_writes_the_picture(store, tmp_path):
    done = run(store.root, "1", "4", "-o", str(tmp_path / "n.svg"))
    assert done.exit_code == 0, done.output
    for name in ("joy", "law", "it's", "日本語"):
        assert name in done.stdout
    assert "mlp_post, layer 1, neuron 4" in done.stdout
    assert f"written to {tmp_path / 'n.svg'}" in done.stderr
    svg = (tmp_path / "n.svg").read_text()
    assert "<script>" not in svg
    for name in ("joy", "law"):
        assert f">{name}</text>" in svg


def test_show__prints_the_cards_rows_as_json(store, values, tmp_path):
    done = run(store.root, "1", "4", "--tau", "1", "--json", "-o", str(tmp_path / "n.png"))
    answer = json.loads(done.stdout)
    assert {key: answer[key] for key in ("hook_point", "layer", "neuron", "tau")} == {
        "hook_point": "mlp_post",
        "layer": 1,
        "neuron": 4,
        "tau": 1.0,
    }
    assert answer["picture"] == str(tmp_path / "n.png")
    assert [row["concept"] for row in answer["rows"]] == sorted(values)
    for row in answer["rows"]:
        x = values[row["concept"]][1, :, 4].astype(float)
        assert row["n"] == 60
        assert [row["mean"], row["lower"], row["max"]] == pytest.approx(
            [x.mean(), x.mean() - x.std(), x.max()], rel=1e-6
        )
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")


def test_show__json_holds_no_infinity(store):
    done = run(store.root, "1", "4", "--tau", "inf", "--json", "--concept", "joy")
    answer = json.loads(done.stdout, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    [row] = answer["rows"]
    assert (row["concept"], row["lower"], row["upper"], answer["tau"]) == ("joy", None, None, None)


def test_show__keeps_a_concepts_colour_whatever_else_is_drawn(store, tmp_path):
    colours = []
    for i, concepts in enumerate((["joy"], ["law", "joy"])):
        path = tmp_path / f"{i}.svg"
        run(store.root, "0", "1", "-o", str(path), *(part for c in concepts for part in ("--concept", c)))
        colours.append(path.read_text().count("#117733") > 0)
    assert colours[0] == colours[1]
