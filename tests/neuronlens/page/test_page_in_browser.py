"""The report in headless Chromium, as wide as a desk and as a phone: nothing sticks out, nothing is cut off."""

import html
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from neuronlens.page import write_report
from tests.report_stores import (
    NASTY,
    arrays,
    evaluation_row,
    generation_rows,
    put_evaluation,
    put_generation,
    put_quarantine,
    put_sweep,
    write_report_store,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
)
MEASURE = """
addEventListener('load', () => setTimeout(() => {
  const page = document.querySelector('iframe').contentDocument, root = page.documentElement;
  const own = e => !e.closest('.scroll, pre');
  const box = e => e.getBoundingClientRect();
  const wide = [...page.body.querySelectorAll('*')].filter(
    e => own(e) && !e.closest('svg') && box(e).right > root.clientWidth + 1);
  const cut = [...page.querySelectorAll('svg text')].filter(t => {
    const inner = box(t), outer = box(t.closest('svg'));
    return inner.left < outer.left - 2 || inner.right > outer.right + 2 || inner.top < outer.top - 2
      || inner.bottom > outer.bottom + 2;
  });
  const scale = svg => box(svg).width / svg.viewBox.baseVal.width;
  const sizes = [...page.querySelectorAll('svg text')].map(
    t => parseFloat(getComputedStyle(t).fontSize) * scale(t.closest('svg')));
  const columns = new Set([...page.querySelectorAll('#neurons figure')].map(f => Math.round(box(f).left)));
  document.title = JSON.stringify({
    width: root.clientWidth, scrollWidth: root.scrollWidth, scripts: page.scripts.length,
    wide: wide.map(e => e.tagName + '.' + e.className + ': ' + e.textContent.slice(0, 40)),
    cut: cut.map(t => t.textContent), smallest: Math.min(...sizes), figures: page.querySelectorAll('figure').length,
    columns: columns.size,
  });
}, 300));
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


def measured(report: Path, width: int, folder: Path) -> dict:
    """The page's measures at a width in CSS pixels, in a frame, since windows of less than 500 cannot be had."""
    frame = (
        f'<iframe width="{width}" height="2000" style="border:0" srcdoc="{html.escape(report.read_text())}"></iframe>'
    )
    wrapper = folder / f"{width}.html"
    wrapper.write_text(f"<!DOCTYPE html><meta charset=utf-8><script>{MEASURE}</script><body style='margin:0'>{frame}")
    dumped = _chromium(folder, "--dump-dom", "--virtual-time-budget=5000", wrapper.as_uri())
    title = dumped.partition("<title>")[2].partition("</title>")[0]
    return json.loads(html.unescape(title))


def _chromium(folder: Path, *args: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1300,1000", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def _whole(root: Path):
    concepts = ("cooking", "law", "weather")
    store = write_report_store(root, arrays(concepts, n_layers=4), answered=True)
    rows = [
        evaluation_row(c, k, a, b)
        for c in concepts
        for k, a, b in (("base", 0.9, 0.9), ("neuron", 0.3, 0.4), ("range", 0.4, 0.8))
    ]
    put_evaluation(root, rows)
    put_sweep(
        root,
        [
            {"tau": tau, "top_fraction": top, "layers": layers, "action": action, "drops": (tau * top, top / 10, tau)}
            for tau in (0.5, 1.0, 2.0)
            for top in (0.1, 0.2, 0.4)
            for layers in (None, [0], [1], [0, 1, 2, 3])
            for action in ("zero", "others")
        ],
        concepts=concepts,
        controls=dict.fromkeys(("random", "wrong_concept", "shuffled", "length_matched"), (0.1, 0.2)),
    )
    put_generation(root, generation_rows(concepts))
    return store


def _nasty(root: Path):
    long = "a very long concept's name that goes on and on without an end in sight"
    names = [*NASTY, long, "x" * 120]
    store = write_report_store(
        root,
        arrays(names),
        hook_points=("mlp_post", "resid_post"),
        n_lost=1,
        model={"id": "/a/" + "long/" * 60, "dtype": "f"},
    )
    put_quarantine(root, len(names) - 1, names[-1], "y" * 300)
    put_evaluation(
        root, [evaluation_row(c, k, 0.5, 0.5, perplexity=p) for c in names for k, p in (("base", 2), ("range", 900))]
    )
    put_sweep(root, [{"tau": tau, "drops": (tau / 10, -2 * tau, tau / 1e5)} for tau in (1e-5, 3.0)], concepts=names)
    example = {"prompt": "long " * 99, "continuation": "z" * 999, "probability": 0.5}
    rows = [{**row, "examples": [example], "perplexity": 1e9} for row in generation_rows(names)]
    put_generation(root, rows, classifier="/a/" + "long/" * 60 + "w" * 200)
    return store


def _many(root: Path):
    return write_report_store(
        root, arrays([f"concept number {i:03d}" for i in range(30)], n_layers=14, n_samples=30, width=4), raw=False
    )


@pytest.mark.parametrize("make", [_whole, _nasty, _many])
def test_report__fits_a_desk_and_a_phone(make, tmp_path):
    report = write_report(make(tmp_path / "store"), tmp_path / "report.html")
    for width, n_columns in ((1280, 3), (390, 1), (360, 1)):
        page = measured(report.path, width, tmp_path)
        assert page["width"] == width
        assert page["scrollWidth"] <= width, page["wide"]
        assert page["wide"] == []
        assert page["cut"] == []
        assert page["figures"] == report.n_figures
        assert page["columns"] == n_columns
        assert page["smallest"] >= 8, width
        assert page["scripts"] == 0


def test_report__is_drawn_to_its_end(tmp_path):
    report = write_report(_whole(tmp_path / "store"), tmp_path / "report.html")
    picture = tmp_path / "page.png"
    _chromium(tmp_path, f"--screenshot={picture}", report.path.as_uri())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
