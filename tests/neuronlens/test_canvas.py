"""Pictures as files and as parts of a page."""

import warnings
from html.parser import HTMLParser

import numpy as np
import pytest

from neuronlens import canvas, figures
from tests.cards_by_hand import bump_of, card_of, joy_and_law
from tests.report_stores import NASTY

RED, BLUE = "#ff0000", "#0000ff"


@pytest.fixture
def two_bumps():
    return joy_and_law()


@pytest.mark.parametrize("form", ["png", "svg"])
def test_save__draws_any_name_without_a_warning(form, tmp_path, recwarn, capfd):
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    card = card_of(*(bump_of(x, name, nearest=name, nearest_ovl=1) for name in NASTY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.distributions(card, colours=figures.concept_colours(NASTY), title="$a_ \\frac{ 日本")
        canvas.save(figure, str(tmp_path / "x"), form)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")
    content = (tmp_path / "x").read_bytes()
    assert content.startswith(b"\x89PNG" if form == "png" else b"<?xml")
    if form == "svg":
        assert b"alert('x')" not in content or b"<script>" not in content
        assert "日本" in content.decode()
        assert "$x^2$" in content.decode()


def test_save__takes_no_name_for_mathematics(tmp_path):
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    names = ("$a_b$", "$\\sum$")
    card = card_of(*(bump_of(x, name) for name in names))
    figure = figures.distributions(card, colours=figures.concept_colours(names), title="$x$")
    canvas.save(figure, str(tmp_path / "x.svg"), "svg")
    svg = (tmp_path / "x.svg").read_text()
    for name in (*names, "$x$"):
        assert f">{name}</text>" in svg


def test_save__gives_the_same_bytes_again(tmp_path, two_bumps):
    colours = {"joy": RED, "law": BLUE}
    for name in ("a.svg", "b.svg"):
        canvas.save(figures.distributions(two_bumps, colours=colours), str(tmp_path / name), "svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_inline_svg__stands_in_a_page(two_bumps):
    figure = figures.distributions(two_bumps, colours={"joy": RED, "law": BLUE}, title="<i>&amp;</i>")
    svg = canvas.inline_svg(figure, name="one", description='a "b" <c>')
    parsed = _Tags()
    parsed.feed(svg)
    assert parsed.tags[0] == "svg"
    assert not {"i", "style", "script", "metadata", "?xml"} & set(parsed.tags)
    attributes = dict(parsed.attributes)
    assert attributes["aria-label"] == 'a "b" <c>'
    assert {"<i>&amp;</i>", "joy", "activation"} <= set(parsed.texts)
    assert "http" not in svg
    assert "font-family" not in svg
    width, height = map(float, attributes["viewbox"].split()[2:])
    assert width * 96 / 72 == pytest.approx(canvas.WIDTH)
    assert height > 0


def test_inline_svg__refers_to_its_own_parts_only(two_bumps):
    drawn = []
    for name in ("one", "two"):
        figure = figures.distributions(two_bumps, colours={"joy": RED, "law": BLUE})
        parsed = _Tags()
        parsed.feed(canvas.inline_svg(figure, name=name, description=""))
        ids = {value for key, value in parsed.attributes if key == "id"}
        used = {value.removeprefix("#") for key, value in parsed.attributes if key == "xlink:href"}
        used |= {value[5:-1] for key, value in parsed.attributes if key == "clip-path"}
        assert used
        assert used <= ids
        drawn.append(ids)
    assert not drawn[0] & drawn[1]
